#!/usr/bin/env python3
"""Compares the methods on one small task: same start, same number of generated tokens, several seeds.

    python tools/compare.py [--seeds 1 2 3] [--methods grpo cure] [--out runs/compare] [--page examples/compare]

For each seed it makes data and a random model (`examples/make_compare.py`), trains the model by imitation (SFT, and
again by CurioSFT), and from there by every reinforcement-learning method, each run a `megatron-entropy train` with
settings from `examples/compare/compare.toml`. These runs end once they have generated `--tokens` tokens for training,
whether a method trains on them, drops them or branches from them. Runs that are complete are kept, so the tool can be
stopped and started again.

The page (`README.md` with pictures and `results.json`) is drawn from what the runs wrote, also with runs missing:
`--page-only` draws it anew.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_entropy.config import load
from megatron_entropy.config.schema import Config
from megatron_entropy.methods import METHOD_CONFIGS
from megatron_entropy.monitor.metrics import read_metrics
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.summary import versions

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "examples" / "compare" / "compare.toml"
STOPPED = 128 + signal.SIGTERM
STOP = threading.Event()
"""Set by Ctrl-C or `kill`: all runs are to end."""
POLL = 0.5
"""Seconds between looks at a run's metrics."""
NO_LOWER = 0.02
"""An accuracy counts as no lower when it is at most this much lower: about the sampling error of one evaluation."""


@dataclass(frozen=True)
class Kind:
    """What is compared: stages of the settings file and the start they train from (None: random weights)."""

    name: str
    label: str
    stages: tuple[str, ...]
    start: str | None
    color: str
    marker: str


KINDS = (
    Kind("sft", "SFT", ("sft",), None, "#000000", "o"),
    Kind("curiosft", "CurioSFT", ("curiosft",), None, "#D55E00", "s"),
    Kind("grpo", "GRPO", ("grpo",), "sft", "#000000", "o"),
    Kind("dapo", "DAPO", ("dapo",), "sft", "#0072B2", "s"),
    Kind("cure", "CURE stage 1", ("cure",), "sft", "#D55E00", "^"),
    Kind("sent", "SENT", ("sent_certain", "sent_uncertain"), "sft", "#009E73", "D"),
    Kind("cer", "CER", ("cer",), "sft", "#CC79A7", "v"),
    Kind("kl_cov", "KL-Cov", ("kl_cov",), "sft", "#E69F00", "P"),
    Kind("grpo_after_curiosft", "GRPO after CurioSFT", ("grpo",), "curiosft", "#D55E00", "s"),
)
"""In the order of page and colours (Okabe and Ito's, told apart by colour-blind readers)."""


@dataclass(frozen=True)
class Point:
    """One evaluation: `spent` is generated tokens, or steps of imitation; `passes` is pass@k by k."""

    spent: float
    accuracy: float
    entropy: float
    length: float
    passes: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run, and what it took: wall-clock `seconds`, `steps`, generated `tokens`."""

    points: list[Point]
    seconds: float
    steps: int
    tokens: int

    @classmethod
    def of_run(cls, folder: Path) -> Curve:
        """Read a complete run."""
        rows = read_metrics(RunFolder(folder).metrics)
        tokens, points = 0, []
        for row in rows:
            tokens += round(row.get("rollout/tokens") or 0)
            if row.get("eval/accuracy") is not None:
                passes = {name.rpartition("_")[2]: row[name] for name in row if name.startswith("eval/pass_at_")}
                spent = tokens or row["step"]
                points.append(Point(spent, row["eval/accuracy"], row["eval/entropy"], row["eval/length"], passes))
        return cls(
            points,
            json.loads((folder / "cell.json").read_text())["seconds"],
            sum(row["step"] > 0 for row in rows),
            tokens,
        )

    def at(self, spent: float, quantity: Callable[[Point], float]) -> float:
        """A quantity when so much was spent, between two evaluations on the line that joins them."""
        return float(np.interp(spent, [point.spent for point in self.points], [quantity(p) for p in self.points]))


QUANTITIES: dict[str, Callable[[Point], float]] = {
    "accuracy": lambda point: point.accuracy,
    "entropy": lambda point: point.entropy,
    "length": lambda point: point.length,
    "pass@8": lambda point: point.passes["8"],
}


# ---- running ----


class Failed(Exception):
    """A run ended with an error, whose last lines are the message."""


@dataclass(frozen=True)
class Cell:
    """One run of the comparison: a kind with a seed, its settings, and the tokens it may generate."""

    kind: Kind
    seed: int
    out: Path
    stages: tuple[Config, ...]
    budget: int

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.out / f"seed{self.seed}" / self.kind.name

    @property
    def receipt(self) -> Path:
        """Written when the run is complete."""
        return self.folder / "cell.json"

    @property
    def is_complete(self) -> bool:
        """Whether it was run to its end with these settings."""
        if not self.receipt.exists() or self.file.read_text() != load.to_toml(self.settings):
            return False
        return not self.kind.start or json.loads(self.receipt.read_text())["budget"] >= self.budget

    @property
    def file(self) -> Path:
        """Its settings as it was last started with."""
        return self.folder.with_suffix(".toml")

    @property
    def inputs(self) -> Path:
        """Data and random model of the seed."""
        return self.out / f"seed{self.seed}" / "inputs"

    @property
    def settings(self) -> list[Config]:
        """Those of its stages, with this seed's files."""
        return [self._at_home(stage) for stage in self.stages]

    def _at_home(self, stage: Config) -> Config:
        seed_folder = self.out / f"seed{self.seed}"
        start = seed_folder / self.kind.start / "hf" if self.kind.start else seed_folder / "inputs" / "model"
        files = {
            key: [str(self.inputs / Path(name).name) for name in getattr(stage.data, key)] for key in ("train", "eval")
        }
        return stage.model_copy(
            update={
                "seed": self.seed,
                "output": str(self.folder),
                "model": stage.model.model_copy(update={"path": str(start)}),
                "data": stage.data.model_copy(update=files),
            }
        )


def make_inputs(cell: Cell) -> None:
    """Data and random model of the cell's seed, and semantic entropies where it wants them, unless they are there."""
    if not (cell.inputs / "model" / "model.safetensors").exists():
        run_script("examples/make_compare.py", "--out", cell.inputs, "--seed", cell.seed)
    with_entropies = cell.inputs / "practice-se.jsonl"
    if str(with_entropies) in cell.settings[0].data.train and not with_entropies.exists():
        stage = cell.settings[0]
        run_script(
            "tools/semantic_entropy.py", stage.model.path, cell.inputs / "practice.jsonl", "--out", with_entropies,
            "--verifier", stage.reward.verifier, "--max-tokens", stage.rollout.max_response_tokens,
            "--max-prompt-tokens", stage.data.max_prompt_tokens,
            "--seed", cell.seed, "--samples", 8,
        )  # fmt: skip


def run_script(name: str, *arguments: object) -> None:
    """Run a script of this repository.

    Raises:
        Failed: it ended with an error.
    """
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{name}: exit code {done.returncode}\n" + "\n".join(done.stderr.splitlines()[-5:]))


def run_cell(cell: Cell, tell: Callable[[float], None]) -> None:
    """Train one cell; practice ends at the first evaluation that finds the budget spent.

    Args:
        tell: is told the share that is done.
    Raises:
        Failed: it ended with an error.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    cell.receipt.unlink(missing_ok=True)
    load.write(cell.settings, cell.file)
    log = cell.folder.with_suffix(".log")
    command = [sys.executable, "-W", "ignore", "-m", "megatron_entropy", "train", str(cell.file), "--overwrite"]
    begin = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            is_spent = watch(process, cell, tell)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
    if code != (STOPPED if is_spent else 0):
        raise Failed(f"{cell.folder}: exit code {code}\n" + "\n".join(log.read_text().splitlines()[-5:]))
    if cell.kind.start and not is_spent:
        raise Failed(
            f"{cell.folder}: {cell.stages[-1].steps} steps generate too few tokens; raise `steps` in {SETTINGS}"
        )
    done = {"seconds": time.perf_counter() - begin, "budget": cell.budget}
    cell.receipt.write_text(json.dumps(done) + "\n")


def watch(process: subprocess.Popen, cell: Cell, tell: Callable[[float], None]) -> bool:
    """Follow a run to its end, and stop it when the budget is spent; whether it was."""
    metrics = RunFolder(cell.folder).metrics
    while process.poll() is None:
        if STOP.wait(POLL):
            process.terminate()
            break
        rows = read_metrics(metrics)
        if not rows:
            continue
        tokens = sum(row.get("rollout/tokens") or 0 for row in rows)
        tell(tokens / cell.budget if cell.kind.start else rows[-1]["step"] / cell.stages[-1].steps)
        if cell.kind.start and tokens >= cell.budget and rows[-1].get("eval/accuracy") is not None:
            process.terminate()
            return True
    return False


def run_all(cells: Sequence[Cell], jobs: int) -> list[str]:
    """Run what is not complete, `jobs` at a time, starts before what needs them; returns what failed."""
    failures: list[str] = []
    futures: dict[tuple[str, int], Future] = {}
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(jobs) as threads:
        total = bar.add_task("all runs", total=len(cells))
        inputs = threading.Lock()

        def work(cell: Cell) -> None:
            task = bar.add_task(f"seed {cell.seed}: {cell.kind.label}", total=1.0)
            try:
                if cell.kind.start and (start := futures.get((cell.kind.start, cell.seed))):
                    start.result()  # was taken up before this one
                if not cell.is_complete:
                    with inputs:
                        make_inputs(cell)
                    run_cell(cell, lambda share: bar.update(task, completed=share))
            except Exception as error:
                failures.append(str(error))
                raise
            finally:
                bar.remove_task(task)
                bar.advance(total)

        for cell in cells:
            futures[cell.kind.name, cell.seed] = threads.submit(work, cell)
        try:
            wait(futures.values())
        except KeyboardInterrupt:
            STOP.set()
            threads.shutdown(cancel_futures=True)
            raise
    return failures


# ---- the page ----


@dataclass(frozen=True)
class Check:
    """A quantity of one kind against another's (or its own at the start): `higher`, `lower` or `no lower`."""

    kind: str
    relation: str
    quantity: str
    other: str


@dataclass(frozen=True)
class Direction:
    """What a paper claims and can be seen here."""

    claim: str
    source: str
    checks: tuple[Check, ...]


DIRECTIONS = (
    Direction(
        "GRPO: entropy collapses while accuracy rises",
        "arXiv 2505.22617",
        (Check("grpo", "lower", "entropy", "start"), Check("grpo", "higher", "accuracy", "start")),
    ),
    Direction(
        "CURE keeps more entropy than DAPO, at no lower accuracy",
        "arXiv 2508.11016",
        (Check("cure", "higher", "entropy", "dapo"), Check("cure", "no lower", "accuracy", "dapo")),
    ),
    Direction(
        "CurioSFT keeps more entropy than SFT, and GRPO after it ends higher",
        "arXiv 2602.02244",
        (
            Check("curiosft", "higher", "entropy", "sft"),
            Check("grpo_after_curiosft", "higher", "accuracy", "grpo"),
        ),
    ),
    Direction("SENT loses less entropy than GRPO", "arXiv 2512.04359", (Check("sent", "higher", "entropy", "grpo"),)),
    Direction(
        "CER's answers are shorter than GRPO's, at no lower accuracy",
        "arXiv 2510.02249",
        (Check("cer", "lower", "length", "grpo"), Check("cer", "no lower", "accuracy", "grpo")),
    ),
    Direction(
        "KL-Cov keeps more entropy than GRPO, at no lower accuracy",
        "arXiv 2505.22617",
        (Check("kl_cov", "higher", "entropy", "grpo"), Check("kl_cov", "no lower", "accuracy", "grpo")),
    ),
)
SCALES = {"accuracy": 100.0, "pass@8": 100.0}
UNITS = {"accuracy": "%", "pass@8": "%", "entropy": "nats", "length": "tokens"}
DIGITS = {"accuracy": 1, "pass@8": 1, "entropy": 3, "length": 1}

Curves = Mapping[str, Mapping[int, Curve]]
"""By kind and seed."""


def final(curves: Curves, kind: str, budget: int, quantity: str) -> dict[int, float]:
    """A quantity at the end, for each seed: of practice, when the budget is spent."""
    return {seed: curve.at(budget, QUANTITIES[quantity]) for seed, curve in curves.get(kind, {}).items()}


def judge(check: Check, curves: Curves, budget: int) -> tuple[str, str]:
    """What was measured, in words, and the verdict: `yes`, `on average`, `no`, or `not run`."""
    mine = final(curves, check.kind, budget, check.quantity)
    if check.other == "start":
        theirs = {
            seed: QUANTITIES[check.quantity](curve.points[0]) for seed, curve in curves.get(check.kind, {}).items()
        }
    else:
        theirs = final(curves, check.other, budget, check.quantity)
    seeds = sorted(set(mine) & set(theirs))
    if not seeds:
        return "", "not run"
    differences = [mine[seed] - theirs[seed] for seed in seeds]
    sign = -1 if check.relation == "lower" else 1
    if check.relation == "no lower":
        verdict = "yes" if statistics.mean(differences) >= -NO_LOWER else "no"
    elif min(sign * difference for difference in differences) > 0:
        verdict = "yes"
    else:
        verdict = "on average" if sign * statistics.mean(differences) > 0 else "no"
    show = f"{{:+.{DIGITS[check.quantity]}f}}"
    each = ", ".join(show.format(SCALES.get(check.quantity, 1.0) * difference) for difference in differences)
    here, there = (spread([values[seed] for seed in seeds], check.quantity) for values in (mine, theirs))
    other = "at the start" if check.other == "start" else f"of {label(check.other)}"
    unit = UNITS[check.quantity]
    return f"{check.quantity} {here} against {there} {unit} {other}; seed by seed {each}", verdict


def spread(values: Iterable[float], quantity: str) -> str:
    """Mean and standard deviation over seeds."""
    scaled = [SCALES.get(quantity, 1.0) * value for value in values]
    digits = DIGITS[quantity]
    if len(scaled) < 2:
        return "".join(f"{value:.{digits}f}" for value in scaled)
    return f"{statistics.mean(scaled):.{digits}f} ± {statistics.stdev(scaled):.{digits}f}"


def label(kind: str) -> str:
    """How the page calls a kind."""
    return next(entry.label for entry in KINDS if entry.name == kind)


def after() -> list[Kind]:
    """GRPO after each way to imitate."""
    return [replace(kind, label=f"GRPO after {label(kind.start or '')}") for kind in KINDS if kind.stages == ("grpo",)]


def table(curves: Curves, budget: int, kinds: Sequence[Kind]) -> list[str]:
    """One line per kind."""
    lines = [
        "| method | accuracy = pass@1 (%) | pass@8 (%) | entropy (nats) | length (tokens) | steps | time of a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        runs = list(curves.get(kind.name, {}).values())
        if not runs:
            continue
        cells = [
            spread(final(curves, kind.name, budget, name).values(), name)
            for name in ("accuracy", "pass@8", "entropy", "length")
        ]
        steps = statistics.mean(run.steps for run in runs)
        lines.append(
            f"| {kind.label} | {' | '.join(cells)} | {steps:.0f} | {statistics.mean(r.seconds for r in runs):.0f} s |"
        )
    return lines


def draw(axes: Any, curves: Curves, kinds: Sequence[Kind], quantity: str, last: float | None) -> None:
    """Mean over seeds as a line, one standard deviation either side as a band."""
    for kind in kinds:
        runs = list(curves.get(kind.name, {}).values())
        if not runs:
            continue
        end = last or min(run.points[-1].spent for run in runs)
        grid = np.linspace(0, end, 41) if last else np.array([point.spent for point in runs[0].points])
        values = SCALES.get(quantity, 1.0) * np.array([[run.at(x, QUANTITIES[quantity]) for x in grid] for run in runs])
        mean, deviation = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else 0 * grid
        axes.fill_between(grid, mean - deviation, mean + deviation, color=kind.color, alpha=0.15, linewidth=0)
        axes.plot(
            grid,
            mean,
            color=kind.color,
            marker=kind.marker,
            markersize=5,
            markevery=8 if last else 1,
            linewidth=1.8,
            label=kind.label,
        )
    dress(axes, quantity)


def dress(axes: Any, quantity: str) -> None:
    """Title, unit and grid of one picture."""
    titles = {
        "accuracy": "Held-out accuracy",
        "entropy": "Token entropy",
        "length": "Answer length",
        "pass@8": "pass@8",
    }
    units = {
        "accuracy": "correct answers (%)",
        "entropy": "nats per token",
        "length": "tokens",
        "pass@8": "questions (%)",
    }
    axes.set_title(titles[quantity], loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(units[quantity])
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def figure(rows: int, columns: int, heading: str) -> tuple[Any, Any]:
    """An empty figure with a heading."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(5.0 * columns, 3.2 * rows + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(made)
    made.suptitle(heading, x=0.01, ha="left", fontsize=12)
    return made, made.subplots(rows, columns, squeeze=False)


def thousands(value: float, place: int) -> str:
    """A tick of an axis of tokens."""
    return f"{value / 1000:.0f}k" if value else "0"


def finish(made: Any, axes: Any, path: Path) -> None:
    """A legend below the axes, and the file."""
    handles, labels = axes.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    made.savefig(path)


def draw_practice(curves: Curves, budget: int, kinds: Sequence[Kind], heading: str, path: Path) -> None:
    """Accuracy, entropy, length and pass@8 against generated tokens."""
    made, grid = figure(2, 2, heading)
    for axes, quantity in zip(grid.flat, QUANTITIES, strict=True):
        draw(axes, curves, kinds, quantity, budget)
        axes.set_xlabel("tokens generated for training")
        axes.xaxis.set_major_formatter(thousands)
    finish(made, grid[0, 0], path)


def draw_imitation(curves: Curves, path: Path) -> None:
    """The two ways to imitate."""
    made, grid = figure(1, 3, "Imitation of the same solutions")
    kinds = [kind for kind in KINDS if kind.start is None]
    for axes, quantity in zip(grid.flat, ("accuracy", "entropy", "pass@8"), strict=True):
        draw(axes, curves, kinds, quantity, None)
        axes.set_xlabel("step")
    grid[0, 1].set_ylim(top=1.0)  # a random model's entropy is far above
    finish(made, grid[0, 0], path)


def draw_passes(curves: Curves, budget: int, kinds: Sequence[Kind], path: Path) -> None:
    """pass@k at the end, against k."""
    made, grid = figure(1, 2, "pass@k: chance that one of k answers is right")
    start = {seed: curve.points[0] for seed, curve in curves.get("grpo", {}).items()}
    for axes, title, quantities in (
        (grid[0, 0], "at the end of practice", None),
        (grid[0, 1], "above the start", start),
    ):
        for kind in kinds:
            runs = curves.get(kind.name, {})
            if not runs:
                continue
            ks = list(next(iter(runs.values())).points[0].passes)
            values = 100 * np.array(
                [
                    [
                        curve.at(budget, lambda p, k=k: p.passes[k]) - (curve.points[0].passes[k] if quantities else 0)
                        for k in ks
                    ]
                    for curve in runs.values()
                ]
            )
            axes.errorbar(
                ks,
                values.mean(0),
                values.std(0, ddof=1) if len(runs) > 1 else None,
                color=kind.color,
                marker=kind.marker,
                markersize=5,
                linewidth=1.8,
                capsize=2,
                label=kind.label,
            )
        dress(axes, "pass@8")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_ylabel("points" if quantities else "questions (%)")
        axes.set_xlabel("k")
    finish(made, grid[0, 0], path)


def write_page(page: Path, curves: Curves, budget: int, command: str) -> None:
    """Write README.md, its pictures and results.json into `page`."""
    page.mkdir(parents=True, exist_ok=True)
    seeds = sorted({seed for runs in curves.values() for seed in runs})
    practice = [kind for kind in KINDS if kind.start == "sft"]
    both = after()
    over = f"mean over {len(seeds)} seeds, band: one standard deviation" if len(seeds) > 1 else "one seed"
    draw_practice(curves, budget, practice, f"Practice from the same SFT start ({over})", page / "practice.png")
    draw_practice(curves, budget, both, f"GRPO after SFT and after CurioSFT ({over})", page / "after.png")
    draw_imitation(curves, page / "imitation.png")
    draw_passes(curves, budget, practice, page / "pass_at_k.png")
    results = {
        "budget": budget,
        "curves": {kind: {seed: asdict_of(curve) for seed, curve in runs.items()} for kind, runs in curves.items()},
    }
    (page / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (page / "README.md").write_text(page_text(curves, budget, seeds, command))


def asdict_of(curve: Curve) -> dict[str, Any]:
    """A curve as JSON, to the digits that mean something."""
    text = json.dumps(asdict(curve))
    return json.loads(text, parse_float=lambda number: round(float(number), 5))


def page_text(curves: Curves, budget: int, seeds: Sequence[int], command: str) -> str:
    """The page itself."""
    runs = [run for of_kind in curves.values() for run in of_kind.values()]
    hours = sum(run.seconds for run in runs) / 60
    over = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    missing = [kind.label for kind in KINDS if kind.name not in curves]
    lines = [
        "# The methods side by side",
        "",
        "Written by `tools/compare.py` from what the runs wrote; nothing on this page is typed in. How to read it, and",
        "what was tried besides: [NOTES.md](NOTES.md).",
        "",
        "The task is small arithmetic with words and hesitation ([make_compare.py](../make_compare.py)), the model has",
        "1.2 M parameters, the engines are the real ones (Megatron actor, vLLM). A seed has one random model and one",
        "data set; all practice starts from the same SFT model and is compared where it has generated",
        f"{budget:,} tokens for training (dropped, repeated and branched answers included). Settings common to all and",
        "those of each method are in [compare.toml](compare.toml). Accuracy, entropy and length are of held-out",
        f"questions at temperature 1, 8 answers each; values are at the end of the budget, {over}.",
        "",
        *([f"Not run: {', '.join(missing)}.", ""] if missing else []),
        "## Practice from the same start",
        "",
        *table(curves, budget, [kind for kind in KINDS if kind.start == "sft"]),
        "",
        "![accuracy, entropy, length, pass@8](practice.png)",
        "",
        "![pass@k](pass_at_k.png)",
        "",
        "## Imitation, and GRPO after it",
        "",
        *table(curves, budget, [*(kind for kind in KINDS if kind.start is None), *after()]),
        "",
        "![accuracy, entropy, pass@8 over imitation](imitation.png)",
        "",
        "![GRPO after SFT and after CurioSFT](after.png)",
        "",
        "## Directions",
        "",
        "What the papers claim at their size, and what was measured at this one. *yes*: for every seed (*no lower*: by",
        f"{100 * NO_LOWER:.0f} points at most, on average); *on average*: for the mean, not for every seed.",
        "",
        "| claim | source | measured | shows |",
        "|---|---|---|---|",
    ]
    for direction in DIRECTIONS:
        judged = [judge(check, curves, budget) for check in direction.checks]
        measured = "; ".join(text for text, _ in judged if text)
        lines.append(f"| {direction.claim} | {direction.source} | {measured} | {', '.join(v for _, v in judged)} |")
    lines += [
        "",
        "## How it was made",
        "",
        f"`{command}`: {len(runs)} runs, {hours:.0f} minutes of run time in all on {os.cpu_count()} cores, the longest "
        f"{max((run.seconds for run in runs), default=0):.0f} s.",
        "",
        ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is missing, write the page; exit code 1 if a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    practised = [kind.name for kind in KINDS]
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--methods", nargs="+", choices=practised, default=practised, metavar="METHOD", help=", ".join(practised)
    )
    parser.add_argument("--tokens", type=int, default=240_000, help="generated for training by each run of practice")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--page", type=Path, default=SETTINGS.parent, help="folder of the page")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    stages = {stage.name: stage for stage in load.load(SETTINGS, [], METHOD_CONFIGS)}
    wanted = {*chosen.methods, *(kind.start for kind in KINDS if kind.name in chosen.methods)}
    kinds = [kind for kind in KINDS if kind.name in wanted]
    kinds.sort(key=lambda kind: kind.start is not None)
    cells = [
        Cell(kind, seed, chosen.out, tuple(stages[name] for name in kind.stages), chosen.tokens)
        for seed in chosen.seeds
        for kind in kinds
    ]
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // chosen.jobs))
    )  # of a run's ranks
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failures = [] if chosen.page_only else run_all(cells, chosen.jobs)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    curves: dict[str, dict[int, Curve]] = {}
    for cell in sorted(cells, key=lambda cell: KINDS.index(cell.kind)):
        if cell.is_complete:
            curves.setdefault(cell.kind.name, {})[cell.seed] = Curve.of_run(cell.folder)
    if curves:
        options = " ".join(argument for argument in sys.argv[1:] if argument != "--page-only")
        write_page(chosen.page, curves, chosen.tokens, f"python tools/compare.py {options}".strip())
        print(chosen.page / "README.md")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
