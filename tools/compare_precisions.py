#!/usr/bin/env python3
"""Train the demo in bfloat16 and in every emulated FP8 recipe, and draw entropy and accuracy of all runs on one page.

    python tools/compare_precisions.py [--inputs runs/quickstart/inputs] [--out runs/precision] [--only bf16 mxfp8]

Each run is `megatron-entropy train` with examples/quickstart.toml, quickstart_plain.toml and precision/short.toml, and
`--actor.fp8.recipe=NAME --actor.fp8.emulate=true`: SFT, then DAPO, from the same weights, on the same questions.
Complete runs are kept. The page (`README.md`, `curves.png`, `results.json`) is built from the runs that there are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare_page import make_figure

from megatron_entropy.evaluation.metrics import clustered_mean
from megatron_entropy.files import atomic_write_text
from megatron_entropy.monitor.metrics import read_metrics
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.summary import versions

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SETTINGS = (
    EXAMPLES / "quickstart.toml",
    EXAMPLES / "quickstart_plain.toml",
    EXAMPLES / "precision" / "short.toml",
)
BLOCK_SCALES = ["--actor.fp8.recipe=blockwise", "--actor.fp8.block_scales=fp32"]
PRECISIONS: dict[str, list[str]] = {
    "bf16": [],
    "current, emulated": ["--actor.fp8.recipe=current", "--actor.fp8.emulate=true"],
    "delayed, emulated": ["--actor.fp8.recipe=delayed", "--actor.fp8.emulate=true"],
    "blockwise, emulated": ["--actor.fp8.recipe=blockwise", "--actor.fp8.emulate=true"],
    "blockwise_fp32, emulated": [*BLOCK_SCALES, "--actor.fp8.emulate=true"],
    "mxfp8, emulated": ["--actor.fp8.recipe=mxfp8", "--actor.fp8.emulate=true"],
}
"""Name on the page -> settings."""
COLORS = ("#222222", "#1f5f8b", "#c8553d", "#4f7942", "#7b4f8e", "#e9a178")
QUANTITIES = {
    "accuracy": ("eval/accuracy", "correct answers (%)", 100.0),
    "entropy": ("eval/entropy", "entropy on eval questions (nats)", 1.0),
    "training entropy": ("policy/entropy", "entropy of trained tokens (nats)", 1.0),
    "gradient norm": ("train/grad_norm", "gradient norm", 1.0),
}
"""Panel -> metric, unit, scale."""
STAGES = ("sft", "rl")

Rows = dict[str, list[dict[str, Any]]]
"""Rows of `metrics.jsonl` by precision."""


def main() -> int:
    """Make the missing runs, write the page; exit code 1 if a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    names = [name.partition(",")[0] for name in PRECISIONS]
    parser.add_argument("--inputs", type=Path, default=Path("runs/quickstart/inputs"), help="by make_arithmetic.py")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"), help="folder of the runs")
    parser.add_argument("--page", type=Path, default=EXAMPLES / "precision", help="folder of the page")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--page-only", action="store_true", help="build the page without running anything")
    args = parser.parse_args()
    failed = [
        name
        for name in PRECISIONS
        if not args.page_only and name.partition(",")[0] in args.only and not train(name, args.inputs, args.out)
    ]
    for name in failed:
        print(f"error: the run {name} failed, see above", file=sys.stderr)
    rows: Rows = {}
    for name in PRECISIONS:
        folder = run_folder(args.out, name)
        if folder.summary.exists():
            rows[name] = [{**row, "stage": str(row["stage"])} for row in read_metrics(folder.metrics)]
    if rows:
        write_page(args.page, rows, args.out)
        print(args.page / "README.md")
    return int(bool(failed))


def run_folder(out: Path, name: str) -> RunFolder:
    """Return the folder of a precision's run."""
    return RunFolder(out / name.partition(",")[0])


def train(name: str, inputs: Path, out: Path) -> bool:
    """Train one run unless it is complete; returns whether it is."""
    folder = run_folder(out, name)
    if folder.summary.exists() and len(json.loads(folder.summary.read_text())["stages"]) == len(STAGES):
        return True
    data = [f"--model.path={inputs}/model", f"--data.train={inputs}/train.jsonl", f"--data.eval={inputs}/eval.jsonl"]
    command = [sys.executable, "-m", "megatron_entropy", "train", *map(str, SETTINGS), f"--output={folder.root}"]
    return subprocess.run([*command, *data, *PRECISIONS[name]]).returncode == 0


def write_page(page: Path, rows: Rows, out: Path) -> None:
    """Write README.md, curves.png and results.json."""
    page.mkdir(parents=True, exist_ok=True)
    figure, grid = make_figure(len(STAGES), len(QUANTITIES), "Training in emulated FP8: SFT above, DAPO below")
    for line, stage in zip(grid, STAGES, strict=True):
        for axes, (title, (metric, unit, scale)) in zip(line, QUANTITIES.items(), strict=True):
            for color, (name, found) in zip(COLORS, rows.items(), strict=False):
                points = curve(found, stage, metric)
                axes.plot(
                    [s for s, _ in points], [scale * v for _, v in points], color=color, label=name, linewidth=1.3
                )
            axes.set_title(f"{title}, {stage}", loc="left", fontsize=10)
            axes.set_ylabel(unit, fontsize=8)
            axes.set_xlabel("step", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(page / "curves.png", dpi=110)
    curves = {
        name: {
            f"{stage} {metric}": curve(found, stage, metric) for stage in STAGES for metric, _, _ in QUANTITIES.values()
        }
        for name, found in rows.items()
    }
    content = {"emulated": True, "versions": versions(), "curves": curves}
    atomic_write_text(page / "results.json", json.dumps(content) + "\n")
    atomic_write_text(page / "README.md", page_text(rows, out))


def curve(rows: list[dict[str, Any]], stage: str, metric: str) -> list[tuple[int, float]]:
    """Return step and value where the metric was logged."""
    return [
        (row["step"], round(row[metric], 5)) for row in rows if row["stage"] == stage and row.get(metric) is not None
    ]


def page_text(rows: Rows, out: Path) -> str:
    """Return the text of the page."""
    lines = [
        "# Training in emulated FP8",
        "",
        "The demo's plain stages, shortened: 100 steps of SFT, 10 of DAPO, from the same random weights on the same "
        "questions, one seed, on a CPU. FP8 is EMULATED: the linear layers round their operands to 8 bits and back; "
        "nothing here ran on a GPU. The engines do not sample in FP8.",
        "",
        "```",
        "python tools/compare_precisions.py    # after `make demo`, whose questions it takes",
        "```",
        "",
        "![entropy and accuracy of every precision](curves.png)",
        "",
        "| precision | accuracy after SFT (%) | after RL (%) | entropy after SFT (nats) | after RL (nats) |",
        "|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        cells = [accuracy(run_folder(out, name), stage, found) for stage in STAGES]
        cells += [f"{last(found, stage, 'eval/entropy'):.4f}" for stage in STAGES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Intervals are of 95 %, over the evaluation's questions, four answers to each. One seed: another one moves",
    ]
    lines += ["the numbers as well, so a recipe differs from bf16 here only where the intervals are apart."]
    return "\n".join(lines) + "\n"


def accuracy(folder: RunFolder, stage: str, rows: list[dict[str, Any]]) -> str:
    """Return a stage's last accuracy in percent with its interval, from the dump of the evaluation."""
    step, _ = curve(rows, stage, "eval/accuracy")[-1]
    verdicts: dict[int, list[bool]] = {}
    for line in folder.evaluation(stage, step).read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        verdicts.setdefault(sample["group"], []).append(bool(sample["correct"]))
    estimate = clustered_mean(list(verdicts.values()))
    return f"{100 * estimate.mean:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def last(rows: list[dict[str, Any]], stage: str, metric: str) -> float:
    """Return the last value of a metric in a stage; NaN if there is none."""
    return ([value for _, value in curve(rows, stage, metric)] or [float("nan")])[-1]


if __name__ == "__main__":
    sys.exit(main())
