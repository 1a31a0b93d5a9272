"""Compare two evaluations question by question: differences of accuracy by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_entropy.benchmarks.folder import EvalFolder, read_record
from megatron_entropy.benchmarks.samples import read_rows
from megatron_entropy.benchmarks.table import group_by_question, percent, verdicts
from megatron_entropy.errors import DataError
from megatron_entropy.evaluation.metrics import PairedBootstrap, paired_bootstrap

if TYPE_CHECKING:
    from rich.console import Console

RESAMPLES = 10_000


@dataclass(frozen=True)
class BenchmarkComparison:
    """Two evaluations on one benchmark; the difference is the second minus the first.

    `questions`: number of those in both. `first`, `second`: accuracies on them. `better`, `worse`: numbers of questions
    that the second answers right more, or less, often. `only_first`, `only_second`: ids of questions that have a
    verdict in one evaluation only; they count nowhere.
    """

    benchmark: str
    grader: str
    questions: int
    first: float
    second: float
    better: int
    worse: int
    bootstrap: PairedBootstrap
    only_first: list[str]
    only_second: list[str]


@dataclass(frozen=True)
class Comparison:
    """Two evaluations.

    `mean_over_sets`: the benchmarks count equally. `all_questions`: the questions count equally. `only_first`,
    `only_second`: benchmarks of one evaluation only. `settings`: name -> both values, where they differ.
    """

    first: str
    second: str
    benchmarks: tuple[BenchmarkComparison, ...]
    mean_over_sets: PairedBootstrap
    all_questions: PairedBootstrap
    only_first: list[str]
    only_second: list[str]
    settings: dict[str, tuple[object, object]]


def compare(first: EvalFolder, second: EvalFolder, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare two evaluations on the questions that both have, by the main grader of the first.

    Args:
        first, second: for example before and after training.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    Raises:
        DataError: a folder cannot be read, or they have no question with a common grader in both.
    """
    records = read_record(first), read_record(second)
    names = [name for name in records[0].benchmarks if name in records[1].benchmarks]
    differences: list[np.ndarray] = []
    benchmarks: list[BenchmarkComparison] = []
    for name in names:
        graders = [g for g in records[0].benchmarks[name].graders if g in records[1].benchmarks[name].graders]
        means = [_question_means(folder, name, graders[0]) if graders else {} for folder in (first, second)]
        if shared := [question for question in means[0] if question in means[1]]:
            table = np.array([[means[0][question], means[1][question]] for question in shared])
            differences.append(table[:, 1] - table[:, 0])
            bootstrap = paired_bootstrap([differences[-1]], [1.0], resamples=resamples, seed=seed)
            benchmarks.append(_compare_benchmark(name, graders[0], table, bootstrap, means))
    if not benchmarks:
        raise DataError(
            f"{first.root} and {second.root} have no question with a grade of the same grader in both; compare "
            "evaluations of the same benchmarks"
        )
    sizes = [float(len(values)) for values in differences]
    settings = (records[0].settings, records[1].settings)
    return Comparison(
        first=_name(records[0].model, first),
        second=_name(records[1].model, second),
        benchmarks=tuple(benchmarks),
        mean_over_sets=paired_bootstrap(differences, [1.0] * len(differences), resamples=resamples, seed=seed),
        all_questions=paired_bootstrap(differences, sizes, resamples=resamples, seed=seed),
        only_first=sorted(set(records[0].benchmarks) - {b.benchmark for b in benchmarks}),
        only_second=sorted(set(records[1].benchmarks) - {b.benchmark for b in benchmarks}),
        settings={
            key: (settings[0].get(key), settings[1].get(key))
            for key in {**settings[0], **settings[1]}
            if settings[0].get(key) != settings[1].get(key)
        },
    )


def _name(model: str, folder: EvalFolder) -> str:
    return f"{model} ({folder.root})"


def _question_means(folder: EvalFolder, benchmark: str, grader: str) -> dict[str, float]:
    """Accuracy on each question that has a verdict, in the order of ids."""
    means = {}
    for question, rows in group_by_question(read_rows(folder.rows(benchmark)).rows).items():
        if judged := [verdict for verdict in verdicts(rows, grader) if verdict is not None]:
            means[question] = sum(judged) / len(judged)
    return means


def _compare_benchmark(
    name: str, grader: str, table: np.ndarray, bootstrap: PairedBootstrap, means: Sequence[Mapping[str, float]]
) -> BenchmarkComparison:
    first, second = table.mean(axis=0)
    return BenchmarkComparison(
        benchmark=name,
        grader=grader,
        questions=len(table),
        first=float(first),
        second=float(second),
        better=int((table[:, 1] > table[:, 0]).sum()),
        worse=int((table[:, 1] < table[:, 0]).sum()),
        bootstrap=bootstrap,
        only_first=[question for question in means[0] if question not in means[1]],
        only_second=[question for question in means[1] if question not in means[0]],
    )


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the comparison as a table, and what it leaves out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console() if console is None else console
    if not console.is_terminal:
        console.width = max(console.width, 100)
    table = Table(
        title="Accuracy (%)", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, show_edge=False
    )
    table.add_column("", overflow="fold")
    for heading in ("A", "B", "B - A", "95 %\ninterval", "p", "ques-\ntions", "bet-\nter", "worse"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in comparison.benchmarks:
        counts = (str(one.questions), str(one.better), str(one.worse))
        table.add_row(one.benchmark, percent(one.first), percent(one.second), *_cells(one.bootstrap), *counts)
    if len(comparison.benchmarks) > 1:
        table.add_section()
        table.add_row("mean over sets", "", "", *_cells(comparison.mean_over_sets))
        table.add_row("all questions", "", "", *_cells(comparison.all_questions))
    for line in (f"A: {comparison.first}", f"B: {comparison.second}"):
        console.print(line, markup=False, highlight=False)
    console.print(table)
    console.print(
        "Paired bootstrap over questions: percentile interval; p is two-sided, for no difference.", style="dim"
    )
    for line in remarks(comparison):
        console.print(line, style="yellow", markup=False, highlight=False)


def _cells(found: PairedBootstrap) -> tuple[str, str, str]:
    low, high = (f"{100 * value:+.1f}" for value in (found.low, found.high))
    return f"{100 * found.difference:+.1f}", f"{low} {high}", f"{found.p_value:.2g}"


def remarks(comparison: Comparison) -> list[str]:
    """Say what is in one evaluation only, and which settings differ."""
    lines = [f"{key} differs: A {a}, B {b}" for key, (a, b) in comparison.settings.items()]
    sides = (("A", comparison.only_first), ("B", comparison.only_second))
    lines += [f"not compared, in {side} only: {', '.join(names)}" for side, names in sides if names]
    for one in comparison.benchmarks:
        for side, ids in (("A", one.only_first), ("B", one.only_second)):
            if ids:
                more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
                lines.append(f"{one.benchmark}: in {side} only, {len(ids)}: {', '.join(ids[:10])}{more}")
    return lines
