"""What a run tells while it runs: console log, `metrics.jsonl`, TensorBoard, W&B, rollout dumps, a step's clock.

Modules log through `logging.getLogger(__name__)`; `setup_logging` decides once per rank where that goes. Only rank 0
holds a `MetricsWriter`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.logging import RichHandler

from megatron_entropy.config import LogConfig
from megatron_entropy.errors import DataError, MissingPackageError
from megatron_entropy.records import Group, Metric, Sample
from megatron_entropy.run_folder import RunFolder

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


class StepClock:
    """Splits the wall-clock time of a step into named parts that add up to the whole.

    `with clock("generate"): ...` counts towards that part; a part opened inside another is taken out of the outer
    one, so no second counts twice. What no part covers is `other`.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._open = ["other"]
        self._seconds: dict[str, float] = {}
        self._mark = now()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the seconds of the `with` block towards `part`."""
        self._turn()
        self._open.append(part)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def split(self) -> dict[str, float]:
        """Seconds of each part since the last call, then `other`, then `step`, their sum; starts the next step."""
        self._turn()
        seconds, self._seconds = self._seconds, {}
        other = seconds.pop("other", 0.0)
        return {**seconds, "other": other, "step": sum(seconds.values()) + other}

    def _turn(self) -> None:
        now = self._now()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now


class MetricsWriter:
    """Appends a stage's rows to `metrics.jsonl` and mirrors them to TensorBoard and W&B.

    A row is `{"stage", "step", "area/name": value, ..., "seconds/part": value}`: wall-clock values only under
    `seconds/`, so that two runs of one seed differ nowhere else. Floats keep full precision; NaN and infinity, which
    JSON lacks, and the mean of nothing become null. Row 0 is the evaluation before training.

    On construction the file is cut back to what a resume builds upon: rows of this stage after `start_step` and rows
    of later stages go, as does a torn last line. Write a step's row before saving its checkpoint, so that a kill
    between the two loses no row.

    Args:
        folder: the run's paths.
        stage: name of the stage.
        log: which mirrors to keep.
        start_step: steps of this stage that the restored checkpoint holds; 0: it begins anew, and all its rows go.

    Raises:
        MissingPackageError: `log.wandb_project` is set and wandb is not installed, or TensorBoard is not.
    """

    def __init__(self, folder: RunFolder, stage: str, log: LogConfig, start_step: int = 0) -> None:
        folder.root.mkdir(parents=True, exist_ok=True)
        self._stage = stage
        self._tensorboard = _open_tensorboard(folder.tensorboard(stage), start_step) if log.tensorboard else None
        self._wandb = _open_wandb(folder, stage, log.wandb_project) if log.wandb_project else None
        truncate_metrics(folder.metrics, stage, start_step)
        self._file = folder.metrics.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float | Metric], seconds: Mapping[str, float]) -> None:
        """Append the row of `step`; it is on its way to the disk when this returns.

        Args:
            step: optimizer-visible steps done, 0 before training.
            metrics: by `area/name`; a `Metric` is logged as its mean.
            seconds: by part, as `StepClock.split` returns them.
        """
        row: dict[str, float | None] = {name: _finite(value) for name, value in metrics.items()}
        row |= {f"seconds/{part}": _finite(value) for part, value in seconds.items()}
        self._file.write(json.dumps({"stage": self._stage, "step": step, **row}, allow_nan=False) + "\n")
        self._file.flush()
        known = {name: value for name, value in row.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in known.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **known})

    def close(self) -> None:
        """Close the file and the mirrors; writing afterwards is an error."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`, without a torn last line; nothing for a missing file.

    Raises:
        DataError: for a line before the last that is not JSON.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise DataError(f"{path}:{number}: not a JSON object; mend or remove the line") from None
    return rows


def truncate_metrics(path: Path, stage: str, start_step: int) -> None:
    """Drop from `path` what comes after `start_step` of `stage` (all of it for 0), in one atomic replacement."""
    rows = read_metrics(path)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    later = stages[stages.index(stage) + 1 :] if stage in stages else []

    def stays(row: dict[str, Any]) -> bool:
        return row["stage"] not in later and (row["stage"] != stage or 0 < start_step >= row["step"])

    lines = (json.dumps(row) + "\n" for row in rows if stays(row))
    if path.exists():
        _replace(path, lines)


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
    "policy/kl_rollout": "mismatch KL",
    "train/grad_norm": "gradient norm",
}


def dump_rollouts(path: Path, groups: Iterable[Group], tokenizer_piece: Callable[[int], str] | None = None) -> None:
    """Write every sample as one JSON object a line, in one atomic replacement.

    Args:
        path: the file; its folder is made.
        groups: prompts with their samples.
        tokenizer_piece: the text of one token id; with it each line also holds the response's `pieces`.

    `tokens` are those of prompt and response; `logprobs`, `rollout_logprobs`, `entropies` (nats) and `pieces` belong
    to the response, values rounded to seven decimals; `advantage` and `entropy` are means over the response. What no
    stage has filled is null.
    """
    lines = (
        json.dumps(_describe(group, sample, tokenizer_piece), ensure_ascii=False) + "\n"
        for group in groups
        for sample in group.samples
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lines)


def _describe(group: Group, sample: Sample, tokenizer_piece: Callable[[int], str] | None) -> dict[str, Any]:
    grade = sample.grade
    row: dict[str, Any] = {
        "prompt": group.prompt.index,
        "question": group.prompt.text,
        "answer": group.prompt.answer,
        "response": sample.text,
        "finish": sample.finish,
        "correct": grade.correct if grade else None,
        "extracted": grade.extracted if grade else None,
        "error": grade.error if grade else None,
        "reward": sample.reward,
        "advantage": _mean(sample, "advantage"),
        "entropy": _mean(sample, "entropy"),
        "policy_version": sample.policy_version,
        "parent": sample.parent,
        "prompt_length": sample.prompt_length,
        "tokens": [int(token) for token in sample.tokens],
        "logprobs": _rounded(sample, "logprob"),
        "rollout_logprobs": _rounded(sample, "rollout_logprob"),
        "entropies": _rounded(sample, "entropy"),
    }
    if tokenizer_piece is not None:
        row["pieces"] = [tokenizer_piece(int(token)) for token in sample.response("tokens")]
    return row


def _mean(sample: Sample, field: str) -> float | None:
    if getattr(sample, field) is None or not sample.response_length:
        return None
    return _finite(float(sample.response(field).mean(dtype=np.float64)))


def _rounded(sample: Sample, field: str) -> list[float | None] | None:
    if getattr(sample, field) is None:
        return None
    return [_finite(round(float(value), 7)) for value in sample.response(field)]


def _finite(value: float | Metric) -> float | None:
    number = float(value.value if isinstance(value, Metric) else value)
    return number if math.isfinite(number) else None


def _replace(path: Path, lines: Iterable[str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _open_tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise MissingPackageError(
            "log.tensorboard=true needs the package tensorboard: pip install tensorboard, or set log.tensorboard=false"
        ) from None
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)


def _open_wandb(folder: RunFolder, stage: str, project: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise MissingPackageError(
            f"log.wandb_project={project!r} needs the package wandb: pip install wandb, or set log.wandb_project=''"
        ) from None
    root = folder.root.resolve()
    identity = hashlib.sha256(f"{root}/{stage}".encode()).hexdigest()[:16]
    run = wandb.init(project=project, name=f"{root.name}/{stage}", id=identity, resume="allow", dir=str(root))
    run.define_metric("*", step_metric="step")
    return run
