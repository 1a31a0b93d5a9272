"""The page of the comparison (see compare.py): tables, plots, and the papers' claims beside what was measured."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from compare_runs import QUANTITIES, VARIANTS, Curve, Variant

from megatron_entropy.monitor.summary import versions

NO_LOWER = 0.02
"""An accuracy counts as no lower when it is at most this much lower: about the sampling error of one evaluation."""
SCALES = {"accuracy": 100.0, "pass@8": 100.0}
UNITS = {"accuracy": "%", "pass@8": "%", "entropy": "nats", "length": "tokens"}
DIGITS = {"accuracy": 1, "pass@8": 1, "entropy": 3, "length": 1}
TITLES = {"accuracy": "Eval accuracy", "entropy": "Token entropy", "length": "Response length", "pass@8": "pass@8"}
AXES = {
    "accuracy": "correct answers (%)",
    "entropy": "nats per token",
    "length": "tokens",
    "pass@8": "questions (%)",
}
SFT_VARIANTS = [variant for variant in VARIANTS if variant.start is None]
RL_VARIANTS = [variant for variant in VARIANTS if variant.start == "sft"]

Curves = Mapping[str, Mapping[int, Curve]]
"""By variant and seed."""


@dataclass(frozen=True)
class Check:
    """A quantity of a variant is `higher`, `lower` or `no lower` than that of another, or than its own at the start."""

    variant: str
    relation: str
    quantity: str
    other: str


@dataclass(frozen=True)
class Claim:
    """A claim of a paper that this comparison can check."""

    text: str
    source: str
    checks: tuple[Check, ...]


CLAIMS = (
    Claim(
        "GRPO: entropy collapses while accuracy rises",
        "arXiv 2505.22617",
        (Check("grpo", "lower", "entropy", "start"), Check("grpo", "higher", "accuracy", "start")),
    ),
    Claim(
        "CURE keeps more entropy than DAPO, at no lower accuracy",
        "arXiv 2508.11016",
        (Check("cure", "higher", "entropy", "dapo"), Check("cure", "no lower", "accuracy", "dapo")),
    ),
    Claim(
        "CurioSFT keeps more entropy than SFT, and GRPO after it ends higher",
        "arXiv 2602.02244",
        (
            Check("curiosft", "higher", "entropy", "sft"),
            Check("grpo_after_curiosft", "higher", "accuracy", "grpo"),
        ),
    ),
    Claim("SENT loses less entropy than GRPO", "arXiv 2512.04359", (Check("sent", "higher", "entropy", "grpo"),)),
    Claim(
        "CER's answers are shorter than GRPO's, at no lower accuracy",
        "arXiv 2510.02249",
        (Check("cer", "lower", "length", "grpo"), Check("cer", "no lower", "accuracy", "grpo")),
    ),
    Claim(
        "KL-Cov keeps more entropy than GRPO, at no lower accuracy",
        "arXiv 2505.22617",
        (Check("kl_cov", "higher", "entropy", "grpo"), Check("kl_cov", "no lower", "accuracy", "grpo")),
    ),
)


def write_page(page: Path, curves: Curves, budget: int, command: str) -> None:
    """Write README.md, its plots and results.json into `page`.

    Args:
        budget: generated tokens at which RL runs are compared.
        command: the command line, for the page.
    """
    page.mkdir(parents=True, exist_ok=True)
    seeds = sorted({seed for runs in curves.values() for seed in runs})
    over = f"mean over {len(seeds)} seeds, band: one standard deviation" if len(seeds) > 1 else "one seed"
    draw_rl(curves, budget, RL_VARIANTS, f"RL from the same SFT model ({over})", page / "rl.png")
    draw_rl(curves, budget, after_sft(), f"GRPO after SFT and after CurioSFT ({over})", page / "after.png")
    draw_sft(curves, page / "sft.png")
    draw_pass_at_k(curves, budget, RL_VARIANTS, page / "pass_at_k.png")
    results = {
        "budget": budget,
        "curves": {name: {seed: rounded(curve) for seed, curve in runs.items()} for name, runs in curves.items()},
    }
    (page / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (page / "README.md").write_text(page_text(curves, budget, seeds, command))


def rounded(curve: Curve) -> dict[str, Any]:
    """Return a curve as JSON with the digits that carry meaning."""
    return json.loads(json.dumps(asdict(curve)), parse_float=lambda number: round(float(number), 5))


def page_text(curves: Curves, budget: int, seeds: Sequence[int], command: str) -> str:
    """Return the text of the page."""
    runs = [run for of_variant in curves.values() for run in of_variant.values()]
    minutes = sum(run.seconds for run in runs) / 60
    over = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    missing = [variant.label for variant in VARIANTS if variant.name not in curves]
    lines = [
        "# The methods side by side",
        "",
        "Written by `tools/compare.py` from the files of the runs. How to read it, and what else was tried:",
        "[NOTES.md](NOTES.md).",
        "",
        "The task is small arithmetic with words and hesitation ([make_compare.py](../make_compare.py)), the model has",
        "1.2 M parameters, the engines are the real ones (Megatron actor, vLLM). A seed has one random model and one",
        "data set. All RL runs start from the same SFT model and are compared where they have generated",
        f"{budget:,} tokens for training (dropped, repeated and branched answers included). Settings common to all and",
        "those of each method are in [compare.toml](compare.toml). Accuracy, entropy and length are those of eval",
        f"questions at temperature 1, 8 answers each; values are at the end of the budget, {over}.",
        "",
        *([f"Not run: {', '.join(missing)}.", ""] if missing else []),
        "## RL from the same SFT model",
        "",
        *table(curves, budget, RL_VARIANTS),
        "",
        "![accuracy, entropy, length, pass@8](rl.png)",
        "",
        "![pass@k](pass_at_k.png)",
        "",
        "## SFT, and GRPO after it",
        "",
        *table(curves, budget, [*SFT_VARIANTS, *after_sft()]),
        "",
        "![accuracy, entropy, pass@8 over SFT](sft.png)",
        "",
        "![GRPO after SFT and after CurioSFT](after.png)",
        "",
        "## Claims",
        "",
        "What the papers claim at their size, and what was measured at this one. *yes*: for every seed (*no lower*: by",
        f"{100 * NO_LOWER:.0f} points at most, on average); *on average*: for the mean, not for every seed.",
        "",
        "| claim | source | measured | holds |",
        "|---|---|---|---|",
    ]
    for claim in CLAIMS:
        judged = [judge(check, curves, budget) for check in claim.checks]
        measured = "; ".join(text for text, _ in judged if text)
        lines.append(f"| {claim.text} | {claim.source} | {measured} | {', '.join(v for _, v in judged)} |")
    lines += [
        "",
        "## How it was made",
        "",
        f"`{command}`: {len(runs)} runs, {minutes:.0f} minutes of run time in all on {os.cpu_count()} cores, the "
        f"longest {max((run.seconds for run in runs), default=0):.0f} s.",
        "",
        ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def final(curves: Curves, variant: str, budget: int, quantity: str) -> dict[int, float]:
    """Return a quantity at the end of each seed's run: for RL, when the budget is spent."""
    return {seed: curve.at(budget, QUANTITIES[quantity]) for seed, curve in curves.get(variant, {}).items()}


def judge(check: Check, curves: Curves, budget: int) -> tuple[str, str]:
    """Return what was measured, in words, and the verdict: `yes`, `on average`, `no`, or `not run`."""
    mine = final(curves, check.variant, budget, check.quantity)
    if check.other == "start":
        first = curves.get(check.variant, {})
        theirs = {seed: QUANTITIES[check.quantity](curve.points[0]) for seed, curve in first.items()}
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
    """Format mean and standard deviation over seeds."""
    scaled = [SCALES.get(quantity, 1.0) * value for value in values]
    digits = DIGITS[quantity]
    if len(scaled) < 2:
        return "".join(f"{value:.{digits}f}" for value in scaled)
    return f"{statistics.mean(scaled):.{digits}f} ± {statistics.stdev(scaled):.{digits}f}"


def label(name: str) -> str:
    """Return a variant's name on the page."""
    return next(variant.label for variant in VARIANTS if variant.name == name)


def after_sft() -> list[Variant]:
    """Return GRPO after each kind of SFT, labelled by it."""
    return [replace(v, label=f"GRPO after {label(v.start or '')}") for v in VARIANTS if v.stages == ("grpo",)]


def table(curves: Curves, budget: int, variants: Sequence[Variant]) -> list[str]:
    """Return the lines of a Markdown table with one row for each variant."""
    lines = [
        "| method | accuracy = pass@1 (%) | pass@8 (%) | entropy (nats) | length (tokens) | steps | time of a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in variants:
        runs = list(curves.get(variant.name, {}).values())
        if not runs:
            continue
        cells = [
            spread(final(curves, variant.name, budget, name).values(), name)
            for name in ("accuracy", "pass@8", "entropy", "length")
        ]
        steps, seconds = (statistics.mean(values) for values in zip(*((r.steps, r.seconds) for r in runs), strict=True))
        lines.append(f"| {variant.label} | {' | '.join(cells)} | {steps:.0f} | {seconds:.0f} s |")
    return lines


def draw_rl(curves: Curves, budget: int, variants: Sequence[Variant], heading: str, path: Path) -> None:
    """Draw accuracy, entropy, length and pass@8 against generated tokens."""
    figure, grid = make_figure(2, 2, heading)
    for axes, quantity in zip(grid.flat, QUANTITIES, strict=True):
        draw(axes, curves, variants, quantity, budget)
        axes.set_xlabel("tokens generated for training")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k" if value else "0")
    save(figure, grid[0, 0], path)


def draw_sft(curves: Curves, path: Path) -> None:
    """Draw SFT and CurioSFT against the step."""
    figure, grid = make_figure(1, 3, "SFT on the same solutions")
    for axes, quantity in zip(grid.flat, ("accuracy", "entropy", "pass@8"), strict=True):
        draw(axes, curves, SFT_VARIANTS, quantity, None)
        axes.set_xlabel("step")
    grid[0, 1].set_ylim(top=1.0)  # a random model's entropy is far above
    save(figure, grid[0, 0], path)


def draw_pass_at_k(curves: Curves, budget: int, variants: Sequence[Variant], path: Path) -> None:
    """Draw pass@k at the end against k, as it is and minus that of the start."""
    figure, grid = make_figure(1, 2, "pass@k: probability that one of k answers is correct")
    for axes, title, is_gain in ((grid[0, 0], "at the end of RL", False), (grid[0, 1], "gain over the start", True)):
        for variant in variants:
            runs = curves.get(variant.name, {})
            if not runs:
                continue
            ks = list(next(iter(runs.values())).points[0].passes)
            values = 100 * np.array(
                [
                    [
                        curve.at(budget, lambda p, k=k: p.passes[k]) - (curve.points[0].passes[k] if is_gain else 0)
                        for k in ks
                    ]
                    for curve in runs.values()
                ]
            )
            deviation = values.std(0, ddof=1) if len(runs) > 1 else None
            axes.errorbar(ks, values.mean(0), deviation, **style(variant), capsize=2)
        decorate(axes, title, "points" if is_gain else AXES["pass@8"])
        axes.set_xlabel("k")
    save(figure, grid[0, 0], path)


def draw(axes: Any, curves: Curves, variants: Sequence[Variant], quantity: str, budget: float | None) -> None:
    """Draw the mean over seeds as a line and one standard deviation on either side as a band.

    Args:
        budget: end of the x axis in tokens; None: at the last common step.
    """
    for variant in variants:
        runs = list(curves.get(variant.name, {}).values())
        if not runs:
            continue
        grid = np.linspace(0, budget, 41) if budget else np.array([point.spent for point in runs[0].points])
        values = SCALES.get(quantity, 1.0) * np.array([[run.at(x, QUANTITIES[quantity]) for x in grid] for run in runs])
        mean, deviation = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else 0 * grid
        axes.fill_between(grid, mean - deviation, mean + deviation, color=variant.color, alpha=0.15, linewidth=0)
        axes.plot(grid, mean, **style(variant), markevery=8 if budget else 1)
    decorate(axes, TITLES[quantity], AXES[quantity])


def style(variant: Variant) -> dict[str, Any]:
    """Return the line style of a variant."""
    return {
        "color": variant.color,
        "marker": variant.marker,
        "markersize": 5,
        "linewidth": 1.8,
        "label": variant.label,
    }


def decorate(axes: Any, title: str, unit: str) -> None:
    """Set title, unit and grid of a plot."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(unit)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def make_figure(rows: int, columns: int, heading: str) -> tuple[Any, Any]:
    """Return an empty figure with a heading, and its grid of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * columns, 3.2 * rows + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, axes: Any, path: Path) -> None:
    """Put the legend of `axes` below the plots and write the file."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path)
