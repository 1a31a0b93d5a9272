"""Plots of an evaluation's page: TECA of right and wrong answers, accuracy against entropy and length, metrics at k.

Each function returns a PNG file's bytes, or None where there is nothing to draw.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_entropy.benchmarks.samples import SampleRow
from megatron_entropy.benchmarks.table import AtK
from megatron_entropy.evaluation import metrics
from megatron_entropy.monitor.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT, WRONG = "#4f7942", "#c8553d"
POINTS = 101
"""Of a TECA curve."""
MIN_ANSWERS = 5
"""A curve over absolute positions ends where fewer answers, or less than a tenth of them, are as long."""
ANSWERS_PER_BIN = 20
MIN_HEIGHT = 10.0
"""Of an axis in per cent."""

Judged = Sequence[tuple[SampleRow, bool]]
"""Rows with their verdicts."""


def draw_teca_relative(title: str, judged: Judged) -> bytes | None:
    """Draw TECA against the relative position in the answer, averaged over right and over wrong answers.

    The band is one standard error of the mean over answers.
    """
    figure, axes = new_figure(title, "TECA (nats)", xlabel="position in the answer (%)")
    for label, rows, color in _right_and_wrong(judged):
        curves = np.stack([metrics.teca_relative(row.entropy or (), POINTS) for row in rows])
        mean, error = curves.mean(axis=0), curves.std(axis=0) / np.sqrt(len(rows))
        positions = np.linspace(0, 100, POINTS)
        axes.plot(positions, mean, color=color, label=f"{label} ({len(rows)})")
        axes.fill_between(positions, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    return _finish(figure)


def draw_teca_absolute(title: str, judged: Judged) -> bytes | None:
    """Draw TECA against the number of tokens, averaged over the right and the wrong answers that are as long."""
    figure, axes = new_figure(title, "TECA (nats)", xlabel="tokens")
    for label, rows, color in _right_and_wrong(judged):
        longest = max(len(row.entropy or ()) for row in rows)
        positions = np.unique(np.linspace(1, longest, 2 * POINTS).astype(int))
        curves = np.stack([metrics.teca_absolute(row.entropy or (), positions) for row in rows])
        enough = (~np.isnan(curves)).sum(axis=0) >= min(len(rows), max(MIN_ANSWERS, len(rows) / 10))
        axes.plot(positions[enough], np.nanmean(curves[:, enough], axis=0), color=color, label=f"{label} ({len(rows)})")
    return _finish(figure)


def _right_and_wrong(judged: Judged) -> list[tuple[str, list[SampleRow], str]]:
    """Label, rows with entropies, and colour of the curves that have an answer."""
    groups = [
        (label, [row for row, verdict in judged if verdict is is_right and row.entropy], color)
        for label, is_right, color in (("right", True, RIGHT), ("wrong", False, WRONG))
    ]
    return [group for group in groups if group[1]]


def draw_accuracy_against(title: str, xlabel: str, values: Sequence[float], correct: Sequence[bool]) -> bytes | None:
    """Draw the accuracy of answers in bins of equal size along a quantity, each at its median, with Wilson's interval.

    Args:
        title: of the panel.
        xlabel: the quantity with its unit.
        values: of each answer.
        correct: verdict on each answer.
    """
    if not values:
        return None
    figure, axes = new_figure(title, "correct answers (%)", xlabel=xlabel)
    order = np.argsort(values, kind="stable")
    bins = np.array_split(order, min(10, max(1, len(values) // ANSWERS_PER_BIN)))
    medians = [float(np.median(np.asarray(values)[members])) for members in bins]
    means = [float(np.mean(np.asarray(correct)[members])) for members in bins]
    bounds = [metrics.wilson_interval(mean, len(members)) for mean, members in zip(means, bins, strict=True)]
    heights = 100 * np.array(means)
    below = heights - 100 * np.array([low for low, _ in bounds])
    above = 100 * np.array([high for _, high in bounds]) - heights
    axes.errorbar(medians, heights, yerr=[below.clip(0), above.clip(0)], color="#1f5f8b", marker="o", capsize=3)
    axes.set_ylim(0, max(MIN_HEIGHT, 1.05 * float((heights + above).max())))
    return _finish(figure, has_legend=False)


def draw_at_k(title: str, at_k: Sequence[AtK]) -> bytes | None:
    """Draw pass@k, maj@k and G-Pass@k against k; nothing with one sample a question."""
    if len(at_k) < 2:
        return None
    from matplotlib.ticker import NullLocator

    figure, axes = new_figure(title, "questions (%)", xlabel="k")
    ks = [one.k for one in at_k]
    for label, values, color in (
        ("pass@k", [one.pass_at_k for one in at_k], "#1f5f8b"),
        ("maj@k", [one.maj_at_k for one in at_k], "#e9a178"),
        ("G-Pass@k 0.5", [one.g_pass_at_k["0.5"] for one in at_k], "#7b4f8e"),
        ("G-Pass@k 1.0", [one.g_pass_at_k["1.0"] for one in at_k], "#b8b8b8"),
    ):
        axes.plot(ks, 100 * np.array(values), color=color, label=label, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, max(MIN_HEIGHT, 105 * max(one.pass_at_k for one in at_k)))
    return _finish(figure)


def _finish(figure: Figure, *, has_legend: bool = True) -> bytes | None:
    """Return the file, None if no curve was drawn."""
    if not figure.axes[0].lines:
        return None
    if has_legend:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
