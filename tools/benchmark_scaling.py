#!/usr/bin/env python3
"""Weak and strong scaling of the phases of a training step, over ranks and layouts, on CPUs or GPUs.

    python tools/benchmark_scaling.py [--ranks 1 2 4 8] [--kind weak strong] [--phase score update sync]
        [--layout auto tp=2] [--model tiny] [--repeats 5] [--out runs/scaling]
    torchrun --nnodes=2 --nproc-per-node=8 ... tools/benchmark_scaling.py --model 0.5B --out SHARED_FOLDER

Alone it starts CPU ranks of this machine, or one rank on its GPU. Under torchrun it measures the ranks that are there;
rows of an earlier run in the same folder stay, so that one folder collects 1, 2, 4, ... nodes. Weak: `--tokens` for a
rank. Strong: `--total-tokens` for all ranks together. The model has random weights.

Writes `scaling.json`, `README.md` and two plots. A row has the median of the slowest rank and:
`exposed_s`: what the same work takes less when every collective of floating point numbers returns at once; with
pipeline stages this includes the bubble. `alone_s`: the collectives without the work between them.
`bubble_s`: with pipeline stages, the exposed seconds without those of the collectives; sends between stages are part of
it. `skew`: how much earlier the fastest rank is done, as a fraction. `cpu_s`: processor seconds of all ranks.
`mfu`: model flops (attention without its causal half) over the dense bfloat16 peak, where that is known.

`generate` and `step` (generate, score, update, sync) start vLLM engines, as many as ranks unless `--engines` says
otherwise. Without them `sync` sends to processes on rank 0's machine that drop the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from benchmark_rows import Row, Value, conditions, quartiles, read, write
from benchmark_update import SHAPES
from local_ranks import run_on_ranks
from scaling_page import write_page
from scaling_rank import RankResult, Settings, Timing, measure

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import ParallelConfig
from megatron_entropy.distributed import network, process_groups

KINDS = ("weak", "strong")
PHASES = ("score", "update", "sync", "generate", "step")
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "H20": 148, "B200": 2250, "GB200": 2500}
"""Dense bfloat16 TFLOP/s of a GPU, by a word of its name."""
BACKWARD = {"score": 1, "update": 3}
"""Flops of a phase in forward passes."""


def layout_of(text: str, ranks: int) -> ParallelConfig:
    """Return a layout for these ranks; what `text` does not say is data parallel.

    Args:
        text: `auto`, or fields of `actor.parallel`: `tp=2,pp=2,sequence_parallel=true`.
    Raises:
        ValueError: the fields are wrong, or their product does not divide the ranks.
    """
    fields: dict[str, int | bool] = {}
    for part in [] if text == "auto" else text.split(","):
        name, _, value = part.partition("=")
        fields[name] = json.loads(value or "null")
    sizes = ParallelConfig(**fields)  # type: ignore[arg-type]
    if ranks % sizes.world_size:
        raise ValueError(f"{text} needs a multiple of {sizes.world_size} ranks, found {ranks}")
    return sizes if sizes.dp > 1 else sizes.model_copy(update={"dp": ranks // sizes.world_size})


def forward_flops(arch: ModelArchitecture, length: float) -> float:
    """Flops of a forward pass for each token of sequences of this mean length, head included."""
    matrices = arch.num_parameters - (0 if arch.tied_embeddings else arch.vocab_size * arch.hidden_size)
    if arch.moe:
        idle = arch.moe.num_experts - arch.moe.experts_per_token
        matrices -= arch.num_layers * idle * 3 * arch.hidden_size * arch.moe.ffn_size
    return 2.0 * matrices + 4.0 * arch.num_layers * arch.num_heads * arch.head_dim * length


def peak_tflops(device: str) -> float | None:
    """Dense bfloat16 peak of a GPU; None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)


def make_row(ranks: Sequence[RankResult], kind: str, phase: str, layout: str, settings: Settings) -> Row:
    """Summarise one kind and phase over the ranks."""
    timings = [result.timings[kind, phase] for result in ranks]
    first, count, device = timings[0], len(ranks), ranks[0].device
    seconds = _slowest(timings, "seconds")
    median = statistics.median(seconds)
    cores = os.cpu_count() or 1
    crowded = device == "cpu" and count * settings.threads > cores * len({result.node for result in ranks})
    case: dict[str, Value] = {
        "model": settings.model,
        "device": device,
        "nodes": len({result.node for result in ranks}),
        "ranks": count,
        "layout": layout,
        "kind": kind,
        "phase": phase,
    }
    per_rank = first.tokens / median / count if first.tokens else None
    values: dict[str, Value] = {"seconds": median, "tokens_per_s_per_rank": per_rank}
    if phase in BACKWARD and per_rank:
        flops = BACKWARD[phase] * forward_flops(ranks[0].arch, sum(settings.lengths) / 2)
        values["tflops_per_rank"] = tflops = per_rank * flops / 1e12
        peak = peak_tflops(device)
        values["mfu"] = tflops / peak if peak and settings.dtype == "bfloat16" else None
    values |= _communication(timings, median, has_stages="pp=" in layout)
    fastest = [min(each) for each in zip(*(timing.seconds for timing in timings), strict=True)]
    values["skew"] = statistics.median(1 - a / b for a, b in zip(fastest, seconds, strict=True))
    values["cpu_s"] = sum(statistics.median(timing.cpu_seconds) for timing in timings)
    values["peak_gb"] = max(statistics.median(timing.peak_gb) for timing in timings)
    values["oversubscribed"] = crowded
    notes = ("oversubscribed: more threads than cores, the ranks take turns",) if crowded else ()
    return Row(case, values, {"seconds": quartiles(seconds)}, notes)


def _communication(timings: Sequence[Timing], median: float, *, has_stages: bool) -> dict[str, Value]:
    """Bytes and seconds of the collectives of the rank that sends most."""
    busiest = max(timings, key=lambda timing: sum(entry["bytes"] for entry in timing.counts.values()))
    values: dict[str, Value] = {}
    for operation, entry in busiest.counts.items():
        values[f"{operation} calls"] = entry["calls"]
        values[f"{operation} bytes"] = entry["bytes"]
        if operation in busiest.alone:
            values[f"{operation} alone_s"] = max(timing.alone.get(operation, 0.0) for timing in timings)
    if timings[0].control:
        exposed = median - statistics.median(_slowest(timings, "control"))
        values["exposed_s"] = exposed
        if has_stages:
            values["bubble_s"] = exposed - max(sum(timing.alone.values()) for timing in timings)
    return values


def _slowest(timings: Sequence[Timing], name: str) -> list[float]:
    return [max(each) for each in zip(*(getattr(timing, name) for timing in timings), strict=True)]


def with_efficiency(rows: Sequence[Row]) -> list[Row]:
    """Add to each row its speed over that of the fewest ranks, by rank: 1 is perfect; none if oversubscribed."""
    found = []
    for row in rows:
        same = ("model", "device", "kind", "phase")
        base = min(
            (other for other in rows if all(other.case[key] == row.case[key] for key in same)),
            key=lambda other: (other.case["ranks"], other.case["layout"] != row.case["layout"]),
        )
        efficiency = None
        if row.values["tokens_per_s_per_rank"] and not (row.values["oversubscribed"] or base.values["oversubscribed"]):
            efficiency = row.values["tokens_per_s_per_rank"] / base.values["tokens_per_s_per_rank"]  # type: ignore[operator]
        found.append(Row(row.case, {**row.values, "efficiency": efficiency}, row.quartiles, row.notes))
    return found


def measure_here(settings: Settings, cases: Sequence[tuple[int, str]]) -> list[Row]:
    """Measure on ranks that this process starts."""
    rows = []
    for ranks, text in cases:
        layout = layout_of(text, ranks)
        print(f"{ranks} ranks, {text}", flush=True)
        if torch.cuda.is_available():
            process_groups.init_process_group()
            results = [measure(settings, layout)]
        else:
            results = run_on_ranks(measure, ranks, settings, layout, timeout_s=1800.0)
        rows += _rows(results, text, settings)
    return rows


def measure_torchrun(settings: Settings, texts: Sequence[str]) -> list[Row]:
    """Measure on the ranks of torchrun; rows on rank 0, which writes them, and elsewhere."""
    master = network.resolve(os.environ["MASTER_ADDR"], setting="MASTER_ADDR")
    if not network.is_loopback(master):
        network.choose_interface(network.address_towards(master))
    process_groups.init_process_group()
    rows = []
    for text in texts:
        results = process_groups.gather_objects(measure(settings, layout_of(text, dist.get_world_size())))
        rows += _rows(results, text, settings)
    return rows


def _rows(results: Sequence[RankResult], text: str, settings: Settings) -> list[Row]:
    return [make_row(results, kind, phase, text, settings) for kind in settings.kinds for phase in settings.phases]


def save(folder: Path, rows: Sequence[Row], described: dict) -> None:
    """Write the rows beside those of earlier runs in the folder, the page and the plots."""
    file = folder / "scaling.json"
    earlier, runs = [], []
    if file.exists():
        content = read(file)
        new = [row.case for row in rows]
        earlier, runs = [row for row in content["rows"] if row.case not in new], content["runs"]
    ordered = sorted([*earlier, *rows], key=lambda row: (row.case["ranks"], row.case["nodes"]))
    write(file, "scaling", with_efficiency(ordered), described, runs=[*runs, described])
    write_page(file)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", help="1 2 4 8 on CPUs; under torchrun those that are there")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES[:3])
    parser.add_argument("--layout", nargs="+", default=["auto"], help="auto: data parallel; or tp=2,pp=2,...")
    parser.add_argument("--model", default="tiny", help=f"{', '.join(SHAPES)}, or a folder with a config.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank in a weak case")
    parser.add_argument("--total-tokens", type=int, default=8192, help="of a strong case")
    parser.add_argument("--lengths", type=int, nargs=2, default=[20, 160], help="shortest and longest sample")
    parser.add_argument("--microbatch", type=int, default=1024, help="tokens of a micro-batch")
    parser.add_argument("--prompts", type=int, default=16, help="prompts: of each rank (weak) or of all (strong)")
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument("--engines", type=int, default=0, help="engines, or receivers of a sync; 0: see above")
    parser.add_argument("--threads", type=int, default=1, help="of a rank on a CPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="bfloat16 on GPUs, else float32")
    parser.add_argument("--note", default="", help="for the page: what else ran on the machine")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    arguments = parser.parse_args()
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    on_gpu = torch.cuda.is_available()
    if under_torchrun and arguments.ranks:
        parser.error("--ranks is for one machine; torchrun decides the number of ranks")
    if on_gpu and not under_torchrun and (arguments.ranks or [1]) != [1]:
        parser.error("several GPUs need torchrun: torchrun --nproc-per-node=N tools/benchmark_scaling.py ...")
    if arguments.model not in SHAPES and not (Path(arguments.model) / "config.json").exists():
        parser.error(f"--model {arguments.model}: neither one of {', '.join(SHAPES)} nor a folder with a config.json")
    arguments.ranks = arguments.ranks or ([1] if on_gpu else [1, 2, 4, 8])
    if under_torchrun:
        arguments.ranks = [int(os.environ["WORLD_SIZE"])]
    try:
        arguments.cases = [
            (ranks, text, layout_of(text, ranks)) for text in arguments.layout for ranks in arguments.ranks
        ]
    except ValueError as error:
        parser.error(f"--layout: {' '.join(str(error).split())}")
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    return arguments


def main() -> None:
    """Measure, then write the folder."""
    arguments = parse()
    names = Settings.__dataclass_fields__.keys() - {"kinds", "phases", "lengths"}
    settings = Settings(
        kinds=tuple(arguments.kind),
        phases=tuple(arguments.phase),
        lengths=tuple(arguments.lengths),
        **{name: getattr(arguments, name) for name in names},
    )
    described = conditions(arguments.note)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        rows = measure_torchrun(settings, arguments.layout)
    else:
        rows = measure_here(settings, [case[:2] for case in arguments.cases])
    if process_groups.rank() == 0:
        save(arguments.out, rows, described)
        print(arguments.out / "README.md")
    process_groups.destroy_process_group()


if __name__ == "__main__":
    main()
