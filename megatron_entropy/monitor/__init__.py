"""What a run records: console log, metrics, rollout dumps, step times, summary, plots, report."""
