"""Two runs side by side: what each went through, and how much their ends differ on the same eval questions."""

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


@dataclass(frozen=True)
class Comparison:
    """A table with a row for each quantity, under `headings`, and sentences about the differences."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    sentences: list[str]


@dataclass(frozen=True)
class Quantity:
    """What is compared: a metric, and the same of one question from its responses (None where they do not tell)."""

    name: str
    unit: str
    metric: str
    of: Callable[[Sequence[DumpRow]], float | None]
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True)
class Difference:
    """Mean difference of a quantity over questions, and half its 95 % interval."""

    quantity: Quantity
    mean: float
    margin: float

    def __str__(self) -> str:
        return f"{self.mean:+z.{self.quantity.digits}f} ± {self.margin:.{self.quantity.digits}f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


ACCURACY = Quantity("accuracy", "%", "eval/accuracy", lambda rows: _mean([row.correct for row in rows]), scale=100.0)
ENTROPY = Quantity("entropy", "nats", "eval/entropy", lambda rows: _mean([row.entropy for row in rows]), digits=3)
LENGTH = Quantity("length", "tokens", "eval/length", lambda rows: _mean([row.length for row in rows]))


def compare(folder: RunFolder, other: RunFolder) -> Comparison:
    """Compare two runs.

    Raises:
        DataError: a run without a finished stage, or a file that cannot be read.
    """
    run, plain = runs = [_Run.read(folder), _Run.read(other)]
    questions = [question for question in run.answers if question in plain.answers]
    pass_at_k = []
    if run.num_answers == plain.num_answers > 1:
        k = run.num_answers
        any_right = Quantity(
            f"pass@{k}", "%", f"eval/pass_at_{k}", lambda rows: any(row.correct for row in rows), 100.0
        )
        pass_at_k = [any_right]
    quantities = [ACCURACY, *pass_at_k, ENTROPY, LENGTH]
    differences = {quantity.name: _difference(quantity, run, plain, questions) for quantity in quantities}
    rows: list[tuple[str, ...]] = [("methods", run.methods, plain.methods, "")]
    for quantity in quantities:
        difference = differences[quantity.name]
        cells = [one.course(quantity) for one in runs]
        rows.append((f"{quantity.name} ({quantity.unit})", *cells, str(difference or "")))
    rows.append(("generated tokens", *(f"{one.num_tokens:,.0f}" for one in runs), ""))
    rows.append(("time", *(f"{sum(stage.seconds for stage in one.stages):.0f} s" for one in runs), ""))
    found = [difference for difference in differences.values() if difference]
    return Comparison(("", run.name, plain.name, "difference"), rows, _sentences(run, plain, found, len(questions)))


@dataclass(frozen=True)
class _Run:
    """A run with its finished stages, its metrics, and the responses of its last evaluation by question."""

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
    def num_answers(self) -> int:
        """Answers to each question; 0 where there are none or their numbers differ."""
        counts = {len(rows) for rows in self.answers.values()}
        return counts.pop() if len(counts) == 1 else 0

    @property
    def num_tokens(self) -> float:
        return sum(row.get("rollout/tokens") or 0.0 for row in self.rows)

    def course(self, quantity: Quantity) -> str:
        """The quantity before the first stage and after each of them."""
        values: list[float | None] = []
        for stage in self.stages:
            own = [row.get(quantity.metric) for row in self.rows if row["stage"] == stage.name]
            known = [value for value in own if value is not None]
            values += [own[0] if own else None] if not values else []
            values.append(known[-1] if known else None)
        return " → ".join("?" if v is None else f"{v * quantity.scale:.{quantity.digits}f}" for v in values)


def _difference(quantity: Quantity, run: _Run, other: _Run, questions: Sequence[str]) -> Difference | None:
    """The difference of a quantity, paired by question."""
    pairs = [(quantity.of(run.answers[question]), quantity.of(other.answers[question])) for question in questions]
    values = [quantity.scale * (mine - its) for mine, its in pairs if mine is not None and its is not None]
    if len(values) < 2:
        return None
    return Difference(quantity, statistics.fmean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values)))


def _sentences(run: _Run, other: _Run, differences: Sequence[Difference], num_questions: int) -> list[str]:
    """Say what differs between the runs, and what the questions cannot tell apart."""
    if not differences:
        return ["The runs were not evaluated on the same questions, so their ends are not compared."]
    apart = [found for found in differences if abs(found.mean) > found.margin]
    alike = [found.quantity.name for found in differences if found not in apart]
    said = []
    if apart:
        parts = [f"{'higher' if found.mean > 0 else 'lower'} {found.quantity.name} ({found})" for found in apart]
        said.append(f"{run.methods} ended with {_listed(parts)} than {other.methods}.")
    if alike:
        said.append(f"The {num_questions} questions show no difference in {_listed(alike)}.")
    return [*said, "± is the 95 % interval over the questions; it does not cover other seeds."]


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"
