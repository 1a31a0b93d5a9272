"""Metrics of a run: `metrics.jsonl` and its mirrors in TensorBoard and W&B. Only rank 0 writes them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_entropy.config.schema import LogConfig
from megatron_entropy.errors import DataError, MissingPackageError
from megatron_entropy.files import atomic_write_text
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.records import Metric


class MetricsWriter:
    """Appends a stage's rows to `metrics.jsonl` and mirrors them to TensorBoard and W&B.

    A row is `{"stage", "step", "area/name": value, ..., "timing/phase": value}`, with the names of `metric_names`.
    Times and memory stand only under `timing/` and `perf/`, so two runs of one seed differ nowhere else. Floats keep
    full precision; NaN and infinity, which JSON lacks, and the mean of nothing become null. Row 0 is the evaluation
    before training.

    The constructor truncates the file to the point of a resume: it drops the rows of this stage after `start_step`,
    those of later stages, and a torn last line. A step's row is written before its checkpoint, so a kill between the
    two loses no row.

    Args:
        folder: the run's paths.
        stage: name of the stage.
        log: which mirrors to keep.
        start_step: steps of this stage that the restored checkpoint holds; 0 drops all its rows.

    Raises:
        MissingPackageError: wandb or tensorboard is configured and not installed.
    """

    def __init__(self, folder: RunFolder, stage: str, log: LogConfig, start_step: int = 0) -> None:
        folder.root.mkdir(parents=True, exist_ok=True)
        self._stage = stage
        self._tensorboard = _open_tensorboard(folder.tensorboard(stage), start_step) if log.tensorboard else None
        self._wandb = _open_wandb(folder, stage, log.wandb_project) if log.wandb_project else None
        if self._tensorboard is not None and folder.config.exists():
            self._tensorboard.add_text("config", _as_markdown(folder.config.read_text(encoding="utf-8")))
        truncate_metrics(folder.metrics, stage, start_step)
        self._file = folder.metrics.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float | Metric], seconds: Mapping[str, float]) -> None:
        """Append the row of `step` and flush it.

        Args:
            step: optimizer-visible steps done, 0 before training.
            metrics: by `area/name`; a `Metric` is logged as its mean.
            seconds: by phase, as `StepTimer.split` returns them.
        """
        row: dict[str, float | None] = {name: finite_or_none(value) for name, value in metrics.items()}
        row |= {f"timing/{phase}": finite_or_none(value) for phase, value in seconds.items()}
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
    """Read the rows of a `metrics.jsonl`, without a torn last line; none of a missing file.

    Raises:
        DataError: for a file that cannot be read, and a line before the last that is no row of metrics.
    """
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            _check_row(row)
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                reason = "not a JSON object" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(f"{path}:{number}: {reason}; fix or remove the line") from None
    return rows


def _check_row(row: Any) -> None:
    """See that a row has a stage, a step, and numbers."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if not isinstance(row.get("stage"), str) or type(row.get("step")) is not int or row["step"] < 0:
        raise ValueError("a row of metrics needs `stage`, a text, and `step`, a number of at least 0")
    for name, value in row.items():
        if name not in ("stage", "step") and not (value is None or type(value) in (int, float)):
            raise ValueError(f"{name[:40]} must be a number")


def truncate_metrics(path: Path, stage: str, start_step: int) -> None:
    """Drop from `path` the rows after `start_step` of `stage` (all of its rows for 0) and those of later stages."""
    rows = read_metrics(path)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    later = stages[stages.index(stage) + 1 :] if stage in stages else []

    def stays(row: dict[str, Any]) -> bool:
        return row["stage"] not in later and (row["stage"] != stage or 0 < start_step >= row["step"])

    if path.exists():
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows if stays(row)))


def finite_or_none(value: float | Metric) -> float | None:
    """Return a value, or a metric's mean, as JSON can hold it: None for NaN and infinity."""
    number = float(value.value if isinstance(value, Metric) else value)
    return number if math.isfinite(number) else None


def _open_tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise MissingPackageError(
            "log.tensorboard=true needs the package tensorboard: pip install tensorboard, or set log.tensorboard=false"
        ) from None
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)


def _as_markdown(text: str) -> str:
    """Indent a text, so that TensorBoard shows it as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


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
