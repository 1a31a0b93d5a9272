"""The page of an evaluation: `report.html`, one file with its tables, curves and a few answers.

It is built from the files of the folder alone, so it can be written again, also for an evaluation that was stopped.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_entropy.benchmarks import plots, table
from megatron_entropy.benchmarks.folder import EvalFolder, read_record
from megatron_entropy.benchmarks.plots import Judged
from megatron_entropy.benchmarks.samples import SampleRow, read_rows
from megatron_entropy.benchmarks.table import BenchmarkSummary, Summary, group_by_question, verdicts
from megatron_entropy.files import atomic_write_text
from megatron_entropy.monitor.report import load_template

SHOWN_CHARACTERS = 1500
"""Of the end of an answer."""
SHOWN_ANSWERS = 2
"""Right ones, and as many wrong ones."""

PLOTS = ("TECA by position", "TECA by tokens", "Accuracy and entropy", "Accuracy and length", "Metrics at k")
NOTES = {
    "TECA by position": "Running mean of the token entropies, averaged over answers; the band is one standard error.",
    "TECA by tokens": "The same after a number of tokens, over the answers that are as long.",
    "Accuracy and entropy": "Answers in bins of equal size by their mean token entropy.",
    "Accuracy and length": "Answers in bins of equal size by their length.",
    "Metrics at k": "Of the n samples of each question, k count; see the table above.",
}

AVERAGES = ("answers", "mean entropy (nats)", "mean length (tokens)")


def write_report(folder: EvalFolder, summary: Summary) -> None:
    """Write `report.html`, which holds everything it shows.

    Args:
        folder: of the evaluation.
        summary: its numbers, from `table.summarize`.
    Raises:
        DataError: `eval.json` or the samples cannot be read.
        OSError: the page cannot be written; the old one stays.
    """
    record = read_record(folder)
    pages = [_BenchmarkPage(folder, benchmark) for benchmark in summary.benchmarks]
    settings = {
        **record.settings,
        **record.engines,
        "started": record.started,
        "finished": record.finished or "not yet",
    }
    page = load_template(Path(__file__).with_name("report.html.j2")).render(
        title=f"Evaluation of {record.model}",
        tables=_tables(summary),
        remarks=table.remarks(summary),
        has_entropy=any(benchmark.entropy is not None for benchmark in summary.benchmarks),
        averages={"headings": AVERAGES, "rows": [row for page in pages for row in page.averages]},
        plots=[
            {"title": title, "note": NOTES[title], "images": images}
            for title in PLOTS
            if (images := [image for page in pages if (image := page.images.get(title))])
        ],
        examples=[{"heading": page.name, "samples": page.examples} for page in pages if page.examples],
        estimators=table.ESTIMATORS,
        sources={name: asked.source for name, asked in record.benchmarks.items()},
        settings=settings,
        versions=record.versions,
    )
    atomic_write_text(folder.report, page)


def _tables(summary: Summary) -> list[dict[str, Any]]:
    """Title, headings and rows of the tables; a row with one cell names a benchmark."""
    scores: list[tuple[str, ...]] = []
    curves: list[tuple[str, ...]] = []
    for benchmark in summary.benchmarks:
        scores += [(benchmark.benchmark,), *((s.grader, *table.score_cells(s)) for s in benchmark.graders)]
        if benchmark.samples > 1:
            curves += [(benchmark.benchmark,), *map(table.at_k_cells, benchmark.graders[0].at_k)]
    if len(summary.benchmarks) > 1:
        mean = f"{table.percent(summary.mean)} ± {table.percent(summary.mean_std_err)}"
        scores += [("mean over sets",), ("first graders", mean, *[""] * (len(table.SCORE_HEADINGS) - 1))]
    samples = [(benchmark.benchmark, *table.sample_cells(benchmark)) for benchmark in summary.benchmarks]
    found = (
        ("Scores", ("", *table.SCORE_HEADINGS), scores),
        ("Samples", ("", *table.SAMPLE_HEADINGS), samples),
        ("k of n samples, first grader", table.AT_K_HEADINGS, curves),
    )
    return [
        {"title": title, "headings": [_unfold(heading) for heading in headings], "rows": rows}
        for title, headings, rows in found
        if rows
    ]


def _unfold(heading: str) -> str:
    """A heading of the console's table in one line."""
    return heading.replace("-\n", "").replace("\n", " ")


class _BenchmarkPage:
    """What the page shows of one benchmark, by its main grader; the samples are not kept."""

    def __init__(self, folder: EvalFolder, summary: BenchmarkSummary) -> None:
        self.name, grader = summary.benchmark, summary.graders[0].grader
        rows = [row for rows in group_by_question(read_rows(folder.rows(self.name)).rows).values() for row in rows]
        judged = [(row, v) for row, v in zip(rows, verdicts(rows, grader), strict=True) if v is not None]
        self.images = {
            title: {"benchmark": self.name, "data": base64.b64encode(data).decode()}
            for title, data in zip(PLOTS, _draw(self.name, judged, summary), strict=True)
            if data
        }
        self.averages = [(self.name,), *_averages(judged)] if judged else []
        self.examples = list(_examples(judged, grader))


def _draw(name: str, judged: Judged, summary: BenchmarkSummary) -> Iterator[bytes | None]:
    """Draw the panels in the order of `PLOTS`."""
    yield plots.draw_teca_relative(name, judged)
    yield plots.draw_teca_absolute(name, judged)
    measured = [(statistics.fmean(row.entropy), verdict) for row, verdict in judged if row.entropy]
    entropies, correct = [value for value, _ in measured], [verdict for _, verdict in measured]
    yield plots.draw_accuracy_against(name, "mean token entropy (nats)", entropies, correct)
    lengths = [float(row.length) for row, _ in judged]
    yield plots.draw_accuracy_against(name, "tokens", lengths, [verdict for _, verdict in judged])
    yield plots.draw_at_k(name, summary.graders[0].at_k)


def _averages(judged: Judged) -> Iterator[tuple[str, ...]]:
    """Number, mean entropy and mean length of right and of wrong answers."""
    for label, is_right in (("right", True), ("wrong", False)):
        rows = [row for row, verdict in judged if verdict is is_right]
        entropies = [statistics.fmean(row.entropy) for row in rows if row.entropy]
        yield (
            label,
            str(len(rows)),
            f"{statistics.fmean(entropies):.3f}" if entropies else "-",
            f"{statistics.fmean(row.length for row in rows):.0f}" if rows else "-",
        )


def _examples(judged: Judged, grader: str) -> Iterator[dict[str, str]]:
    """Describe the first right and the first wrong answers."""
    for verdict, name in ((True, "correct"), (False, "wrong")):
        for row in islice((row for row, v in judged if v is verdict), SHOWN_ANSWERS):
            yield {"verdict": name, "response": _end(row.response), "facts": _facts(row, grader)}


def _end(response: str) -> str:
    return response if len(response) <= SHOWN_CHARACTERS else f"… {response[-SHOWN_CHARACTERS:]}"


def _facts(row: SampleRow, grader: str) -> str:
    facts = [f"question {row.question}, sample {row.sample}", f"expected {row.answer}"]
    facts += [f"found {row.grades[grader].extracted or 'no answer'}", f"{row.length} tokens, {row.finish_reason}"]
    if row.entropy:
        facts.append(f"entropy {statistics.fmean(row.entropy):.3f}")
    return ", ".join(facts)
