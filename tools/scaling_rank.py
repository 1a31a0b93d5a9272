"""One rank of `benchmark_scaling.py`: builds the model in a layout and times the phases of a training step."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import collectives
import numpy as np
import torch
from benchmark_resharding import BareEngine
from benchmark_update import SHAPES, make_samples

from entropy_kernels import TokenStats
from megatron_entropy.config.architecture import ModelArchitecture, read_architecture
from megatron_entropy.config.schema import ActorConfig, ParallelConfig, RolloutConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.records import Batch

WARM_UP = 2
"""Calls that do not count: the first allocates what stays, the second still touches fresh memory."""
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Settings:
    """What all cases have in common.

    `tokens`: of each rank in a weak case. `total_tokens`: of all ranks together in a strong case. `microbatch`: tokens
    of a micro-batch. `prompts`, `response_tokens`: of each engine. `engines`: 0: as many as ranks. `threads`: of a rank
    on a CPU. `model`: a name of `SHAPES`, or a model folder, of which only `config.json` is read.
    """

    model: str
    kinds: tuple[str, ...]
    phases: tuple[str, ...]
    repeats: int
    tokens: int
    total_tokens: int
    lengths: tuple[int, int]
    microbatch: int
    prompts: int
    response_tokens: int
    engines: int
    threads: int
    dtype: str


@dataclass
class Timing:
    """What one rank saw of one kind and phase; a number of each list belongs to one repeat."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_gb: list[float] = field(default_factory=list)
    control: list[float] = field(default_factory=list)
    """Seconds of the same without communication."""
    tokens: int = 0
    """Tokens of all ranks in one call."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Calls and bytes of this rank's collectives by operation."""
    alone: dict[str, float] = field(default_factory=dict)
    """Seconds of these collectives without the work between them."""


@dataclass
class RankResult:
    """All timings of a rank by (kind, phase), and the model's architecture."""

    timings: dict[tuple[str, str], Timing]
    arch: ModelArchitecture
    node: str
    device: str


def measure(settings: Settings, layout: ParallelConfig) -> RankResult:
    """Time every kind and phase on this rank; a collective over all ranks of the layout."""
    import socket

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(settings.threads)
    process_groups.init_model_parallel(layout, seed=1)
    timings = {(kind, phase): Timing() for kind in settings.kinds for phase in settings.phases}
    with model_folder(settings.model) as folder, Workload(folder, settings, layout) as workload:
        for turn in range(WARM_UP + settings.repeats):
            for (kind, phase), timing in timings.items():
                _time(workload.work(kind, phase), timing if turn >= WARM_UP else Timing(), workload)
                if phase in ("score", "update") and layout.world_size > 1:
                    scratch = timing if turn >= WARM_UP else Timing()
                    with collectives.without_communication():
                        scratch.control.append(_time(workload.work(kind, phase), Timing(), workload))
        for (kind, phase), timing in timings.items():
            with collectives.recorded() as calls:
                timing.tokens = workload.work(kind, phase)()
            timing.counts = collectives.count(calls)
            process_groups.barrier()
            if phase in ("score", "update"):
                collectives.run_alone(calls)
                process_groups.barrier()
                timing.alone = collectives.run_alone(calls)
            process_groups.barrier()
        device = torch.cuda.get_device_name() if on_gpu else "cpu"
        return RankResult(timings, workload.arch, socket.gethostname(), device)


def _time(work: Callable[[], int], timing: Timing, workload: Workload) -> float:
    """Run a phase once into `timing`; returns this rank's seconds."""
    if workload.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    process_groups.barrier()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    work()
    if workload.on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    timing.seconds.append(seconds)
    timing.cpu_seconds.append(time.process_time() - begin_cpu)
    timing.peak_gb.append(_peak_bytes(workload.on_gpu) / 1e9)
    return seconds


def _peak_bytes(on_gpu: bool) -> int:
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


@contextlib.contextmanager
def model_folder(model: str) -> Iterator[str]:
    """The folder of the user, or one with the `config.json` of a shape."""
    if model not in SHAPES:
        yield model
        return
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "max_position_embeddings": 8192, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    } | SHAPES[model]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        yield folder


class Workload:
    """A model with random weights, and the phases of a step on it. Rank 0 has the engines or the bare receivers."""

    def __init__(self, folder: str, settings: Settings, layout: ParallelConfig) -> None:
        from megatron_entropy.actor.actor import Actor
        from megatron_entropy.weights.source import ShardedSource
        from megatron_entropy.weights.sync import WeightSync

        self.on_gpu = torch.cuda.is_available()
        self.arch = read_architecture(folder)
        self._settings = settings
        self._world_size = layout.world_size
        config = ActorConfig(parallel=layout, dtype=settings.dtype, max_tokens_per_microbatch=settings.microbatch)  # type: ignore[arg-type]
        self._actor = Actor(self.arch, config, total_updates=1)
        _fill(self._actor.named_shards())
        self._actor.after_load()
        self._pool: Any = None
        self._clients: list[Any] | None = None
        self._version = 0
        self._sync: WeightSync | None = None
        if not {"sync", "generate", "step"} & set(settings.phases):
            return
        single = process_groups.is_single_machine()
        address, backend = process_groups.run_on_rank_zero(lambda: self._start_receivers(folder, single))
        dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        source = ShardedSource(self.arch, layout, self._actor.named_shards(), dtype)
        self._sync = WeightSync(source, address=address, timeout=600, backend=backend)
        self._sync_weights()

    def __enter__(self) -> Workload:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._sync is not None:
            self._sync.close()
        if self._pool is not None:
            self._pool.shutdown()
        elif self._clients is not None:
            for client in self._clients:
                client.close()

    def work(self, kind: str, phase: str) -> Callable[[], int]:
        """Return a function that runs a phase and returns its tokens over all ranks."""
        ranks = self._world_size if kind == "weak" else 1
        tokens = self._settings.tokens * ranks if kind == "weak" else self._settings.total_tokens
        samples = make_samples(self._settings.lengths, tokens, self.arch.vocab_size)
        prompts = self._settings.prompts * ranks
        phases: dict[str, Callable[[], int]] = {
            "score": lambda: self._score(samples, tokens),
            "update": lambda: self._update(samples, tokens),
            "sync": self._sync_weights,
            "generate": lambda: self._generate(prompts),
        }
        if phase == "step":
            return lambda: [phases[name]() for name in ("generate", "score", "update", "sync")][2]
        return phases[phase]

    def _score(self, samples: Sequence[Any], tokens: int) -> int:
        from megatron_entropy.actor.statistics import policy_statistics

        self._actor.score(samples, policy_statistics(temperature=1.0))
        return tokens

    def _update(self, samples: Sequence[Any], tokens: int) -> int:
        self._actor.update(samples, _loss, temperature=1.0)
        return tokens

    def _sync_weights(self) -> int:
        assert self._sync is not None
        self._version += 1
        self._sync.sync(self._version, self._clients)
        return 0

    def _generate(self, prompts: int) -> int:
        """Answer random prompts; no answer ends early."""

        def on_rank_zero() -> int:
            completions, dead = self._pool.generate(self._requests(prompts), "benchmark")
            assert not dead, "an engine died"
            return sum(len(completion.tokens) for completion in completions)

        return process_groups.run_on_rank_zero(on_rank_zero)

    def _requests(self, prompts: int) -> list[Any]:
        from megatron_entropy.rollout.engine import Request

        generator = np.random.default_rng(self._version)
        return [
            Request(
                (number,),
                tuple(generator.integers(0, self.arch.vocab_size, PROMPT_TOKENS).tolist()),
                seed=number,
                max_tokens=self._settings.response_tokens,
                temperature=1.0,
            )
            for number in range(prompts)
        ]

    def _start_receivers(self, folder: str, trainer_on_one_machine: bool) -> tuple[str, str]:
        """Start engines, or processes that drop the weights; returns the address and the backend of the sync."""
        if not {"generate", "step"} & set(self._settings.phases):
            self._clients = [BareEngine(index) for index in range(max(1, self._settings.engines))]
            return "127.0.0.1", "shared_memory" if trainer_on_one_machine else "gloo"
        from megatron_entropy.rollout.engine import EngineSpec
        from megatron_entropy.rollout.pool import EnginePool

        os.environ.setdefault("LOCAL_WORLD_SIZE", str(self._world_size))
        spec = EngineSpec(
            folder,
            PROMPT_TOKENS + self._settings.response_tokens,
            (),
            dtype=self._settings.dtype,
            device="cuda" if self.on_gpu else "cpu",
            threads=self._settings.threads,
        )
        config = RolloutConfig(num_engines=self._settings.engines or self._world_size)
        self._pool = EnginePool(config, spec)
        self._pool.wait_ready()
        self._clients = self._pool.clients()
        return self._pool.address, self._pool.backend(trainer_on_one_machine=trainer_on_one_machine)


def _loss(stats: TokenStats, batch: Batch) -> tuple[torch.Tensor, dict]:
    assert stats.entropy is not None
    return -stats.logprob - 0.01 * stats.entropy, {}


def _fill(shards: dict[str, torch.Tensor]) -> None:
    """Random matrices, scales of one and biases of zero."""
    with torch.no_grad():
        for name, shard in shards.items():
            if shard.dim() > 1:
                shard.normal_(0.0, 0.02)
            else:
                shard.fill_(0.0 if name.endswith("bias") else 1.0)
