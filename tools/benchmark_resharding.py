#!/usr/bin/env python3
"""Measure a weight sync: bytes, memory and seconds, for random Qwen2-like models on the CPUs of this machine.

For each size the trainer's ranks hold their shards of a random model (no gradients, no optimizer) and sync it to real
vLLM engines. Between the syncs the same number of bytes is sent bare, over the same kind of link and in the same
buckets, to as many processes that drop it; the two take turns in going first.

    python tools/benchmark_resharding.py [--sizes 0.1 0.5 1.5] [--tp 2] [--pp 1] [--engines 1] [--engine-tp 1]
        [--dtype bfloat16] [--transfer shared_memory] [--repeats 3] [--bare-receivers] [--json resharding.json]

Columns: `bytes`: sent to each engine, relative to the model's (every worker of an engine receives all of them).
`memory`: the peak of resident memory during a sync above that before it, in buckets, of rank 0 and of the worst other
rank. Seconds are medians; `gather`, `convert` and `transfer` follow one another on rank 0 (transfer: what sending takes
beyond the other two, which it overlaps), `load` is the engine's and overlaps all. `ratio`: the sync to the bare
transfer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `megatron-entropy train` does; read when torch is imported

import local_ranks
import torch
import torch.distributed as dist
from benchmark_rows import Row, conditions, quartiles, write

from megatron_entropy.config.architecture import ModelArchitecture, read_architecture
from megatron_entropy.config.schema import ParallelConfig, RolloutConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.weights.buckets import BUCKET_BYTES, TensorMeta
from megatron_entropy.weights.links import SHARED_MEMORY, LinkInfo
from megatron_entropy.weights.names import shard_shape
from megatron_entropy.weights.plan import plan
from megatron_entropy.weights.source import ShardedSource
from megatron_entropy.weights.sync import WeightSync, WeightSyncStats
from megatron_entropy.weights.transport import Receiver, Sender

SIZES = {  # billions of parameters; the larger two are Qwen2.5's
    "0.1": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12,
            "num_key_value_heads": 4, "vocab_size": 32768},
    "0.5": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "vocab_size": 151936},
    "1.5": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip
STOP = "stop"


def random_shards(arch: ModelArchitecture, layout: ParallelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Make this rank's shards of the parameters that a sync reads from it."""
    shards = {}
    for placement in plan(arch, layout):
        if dist.get_rank() in placement.ranks:
            shards[placement.entry.megatron] = torch.randn(
                shard_shape(placement.entry, arch, ranks=placement.num_shards), dtype=dtype
            )
    return shards


class BareEngine:
    """A process that receives weights and drops them: replaces an engine where memory does not allow one."""

    num_workers = 1

    def __init__(self, index: int) -> None:
        self.index = index
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_receive_bare, args=(other,), daemon=True)
        self._process.start()

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        """Join a transfer group."""
        self._ask(("join", init_info))

    def start_weight_update(self) -> None:
        """Do nothing."""

    def update_weights(self, update_info: dict) -> float:
        """Receive the tensors and drop them."""
        return self._ask(("receive", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Do nothing."""

    def close(self) -> None:
        """End the process."""
        self._pipe.send(STOP)

    def _ask(self, message: tuple) -> float:
        self._pipe.send(message)
        return self._pipe.recv()


def _receive_bare(pipe: Connection) -> None:
    torch.set_num_threads(1)
    receiver = None
    while (message := pipe.recv()) != STOP:
        method, info = message
        if method == "join":
            pipe.send(0.0)  # at once: the sender waits until all have joined
            receiver = Receiver(LinkInfo(**info), info["rank_offset"])
        else:
            assert receiver is not None
            fields = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
            receiver.receive([TensorMeta(n, getattr(torch, d), tuple(s)) for n, d, s in fields], lambda tensors: None)
            pipe.send(0.0)


class BareBroadcast:
    """Sends the same bytes in the same buckets over the same kind of link: the lower bound of a sync."""

    def __init__(self, num_receivers: int, num_bytes: int, bucket_bytes: int, backend: str) -> None:
        self._sizes = _pieces(num_bytes, bucket_bytes)
        self._writes = backend == SHARED_MEMORY  # other links send from the memory that holds the bytes
        sender = Sender("127.0.0.1", num_receivers=num_receivers, bucket_bytes=bucket_bytes, backend=backend)
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        for rank in range(1, num_receivers + 1):
            pipe, other = context.Pipe()
            context.Process(
                target=_take_bare, args=(other, sender.init_info(0), rank, self._sizes), daemon=True
            ).start()
            self._pipes.append(pipe)
        sender.connect()
        self._sender = sender
        self._buffer = torch.ones(max(self._sizes), dtype=torch.uint8)

    def run(self) -> float:
        """Broadcast once; returns the seconds."""
        for pipe in self._pipes:
            pipe.send("go")
        link = self._sender._link
        assert link is not None
        begin = time.monotonic()
        link.begin(max(self._sizes))
        shared = link.buffers() if self._writes else []
        for turn, size in enumerate(self._sizes):
            buffer = self._buffer[:size]
            if shared:
                buffer = shared[turn % 2][:size].copy_(buffer)
            link.finish()
            link.start(buffer)
        link.finish()
        for pipe in self._pipes:
            pipe.recv()
        return time.monotonic() - begin

    def close(self) -> None:
        """End the receivers."""
        for pipe in self._pipes:
            pipe.send(STOP)
        self._sender.close()


def _take_bare(pipe: Connection, info: dict, rank: int, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    receiver = Receiver(LinkInfo(**info), rank)
    buffer = torch.ones(max(sizes), dtype=torch.uint8)
    while pipe.recv() != STOP:
        link = receiver._link
        assert link is not None
        link.begin(max(sizes))
        for size in sizes:
            link.start(buffer[:size])
            link.finish()
        pipe.send("done")


def _pieces(num_bytes: int, piece: int) -> list[int]:
    return [min(piece, num_bytes - begin) for begin in range(0, num_bytes, piece)]


def measure_rank(folder: str, layout: ParallelConfig, settings: argparse.Namespace) -> dict:
    """Run one trainer rank; rank 0 returns the row of the table."""
    torch.set_num_threads(1)
    process_groups.init_model_parallel(layout, seed=1)
    arch = read_architecture(folder)
    dtype = getattr(torch, settings.dtype)
    source = ShardedSource(arch, layout, random_shards(arch, layout, dtype), dtype)
    first = dist.get_rank() == 0
    clients = pool = bare = None
    if first:
        clients, pool = _engines(folder, settings)
    sync = WeightSync(source, bucket_bytes=settings.bucket_mib * 2**20, timeout=600, backend=settings.transfer)
    _timed_sync(sync, clients)  # connects, and touches all memory once
    memory = _memory_of(lambda: _timed_sync(sync, clients)) / (settings.bucket_mib * 2**20)
    memories: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(memories, memory)
    model_bytes = sum(meta.num_bytes for meta in source.metadata())
    if first:
        num_receivers = settings.engines * settings.engine_tp
        bare = BareBroadcast(num_receivers, model_bytes, settings.bucket_mib * 2**20, settings.transfer)
        bare.run()
    all_stats, seconds, floors = [], [], []
    for repeat in range(settings.repeats):
        if bare and repeat % 2:
            floors.append(bare.run())
        dist.barrier()
        stats, wall = _timed_sync(sync, clients)
        all_stats.append(stats)
        seconds.append(wall)
        if bare and not repeat % 2:
            floors.append(bare.run())
    sync.close()
    if not first or bare is None:
        return {}
    bare.close()
    for client in clients or ():
        if isinstance(client, BareEngine):
            client.close()
    if pool is not None:
        pool.shutdown()
    return {
        "model_bytes": model_bytes,
        "bytes_ratio": all_stats[0].num_bytes * settings.engine_tp / model_bytes,
        "memory_rank0": memories[0],
        "memory_others": max(memories[1:], default=0.0),
        **_medians(all_stats),
        "sync_s": seconds,
        "bare_s": floors,
    }


def _engines(folder: str, settings: argparse.Namespace) -> tuple[list, Any]:
    if settings.bare_receivers:
        return [BareEngine(index) for index in range(settings.engines)], None
    from megatron_entropy.rollout.engine import EngineSpec
    from megatron_entropy.rollout.pool import EnginePool

    config = RolloutConfig(num_engines=settings.engines, tensor_parallel=settings.engine_tp, max_num_seqs=8)
    pool = EnginePool(config, EngineSpec(folder, 64, (0,), dtype=settings.dtype))
    pool.wait_ready()
    return pool.clients(), pool


def _timed_sync(sync: WeightSync, clients: list | None) -> tuple[WeightSyncStats | None, float]:
    begin = time.monotonic()
    return sync.sync(1, clients), time.monotonic() - begin


def _memory_of(work) -> float:
    """Bytes by which this process's resident memory rises while `work` runs; all shared memory counts."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS") - _status("RssShmem")
    work()
    return (_status("VmHWM") - before) * 1024


def _status(field: str) -> int:
    """A field of this process's memory status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def _medians(all_stats: list[WeightSyncStats]) -> dict[str, float]:
    fields = {"gather": "gather_seconds", "convert": "convert_seconds", "transfer": "wire_seconds"}
    row = {
        f"{name}_s": statistics.median(getattr(stats, field) for stats in all_stats) for name, field in fields.items()
    }
    row["load_s"] = statistics.median(s.load_seconds + s.start_seconds + s.finish_seconds for s in all_stats)
    return row


def measure(size: str, settings: argparse.Namespace) -> Row:
    """Measure one model."""
    layout = ParallelConfig(tp=settings.tp, pp=settings.pp)
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "max_position_embeddings": 4096, "tie_word_embeddings": True,
            "torch_dtype": settings.dtype, **SIZES[size],
        }  # fmt: skip
        Path(folder, "config.json").write_text(json.dumps(config))
        found = local_ranks.run_on_ranks(measure_rank, layout.world_size, folder, layout, settings, timeout_s=3000)[0]
    repeats = {name: found[name] for name in ("sync_s", "bare_s")}
    values = found | {name: statistics.median(numbers) for name, numbers in repeats.items()}
    values["ratio"] = values["sync_s"] / values["bare_s"]
    named = ("tp", "pp", "engines", "engine_tp", "dtype", "bucket_mib", "transfer", "bare_receivers")
    case = {"billions": size} | {name: getattr(settings, name) for name in named}
    return Row(case, values, {name: quartiles(numbers) for name, numbers in repeats.items()})


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), metavar="BILLIONS")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--engine-tp", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--bucket-mib", type=int, default=BUCKET_BYTES // 2**20)
    parser.add_argument("--transfer", choices=[SHARED_MEMORY, "gloo"], default=SHARED_MEMORY)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bare-receivers", action="store_true", help="processes that drop the weights instead of vLLM")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    settings = parser.parse_args()
    if settings.bare_receivers and settings.engine_tp > 1:
        parser.error("--bare-receivers stand for one worker each; use --engines instead of --engine-tp")
    receivers = "bare receivers" if settings.bare_receivers else f"vLLM engines (TP{settings.engine_tp})"
    print(
        f"{settings.engines} {receivers}, trainer TP{settings.tp} PP{settings.pp}, {settings.dtype}, "
        f"buckets of {settings.bucket_mib} MiB through {settings.transfer}, {os.cpu_count()} cores, "
        f"medians of {settings.repeats}"
    )
    print(
        f"{'model':>6}{'MiB':>7}{'bytes':>7}{'memory 0':>10}{'others':>8}{'gather':>9}{'convert':>9}{'transfer':>10}"
        f"{'load':>7}{'sync':>8}{'bare':>8}{'ratio':>7}"
    )
    described = conditions()
    rows: list[Row] = []
    for size in settings.sizes:
        rows.append(measure(size, settings))
        row: dict[str, Any] = rows[-1].values
        print(
            f"{size + ' B':>6}{row['model_bytes'] / 2**20:>7.0f}{row['bytes_ratio']:>7.3f}{row['memory_rank0']:>10.2f}"
            f"{row['memory_others']:>8.2f}{row['gather_s']:>8.2f}s{row['convert_s']:>8.2f}s{row['transfer_s']:>9.2f}s"
            f"{row['load_s']:>6.2f}s{row['sync_s']:>7.2f}s{row['bare_s']:>7.2f}s{row['ratio']:>7.2f}",
            flush=True,
        )
    if settings.json:
        write(settings.json, "weight sync", rows, described)


if __name__ == "__main__":
    main()
