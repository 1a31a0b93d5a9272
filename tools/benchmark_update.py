#!/usr/bin/env python3
"""Tokens per second and peak memory of a rank in one `score` and one `update` of a model, on CPU ranks of this machine.

    python tools/benchmark_update.py [FOLDER] [--ranks 1 2] [--dtypes bfloat16 float32] [--microbatch 2048 4096]

FOLDER is a Hugging Face model folder; without one a random model of the shape `--shape` is made. Samples have 20 to
160 tokens, like answers to short questions, or `--lengths`; each data-parallel rank gets `--tokens` of them. Ranks are
data parallel and share the processors. Every row is a process group of its own; rounds of all rows alternate, so that
other load on the machine falls on all of them. Figures are medians of the rounds; the memory is the largest resident
set of a rank while the phase ran, everything included (libraries, weights, gradients, optimizer state, activations).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from local_ranks import run_on_ranks

from entropy_kernels import TokenStats
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import ActorConfig, ParallelConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.records import Batch, Sample

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 8192},
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
"""Fields of a Llama configuration: `0.5B` has the sizes of Qwen2.5-0.5B, `smollm2-135m` of SmolLM2-135M."""
WARM_UP = 2
"""Calls that do not count: the first allocates what stays, the second still touches fresh memory."""


def measure(folder: str, row: dict[str, Any], options: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds and peak resident GB of every call of `score` and `update` on this rank, without the first two."""
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.actor.statistics import policy_statistics
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    torch.set_num_threads(options["threads"] or max(1, (os.cpu_count() or 1) // row["ranks"]))
    layout = ParallelConfig()
    process_groups.init_model_parallel(layout, seed=1)
    arch = read_architecture(folder)
    config = ActorConfig(
        parallel=layout,
        dtype=row["dtype"],
        recompute=row["recompute"],
        max_tokens_per_microbatch=row["microbatch"],
    )
    actor = Actor(arch, config, total_updates=1)
    load(TensorFolder(folder), arch, layout, actor.named_shards())
    actor.after_load()
    samples = make_samples(options["lengths"], options["tokens"] * row["ranks"], arch.vocab_size)

    def loss(stats: TokenStats, batch: Batch) -> tuple[torch.Tensor, dict]:
        assert stats.entropy is not None
        return -stats.logprob - 0.01 * stats.entropy, {}

    figures: dict[str, list[float]] = {}
    for round_number in range(WARM_UP + options["rounds"]):
        for phase in ("score", "update"):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            process_groups.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            if phase == "score":
                actor.score(samples, policy_statistics(temperature=1.0))
            else:
                actor.update(samples, loss, temperature=1.0)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            if round_number >= WARM_UP:
                figures.setdefault(f"{phase}_s", []).append(seconds)
                figures.setdefault(f"{phase}_cpu_s", []).append(cpu_seconds)
                figures.setdefault(f"{phase}_gb", []).append(_peak_resident_gb())
    return figures


def make_samples(lengths: tuple[int, int], tokens: int, vocab_size: int) -> list[Sample]:
    """Samples of random tokens, lengths uniform between two bounds, until they have `tokens` tokens."""
    generator = np.random.default_rng(0)
    samples, total = [], 0
    while total < tokens:
        length = min(int(generator.integers(lengths[0], lengths[1] + 1)), max(tokens - total, 2))
        sample = Sample(generator.integers(0, vocab_size, length + 1).astype(np.int32), 1, "stop", "")
        samples.append(dataclasses.replace(sample, weight=sample.constant(1 / tokens)))
        total += length
    return samples


def _peak_resident_gb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e9


@contextlib.contextmanager
def random_model(shape: str) -> Iterator[str]:
    """A model folder with random weights of a shape of `SHAPES`, removed afterwards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = SHAPES[shape] | {"max_position_embeddings": 8192, "tie_word_embeddings": True}
    config = LlamaConfig(**fields)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        yield folder


def summarise(row: dict[str, Any], rounds: list[list[dict[str, list[float]]]], tokens: int) -> dict[str, Any]:
    """Medians over rounds and repeats, of the slowest rank and of the rank with the most memory."""
    result = dict(row)
    for phase in ("score", "update"):
        seconds = [max(each) for ranks in rounds for each in zip(*(rank[f"{phase}_s"] for rank in ranks), strict=True)]
        result[f"{phase}_tokens_per_s"] = tokens * row["ranks"] / statistics.median(seconds)
        peaks = [max(each) for ranks in rounds for each in zip(*(rank[f"{phase}_gb"] for rank in ranks), strict=True)]
        result[f"{phase}_gb"] = statistics.median(peaks)
    return result


def main() -> None:
    """Print the table or, with `--json`, one line of JSON a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="model folder; without it a random model")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of the random model")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=0, help="of a rank; 0: the processors divided by the ranks")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--recompute", nargs="+", default=["none"], help="values of actor.recompute")
    parser.add_argument("--microbatch", type=int, nargs="+", default=[2048, 4096], help="tokens of a micro-batch")
    parser.add_argument("--tokens", type=int, default=8192, help="of a rank in one call")
    parser.add_argument("--lengths", type=int, nargs=2, default=[20, 160], help="shortest and longest sample")
    parser.add_argument("--rounds", type=int, default=3, help="process groups of every row, alternating")
    parser.add_argument("--repeats", type=int, default=2, help="calls that count in a process group")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    options = {
        "threads": arguments.threads,
        "lengths": tuple(arguments.lengths),
        "tokens": arguments.tokens,
        "rounds": arguments.repeats,
    }
    rows = [
        {"ranks": ranks, "dtype": dtype, "recompute": recompute, "microbatch": microbatch}
        for ranks, microbatch, recompute, dtype in itertools.product(
            arguments.ranks, arguments.microbatch, arguments.recompute, arguments.dtypes
        )
    ]
    with random_model(arguments.shape) if not arguments.folder else contextlib.nullcontext(arguments.folder) as folder:
        found: list[list] = [[] for _ in rows]
        for _, (index, row) in itertools.product(range(arguments.rounds), enumerate(rows)):
            found[index].append(run_on_ranks(measure, row["ranks"], folder, row, options, timeout_s=1800.0))
    results = [summarise(row, rounds, arguments.tokens) for row, rounds in zip(rows, found, strict=True)]
    if arguments.json:
        for result in results:
            print(json.dumps(result))
        return
    print(
        f"{'ranks':>5}{'dtype':>10}{'recompute':>11}{'micro-batch':>13}{'score tokens/s':>16}{'update tokens/s':>17}"
        f"{'score GB':>10}{'update GB':>11}"
    )
    for r in results:
        print(
            f"{r['ranks']:>5}{r['dtype']:>10}{r['recompute']:>11}{r['microbatch']:>13}{r['score_tokens_per_s']:>16.0f}"
            f"{r['update_tokens_per_s']:>17.0f}{r['score_gb']:>10.2f}{r['update_gb']:>11.2f}"
        )


if __name__ == "__main__":
    main()
