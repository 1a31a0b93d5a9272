"""The report of a run: a table on the console, and the page `report.html` with plots and samples.

Both are built from the files of the run folder alone, so `megatron-entropy report RUN` works on a finished run, on a
stopped one and on one that still runs.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from megatron_entropy.errors import DataError
from megatron_entropy.files import atomic_write_text
from megatron_entropy.monitor.metrics import read_metrics
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.summary import Change, StageSummary, layout_label, read_summary, versions

if TYPE_CHECKING:
    from jinja2 import Template

log = logging.getLogger(__name__)

HEADINGS = ("stage", "method", "steps", "time", "layout", "eval accuracy", "entropy (nats)", "length (tokens)")

MAX_LINES = 2000
"""Lines of a dump that are searched for samples to show."""


class DumpedSample(BaseModel):
    """The keys of a line of a rollout dump that the report shows (`rollout_dumps`)."""

    question: str
    response: str
    answer: str | None = None
    extracted: str | None = None
    finish_reason: str | None = None
    correct: bool | None = None
    reward: float | None = None
    entropy: float | None = None
    pieces: list[str] | None = None
    entropies: list[float | None] | None = None


def print_table(folder: RunFolder) -> None:
    """Print the table of finished stages to standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(folder.root)), title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=heading != "layout")
    for entry in read_summary(folder):
        table.add_row(*map(Text, _cells(entry)))
    console = Console()
    if not console.is_terminal:  # a log file is wide enough for the numbers
        console.width = max(console.width, 120)
    console.print(table)


def write_report(folder: RunFolder) -> None:
    """Draw the plots and write `report.html`, which holds everything it shows.

    Raises:
        DataError: the folder holds no `metrics.jsonl`, or a file of it cannot be read.
    """
    from megatron_entropy.monitor.plots import draw_all

    if not folder.metrics.exists():
        raise DataError(f"{folder.root}: no metrics.jsonl here; name the folder of a run")
    if folder.plots.exists() and not folder.plots.is_dir():
        raise DataError(f"{folder.plots} is not a folder; remove it")
    rows = read_metrics(folder.metrics)
    entries = read_summary(folder)
    examples = _examples(folder, list(dict.fromkeys(row["stage"] for row in rows)))
    page = load_template(Path(__file__).with_name("report.html.j2")).render(
        title=f"Run {folder.root.resolve().name}",
        headings=HEADINGS,
        stages=[_cells(entry) for entry in entries],
        plots=[
            {
                "title": plot.title,
                "images": [
                    {"stage": panel.stage, "data": base64.b64encode(panel.file.read_bytes()).decode()}
                    for panel in plot.panels
                ],
            }
            for plot in draw_all(rows, folder.plots)
        ],
        examples=examples,
        scale=[{"color": _shade(value), "label": f"{value:g}"} for value in (0.0, 0.1, 0.3, 0.6, 1.0, 2.0)],
        versions=entries[-1].versions if entries else versions(),
        config=folder.config.read_text(encoding="utf-8", errors="replace") if folder.config.is_file() else "",
    )
    atomic_write_text(folder.report, page)


def load_template(file: Path) -> Template:
    """Load a page's template; it escapes what is filled in, and can include this package's `style.css.j2`."""
    import jinja2

    loader = jinja2.FileSystemLoader([file.parent, Path(__file__).parent])
    return jinja2.Environment(loader=loader, autoescape=True).get_template(file.name)


def _cells(entry: StageSummary) -> tuple[str, ...]:
    accuracy = _arrow(entry.accuracy, lambda value: f"{100 * value:.1f}")
    if entry.accuracy.before is not None and entry.accuracy.after is not None:
        accuracy += f" % ({100 * (entry.accuracy.after - entry.accuracy.before):+.1f})"
    elif accuracy:
        accuracy += " %"
    return (
        entry.name,
        entry.method,
        str(entry.steps),
        f"{entry.seconds:.0f} s" if entry.seconds < 600 else f"{entry.seconds / 60:.0f} min",
        layout_label(entry.layout),
        accuracy,
        _arrow(entry.entropy, lambda value: f"{value:.3f}"),
        _arrow(entry.length, lambda value: f"{value:.1f}"),
    )


def _arrow(change: Change, show: Callable[[float], str]) -> str:
    if change.before is None and change.after is None:
        return ""
    return " → ".join("?" if value is None else show(value) for value in (change.before, change.after))


def _examples(folder: RunFolder, stages: Sequence[str]) -> list[dict[str, Any]]:
    """Choose samples from the last dump of each stage: of its last evaluation, or else of its last training dump."""
    examples = []
    for stage in stages:
        for kind, directory in (
            ("eval", folder.evaluation(stage, 0).parent),
            ("train", folder.rollouts(stage, 0).parent),
        ):
            dumps = sorted(path for path in directory.glob("step_*.jsonl") if path.stem[len("step_") :].isdecimal())
            samples = _choose(dumps[-1]) if dumps else []
            if samples:
                step = int(dumps[-1].stem.removeprefix("step_"))
                examples.append({"heading": f"{stage}, step {step}, {kind} questions", "samples": samples})
                break
    return examples


def _choose(dump: Path, count: int = 2) -> list[dict[str, Any]]:
    """Return the first `count` correct and the first `count` wrong samples of a dump; damaged lines are skipped."""
    chosen: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    skipped = 0
    with dump.open(encoding="utf-8", errors="replace") as file:
        for line in islice(file, MAX_LINES):
            try:
                sample = DumpedSample.model_validate_json(line)
            except ValueError:
                skipped += 1
                continue
            if sample.correct is not None and len(chosen[sample.correct]) < count:
                chosen[sample.correct].append(_describe(sample))
    if skipped:
        log.warning("%s: %d damaged lines are skipped", dump, skipped)
    return chosen[True] + chosen[False]


def _describe(sample: DumpedSample) -> dict[str, Any]:
    tokens: list[dict[str, str]] = [{"text": sample.response, "color": "", "title": ""}]
    if sample.pieces and sample.entropies and len(sample.pieces) == len(sample.entropies):
        tokens = [
            {"text": piece, "color": _shade(entropy or 0.0), "title": f"{entropy} nats"}
            for piece, entropy in zip(sample.pieces, sample.entropies, strict=True)
        ]
    facts = [f"expected {sample.answer}", f"found {sample.extracted}", f"{sample.finish_reason}"]
    values = {"reward": sample.reward, "entropy": sample.entropy}
    facts += [f"{name} {value:.3f}" for name, value in values.items() if value is not None]
    verdict = "correct" if sample.correct else "wrong"
    return {"question": sample.question, "tokens": tokens, "facts": ", ".join(facts), "verdict": verdict}


def _shade(entropy: float) -> str:
    """Return the background of a token as CSS: white at 0 nats, full colour from 2 nats on."""
    return f"rgba(240, 140, 40, {min(max(entropy, 0.0) / 2.0, 1.0) ** 0.6:.2f})"
