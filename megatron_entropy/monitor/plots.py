"""Plots of the report: accuracy, entropy, length and step time, one panel for each stage.

Each panel is a PNG file of its own, drawn from rows of `metrics.jsonl`; metrics that a run did not log are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_entropy.files import atomic_writer
from megatron_entropy.monitor.timer import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

PHASE_COLORS = dict(
    zip(
        PHASES,
        ("#1f5f8b", "#e9a178", "#5b9bd5", "#7b4f8e", "#a9cce3", "#c8553d", "#4f7942", "#a3c293", "#b8b8b8"),
        strict=True,
    )
)
EVAL_STYLE = {"color": "#1f5f8b", "linewidth": 1.8, "marker": "o", "markersize": 4, "zorder": 3}
TRAIN_STYLE = {"color": "#c8553d", "linewidth": 1.0, "alpha": 0.7, "zorder": 2}


@dataclass(frozen=True)
class Panel:
    """The plot of one stage."""

    stage: str
    file: Path


@dataclass(frozen=True)
class Plot:
    """A quantity with the panels of its stages, in their order."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Quantity:
    """What a plot shows: a metric on eval questions and one on training rollouts.

    `shared`: all panels have the same y axis; off where a stage from random weights would flatten the others.
    """

    name: str
    title: str
    unit: str
    eval_metric: str
    train_metric: str
    scale: float = 1.0
    shared: bool = True


QUANTITIES = (
    Quantity("accuracy", "Accuracy", "correct answers (%)", "eval/accuracy", "reward/accuracy", scale=100.0),
    Quantity("entropy", "Token entropy", "nats per token", "eval/entropy", "policy/entropy", shared=False),
    Quantity("length", "Response length", "tokens", "eval/length", "rollout/length"),
)


def draw_all(rows: Sequence[Row], folder: Path) -> list[Plot]:
    """Draw every plot for which there are values.

    Args:
        rows: rows of `metrics.jsonl`, in its order.
        folder: folder of the files `QUANTITY_STAGE.png`, created where it is missing.

    Returns:
        The plots in the order of the report.
    """
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    plots = [_draw_quantity(quantity, stages, folder) for quantity in QUANTITIES]
    plots.append(Plot("Time of a step", tuple(_draw_times(stages, folder))))
    return [plot for plot in plots if plot.panels]


def _draw_quantity(quantity: Quantity, stages: Mapping[str, Sequence[Row]], folder: Path) -> Plot:
    curves = {stage: _curves(quantity, rows) for stage, rows in stages.items()}
    values = [value for lines in curves.values() for _, points, _ in lines for _, value in points]
    panels = []
    for stage, lines in curves.items():
        if not lines:
            continue
        figure, axes = new_figure(stage, quantity.unit)
        for label, points, style in lines:
            axes.plot(*zip(*points, strict=True), label=label, **style)
        if quantity.shared:
            margin = 0.05 * (max(values) - min(values)) or 1.0
            axes.set_ylim(min(values) - margin, max(values) + margin)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        panels.append(_save(figure, stage, folder / f"{quantity.name}_{stage}.png"))
    return Plot(quantity.title, tuple(panels))


def _curves(quantity: Quantity, rows: Sequence[Row]) -> list[tuple[str, list[tuple[int, float]], Mapping[str, Any]]]:
    """Label, points and style of the curves that have values."""
    curves = []
    for label, metric, style in (
        ("train", quantity.train_metric, TRAIN_STYLE),
        ("eval", quantity.eval_metric, EVAL_STYLE),
    ):
        points = [(row["step"], row[metric] * quantity.scale) for row in rows if row.get(metric) is not None]
        if points:
            curves.append((label, points, {**style, "marker": "o", "markersize": 4} if len(points) == 1 else style))
    return curves


def _draw_times(stages: Mapping[str, Sequence[Row]], folder: Path) -> list[Panel]:
    """Draw the seconds of each phase, stacked, against the step."""
    panels = []
    for stage, rows in stages.items():
        timed = [row for row in rows if row["step"] and row.get("timing/step") is not None]
        if not timed:
            continue
        figure, axes = new_figure(stage, "seconds per step")
        edges = [row["step"] - 0.5 for row in timed] + [timed[-1]["step"] + 0.5]
        top = [0.0] * len(timed)
        for phase in PHASES:
            bottom, seconds = top, [row.get(f"timing/{phase}") or 0.0 for row in timed]
            if any(seconds):
                top = [low + height for low, height in zip(bottom, seconds, strict=True)]
                axes.stairs(top, edges, baseline=bottom, fill=True, label=phase, color=PHASE_COLORS[phase])
        # One step in fifty may stick out (the first compiles and warms up) without flattening the others.
        typical = sorted(top)[max(0, int(0.98 * len(top)) - 1)]
        axes.set_ylim(0, min(max(top), 2 * typical) * 1.05 or 1.0)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        panels.append(_save(figure, stage, folder / f"time_{stage}.png"))
    return panels


def new_figure(title: str, unit: str, *, xlabel: str = "step") -> tuple[Figure, Axes]:
    """Return an empty panel in the style of the reports.

    Args:
        title: at the top left, not read as mathematics.
        unit: label of the y axis.
        xlabel: label of the x axis; steps are whole numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.8, 3.2), dpi=180, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", parse_math=False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(unit)
    if xlabel == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, stage: str, file: Path) -> Panel:
    with atomic_writer(file) as temporary:
        figure.savefig(temporary, format="png")
    return Panel(stage, file)
