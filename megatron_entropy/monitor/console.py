"""What a run tells while it runs: console log, `metrics.jsonl`, TensorBoard, W&B, rollout dumps, a step's clock.

Modules log through `logging.getLogger(__name__)`; `setup_logging` decides once per rank where that goes. Only rank 0
holds a `MetricsWriter`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping

from rich.console import Console
from rich.logging import RichHandler

from megatron_entropy.monitor.metrics import _finite
from megatron_entropy.records import Metric

ROOT_LOGGER = "megatron_entropy"

_CHATTY = ("megatron", "torch", "vllm", "ray")
"""Libraries whose Python warnings (fused parts that are missing, calls they deprecate) a user cannot act upon here;
`megatron-entropy doctor` says what is missing."""


def setup_logging(rank: int, *, level: int = logging.INFO) -> logging.Logger:
    """Send the package's log to this rank's console; safe to call twice.

    Rank 0 prints `level` and above through rich on standard output. Other ranks print warnings and above on standard
    error, one line each with the rank in front, and keep quiet about Python warnings, which rank 0 shows already.

    Returns:
        The package's logger, parent of every module's.
    """
    if rank == 0:
        handler: logging.Handler = RichHandler(
            console=Console(soft_wrap=True), show_path=False, log_time_format="%H:%M:%S", rich_tracebacks=False
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(message)s"))
        warnings.simplefilter("ignore")
    for package in _CHATTY:
        warnings.filterwarnings("ignore", module=rf"{package}\.")
    logger = logging.getLogger(ROOT_LOGGER)
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    return logger


def summary_line(step: int, steps: int, metrics: Mapping[str, float | Metric], seconds: Mapping[str, float]) -> str:
    """One line for the console: the metrics a reader follows, where present, and the seconds of the step."""
    parts = [f"step {step}/{steps}"]
    for name, label in _SHOWN.items():
        value = _finite(metrics[name]) if name in metrics else None
        if value is not None:
            parts.append(f"{label} {value:.4g}")
    split = " ".join(f"{part} {value:.1f}" for part, value in seconds.items() if part != "step" and value >= 0.05)
    return "  ".join([*parts, f"{seconds.get('step', 0.0):.1f} s ({split})"])


_SHOWN = {
    "eval/accuracy": "held-out accuracy",
    "train/loss": "loss",
    "reward/mean": "reward",
    "reward/accuracy": "accuracy",
    "policy/entropy": "entropy",
    "rollout/length": "length",
    "policy/rollout_kl": "rollout KL",
    "train/grad_norm": "gradient norm",
}
