#!/usr/bin/env python3
"""Write the report of runs of these examples: tables, one plot for each subject, results.json.

    python examples/smollm2/report.py runs/smollm2/times_tables_dapo runs/smollm2/times_tables_cure ...

Everything is read from the run folders; runs of an earlier `results.json` that are not named stay. Intervals are of
95 % over questions, the answers to one question together (`megatron_entropy.evaluation.metrics.clustered_mean`).
Answers that the verifier could not grade are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_entropy.errors import DataError, UserError
from megatron_entropy.evaluation.metrics import Estimate, clustered_mean
from megatron_entropy.files import atomic_write_text, atomic_writer
from megatron_entropy.monitor.metrics import read_metrics
from megatron_entropy.monitor.plots import new_figure
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.summary import StageSummary, read_summary, versions

SUBJECTS = {"times_tables": "Times tables", "chain_sum": "Chains of sums", "gsm8k": "GSM8K, at most two steps"}
"""By the beginning of a run folder's name."""
COLORS = ("#000000", "#D55E00", "#CC79A7", "#0072B2", "#009E73", "#E69F00")
"""Of Okabe and Ito, which colour-blind readers can tell apart."""

INTRODUCTION = """# SmolLM2-135M on 2 CPU cores: results

Written by `examples/smollm2/report.py` from the folders of the runs. Questions of an evaluation are not trained on;
answers are sampled at temperature 1. Intervals are of 95 %, over questions and samples. Entropy is that of the whole
vocabulary, mean over response tokens. Time is that of a stage with its evaluations. tokens/s are medians over steps: of
the whole step (prompts and responses), and of generation (responses). Memory is the peak of a trainer rank."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: `step` of its stage, entropy in nats, length in tokens, pass@k of the largest k."""

    step: int
    accuracy: Estimate
    pass_at_k: float | None
    entropy: float
    length: float


@dataclass(frozen=True)
class Stage:
    """A finished stage: its evaluations, and medians over its steps of tokens/s; `memory` is GB of a trainer rank."""

    run: str
    name: str
    method: str
    steps: int
    seconds: float
    throughput: float | None
    generate_throughput: float | None
    memory: float | None
    evaluations: list[Evaluation]


def main(arguments: list[str] | None = None) -> None:
    """Write the page, or print in one line what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the page")
    parser.add_argument("--conditions", default="", help="a sentence for the page: what else ran on the machine")
    args = parser.parse_args(arguments)
    try:
        runs = [read_run(RunFolder(path)) for path in args.runs]
        known = {run[0].run: run for run in (*read_results(args.out / "results.json"), *runs)}
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    write_page(args.out, list(known.values()), args.conditions)
    print(f"wrote {args.out / 'README.md'}")


def read_run(folder: RunFolder) -> list[Stage]:
    """Read the finished stages of a run.

    Raises:
        DataError: no stage has finished, or a file of the run cannot be read.
    """
    summaries = read_summary(folder)
    if not summaries:
        raise DataError(f"{folder.root}: no finished stage; train it first")
    rows = read_metrics(folder.metrics)
    return [read_stage(folder, summary, [row for row in rows if row["stage"] == summary.name]) for summary in summaries]


def read_results(path: Path) -> list[list[Stage]]:
    """Read the runs of an earlier page, none if there is no page.

    Raises:
        DataError: the file is not one that this program wrote.
    """
    if not path.exists():
        return []
    runs: dict[str, list[Stage]] = {}
    try:
        for values in json.loads(path.read_text(encoding="utf-8")):
            evaluations = [
                Evaluation(**{**evaluation, "accuracy": Estimate(**evaluation["accuracy"])})
                for evaluation in values["evaluations"]
            ]
            runs.setdefault(values["run"], []).append(Stage(**{**values, "evaluations": evaluations}))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the results of earlier runs ({error}); delete it") from None
    return list(runs.values())


def read_stage(folder: RunFolder, summary: StageSummary, rows: Sequence[Mapping[str, Any]]) -> Stage:
    """Read a stage from its rows and the dumps of its evaluations."""
    steps = [row for row in rows if row["step"]]
    return Stage(
        run=folder.root.name,
        name=summary.name,
        method=summary.method,
        steps=summary.steps,
        seconds=summary.seconds,
        throughput=_median(steps, "perf/throughput"),
        generate_throughput=_median(steps, "perf/generate_throughput"),
        memory=max((row["perf/memory"] for row in steps if row.get("perf/memory")), default=None),
        evaluations=[read_evaluation(folder, row) for row in rows if row.get("eval/accuracy") is not None],
    )


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name)]
    return median(values) if values else None


def read_evaluation(folder: RunFolder, row: Mapping[str, Any]) -> Evaluation:
    """Read one evaluation from its row of metrics and its dump."""
    path = folder.evaluation(row["stage"], row["step"])
    verdicts: dict[int, list[bool]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            if sample["correct"] is not None:
                verdicts.setdefault(sample["group"], []).append(sample["correct"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not the samples of an evaluation ({error})") from None
    passes = {int(name.rpartition("_")[2]): value for name, value in row.items() if name.startswith("eval/pass_at_")}
    return Evaluation(
        step=row["step"],
        accuracy=clustered_mean(list(verdicts.values())),
        pass_at_k=passes[max(passes)] if passes else None,
        entropy=row["eval/entropy"],
        length=row["eval/length"],
    )


def write_page(page: Path, runs: Sequence[Sequence[Stage]], conditions: str) -> None:
    """Write README.md, its plots and results.json into `page`."""
    page.mkdir(parents=True, exist_ok=True)
    lines = [INTRODUCTION + (f" {conditions}" if conditions else ""), ""]
    for subject in dict.fromkeys(_subject(run[0].run) for run in runs):
        members = [run for run in runs if _subject(run[0].run) == subject]
        lines += [f"## {SUBJECTS.get(subject, subject)}", "", *table(members), ""]
        for quantity, label, unit in (("accuracy", "Accuracy", "correct answers (%)"), ("entropy", "Entropy", "nats")):
            name = f"{subject}_{quantity}.png"
            draw(page / name, members, quantity, f"{label}: {SUBJECTS.get(subject, subject)}", unit)
            lines.append(f"![{label.lower()}]({name})")
        lines.append("")
    lines += ["## Versions", "", ", ".join(f"{name} {version}" for name, version in versions().items()) + "."]
    atomic_write_text(page / "README.md", "\n".join(lines) + "\n")
    results = [asdict(stage) for run in runs for stage in run]
    atomic_write_text(page / "results.json", json.dumps(results, indent=1) + "\n")


def _subject(run: str) -> str:
    return next((name for name in SUBJECTS if run.startswith(name)), run)


def table(runs: Sequence[Sequence[Stage]]) -> list[str]:
    """Return the Markdown table of a subject, one row for each stage."""
    lines = [
        "| run | stage | steps | accuracy before (%) | after (%) | pass@k (%) | entropy (nats) | length (tokens) "
        "| minutes | tokens/s: step, generation | memory (GB) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in (stage for run in runs for stage in run):
        first, last = stage.evaluations[0], stage.evaluations[-1]
        cells = [
            f"`{stage.run}`",
            stage.method,
            str(stage.steps),
            _interval(first.accuracy),
            _interval(last.accuracy),
            " → ".join(_number(e.pass_at_k and 100 * e.pass_at_k, 1) for e in (first, last)),
            f"{first.entropy:.2f} → {last.entropy:.2f}",
            f"{first.length:.1f} → {last.length:.1f}",
            f"{stage.seconds / 60:.0f}",
            f"{_number(stage.throughput, 0)}, {_number(stage.generate_throughput, 0)}",
            _number(stage.memory, 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(path: Path, runs: Sequence[Sequence[Stage]], quantity: str, title: str, unit: str) -> None:
    """Draw a quantity of a subject's runs over their steps; a dotted line where a stage begins, bands are intervals."""
    figure, axes = new_figure(title, unit)
    for color, run in zip(COLORS, runs, strict=False):
        start, steps, values, low, high = 0, [], [], [], []
        for stage in run:
            if start:
                axes.axvline(start, color=color, linewidth=0.8, linestyle=":")
            for evaluation in stage.evaluations:
                steps.append(start + evaluation.step)
                accuracy = evaluation.accuracy
                values.append(100 * accuracy.mean if quantity == "accuracy" else evaluation.entropy)
                low.append(100 * accuracy.low)
                high.append(100 * accuracy.high)
            start += stage.steps
        axes.plot(steps, values, color=color, marker="o", markersize=3, label=run[0].run)
        if quantity == "accuracy":
            axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    with atomic_writer(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    main()
