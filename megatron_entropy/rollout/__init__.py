"""Rollout engines: vLLM under Ray, seen through a small protocol."""
