#!/usr/bin/env python3
"""One kind of row for all benchmarks, and the page of a machine's rows.

A benchmark writes a JSON file with `benchmark`, `conditions` and `rows`. A row has `case`, what was varied, and
`values`, what was measured: medians, the unit at the end of the name (`_s` seconds, `_gb` 1e9 bytes, `_mib` MiB);
`quartiles` of some of them; `notes` in words.

    python tools/benchmark_rows.py build/bench [--out build/bench/README.md]     # the files of a folder as one page
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Value = float | int | str | bool | None

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One measured case.

    `values` are medians of repeats where the benchmark repeats; None: not measured or not known here.
    """

    case: dict[str, Value]
    values: dict[str, Value]
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def conditions(note: str = "") -> dict[str, Any]:
    """Describe this machine and moment: processor, GPU, versions, commit, load.

    Args:
        note: what else a reader must know, such as other work on the machine.
    """
    import torch

    cpu = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit.stdout.strip() or "unknown",
        "processor": f"{os.cpu_count()} x {cpu[0] if cpu else platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
        "note": note,
    }


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile; of one number, itself."""
    if len(numbers) < 2:
        return (numbers[0], numbers[0])
    first, _, third = statistics.quantiles(numbers, n=4, method="inclusive")
    return (first, third)


def write(path: Path, benchmark: str, rows: Sequence[Row], described: Mapping[str, Any], **more: Any) -> None:
    """Write a benchmark's file.

    Args:
        described: `conditions` of the measurement.
        more: further keys of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": benchmark, "conditions": described, **more, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read a benchmark's file; its rows become `Row`."""
    content = json.loads(path.read_text())
    return content | {"rows": [Row(**row) for row in content["rows"]]}


def table(rows: Sequence[Row], values: Sequence[str] | None = None) -> str:
    """Return rows as a Markdown table: columns of the case, then values; a column without any value is left out."""
    cases = list(dict.fromkeys(key for row in rows for key in row.case))
    names = list(dict.fromkeys(key for row in rows for key in row.values)) if values is None else list(values)
    names = [name for name in names if any(row.values.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join([*cases, *names]) + " |", "|" + "---|" * (len(cases) + len(names))]
    for row in rows:
        cells = [show(row.case.get(key)) for key in cases]
        for name in names:
            spread = row.quartiles.get(name)
            between = f" ({show(spread[0])} to {show(spread[1])})" if spread else ""
            cells.append(show(row.values.get(name)) + between)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(value: Value) -> str:
    """Return a value as text: numbers with three significant digits."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def describe(described: Mapping[str, Any]) -> str:
    """Return the conditions as one line."""
    named = {key: value for key, value in described.items() if key != "note" and value not in ("", "none")}
    line = ", ".join(f"{key} {value}" for key, value in named.items())
    return f"{line}. {described['note']}".strip() if described.get("note") else f"{line}."


def page(folder: Path) -> str:
    """Return all benchmark files of a folder as one Markdown page."""
    parts = ["# Benchmarks of this machine", "Medians; quartiles in brackets. Written by `make bench`."]
    for path in sorted(folder.rglob("*.json")):
        content = read(path)
        parts += [f"## {path.stem}: {content['benchmark']}", describe(content["conditions"]), table(content["rows"])]
        parts += [f"- {note}" for note in dict.fromkeys(note for row in content["rows"] for note in row.notes)]
    return "\n\n".join(parts) + "\n"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def main() -> None:
    """Write the page of a folder."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="by default README.md in the folder")
    arguments = parser.parse_args()
    out = arguments.out or arguments.folder / "README.md"
    out.write_text(page(arguments.folder))
    print(out)


if __name__ == "__main__":
    main()
