"""Checkpoints: what a stage resumes from, written in the background, readable under any layout."""
