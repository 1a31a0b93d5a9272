"""Two runs side by side: what each ended with, and how much they differ on the same eval questions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_entropy.errors import DataError
from megatron_entropy.monitor.dump_rows import DumpRow
from megatron_entropy.monitor.history import list_dumps, read_dump
from megatron_entropy.monitor.metrics import read_metrics
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.summary import StageSummary, read_summary

HEADINGS = ("run", "methods", "accuracy (%)", "pass@k (%)", "entropy (nats)", "length", "generated tokens", "time")


@dataclass(frozen=True)
class Comparison:
    """A row of cells for each run, under `headings`, and sentences about their differences."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    sentences: list[str]


@dataclass(frozen=True)
class Measure:
    """A quantity of one question: `of` maps its responses to a value, None where they do not tell."""

    name: str
    unit: str
    of: Callable[[Sequence[DumpRow]], float | None]
    digits: int = 1


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _any_right(rows: Sequence[DumpRow]) -> float:
    return 100.0 * any(row.correct for row in rows)


MEASURES = (
    Measure(
        "accuracy", " points", lambda rows: _mean([None if r.correct is None else 100.0 * r.correct for r in rows])
    ),
    Measure("entropy", " nats", lambda rows: _mean([row.entropy for row in rows]), digits=3),
    Measure("length", " tokens", lambda rows: _mean([row.length for row in rows])),
)


def compare(folder: RunFolder, other: RunFolder) -> Comparison:
    """Compare the ends of two runs.

    Raises:
        DataError: a run without a finished stage, or a file that cannot be read.
    """
    runs = [_Run.read(folder), _Run.read(other)]
    return Comparison(HEADINGS, [run.cells() for run in runs], _differences(*runs))


@dataclass(frozen=True)
class _Run:
    """A run with its finished stages, and the responses of its last evaluation by question."""

    name: str
    stages: Sequence[StageSummary]
    rows: Sequence[Mapping[str, Any]]
    answers: Mapping[str, Sequence[DumpRow]]

    @classmethod
    def read(cls, folder: RunFolder) -> _Run:
        stages = read_summary(folder)
        if not stages:
            raise DataError(f"{folder.root}: no stage has finished; only finished runs are compared")
        answers: dict[str, list[DumpRow]] = {}
        for _, path in list_dumps(folder.evaluation(stages[-1].name, 0).parent)[-1:]:
            for row in read_dump(path):
                answers.setdefault(row.question, []).append(row)
        return cls(folder.root.resolve().name, stages, read_metrics(folder.metrics), answers)

    @property
    def methods(self) -> str:
        return " → ".join(stage.method for stage in self.stages)

    @property
    def k(self) -> int:
        """Answers to each question, 0 where there are none or their numbers differ."""
        counts = {len(rows) for rows in self.answers.values()}
        return counts.pop() if len(counts) == 1 else 0

    def cells(self) -> tuple[str, ...]:
        tokens = sum(row.get("rollout/tokens") or 0 for row in self.rows)
        return (
            self.name,
            self.methods,
            self._arrow("accuracy", lambda value: f"{100 * value:.1f}"),
            f"{_mean(list(map(_any_right, self.answers.values()))):.1f} (k = {self.k})" if self.k > 1 else "",
            self._arrow("entropy", lambda value: f"{value:.3f}"),
            self._arrow("length", lambda value: f"{value:.1f}"),
            f"{tokens:,.0f}",
            f"{sum(stage.seconds for stage in self.stages):.0f} s",
        )

    def _arrow(self, name: str, show: Callable[[float], str]) -> str:
        """The value before the first stage and after each of them."""
        changes = [getattr(stage, name) for stage in self.stages]
        values = [changes[0].before, *(change.after for change in changes)]
        return " → ".join("?" if value is None else show(value) for value in values)


def _differences(run: _Run, other: _Run) -> list[str]:
    """Say what differs between the runs, paired by question, and what the questions cannot tell apart."""
    questions = [question for question in run.answers if question in other.answers]
    if len(questions) < 2:
        return ["The runs were not evaluated on the same questions, so they are not compared further."]
    apart, alike = [], []
    measures = [*MEASURES]
    if run.k == other.k > 1:
        measures.insert(1, Measure(f"pass@{run.k}", " points", _any_right))
    for measure in measures:
        pairs = [(measure.of(run.answers[question]), measure.of(other.answers[question])) for question in questions]
        differences = [mine - its for mine, its in pairs if mine is not None and its is not None]
        if len(differences) < 2:
            continue
        mean = statistics.fmean(differences)
        margin = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
        text = f"{mean:+.{measure.digits}f} ± {margin:.{measure.digits}f}{measure.unit}"
        if abs(mean) > margin:
            apart.append(f"{'higher' if mean > 0 else 'lower'} {measure.name} ({text})")
        else:
            alike.append(f"{measure.name} ({text})")
    said = []
    if apart:
        said.append(f"{run.methods} ended with {_listed(apart)} than {other.methods}.")
    if alike:
        said.append(f"These {len(questions)} questions show no difference in {_listed(alike)}.")
    return [*said, "± is the 95 % interval over the questions of this seed; it does not cover other seeds."]


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"
