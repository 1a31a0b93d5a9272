"""Fills documentation pages from the code while mkdocs builds them (listed under `hooks` in mkdocs.yml).

A page holds a comment where something generated belongs: `<!-- configuration -->`, `<!-- metrics -->`,
`<!-- settings: METHOD -->` or `<!-- curve: METHOD [BASELINE] -->`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"<!-- (configuration|metrics|settings|curve)(?:: ([a-z_ ]+))? -->")
RUNS = ROOT / "examples" / "compare" / "results.json"
LABELS = {
    "grpo": "GRPO",
    "dapo": "DAPO",
    "cure": "CURE",
    "sent": "SENT",
    "cer": "CER",
    "kl_cov": "KL-Cov",
    "sft": "SFT",
}
LABELS["curiosft"] = "CurioSFT"
PANEL, HEIGHT, GAP = 330, 190, 74


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """Replace the marks of a page; mkdocs calls it for every page."""
    return fill(markdown)


def fill(markdown: str) -> str:
    """Return the page with every mark replaced."""
    makers: dict[str, Callable[..., str]] = {
        "configuration": configuration,
        "metrics": metrics,
        "settings": settings,
        "curve": curve,
    }
    return MARK.sub(lambda hit: makers[hit[1]](*(hit[2] or "").split()), markdown)


def configuration() -> str:
    """Return what `megatron-entropy config --format markdown` prints."""
    from megatron_entropy.cli.main import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = main(["config", "--format", "markdown"])
    assert code == 0, text.getvalue()
    return text.getvalue()


def metrics() -> str:
    """Return the glossary of metrics."""
    from megatron_entropy.monitor.metric_names import metric_table_markdown

    return metric_table_markdown()


def settings(method: str) -> str:
    """Return a table of the settings that a method states itself, and below it one of those it inherits and uses."""
    from megatron_entropy.methods import METHOD_CONFIGS

    config = METHOD_CONFIGS[method]
    stated = config.__dict__.get("__annotations__", {})
    own, inherited = [], []
    unused = {name for base in config.__mro__ for name in base.__dict__.get("unused", ())}
    for name, field in config.model_fields.items():
        if name != "name" and name not in unused:
            default = json.dumps(field.get_default(call_default_factory=True))
            row = f"| `{name}` | `{default}` | {_cell(field.description or '')} |"
            (own if name in stated else inherited).append(row)
    head = "| key in `[method]` | default | meaning |\n|---|---|---|\n"
    parts = [head + "\n".join(own)] if own else []
    if inherited:
        title = "Inherited settings" if own else f"`{method}` has the settings of the method it extends"
        parts.append(
            f'??? note "{title}"\n\n' + "\n".join("    " + line for line in (head + "\n".join(inherited)).split("\n"))
        )
    return "\n\n".join(parts)


def curve(method: str, baseline: str = "") -> str:
    """Return a picture of the eval entropy and accuracy of a method's recorded runs, a line for each seed."""
    curves = json.loads(RUNS.read_text(encoding="utf-8"))["curves"]
    lines = {name: [run["points"] for run in curves[name].values()] for name in filter(None, (method, baseline))}
    is_sft = not any(run["tokens"] for run in curves[method].values())
    if is_sft:  # the untrained model would set the scale
        lines = {name: [points[1:] for points in seeds] for name, seeds in lines.items()}
    unit = "training steps" if is_sft else "tokens generated for training"
    left = _panel(0, "Entropy (nats)", lines, lambda point: point["entropy"])
    right = _panel(PANEL + GAP, "Accuracy (%)", lines, lambda point: 100 * point["accuracy"])
    width = 2 * PANEL + GAP + 60
    cut = " after the first 60 steps" if is_sft else ""
    against = f" (blue) and {LABELS[baseline]} (grey)" if baseline else ""
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT + 64}" role="img" font-family="sans-serif" font-size="11" fill="#333" '
        f'style="background:#fff;max-width:760px" aria-label="Entropy and accuracy of {LABELS[method]} over {unit}">'
        f'{left}{right}<text x="{width / 2}" y="{HEIGHT + 58}" text-anchor="middle">{unit}</text></svg>\n\n'
        f"{LABELS[method]}{against}: eval entropy and accuracy, one line for each seed{cut}, "
        "from `examples/compare/results.json` (`make compare`)."
    )


def _panel(left: int, title: str, lines: dict[str, list[list[dict]]], value: Callable[[dict], float]) -> str:
    points = [point for seeds in lines.values() for seed in seeds for point in seed]
    spent = [point["spent"] for point in points]
    heights = [value(point) for point in points]
    x0, y0, first, last, low, high = left + 44, 30, min(spent), max(spent), min(heights), max(heights)

    def x(at: float) -> float:
        return x0 + PANEL * (at - first) / (last - first)

    def y(at: float) -> float:
        return y0 + HEIGHT * (high - at) / (high - low)

    parts = [f'<text x="{x0}" y="18" font-size="13" font-weight="600">{title}</text>']
    for tick in range(5):
        height, at = low + (high - low) * tick / 4, first + (last - first) * tick / 4
        label = f"{height:.2f}" if high < 10 else f"{height:.0f}"
        across = f"{at / 1000:.0f}k" if last > 5000 else f"{at:.0f}"
        parts.append(f'<path d="M{x0} {y(height):.1f}H{x0 + PANEL}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 - 6}" y="{y(height) + 4:.1f}" text-anchor="end">{label}</text>')
        parts.append(f'<text x="{x(at):.1f}" y="{y0 + HEIGHT + 15}" text-anchor="middle">{across}</text>')
    for seeds, color in reversed(list(zip(lines.values(), ("#1769aa", "#999"), strict=False))):
        for seed in seeds:
            path = " ".join(f"{x(point['spent']):.1f},{y(value(point)):.1f}" for point in seed)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
    return "".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
