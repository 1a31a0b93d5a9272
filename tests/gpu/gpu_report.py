"""The table of a GPU run: what ran, on which hardware and versions, with which figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core", "vllm", "ray", "transformers", "apex",
            "flash-attn", "liger-kernel", "verl")  # fmt: skip


@dataclass
class Outcome:
    """One case: `status` is passed, failed or skipped; `reason` why it did not pass; `figures` what it measured."""

    case: str
    status: str
    seconds: float
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def describe_machine() -> dict[str, Any]:
    """Date, GPU, driver's CUDA, Python and package versions."""
    import torch

    from megatron_entropy.packages import installed_versions

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpus": gpus or ["none"],
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "versions": installed_versions(PACKAGES),
    }


def write(folder: Path, machine: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write `results.json` and `results.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"machine": dict(machine), "cases": [asdict(outcome) for outcome in outcomes]}
    (folder / "results.json").write_text(json.dumps(body, indent=1) + "\n")
    (folder / "results.md").write_text(to_markdown(machine, outcomes))


def to_markdown(machine: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The same for readers."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"GPU: {', '.join(machine['gpus'])}. CUDA {machine['cuda']}, Python {machine['python']}, {versions}.",
        f"Run on {machine['date']}.",
        "",
        "| case | result | seconds | figures or reason |",
        "|---|---|---|---|",
    ]
    for outcome in outcomes:
        figures = "; ".join(f"{name}: {_show(value)}" for name, value in outcome.figures.items())
        detail = "; ".join(part for part in (outcome.reason, figures) if part).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {outcome.case} | {outcome.status} | {outcome.seconds:.1f} | {detail} |")
    return "\n".join(lines) + "\n"


def _show(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_show(item) for item in value)
    return str(value)
