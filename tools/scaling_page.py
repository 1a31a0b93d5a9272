"""The page of `benchmark_scaling.py`: tables in Markdown and two plots, from `scaling.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmark_rows import Row, describe, read, table

TIMES = (
    "seconds",
    "tokens_per_s_per_rank",
    "efficiency",
    "tflops_per_rank",
    "mfu",
    "exposed_s",
    "bubble_s",
    "skew",
    "cpu_s",
    "peak_gb",
    "oversubscribed",
)
ON_CPU = """CPU ranks show that the benchmark works, which collectives a layout needs and how many bytes they move. They
say nothing about the speed of GPUs. Not run on a GPU."""
COLUMNS = """Seconds are medians of the slowest rank, quartiles in brackets. `efficiency`: speed of a rank over that of
the fewest ranks; none where ranks share cores (`oversubscribed`). `exposed_s`: what the work takes less if collectives
return at once, the bubble of pipeline stages included. `bubble_s`: that without `alone_s`. `skew`: how much earlier the
fastest rank is done. `cpu_s`: processor seconds of all ranks, engines not included. `alone_s`: the collectives without
the work between them. Bytes are those of one rank and one call of the phase."""


def write_page(file: Path) -> None:
    """Write `README.md`, `weak.png` and `strong.png` beside the file of rows."""
    content = read(file)
    rows = content["rows"]
    models = ", ".join(sorted({str(row.case["model"]) for row in rows}))
    parts = ["# Scaling of a training step", f"Written by `tools/benchmark_scaling.py` (`--model {models}`)."]
    if all(row.case["device"] == "cpu" for row in rows):
        parts.append(ON_CPU)
    parts.append(COLUMNS)
    for kind, meaning in (("weak", "the same tokens for every rank"), ("strong", "the same tokens in all")):
        if chosen := [row for row in rows if row.case["kind"] == kind]:
            _plot(chosen, kind, file.parent / f"{kind}.png")
            parts += [f"## {kind.capitalize()} scaling: {meaning}", f"![{kind} scaling]({kind}.png)"]
            parts.append(table(_without(chosen, "kind"), TIMES))
    moved = [row for row in rows if any(name.endswith("bytes") for name in row.values)]
    if moved:
        names = [name for row in moved for name in row.values if name.endswith((" calls", " bytes", " alone_s"))]
        parts += ["## Collectives of one call", table(_without(moved), sorted(set(names)))]
    parts += ["## Conditions", *(f"- {describe(run)}" for run in content["runs"])]
    (file.parent / "README.md").write_text("\n\n".join(parts) + "\n")


def _without(rows: Sequence[Row], *keys: str) -> list[Row]:
    """Leave out these columns, and those of the case that have one value only."""
    single = {key for key in rows[0].case if len({row.case[key] for row in rows}) == 1} - {"ranks", "phase"}
    dropped = single | set(keys)
    return [
        Row({key: value for key, value in row.case.items() if key not in dropped}, row.values, row.quartiles)
        for row in rows
    ]


def _plot(rows: Sequence[Row], kind: str, path: Path) -> None:
    """Tokens per second of a rank (weak) or of all ranks (strong); hollow points are oversubscribed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=120)
    series: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.values["tokens_per_s_per_rank"]:
            name = tuple(str(row.case[key]) for key in ("phase", "layout", "model", "device"))
            series.setdefault(name, []).append(row)
    for name, found in series.items():
        found.sort(key=lambda row: row.case["ranks"])  # type: ignore[arg-type, return-value]
        ranks = [float(row.case["ranks"] or 1) for row in found]
        speeds = [float(row.values["tokens_per_s_per_rank"] or 0) for row in found]
        if kind == "strong":
            speeds = [speed * number for speed, number in zip(speeds, ranks, strict=True)]
        (line,) = axes.plot(ranks, speeds, label=", ".join(name[:2]))
        for number, speed, row in zip(ranks, speeds, found, strict=True):
            face = "white" if row.values["oversubscribed"] else line.get_color()
            axes.plot(number, speed, "o", color=line.get_color(), markerfacecolor=face)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({int(row.case["ranks"] or 1) for row in rows}), [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks (hollow: more than cores)")
    axes.set_ylabel("tokens/s" + (" of a rank" if kind == "weak" else ""))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
