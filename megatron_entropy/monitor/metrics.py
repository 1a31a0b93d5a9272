"""What a run tells while it runs: console log, `metrics.jsonl`, TensorBoard, W&B, rollout dumps, a step's clock.

Modules log through `logging.getLogger(__name__)`; `setup_logging` decides once per rank where that goes. Only rank 0
holds a `MetricsWriter`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_entropy.config.schema import LogConfig
from megatron_entropy.errors import DataError, MissingPackageError
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.records import Metric


class MetricsWriter:
    """Appends a stage's rows to `metrics.jsonl` and mirrors them to TensorBoard and W&B.

    A row is `{"stage", "step", "area/name": value, ..., "timing/part": value}`: wall-clock values only under
    `timing/`, so that two runs of one seed differ nowhere else. Floats keep full precision; NaN and infinity, which
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
            seconds: by part, as `StepTimer.split` returns them.
        """
        row: dict[str, float | None] = {name: _finite(value) for name, value in metrics.items()}
        row |= {f"timing/{part}": _finite(value) for part, value in seconds.items()}
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
