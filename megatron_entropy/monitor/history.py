"""What the files of a run say about one stage, for those who explain it: settings, metrics, groups of responses."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_entropy.monitor.dump_rows import DumpRow
from megatron_entropy.monitor.run_folder import RunFolder

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 2**20
"""Bytes of dumps that are read for one stage, the newest first; at least one dump is read."""


@dataclass(frozen=True)
class StageHistory:
    """One stage. `settings`: its table of `config.toml`, `rows`: of `metrics.jsonl`, in order."""

    folder: RunFolder
    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def method(self) -> Mapping[str, Any]:
        """Settings of the method, its `name` among them."""
        method = self.settings.get("method")
        return method if isinstance(method, Mapping) else {}

    def values(self, metric: str) -> list[float]:
        """Return the values of a metric in the order of the steps."""
        return [row[metric] for row in self.rows if row.get(metric) is not None]

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric over the steps that have it."""
        values = self.values(metric)
        return sum(values) / len(values) if values else None

    def groups(self) -> Iterator[tuple[int, list[DumpRow]]]:
        """Read step and rows of groups that were trained on, newest step first, from up to `MAX_BYTES` of dumps."""
        left = MAX_BYTES
        for step, path in reversed(list_dumps(self.folder.rollouts(self.name, 0).parent)):
            rows = read_dump(path)
            for number, group in groupby(rows, key=lambda row: row.group):
                if number is not None:  # a dump of an older version does not tell groups
                    yield step, list(group)
            left -= path.stat().st_size
            if left <= 0:
                return


def list_dumps(directory: Path) -> list[tuple[int, Path]]:
    """Return step and path of the dumps in a folder, in order."""
    names = ((path.stem.removeprefix("step_"), path) for path in directory.glob("step_*.jsonl"))
    return sorted((int(step), path) for step, path in names if step.isascii() and step.isdecimal())


def read_dump(path: Path) -> Iterator[DumpRow]:
    """Read the lines of a dump one by one; damaged ones are skipped and counted in the log."""
    damaged = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = DumpRow.model_validate_json(line)
            except ValueError:
                damaged += 1
                continue
            yield row
    if damaged:
        log.warning("%s: %d damaged lines are skipped", path, damaged)


def read_stages(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the settings of the stages by `config.toml`; none while it is missing or damaged."""
    try:
        settings = tomllib.loads(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    stages = settings.get("stages", [])
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
