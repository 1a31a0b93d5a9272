"""The numbers of an evaluation: one summary from its samples, printed as tables and written as `summary.json`.

The same samples give the same numbers, in whatever order they were finished.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_entropy.benchmarks.folder import EvalFolder, read_record
from megatron_entropy.benchmarks.samples import SampleRow, read_rows
from megatron_entropy.evaluation import metrics
from megatron_entropy.evaluation.metrics import Estimate
from megatron_entropy.files import atomic_write_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TAUS = (0.25, 0.5, 0.75, 1.0)
"""Thresholds of G-Pass@k."""

ESTIMATORS = {
    "accuracy": "mean@n: correct answers among those with a verdict, mean over questions",
    "std_err": "standard deviation of the questions' means / sqrt(questions): questions and sampling",
    "interval": "95 %, Wilson with the effective sample size of std_err",
    "std_err_runs": "standard deviation of the n runs' accuracies / sqrt(n): sampling alone, questions fixed",
    "pass_at_k": "unbiased, 1 - C(n - c, k) / C(n, k) (Chen et al. 2021)",
    "maj_at_k": "strings vote, the first k samples; a tie goes to the answer that came first (Qwen2.5-Math)",
    "maj_at_k_average": "the same, but a tie gives the mean of the tied answers (NeMo-Skills)",
    "g_pass_at_k": "at least ceil(tau * k) of k correct, unbiased (arXiv 2412.13147)",
    "mg_pass_at_k": "2/k * sum of that for ceil(k/2) + 1 to k correct",
    "errors": "responses that the grader could not judge: left out of accuracy, not correct in all metrics at k",
    "entropy": "nats, full vocabulary, mean over tokens",
}
"""What each number is, so that it can be compared with those of other programs."""

PRINTED = {
    "accuracy": "mean@n, ± standard error clustered by question; 95 %: Wilson with the effective sample size",
    "± runs": "standard error over the n runs, questions fixed",
    "pass@k": "unbiased (Chen et al. 2021)",
    "maj@k": "strings vote, first k samples; of tied answers the first counts; ties avg: their mean",
    "G-Pass@k": "unbiased, at least tau of k correct (columns: tau); mG: mean over tau in (0.5, 1]",
    "errors": "responses that the grader could not judge: left out of accuracy, not correct in the metrics at k",
}


@dataclass(frozen=True)
class AtK:
    """Metrics of k samples of each question, means over questions. `g_pass`: by tau."""

    k: int
    pass_at_k: float
    maj_at_k: float
    maj_at_k_average: float
    g_pass_at_k: dict[str, float]
    mg_pass_at_k: float


@dataclass(frozen=True)
class GraderSummary:
    """Scores of one grader on one benchmark.

    `accuracy`: NaN where no answer has a verdict. `std_err_runs`: NaN with one run. `unparsed`: fraction of responses
    without an answer. `errors`: number of responses that the grader could not judge. `ungraded`: ids of questions
    that have no verdict at all; they count in no number here.
    """

    grader: str
    accuracy: Estimate
    std_err_runs: float
    at_k: tuple[AtK, ...]
    unparsed: float
    errors: int
    ungraded: list[str]


@dataclass(frozen=True)
class BenchmarkSummary:
    """Numbers of one benchmark.

    `samples`: of the question that has the fewest. `num_samples`: of all questions; `asked`: of a complete evaluation.
    `skipped`: reason -> ids of questions that were not sampled. `length`: tokens. `truncated`: fraction. `entropy`:
    nats, None where it was not measured. `graders`: the first gives the main score.
    """

    benchmark: str
    questions: int
    samples: int
    num_samples: int
    asked: int
    skipped: dict[str, list[str]]
    length: float
    truncated: float
    entropy: float | None
    graders: tuple[GraderSummary, ...]


@dataclass(frozen=True)
class Summary:
    """Numbers of an evaluation. `mean`, `mean_std_err`: unweighted over the benchmarks' main scores (CurioSFT)."""

    benchmarks: tuple[BenchmarkSummary, ...]
    mean: float
    mean_std_err: float


def summarize(folder: EvalFolder) -> Summary:
    """Compute the numbers of an evaluation, also of a stopped one; benchmarks without a sample are left out.

    Raises:
        DataError: `eval.json` or the samples cannot be read.
    """
    benchmarks = []
    for name, asked in read_record(folder).benchmarks.items():
        if rows := read_rows(folder.rows(name)).rows:
            summary = summarize_benchmark(name, rows, asked.graders, asked=asked.num_samples, skipped=asked.skipped)
            benchmarks.append(summary)
    scores = [benchmark.graders[0].accuracy for benchmark in benchmarks]
    scores = [score for score in scores if math.isfinite(score.mean)]
    mean, error = math.nan, math.nan
    if scores:
        mean, error = metrics.mean_over_sets([s.mean for s in scores], [s.std_err for s in scores])
    return Summary(tuple(benchmarks), mean, error)


def summarize_benchmark(
    name: str, rows: Sequence[SampleRow], graders: Sequence[str], *, asked: int, skipped: Mapping[str, Sequence[str]]
) -> BenchmarkSummary:
    """Compute the numbers of one benchmark.

    Args:
        name: of the benchmark.
        rows: its samples in any order, at least one.
        graders: the first gives the main score.
        asked: number of samples of a complete evaluation.
        skipped: reason -> ids of questions that were not sampled.
    """
    questions = group_by_question(rows)
    measured = [row for row in rows if row.entropy]
    tokens = sum(len(row.entropy or ()) for row in measured)
    return BenchmarkSummary(
        benchmark=name,
        questions=len(questions),
        samples=min(map(len, questions.values())),
        num_samples=len(rows),
        asked=asked,
        skipped={reason: list(ids) for reason, ids in skipped.items()},
        length=sum(row.length for row in rows) / len(rows),
        truncated=sum(row.finish_reason == "length" for row in rows) / len(rows),
        entropy=math.fsum(math.fsum(row.entropy or ()) for row in measured) / tokens if tokens else None,
        graders=tuple(_summarize_grader(grader, questions) for grader in graders),
    )


def group_by_question(rows: Sequence[SampleRow]) -> dict[str, list[SampleRow]]:
    """Group rows by question id, in the order of ids and samples, which does not depend on the order of the rows."""
    questions: dict[str, list[SampleRow]] = {}
    for row in sorted(rows, key=lambda row: row.key):
        questions.setdefault(row.question, []).append(row)
    return questions


def verdicts(rows: Sequence[SampleRow], grader: str) -> list[bool | None]:
    """Return a grader's verdicts, None where it has none."""
    return [row.grades[grader].correct if grader in row.grades else None for row in rows]


def _summarize_grader(grader: str, questions: Mapping[str, Sequence[SampleRow]]) -> GraderSummary:
    rows = [row for samples in questions.values() for row in samples]
    graded = {name: samples for name, samples in questions.items() if set(verdicts(samples, grader)) - {None}}
    judged = [[float(v) for v in verdicts(samples, grader) if v is not None] for samples in graded.values()]
    grades = [row.grades[grader] for row in rows if grader in row.grades]
    runs = min(map(len, graded.values()), default=0)
    correct = [[v is True for v in verdicts(samples, grader)] for samples in graded.values()]
    answers = [[_vote(row, grader) for row in samples] for samples in graded.values()]
    return GraderSummary(
        grader=grader,
        accuracy=metrics.clustered_mean(judged) if judged else Estimate(*[math.nan] * 4),
        std_err_runs=metrics.run_statistics([row[:runs] for row in correct]).std_err_runs if runs else math.nan,
        at_k=tuple(_at_k(k, correct, answers) for k in _numbers_of_samples(runs)),
        unparsed=sum(grade.correct is not None and grade.extracted is None for grade in grades) / len(rows),
        errors=verdicts(rows, grader).count(None),
        ungraded=sorted(set(questions) - set(graded)),
    )


def _vote(row: SampleRow, grader: str) -> str | None:
    """What a sample votes for: its answer; of options in an order of its own, the option behind the letter."""
    answer = row.grades[grader].extracted if grader in row.grades else None
    if row.permutation is None or answer is None or len(answer) != 1:
        return answer
    position = ord(answer.upper()) - ord("A")
    return str(row.permutation[position]) if 0 <= position < len(row.permutation) else answer


def _numbers_of_samples(samples: int) -> list[int]:
    """1, 2, 4, ... up to the number of samples, and that number."""
    powers = [2**i for i in range(samples.bit_length())]
    return sorted({*powers, samples}) if samples else []


def _at_k(k: int, correct: Sequence[Sequence[bool]], answers: Sequence[Sequence[str | None]]) -> AtK:
    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values)

    voters = list(zip(answers, correct, strict=True))
    return AtK(
        k=k,
        pass_at_k=mean([metrics.pass_at_k(row, k) for row in correct]),
        maj_at_k=mean([metrics.maj_at_k(*voter, k) for voter in voters]),
        maj_at_k_average=mean([metrics.maj_at_k(*voter, k, ties="average") for voter in voters]),
        g_pass_at_k={str(tau): mean([metrics.g_pass_at_k(row, k, tau) for row in correct]) for tau in TAUS},
        mg_pass_at_k=mean([metrics.mg_pass_at_k(row, k) for row in correct]),
    )


def write_summary(folder: EvalFolder, summary: Summary) -> None:
    """Write `summary.json`: every number, null where there is none, and what the estimators are.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    content = {"estimators": ESTIMATORS, **asdict(summary)}
    atomic_write_text(folder.summary, json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float | np.floating) and not math.isfinite(value) else value


def percent(value: float) -> str:
    """Format a fraction as a percentage; `-` where there is none."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "-"


def score_cells(score: GraderSummary) -> tuple[str, ...]:
    """Format the scores of a grader, for `SCORE_HEADINGS`."""
    estimate = score.accuracy
    return (
        f"{percent(estimate.mean)} ± {percent(estimate.std_err)}",
        f"{percent(estimate.low)}-{percent(estimate.high)}" if math.isfinite(estimate.low) else "-",
        percent(score.std_err_runs),
        f"{percent(score.unparsed)}%",
        str(score.errors),
    )


def sample_cells(summary: BenchmarkSummary) -> tuple[str, ...]:
    """Format the numbers of a benchmark that no grader changes, for `SAMPLE_HEADINGS`."""
    return (
        str(summary.questions),
        str(sum(map(len, summary.skipped.values()))),
        str(summary.samples),
        f"{summary.length:.0f}",
        f"{percent(summary.truncated)}%",
        "-" if summary.entropy is None else f"{summary.entropy:.3f}",
    )


def at_k_cells(at_k: AtK) -> tuple[str, ...]:
    """Format the metrics at one k, for `AT_K_HEADINGS`."""
    values = (at_k.pass_at_k, at_k.maj_at_k, at_k.maj_at_k_average, *(at_k.g_pass_at_k[str(tau)] for tau in (0.5, 1.0)))
    return (str(at_k.k), *map(percent, values), percent(at_k.mg_pass_at_k) if at_k.k > 1 else "-")


SCORE_HEADINGS = ("accuracy\n(%)", "95 %\ninterval", "±\nruns", "un-\nparsed", "er-\nrors")
SAMPLE_HEADINGS = ("ques-\ntions", "skip-\nped", "n", "tokens", "trun-\ncated", "entropy\n(nats)")
AT_K_HEADINGS = ("k", "pass@k\n(%)", "maj@k\n(%)", "maj@k\nties avg", "G-Pass\n0.5", "G-Pass\n1.0", "mG\nPass")


def print_table(summary: Summary, console: Console | None = None) -> None:
    """Print the tables of an evaluation and what their numbers are; 60 columns are wide enough."""
    if console is None:
        from rich.console import Console

        console = Console()
    if not console.is_terminal:  # a log file is wide enough for the sentences
        console.width = max(console.width, 100)
    scores, samples = _table("Scores", SCORE_HEADINGS), _table("Samples", SAMPLE_HEADINGS)
    curves = _table("k of n samples, first grader", AT_K_HEADINGS[1:])
    for benchmark in summary.benchmarks:
        scores.add_row(benchmark.benchmark, style="bold")
        for score in benchmark.graders:
            scores.add_row(f" {score.grader}", *score_cells(score))
        samples.add_row(benchmark.benchmark, *sample_cells(benchmark))
        if benchmark.samples > 1:
            curves.add_row(benchmark.benchmark, style="bold")
            for cells in map(at_k_cells, benchmark.graders[0].at_k):
                curves.add_row(f" k = {cells[0]}", *cells[1:])
    if len(summary.benchmarks) > 1:
        scores.add_section()
        scores.add_row("mean over sets", f"{percent(summary.mean)} ± {percent(summary.mean_std_err)}")
    for table in (scores, samples, curves):
        if table.row_count:
            console.print(table)
            console.print()
    for name, meaning in PRINTED.items():
        console.print(f"{name}: {meaning}", style="dim", markup=False, highlight=False)
    for line in remarks(summary):
        console.print(line, style="yellow", markup=False, highlight=False)


def _table(title: str, headings: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def remarks(summary: Summary) -> list[str]:
    """Say what the numbers leave out: questions that were skipped or have no verdict, samples that are missing."""
    lines = []
    for benchmark in summary.benchmarks:
        if benchmark.num_samples < benchmark.asked:
            lines.append(f"{benchmark.benchmark}: {benchmark.num_samples} of {benchmark.asked} samples so far")
        for reason, ids in benchmark.skipped.items():
            lines.append(f"{benchmark.benchmark}: {len(ids)} skipped, {reason}: {_listed(ids)}")
        for score in benchmark.graders:
            if score.ungraded:
                what = f"{len(score.ungraded)} questions without a verdict are left out"
                lines.append(f"{benchmark.benchmark}, {score.grader}: {what}: {_listed(score.ungraded)}")
    return lines


def _listed(ids: Sequence[str], shown: int = 10) -> str:
    return ", ".join(ids[:shown]) + (f" and {len(ids) - shown} more (summary.json)" if len(ids) > shown else "")
