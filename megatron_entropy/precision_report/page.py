"""Write a precision report: `report.html`, `report.json` and `README.md`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_entropy.files import atomic_write_text
from megatron_entropy.monitor.report import load_template
from megatron_entropy.monitor.summary import versions
from megatron_entropy.precision_report import plots
from megatron_entropy.precision_report.compare import QUANTILES, RESAMPLES, Comparison, Estimate

NUMBERS = ("log-prob bias", "log-prob sd", "entropy bias", "entropy sd", "outside DAPO's clip")
CHOICES = (
    "CURE's candidates changed",
    "SENT's set changed",
    "top token changed",
    "first token's top changed",
    "CER reward",
    "CER pairs swapped",
)
NOTES = {
    "Bias": "Mean difference to bf16 with its interval.",
    "Entropy bias by entropy": "Where the entropy moves: certain tokens left, uncertain ones right.",
    "Log-prob spread by entropy": "The spread of log-probs grows with the entropy.",
    "Importance ratio": "p / p_bf16 of the sampled token, what an update would take for a change of the policy.",
}
MEANINGS = {
    "log-prob, entropy": "difference to bf16 in nats: mean and standard deviation over response tokens",
    "CURE's candidates changed": "share of a response's 20 candidates for a cut that are no longer among them",
    "SENT's set changed": "share of the 80 % of lowest entropy that is no longer in it",
    "top token changed": "share of positions whose most probable token is another one",
    "first token's top changed": "the same for the first token of the response, in responses",
    "outside DAPO's clip": "share of tokens whose importance ratio is below 0.8 or above 1.28 before any update",
    "CER reward": "absolute change of the reward of a right response, mean over responses",
    "CER pairs swapped": "share of pairs of responses that change their order by CER's reward",
    "interval": f"95 %, from {RESAMPLES} resamplings of the responses",
}


def write(
    folder: Path, rows: plots.Rows, *, title: str, settings: Mapping[str, object], remarks: Iterable[str]
) -> None:
    """Write the three files.

    Args:
        folder: exists.
        rows: measurements with their comparisons, in the order of the table.
        title: of the page.
        settings: what was measured: name -> value.
        remarks: sentences above the table.
    """
    remarks = list(remarks)
    meanings = {measurement.name: measurement.meaning for measurement, _ in rows}
    content = {
        "title": title,
        "remarks": remarks,
        "settings": dict(settings),
        "versions": versions(),
        "ratio_quantiles": QUANTILES,
        "rows": [{"name": m.name, "meaning": m.meaning, **asdict(comparison)} for m, comparison in rows],
    }
    atomic_write_text(folder / "report.json", json.dumps(content, indent=1, default=str) + "\n")
    tables = {
        "Differences to bf16": (NUMBERS, [[(m.name, ""), *_numbers(found)] for m, found in rows]),
        "What methods select": (CHOICES, [[(m.name, ""), *_choices(found)] for m, found in rows]),
    }
    page = load_template(Path(__file__).with_name("report.html.j2")).render(
        title=title,
        remarks=remarks,
        tables=tables,
        ratio_headings=("precision", *(f"{100 * q:g} %" for q in QUANTILES)),
        ratio_rows=[(m.name, *(f"{value:.3f}" for value in c.ratio_quantiles)) for m, c in rows],
        plots=[
            {"title": name, "note": NOTES[name], "data": base64.b64encode(data).decode()}
            for name, data in plots.draw_all(rows).items()
        ],
        meanings={**meanings, **MEANINGS},
        settings=settings,
        versions=versions(),
    )
    atomic_write_text(folder / "report.html", page)
    atomic_write_text(folder / "README.md", _readme(title, remarks, tables, {**meanings, **MEANINGS}, settings))


def _numbers(found: Comparison) -> list[tuple[str, str]]:
    """Values and intervals under `NUMBERS`."""
    shifts = [_nats(e) for shift in (found.logprob, found.entropy) for e in (shift.bias, shift.sd)]
    return [*shifts, _percent(found.outside_clip)]


def _choices(found: Comparison) -> list[tuple[str, str]]:
    """Values and intervals under `CHOICES`."""
    return [
        _percent(found.cure_changed),
        _percent(found.sent_changed),
        _percent(found.top_changed),
        (str(found.first_top_changed), ""),
        (f"{found.cer_change.value:.4f}", f"{found.cer_change.low:.4f} to {found.cer_change.high:.4f}"),
        (f"{100 * found.cer_pairs_swapped:.1f} %", ""),
    ]


def _nats(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}"


def _percent(estimate: Estimate) -> tuple[str, str]:
    return f"{100 * estimate.value:.2f} %", f"{100 * estimate.low:.2f} to {100 * estimate.high:.2f}"


def _readme(
    title: str,
    remarks: Iterable[str],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[tuple[str, str]]]]],
    meanings: Mapping[str, str],
    settings: Mapping[str, object],
) -> str:
    lines = [f"# {title}", "", *remarks, "", f"```\n{settings['command']}\n```", ""]
    for name, (headings, rows) in tables.items():
        lines += [f"## {name}", "", f"| precision | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
        lines += ["| " + " | ".join(f"{v} ({i})" if i else v for v, i in row) + " |" for row in rows] + [""]
    lines += [*(f"- {name}: {meaning}." for name, meaning in meanings.items()), ""]
    lines += [f"- {name}: {value}" for name, value in settings.items() if name != "command"]
    return "\n".join(lines) + "\n"
