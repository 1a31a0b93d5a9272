"""Time, peak memory and error of every implementation and installed peer, on the same tensors.

    python kernels/benchmark.py --tokens 2048 --hidden 896 --vocab 151936 --dtype bfloat16

One run = forward and backward of sum(a * logprob + b * entropy). Contestants run in a new random
order in every round; reported are medians, and medians of each round's ratio to the floor: the
four matrix products that a method without logits in memory must do (one forward, three
backward), in the inputs' type, best blocking. Masked rows have target -100 (peers without an
ignore index compute them with coefficient 0). Peak memory is beyond the inputs and both
gradients. Errors are the largest against float64, on `--check` rows.

Logits have a standard deviation of 2, so every token keeps some probability. `--peaked 20` adds the
directions of the target and of three rivals to hidden, as a trained model would: few tokens hold
nearly everything, and tile skipping (`skip_mass`) joins the contestants.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmark_peers import CONTESTANTS, Case, Contestant, Unavailable
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from benchmark_rows import Row, conditions, quartiles, write  # noqa: E402

FLOOR = "floor: 4 products"
CASE = ("tokens", "hidden", "vocab", "tp", "dtype", "device", "masked", "peaked", "threads")


@dataclass
class Measurement:
    """What one contestant showed; times in seconds, memory in bytes."""

    times: list[float] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)
    """Processor time of the process: immune to other programs, but counts waiting threads."""
    peak: int = 0
    logprob_error: float | None = None
    entropy_error: float | None = None
    entropy: float | None = None
    """Mean over the rows that count, in nats."""
    hidden_gradient_error: float | None = None


@dataclass
class Problem:
    """The tensors of one rank."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    weights: Tensor
    """[2, T]: coefficients of log-prob and entropy in the loss, 0 on masked rows."""


def make_problem(options: argparse.Namespace, rank: int) -> Problem:
    """Random hidden states and weights that give logits of standard deviation 2."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (options.tokens, options.hidden)
    hidden = torch.randn(shape, generator=generator).to(device, dtype)
    target = torch.randint(options.vocab, (options.tokens,), generator=generator)
    masked = torch.rand(options.tokens, generator=generator) < options.masked
    weights = torch.randn((2, options.tokens), generator=generator).masked_fill(masked, 0.0)
    rows = options.vocab // options.tp
    generator.manual_seed(1 + rank)
    weight = torch.randn((rows, options.hidden), generator=generator)
    weight = weight.mul_(2 / options.hidden**0.5).to(device, dtype)
    if options.peaked:
        sharpen(hidden, weight, target.to(device), options.peaked)
    target = target.masked_fill(masked, -100).to(device)
    return Problem(hidden, weight, target, weights.to(device))


def sharpen(hidden: Tensor, weight: Tensor, target: Tensor, logit: float) -> None:
    """Raise the target's logit to about `logit`, and those of three random rivals to a little less.

    A row of the weight has a squared length of 4, so a quarter of it in hidden adds 1 to its logit.
    """
    generator = torch.Generator().manual_seed(2)
    hidden += weight[target] * (logit / 4)
    for less in (2.0, 3.0, 4.0):
        rival = torch.randint(weight.shape[0], target.shape, generator=generator).to(target.device)
        hidden += weight[rival] * ((logit - less) / 4)


def floor(problem: Problem) -> Callable[[], None]:
    """The bare products, tiled [all rows, 4096 columns], results into fixed buffers."""
    hidden, weight = problem.hidden, problem.weight
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    width = min(4096, weight.shape[0])
    logits = torch.randn(hidden.shape[0], width, device=hidden.device).to(hidden.dtype)
    out = torch.empty_like(logits)

    def run() -> None:
        for start in range(0, weight.shape[0], width):
            tile = weight[start : start + width]
            count = tile.shape[0]
            for _ in range(2):
                if count == width:
                    torch.mm(hidden, tile.t(), out=out)
                else:
                    hidden @ tile.t()
            torch.mm(logits[:, :count], tile, out=grad_hidden)
            torch.mm(logits[:, :count].t(), hidden, out=grad_weight[start : start + width])

    return run


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak(device: torch.device) -> int:
    """Give freed memory back, start a peak measurement; returns the memory in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")
    return resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    """The peak since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def run_once(run: Contestant, problem: Problem, record: Measurement | None) -> tuple[Any, ...]:
    """Forward and backward, timed into `record`; returns (logprob, entropy, hidden gradient)."""
    device = problem.hidden.device
    hidden = problem.hidden.detach().requires_grad_()
    weight = problem.weight.detach().requires_grad_()
    dist.barrier()
    synchronise(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    logprob, entropy = run(hidden, weight)
    loss = (problem.weights[0] * logprob.float()).sum()
    if entropy is not None:
        loss = loss + (problem.weights[1] * entropy.float()).sum()
    loss.backward()
    synchronise(device)
    stop, cpu_stop = time.perf_counter(), time.process_time()
    if record is not None:
        record.times.append(stop - start)
        record.cpu_times.append(cpu_stop - cpu_start)
    return logprob.detach(), None if entropy is None else entropy.detach(), hidden.grad


def measure_peak(run: Contestant, problem: Problem) -> int:
    """Peak memory of one more run, beyond the inputs and both gradients."""
    device = problem.hidden.device
    before = reset_peak(device)
    run_once(run, problem, None)
    return peak_memory(device) - before - problem.hidden.nbytes - problem.weight.nbytes


def exact_rows(problem: Problem, rows: Tensor, group: Any, with_entropy: bool) -> tuple[Any, ...]:
    """float64 log-prob, entropy and hidden gradient of some rows."""
    hidden = problem.hidden[rows].double()
    logits = hidden @ problem.weight.double().t()
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits, group=group)
    logp = torch.log_softmax(torch.cat(parts, dim=1), dim=1)
    p = logp.exp()
    entropy = -(p * logp).sum(dim=1)
    target = problem.target[rows]
    a, b = problem.weights[:, rows].double()
    gradient = -a[:, None] * p
    gradient.scatter_add_(1, target[:, None], a[:, None])
    if with_entropy:
        gradient -= b[:, None] * p * (logp + entropy[:, None])
    rank, width = dist.get_rank(group), problem.weight.shape[0]
    own = gradient[:, rank * width : (rank + 1) * width] @ problem.weight.double()
    dist.all_reduce(own, group=group)
    return logp.gather(1, target[:, None])[:, 0], entropy, own


def measure_error(results: tuple[Any, ...], problem: Problem, count: int, group: Any) -> dict:
    """Largest errors on the first `count` rows that count."""
    rows = (problem.target >= 0).nonzero()[:count, 0]
    logprob, entropy, gradient = results
    exact = exact_rows(problem, rows, group, entropy is not None)
    errors = {"logprob_error": (logprob[rows] - exact[0]).abs().max().item()}
    if entropy is not None:
        errors["entropy_error"] = (entropy[rows] - exact[1]).abs().max().item()
        errors["entropy"] = entropy[problem.target >= 0].mean().item()
    scale = exact[2].abs().max()
    errors["hidden_gradient_error"] = ((gradient[rows] - exact[2]).abs().max() / scale).item()
    return errors


def prepare(options: argparse.Namespace, case: Case) -> tuple[dict[str, Contestant], dict]:
    """The contestants that can run, and why the others cannot."""
    ready, absent = {}, {}
    for name, make in CONTESTANTS.items():
        if options.only and not any(o in name for o in options.only):
            continue
        try:
            ready[name] = make(case)
        except (Unavailable, ImportError) as reason:
            absent[name] = str(reason)
    return ready, absent


def worker(rank: int, options: argparse.Namespace, port: int, outbox: Any) -> None:
    """One rank's benchmark."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, options.threads // options.tp))
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=options.tp)
    group = dist.group.WORLD
    assert group is not None
    try:
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=options.tp)
    except ImportError:
        pass  # only verl's pair needs it, and it is then listed as unavailable
    problem = make_problem(options, rank)
    case = Case(problem.target, group, options.tp, device, problem.hidden.dtype, options.peaked > 0)
    contestants, absent = prepare(options, case)
    measured = {name: Measurement() for name in (FLOOR, *contestants)}
    for name in list(contestants):
        try:
            results = run_once(contestants[name], problem, None)
        except Exception as error:  # a peer's own failure is a finding, listed with its message
            if name.startswith("ours"):
                raise
            absent[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
            del contestants[name], measured[name]
            continue
        errors = measure_error(results, problem, options.check, group)
        measured[name] = Measurement(**errors)
        del results
        measured[name].peak = measure_peak(contestants[name], problem)
    rounds(options, problem, contestants, measured)
    gathered: list[Any] = [None] * options.tp
    dist.all_gather_object(gathered, measured)
    if rank == 0:
        outbox.put((slowest(gathered), absent))
    dist.barrier()
    dist.destroy_process_group()


def rounds(
    options: argparse.Namespace,
    problem: Problem,
    contestants: dict[str, Contestant],
    measured: dict[str, Measurement],
) -> None:
    """Every contestant once per round, in an order that is new each round."""
    shuffle = random.Random(0)
    bare = floor(problem)
    names = list(measured)
    for number in range(1, options.repeats + 1):
        if dist.get_rank() == 0:
            print(f"round {number} of {options.repeats}, {len(names)} contestants", file=sys.stderr, flush=True)
        shuffle.shuffle(names)
        for name in names:
            if name != FLOOR:
                run_once(contestants[name], problem, measured[name])
                continue
            dist.barrier()
            synchronise(problem.hidden.device)
            start, cpu_start = time.perf_counter(), time.process_time()
            bare()
            synchronise(problem.hidden.device)
            measured[name].times.append(time.perf_counter() - start)
            measured[name].cpu_times.append(time.process_time() - cpu_start)


def slowest(ranks: list[dict[str, Measurement]]) -> dict[str, Measurement]:
    """Per round the slowest rank's time; the largest memory of any rank."""
    merged = ranks[0]
    for name, measurement in merged.items():
        others = [r[name] for r in ranks]
        measurement.times = [max(t) for t in zip(*(o.times for o in others), strict=True)]
        measurement.cpu_times = [max(t) for t in zip(*(o.cpu_times for o in others), strict=True)]
        measurement.peak = max(o.peak for o in others)
    return merged


def relative_time(times: list[float], floor_times: list[float]) -> float:
    """Median over the rounds of the time in units of the same round's floor."""
    return statistics.median(t / f for t, f in zip(times, floor_times, strict=True))


def report(options: argparse.Namespace, measured: dict[str, Measurement], absent: dict) -> list[Row]:
    """Print the table; return the rows of the JSON file."""
    logits = 4 * options.tokens * (options.vocab // options.tp)
    print(f"T={options.tokens} H={options.hidden} V={options.vocab} tp={options.tp} "
          f"{options.dtype} masked={options.masked} peaked={options.peaked} on {options.device}, "
          f"{options.threads} threads, torch {torch.__version__}; "
          f"fp32 logits {logits / 2**20:.0f} MiB per rank")  # fmt: skip
    print(f"{'':20s} {'median s':>9s} {'best s':>8s} {'x floor':>8s} {'cpu x':>6s} {'peak MiB':>9s} "
          f"{'/logits':>8s} {'logp err':>9s} {'H err':>9s} {'dh err':>9s} {'mean H':>6s}")  # fmt: skip
    shape = {key: getattr(options, key) for key in CASE}
    rows = []
    for name, m in sorted(measured.items(), key=lambda item: statistics.median(item[1].times)):
        ratio = relative_time(m.times, measured[FLOOR].times)
        cpu_ratio = relative_time(m.cpu_times, measured[FLOOR].cpu_times)
        errors = [m.logprob_error, m.entropy_error, m.hidden_gradient_error]
        shown = " ".join(f"{'-' if e is None else format(e, '.1e'):>9s}" for e in errors)
        shown += f" {'-' if m.entropy is None else format(m.entropy, '.2f'):>6s}"
        median, best = statistics.median(m.times), min(m.times)
        print(f"{name:20s} {median:9.3f} {best:8.3f} {ratio:8.2f} {cpu_ratio:6.2f} {m.peak / 2**20:9.0f} "
              f"{m.peak / logits:8.2f} {shown}")  # fmt: skip
        values = {
            "median_s": median, "best_s": best, "ratio_to_floor": ratio, "cpu_ratio_to_floor": cpu_ratio,
            "peak_mib": m.peak / 2**20, "logprob_error": m.logprob_error, "entropy_error": m.entropy_error,
            "hidden_gradient_error": m.hidden_gradient_error, "mean_entropy_nats": m.entropy,
        }  # fmt: skip
        rows.append(Row({"implementation": name} | shape, values, {"median_s": quartiles(m.times)}))
    for name, reason in absent.items():
        print(f"{name:20s} not run: {reason}")
    return rows


def command_line(description: str, *, tp: int, dtype: str) -> argparse.ArgumentParser:
    """The options that every benchmark of a head has."""
    parser = argparse.ArgumentParser(description=description.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--tp", type=int, default=tp, help="ranks; they share --threads")
    parser.add_argument("--dtype", default=dtype, choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--masked", type=float, default=0.0, help="fraction of ignored rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="file for the numbers")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__ or "", tp=1, dtype="bfloat16")
    parser.add_argument("--peaked", type=float, default=0.0, help="logit of the targets; 0: as random as the others")
    parser.add_argument("--check", type=int, default=32, help="rows compared with float64")
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name contains")
    return parser.parse_args(arguments)


def main() -> None:
    """Start the ranks, wait, report."""
    options = parse()
    if options.vocab % options.tp:
        raise SystemExit(f"--vocab {options.vocab} is not divisible by --tp {options.tp}")
    if options.peaked and options.tp > 1:
        raise SystemExit("--peaked needs --tp 1: a rank has the directions of its own shard only")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    described = conditions()
    outbox = mp.get_context("spawn").SimpleQueue()
    mp.spawn(worker, (options, port, outbox), nprocs=options.tp, join=True)
    measured, absent = outbox.get()
    rows = report(options, measured, absent)
    if options.json:
        write(Path(options.json), "entropy head", rows, described, not_run=absent)


if __name__ == "__main__":
    main()
