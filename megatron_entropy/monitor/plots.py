"""The report's four pictures: accuracy, entropy, length and time against step, all stages on one axis.

Each is drawn from rows of `metrics.jsonl` and copes with what a run did not log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

STAGE_COLORS = ("#1f5f8b", "#c8553d", "#4f7942", "#7b4f8e", "#8a6d3b")
PART_COLORS = {
    "generate": "#1f5f8b",
    "score": "#5b9bd5",
    "reward": "#a9cce3",
    "update": "#c8553d",
    "push": "#e9a178",
    "evaluate": "#4f7942",
    "save": "#a3c293",
    "other": "#b8b8b8",
}
"""Parts of a step from bottom to top; parts of other names come after `save` in grey."""


@dataclass(frozen=True)
class Curve:
    """One quantity of a picture: `evaluated` on held-out questions, or else measured on what a step trained on."""

    metric: str
    label: str
    evaluated: bool
    scale: float = 1.0


@dataclass(frozen=True)
class Picture:
    """A file of `plots/`, what its axis says, and its curves."""

    file: str
    title: str
    unit: str
    curves: tuple[Curve, ...]


PICTURES = (
    Picture(
        "accuracy.png",
        "Accuracy",
        "correct answers (%)",
        (Curve("eval/accuracy", "held-out", True, 100.0), Curve("reward/accuracy", "training rollouts", False, 100.0)),
    ),
    Picture(
        "entropy.png",
        "Mean token entropy",
        "nats per token",
        (Curve("eval/entropy", "held-out", True), Curve("policy/entropy", "training batch", False)),
    ),
    Picture(
        "length.png",
        "Mean response length",
        "tokens",
        (Curve("eval/length", "held-out", True), Curve("rollout/length", "training rollouts", False)),
    ),
)


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures for which there is something to show into `folder`.

    Args:
        rows: of `metrics.jsonl`, in its order.
        folder: is made where it is missing.

    Returns:
        The files written, in the order of the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for picture in PICTURES:
        if any(row.get(curve.metric) is not None for row in rows for curve in picture.curves):
            files.append(_draw_curves(rows, picture, folder / picture.file))
    if any(row["step"] and name.startswith("timing/") and name != "timing/step" for row in rows for name in row):
        files.append(_draw_time(rows, folder / "time.png"))
    return files


def stage_offsets(rows: Sequence[Row]) -> dict[str, int]:
    """Where each stage's step 0 lies on the common axis: after the last step of the stages before it."""
    last: dict[str, int] = {}
    for row in rows:
        last[row["stage"]] = max(last.get(row["stage"], 0), row["step"])
    offsets, position = {}, 0
    for stage, steps in last.items():
        offsets[stage] = position
        position += steps
    return offsets


def _draw_curves(rows: Sequence[Row], picture: Picture, path: Path) -> Path:
    figure, axes = _figure(picture.title, picture.unit)
    offsets = stage_offsets(rows)
    for curve in picture.curves:
        labelled = False
        for number, (stage, offset) in enumerate(offsets.items()):
            points = [
                (offset + row["step"], row[curve.metric] * curve.scale)
                for row in rows
                if row["stage"] == stage and row.get(curve.metric) is not None
            ]
            if not points:
                continue
            style: dict[str, Any] = {"color": STAGE_COLORS[number % len(STAGE_COLORS)]}
            if curve.evaluated:
                style |= {"marker": "o", "markersize": 4, "linewidth": 1.8, "zorder": 3}
            else:
                style |= {"linewidth": 1.0, "alpha": 0.45, "zorder": 2}
            axes.plot(*zip(*points, strict=True), label=None if labelled else curve.label, **style)
            labelled = True
    _ink_in_grey(axes)
    return _finish(figure, axes, rows, path)


def _ink_in_grey(axes: Axes) -> None:
    """A legend whose lines are grey: colour tells the stage, the kind of line what was measured."""
    legend = axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    for handle in legend.get_lines():
        handle.set_color("#444444")


def _draw_time(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = _figure("Where a step's time goes", "seconds")
    offsets = stage_offsets(rows)
    timed = [row for row in rows if row["step"] and any(name.startswith("timing/") for name in row)]
    present = {name.removeprefix("timing/") for row in timed for name in row if name.startswith("timing/")} - {"step"}
    known = [part for part in PART_COLORS if part in present and part != "other"]
    parts = known + sorted(present - set(PART_COLORS)) + (["other"] if "other" in present else [])
    positions = [offsets[row["stage"]] + row["step"] - 0.5 for row in timed]
    bottom = [0.0] * len(timed)
    for part in parts:
        heights = [row.get(f"timing/{part}") or 0.0 for row in timed]
        axes.bar(positions, heights, width=1.0, bottom=bottom, label=part, color=PART_COLORS.get(part, "#888888"), lw=0)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    if bottom:
        # One step in fifty may stick out (the first compiles and warms up) without flattening the others.
        typical = sorted(bottom)[max(0, int(0.98 * len(bottom)) - 1)]
        axes.set_ylim(0, min(max(bottom), 2 * typical) * 1.05 or 1.0)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, reverse=True)
    return _finish(figure, axes, rows, path)


def _figure(title: str, unit: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=22)
    axes.set_xlabel("step of the stage")
    axes.set_ylabel(unit)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Figure, axes: Axes, rows: Sequence[Row], path: Path) -> Path:
    """Mark the stages above the axes, count steps per stage below, and save."""
    offsets = stage_offsets(rows)
    names = list(offsets)
    total = max([offsets[row["stage"]] + row["step"] for row in rows], default=0)
    ends = [*list(offsets.values())[1:], total]
    ticks: dict[float, str] = {}
    for number, (name, end) in enumerate(zip(names, ends, strict=True)):
        start = offsets[name]
        color = STAGE_COLORS[number % len(STAGE_COLORS)]
        if number:
            axes.axvline(start, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            name,
            ((start + end) / 2, 1.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            color=color,
            fontweight="bold",
            fontsize=10,
        )
        for step in _round_steps(end - start, wanted=max(2, round(8 * (end - start) / max(total, 1)))):
            ticks[start + step] = str(step)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(-0.01 * total - 0.5, total * 1.01 + 0.5)
    figure.savefig(path)
    return path


def _round_steps(last: int, wanted: int) -> list[int]:
    """Round step numbers after 0 and up to `last`, about `wanted` of them."""
    spacing = next(unit * 10**power for power in range(9) for unit in (1, 2, 5) if unit * 10**power * wanted >= last)
    return list(range(spacing, last + 1, spacing)) if last >= spacing else [last]
