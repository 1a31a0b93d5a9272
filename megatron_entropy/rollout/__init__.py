"""Rollout engines: vLLM in Ray actors, behind a small protocol."""
