"""Plots of a precision report; each function returns a PNG file's bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_entropy.monitor.plots import new_figure
from megatron_entropy.precision_report.compare import Comparison, Estimate
from megatron_entropy.precision_report.measure import Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#777777", "#1f5f8b", "#c8553d", "#4f7942", "#7b4f8e", "#e9a178", "#5b9bd5", "#a3c293")

Rows = Sequence[tuple[Measurement, Comparison]]


def draw_all(rows: Rows) -> dict[str, bytes]:
    """Draw every plot, by title.

    Args:
        rows: measurements with their comparisons, in the order of the table.
    """
    names = [measurement.name for measurement, _ in rows]
    found = [comparison for _, comparison in rows]
    return {
        "Bias": _draw_bias(names, found),
        "Entropy bias by entropy": _draw_deciles(names, found, "entropy bias (nats)", lambda d: d.entropy.bias),
        "Log-prob spread by entropy": _draw_deciles(names, found, "sd of log-prob (nats)", lambda d: d.logprob.sd),
        "Importance ratio": _draw_tails(rows),
    }


def _draw_bias(names: Sequence[str], found: Sequence[Comparison]) -> bytes:
    figure, axes = new_figure("mean over tokens", "", xlabel="difference to bf16 (nats)")
    places = np.arange(len(names))[::-1]
    parts: Mapping[str, tuple[float, str, list[Estimate]]] = {
        "log-prob": (0.13, "#1f5f8b", [c.logprob.bias for c in found]),
        "entropy": (-0.13, "#c8553d", [c.entropy.bias for c in found]),
    }
    for label, (shift, color, estimates) in parts.items():
        middle = np.array([e.value for e in estimates])
        reach = np.abs(np.array([[e.low for e in estimates], [e.high for e in estimates]]) - middle)
        axes.errorbar(middle, places + shift, xerr=reach, fmt="o", markersize=4, capsize=2, color=color, label=label)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(places, names)
    return _png(figure)


def _draw_deciles(names: Sequence[str], found: Sequence[Comparison], unit: str, pick: object) -> bytes:
    figure, axes = new_figure("by entropy", unit, xlabel="tenth of the tokens by entropy in bf16")
    for name, color, comparison in zip(names, COLORS * 2, found, strict=False):
        estimates = [pick(decile) for decile in comparison.deciles]  # type: ignore[operator]
        places = np.arange(1, len(estimates) + 1)
        axes.plot(places, [e.value for e in estimates], color=color, label=name, linewidth=1.4)
        axes.fill_between(
            places, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.12, linewidth=0
        )
    axes.set_xticks(range(1, 11))
    return _png(figure)


def _draw_tails(rows: Rows) -> bytes:
    figure, axes = new_figure("further from 1", "share of tokens", xlabel="|log ratio to bf16|")
    for (measurement, _), color in zip(rows, COLORS * 2, strict=False):
        distance = np.sort(np.abs(np.concatenate(measurement.found.logprob) - np.concatenate(measurement.base.logprob)))
        share = 1 - np.arange(len(distance)) / len(distance)
        kept = np.unique(np.linspace(0, len(distance) - 1, 400).astype(int))
        axes.plot(distance[kept], share[kept], color=color, label=measurement.name, linewidth=1.4)
    axes.axvspan(np.log(1.2), np.log(1.28), color="#dddddd", linewidth=0, label="DAPO's clip, 0.8 to 1.28")
    axes.set_yscale("log")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()
