"""The report of a run: a table on the console, and the page `report.html` with plots and samples.

Both are built from the files of the run folder alone, so `megatron-entropy report RUN` works on a finished run, on a
stopped one and on one that still runs.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_entropy.errors import DataError
from megatron_entropy.files import atomic_write_text
from megatron_entropy.monitor.comparison import compare
from megatron_entropy.monitor.drawing import draw_samples, draw_tree, shade
from megatron_entropy.monitor.history import StageHistory, list_dumps, read_dump, read_stages
from megatron_entropy.monitor.metrics import read_metrics
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.summary import Change, StageSummary, layout_label, read_summary, versions

if TYPE_CHECKING:
    from jinja2 import Template

HEADINGS = ("stage", "method", "steps", "time", "layout", "eval accuracy", "entropy (nats)", "length (tokens)")

EMULATED = "train/fp8_emulated"
"""Metric of steps with emulated FP8."""

MAX_LINES = 2000
"""Lines of a dump that are searched for samples to show."""

Explain = Callable[[StageHistory], list[str]]
"""Says what the method of a stage did (`methods.explain_stage`)."""


def print_table(folder: RunFolder, other: RunFolder | None = None) -> None:
    """Print the table of finished stages to standard output, or compare the run with another."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a log file is wide enough for the numbers
        console.width = max(console.width, 120)
    compared = compare(folder, other) if other else None
    table = Table(title=None if compared else Text(str(folder.root)), title_justify="left")
    for heading in compared.headings if compared else HEADINGS:
        table.add_column(heading, no_wrap=heading not in ("layout", "methods"))
    for cells in compared.rows if compared else map(_cells, read_summary(folder)):
        table.add_row(*map(Text, cells))
    console.print(table)
    for sentence in compared.sentences if compared else ():
        console.print(Text(sentence))


def write_report(folder: RunFolder, explain: Explain, other: RunFolder | None = None) -> None:
    """Draw the plots and write `report.html`, which holds everything it shows.

    Args:
        folder: the run.
        explain: returns sentences about a stage.
        other: a run to compare it with.
    Raises:
        DataError: a folder holds no `metrics.jsonl`, or a file of it cannot be read.
    """
    from megatron_entropy.monitor.plots import draw_all

    if not folder.metrics.exists():
        raise DataError(f"{folder.root}: no metrics.jsonl here; name the folder of a run")
    if folder.plots.exists() and not folder.plots.is_dir():
        raise DataError(f"{folder.plots} is not a folder; remove it")
    rows = read_metrics(folder.metrics)
    entries = read_summary(folder)
    stages = _histories(folder, rows)
    page = load_template(Path(__file__).with_name("report.html.j2")).render(
        title=f"Run {folder.root.resolve().name}{', FP8 emulated' * any(row.get(EMULATED) for row in rows)}",
        headings=HEADINGS,
        stages=[_cells(entry) for entry in entries],
        stories=[story for stage in stages if (story := _story(stage, explain))],
        comparison=compare(folder, other) if other else None,
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
        examples=_examples(folder, [stage.name for stage in stages]),
        scale=[{"color": shade(value), "label": f"{value:g}"} for value in (0.0, 0.1, 0.3, 0.6, 1.0, 2.0)],
        versions=entries[-1].versions if entries else versions(),
        config=folder.config.read_text(encoding="utf-8", errors="replace") if folder.config.is_file() else "",
    )
    atomic_write_text(folder.report, page)


def _histories(folder: RunFolder, rows: Sequence[dict[str, Any]]) -> list[StageHistory]:
    """The stages that have metrics, in order."""
    settings = {str(stage.get("name")): stage for stage in read_stages(folder)}
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"], []).append(row)
    return [StageHistory(folder, name, settings.get(name, {}), own) for name, own in by_stage.items()]


def _story(stage: StageHistory, explain: Explain) -> dict[str, Any] | None:
    """What the method of a stage did, with one of its branches where there are any."""
    sentences, tree = explain(stage), draw_tree(stage)
    if not sentences and tree is None:
        return None
    return {"heading": f"{stage.name}: {stage.method.get('name', '')}", "text": " ".join(sentences), "tree": tree}


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
        f"{entry.method} ({entry.precision})" if entry.precision else entry.method,
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
            dumps = list_dumps(directory)
            samples = draw_samples(islice(read_dump(dumps[-1][1]), MAX_LINES)) if dumps else []
            if samples:
                examples.append({"heading": f"{stage}, step {dumps[-1][0]}, {kind} questions", "samples": samples})
                break
    return examples
