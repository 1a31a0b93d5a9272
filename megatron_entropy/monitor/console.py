"""Console log of a rank, and the line that rank 0 prints after a step.

Modules log through `logging.getLogger(__name__)`; `setup_logging` decides once per rank where that goes.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping

from rich.console import Console
from rich.logging import RichHandler

from megatron_entropy.monitor.metrics import finite_or_none
from megatron_entropy.records import Metric

ROOT_LOGGER = "megatron_entropy"

_NOISY_PACKAGES = ("megatron", "torch", "vllm", "ray")
"""Their Python warnings (missing fused kernels, deprecated calls) are hidden: a user cannot act on them here, and
`megatron-entropy doctor` reports what is missing."""

_SHOWN = {
    "eval/accuracy": "eval accuracy",
    "train/loss": "loss",
    "reward/mean": "reward",
    "reward/accuracy": "accuracy",
    "policy/entropy": "entropy",
    "rollout/length": "length",
    "policy/rollout_kl": "rollout KL",
    "train/grad_norm": "gradient norm",
}
"""Metrics of a step's line, with their labels."""


def setup_logging(rank: int, *, level: int = logging.INFO) -> logging.Logger:
    """Send the package's log to this rank's console; safe to call twice.

    Rank 0 prints `level` and above on standard output: through rich on a terminal, else one line a record, which can be
    searched. Other ranks print warnings and above on standard error, one line each with the rank in front, and hide
    Python warnings, which rank 0 shows already.

    Returns:
        The package's logger, parent of every module's.
    """
    if rank == 0 and sys.stdout.isatty():
        handler: logging.Handler = RichHandler(
            console=Console(soft_wrap=True), show_path=False, log_time_format="%H:%M:%S", rich_tracebacks=False
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    elif rank == 0:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(message)s"))
        warnings.simplefilter("ignore")
    hide_library_warnings()
    logger = logging.getLogger(ROOT_LOGGER)
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    return logger


def hide_library_warnings() -> None:
    """Hide the Python warnings of Megatron, torch, vLLM and Ray in this process."""
    for package in _NOISY_PACKAGES:
        warnings.filterwarnings("ignore", module=rf"{package}\.")


def summary_line(
    step: int,
    steps: int,
    metrics: Mapping[str, float | Metric],
    seconds: Mapping[str, float],
    *,
    remaining: float = 0.0,
) -> str:
    """Format one step for the console: its main metrics, where present, and the seconds of its phases.

    Args:
        remaining: estimated seconds until the last step; not shown when 0.
    """
    fields = [f"step {step}/{steps}"]
    for name, label in _SHOWN.items():
        value = finite_or_none(metrics[name]) if name in metrics else None
        if value is not None:
            fields.append(f"{label} {value:.4g}")
    phases = " ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if phase != "step" and value >= 0.05)
    fields.append(f"{seconds.get('step', 0.0):.1f} s ({phases})")
    return "  ".join([*fields, f"ETA {duration(remaining)}"] if remaining else fields)


def duration(seconds: float) -> str:
    """Format a duration: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
