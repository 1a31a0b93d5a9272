"""Time and peak memory of the guided teacher against the bare product of its head.

    python kernels/benchmark_guided.py --tokens 2048 --hidden 896 --vocab 151936 --tp 2 --dtype float32

Contestants run in a new random order in every round; reported are medians of each round's ratio to
the floor, the slowest rank's time in both. The floor is the one product a teacher cannot do
without, this rank's hidden @ weight^T in the inputs' type as torch runs it, all rows by `--columns`
columns into one buffer, the fastest blocking found on CPUs. "ours product" is the same product as
the guided teacher makes it: its row chunks, its columns, float32 results. "search" is the guided
teacher beyond that. Memory is the peak beyond the inputs. Logits have a standard deviation of 2
times `--scale` times a factor per token between `--spread` and 1, so that every kind of token occurs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import benchmark as common
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from entropy_kernels import guided, guided_teacher
from entropy_kernels.chunked import spans
from entropy_kernels.collectives import locate
from entropy_kernels.tiles import HiddenTiles

FLOOR, PRODUCT, GUIDED, FIXED = "floor: 1 product", "ours product", "ours guided", "ours fixed"


def bare(problem: common.Problem, columns: int) -> Callable[[], None]:
    """The product, tiled [all rows, columns], into one buffer."""
    hidden, weight = problem.hidden, problem.weight
    out = hidden.new_empty(hidden.shape[0] * min(columns, weight.shape[0]))

    def run() -> None:
        for start, stop in spans(weight.shape[0], columns):
            tile = out[: hidden.shape[0] * (stop - start)].view(hidden.shape[0], stop - start)
            torch.mm(hidden, weight[start:stop].t(), out=tile)

    return run


def contestants(options: argparse.Namespace, problem: common.Problem, group: Any) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    hidden, weight, target = problem.hidden, problem.weight, problem.target

    def product() -> None:
        shard = locate(group, weight.shape[0], options.vocab)
        chunk = guided._Chunk.allocate(
            HiddenTiles(hidden, weight), target, shard, options.row_chunk, guided.uses_triton("auto", hidden)
        )
        for first, last in spans(options.tokens, chunk.logits.shape[0]):
            chunk.load(first, last)

    def teacher(fixed: float | None) -> guided.GuidedTeacher:
        return guided_teacher(hidden, weight, target, fixed=fixed, group=group, row_chunk=options.row_chunk)

    return {
        FLOOR: bare(problem, options.columns),
        PRODUCT: product,
        GUIDED: lambda: teacher(None),
        FIXED: lambda: teacher(1.3),
    }


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds of one run."""
    dist.barrier()
    common.synchronise(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    common.synchronise(device)
    return time.perf_counter() - start, time.process_time() - cpu_start


def kinds(teacher: guided.GuidedTeacher, target: torch.Tensor) -> dict[str, float]:
    """Fractions of the tokens at the lowest, at the highest and at a searched temperature."""
    chosen = teacher.temperature[target >= 0]
    lowest, highest = (chosen <= 1.1).float().mean().item(), (chosen >= 1.5).float().mean().item()
    return {"lowest": lowest, "highest": highest, "searched": 1 - lowest - highest}


def worker(rank: int, options: argparse.Namespace, port: int, outbox: Any) -> None:
    """One rank's benchmark."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, options.threads // options.tp))
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=options.tp)
    problem = common.make_problem(options, rank)
    factors = torch.linspace(options.spread, 1.0, options.tokens, dtype=torch.float64).to(problem.hidden)
    order = torch.randperm(options.tokens, generator=torch.Generator().manual_seed(3))
    problem.hidden *= options.scale * factors[order, None]
    runs = contestants(options, problem, dist.group.WORLD)
    measured = {name: common.Measurement() for name in runs}
    shares = kinds(runs[GUIDED](), problem.target)
    for name, run in runs.items():
        run()
        before = common.reset_peak(device)
        run()
        measured[name].peak = common.peak_memory(device) - before
    names, shuffle = list(runs), random.Random(0)
    for _ in range(options.repeats):
        shuffle.shuffle(names)
        for name in names:
            wall, cpu = timed(runs[name], device)
            measured[name].times.append(wall)
            measured[name].cpu_times.append(cpu)
    gathered: list[Any] = [None] * options.tp
    dist.all_gather_object(gathered, measured)
    if rank == 0:
        outbox.put((common.slowest(gathered), shares))
    dist.barrier()
    dist.destroy_process_group()


def report(options: argparse.Namespace, measured: dict[str, common.Measurement], shares: dict[str, float]) -> dict:
    """Print the table; return what goes to the JSON file."""
    logits = 4 * options.tokens * (options.vocab // options.tp)
    print(f"T={options.tokens} H={options.hidden} V={options.vocab} tp={options.tp} {options.dtype} "
          f"on {options.device}, {options.threads} threads, torch {torch.__version__}; "
          f"fp32 logits {logits / 2**20:.0f} MiB per rank; temperatures: "
          + ", ".join(f"{share:.0%} {kind}" for kind, share in shares.items()))  # fmt: skip
    print(f"{'':20s} {'median s':>9s} {'x floor':>8s} {'cpu x':>6s} {'- product':>10s} {'peak MiB':>9s} "
          f"{'/logits':>8s}")  # fmt: skip
    rows = {}
    floor, product = measured[FLOOR], measured[PRODUCT]
    for name, m in measured.items():
        ratio = common.relative_time(m.times, floor.times)
        cpu_ratio = common.relative_time(m.cpu_times, floor.cpu_times)
        beyond = [t - p for t, p in zip(m.times, product.times, strict=True)]
        search = common.relative_time(beyond, product.times)
        median = statistics.median(m.times)
        print(f"{name:20s} {median:9.3f} {ratio:8.3f} {cpu_ratio:6.3f} {search:10.3f} {m.peak / 2**20:9.0f} "
              f"{m.peak / logits:8.2f}")  # fmt: skip
        rows[name] = {"times": m.times, "cpu_times": m.cpu_times, "peak": m.peak, "median": median,
                      "ratio_to_floor": ratio, "cpu_ratio_to_floor": cpu_ratio,
                      "beyond_own_product": search}  # fmt: skip
    machine = {"platform": platform.platform(), "torch": torch.__version__, "load": os.getloadavg()}
    return {"options": vars(options), "machine": machine, "temperatures": shares, "results": rows}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_line(__doc__ or "", tp=2, dtype="float32")
    parser.add_argument("--spread", type=float, default=0.25, help="smallest factor on a token's logits")
    parser.add_argument("--scale", type=float, default=4.0, help="factor on every logit")
    parser.add_argument("--row-chunk", type=int, help="rows of a chunk; a good number unless given")
    parser.add_argument("--columns", type=int, default=1024, help="columns of a tile of the floor")
    options = parser.parse_args(arguments)
    options.peaked = 0.0
    return options


def main() -> None:
    """Start the ranks, wait, report."""
    options = parse()
    if options.vocab % options.tp:
        raise SystemExit(f"--vocab {options.vocab} is not divisible by --tp {options.tp}")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    outbox = mp.get_context("spawn").SimpleQueue()
    mp.spawn(worker, (options, port, outbox), nprocs=options.tp, join=True)
    result = report(options, *outbox.get())
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
