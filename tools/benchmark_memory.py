#!/usr/bin/env python3
"""Peak memory of the actor's `score` and `update` against tokens and vocabulary: it must not grow with T x V.

For each vocabulary a small random model is scored and updated on packs of two sizes, each in a fresh process; the
difference of the peaks over the difference in tokens is the memory per token. It should not depend on the vocabulary;
keeping fp32 logits would cost 4 * V bytes per token.

    python tools/benchmark_memory.py [--vocabularies 16384 65536] [--tokens 4096 16384] [--out memory.json]

CPU figures (process memory read from /proc); activations of the layers are part of them.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from benchmark_rows import Row, Value, conditions, write
from local_ranks import run_on_ranks

from entropy_kernels import TokenStats
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import ActorConfig, ParallelConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.records import Batch, Sample

M_MMAP_THRESHOLD = -3  # of mallopt(3)

LENGTH = 256
"""Tokens of each sequence of the pack."""


def peak_mib(folder: str, tokens: int, layout: ParallelConfig) -> dict[str, float]:
    """Increase of the peak process memory in MiB during a score and an update of one pack."""
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.actor.statistics import policy_statistics
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    # Large blocks are taken from the kernel and returned to it, so that resident memory is live memory.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    process_groups.init_model_parallel(layout, seed=1)
    arch = read_architecture(folder)
    actor = Actor(
        arch, ActorConfig(parallel=layout, dtype="float32", max_tokens_per_microbatch=tokens), total_updates=1
    )
    load(TensorFolder(folder), arch, actor.config.parallel, actor.named_shards())
    actor.after_load()
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(tokens // LENGTH):
        sample = Sample(generator.integers(0, arch.vocab_size, LENGTH + 1).astype(np.int32), 1, "stop", "")
        samples.append(dataclasses.replace(sample, weight=sample.constant(1 / tokens)))

    def loss(stats: TokenStats, batch: Batch) -> tuple[torch.Tensor, dict]:
        assert stats.entropy is not None
        return -stats.logprob - 0.01 * stats.entropy, {}

    def work(name: str) -> None:
        if name == "score":
            actor.score(samples, policy_statistics(temperature=1.0))
        else:
            actor.update(samples, loss, temperature=1.0)

    peaks = {}
    for name in ("score", "update"):
        work(name)  # the first call allocates the optimizer state, which stays
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        work(name)
        peaks[name] = (_status("VmHWM") - before) / 1024
    return peaks


def _status(field: str) -> int:
    """A field of this process's memory status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def measure(vocabulary: int, tokens: list[int], layout: ParallelConfig) -> Row:
    """Peaks of one vocabulary at every pack size, and bytes per token."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=LENGTH + 1, tie_word_embeddings=True,
        )  # fmt: skip
        Qwen3ForCausalLM(config).float().save_pretrained(folder)
        # The allocator keeps freed memory, which would distort a second measurement: every size has its own process.
        peaks = [max(run_on_ranks(peak_mib, layout.world_size, folder, t, layout), key=str) for t in tokens]
    span = tokens[-1] - tokens[0]
    values: dict[str, Value] = {"logits_bytes_per_token": 4 * vocabulary // layout.tp}
    for name in ("score", "update"):
        values |= {f"{name}_{count}_tokens_mib": peak[name] for count, peak in zip(tokens, peaks, strict=True)}
        values[f"{name}_bytes_per_token"] = (peaks[-1][name] - peaks[0][name]) * 2**20 / span
    return Row({"vocabulary": vocabulary, "tp": layout.tp, "dtype": "float32"}, values)


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--tokens", type=int, nargs=2, default=[4096, 16384])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("memory.json"))
    arguments = parser.parse_args()
    layout = ParallelConfig(tp=arguments.tp)
    described = conditions()
    rows = [measure(vocabulary, arguments.tokens, layout) for vocabulary in arguments.vocabularies]
    print(f"increase of the peak, T = {arguments.tokens[0]} and {arguments.tokens[1]}, TP{arguments.tp}, fp32")
    print(
        f"{'V':>8}{'score MiB':>18}{'update MiB':>18}{'score B/token':>16}{'update B/token':>16}"
        f"{'fp32 logits B/token':>22}"
    )
    for row in rows:
        peaks = {k: [row.values[f"{k}_{count}_tokens_mib"] for count in arguments.tokens] for k in ("score", "update")}
        pair = {k: " / ".join(f"{mib:.0f}" for mib in found) for k, found in peaks.items()}
        print(
            f"{row.case['vocabulary']:>8}{pair['score']:>18}{pair['update']:>18}{row.values['score_bytes_per_token']:>16.0f}"
            f"{row.values['update_bytes_per_token']:>16.0f}{row.values['logits_bytes_per_token']:>22}"
        )
    write(arguments.out, "memory of score and update", rows, described)


if __name__ == "__main__":
    main()
