#!/usr/bin/env python3
"""What `rollout.entropy` costs while sampling, and what it saves in a step of CURE.

    python tools/benchmark_rollout_entropy.py generation [--model toy deep49k shallow49k] [--rounds 9] [--top-p 0.9]
    python tools/benchmark_rollout_entropy.py cure --config RUN.toml [--rounds 3] [--out FOLDER] [--steps=4 ...]

`generation`: two engines with the same random weights, one of which records entropies, answer the same requests in
turns. Printed is the median over the rounds of the ratio, by wall-clock time and by the processor time of the engine,
which other processes on the machine disturb less. Their tokens must be the same.

`cure`: a run with and one without, in turns, from the same start; other flags are those of `train`. Printed are the
median seconds of a step and of its phases, and whether the branches of the first step (before which the weights are
equal) have the same prefixes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import PreTrainedModel

from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.rollout.engine import Completion, EngineSpec, Request
from megatron_entropy.rollout.pool import EnginePool
from megatron_entropy.weights.buckets import TensorMeta
from megatron_entropy.weights.sync import WeightSync

SMOL: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
MODELS: dict[str, dict[str, Any]] = {
    "toy": {"vocab_size": 17, "hidden_size": 160, "intermediate_size": 480, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "num_hidden_layers": 4, "head_dim": 32},
    "shallow49k": SMOL | {"num_key_value_heads": 3, "num_hidden_layers": 4},
    "deep49k": SMOL | {"num_key_value_heads": 3, "num_hidden_layers": 30},
}
"""Sizes: that of the examples, SmolLM2-135M (deep49k), and the same with 4 layers, where the vocabulary weighs more."""
NUM_SEQS = 32
PROMPT_TOKENS = 16


class Source:
    """The parameters of a model as a source of weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        self.gather_seconds = 0.0

    def metadata(self) -> list[TensorMeta]:
        """Name, type and shape of every parameter."""
        return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors]

    def read(self, number: int, first: int, count: int, out: torch.Tensor | None, *, in_place: bool) -> None:
        """Copy rows of a parameter to `out`."""
        assert out is not None
        out.copy_(self.tensors[number][1][first : first + count])


def random_model(sizes: dict[str, Any], folder: str) -> PreTrainedModel:
    """Build a model whose logits have a deviation of about 3, and write its config."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.02, eos_token_id=None
    )
    model = LlamaForCausalLM(config).float()
    torch.nn.init.constant_(model.model.norm.weight, 150 * sizes["hidden_size"] ** -0.5)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    return model


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its children so far."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in family)


def measure(pool: EnginePool, requests: list[Request]) -> tuple[float, float, list[Completion]]:
    """Wall-clock and processor seconds of a generation, and the completions."""
    begin, cpu = time.perf_counter(), cpu_seconds(pool.pids[0])
    done, dead = pool.generate(requests, "benchmark")
    assert not dead
    return time.perf_counter() - begin, cpu_seconds(pool.pids[0]) - cpu, done


def benchmark_generation(args: argparse.Namespace) -> None:
    """Print the cost for each model."""
    for name in args.model:
        sizes = MODELS[name]
        count, length = (256, 48) if name == "toy" else (args.requests, args.tokens)
        generator = np.random.default_rng(0)
        requests = [
            Request(
                (number,),
                tuple(generator.integers(0, sizes["vocab_size"], PROMPT_TOKENS).tolist()),
                seed=number,
                max_tokens=length,
                temperature=0.9,
                top_p=args.top_p,
            )
            for number in range(count)
        ]
        with tempfile.TemporaryDirectory() as folder:
            source = Source(random_model(sizes, folder))
            spec = EngineSpec(folder, PROMPT_TOKENS + length, (), dtype=args.dtype, threads=args.threads)
            pools = [
                EnginePool(RolloutConfig(entropy=entropy, max_num_seqs=NUM_SEQS), spec) for entropy in (False, True)
            ]
            try:
                for pool in pools:
                    WeightSync(source, timeout=600).sync(1, pool.clients())
                ratios, plain = compare(pools, requests, args.rounds)
            finally:
                for pool in reversed(pools):
                    pool.shutdown()
        wall, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
        seconds = ", ".join(f"{s:.2f}" for s in plain)
        print(
            f"{name} (vocabulary {sizes['vocab_size']}, {count} requests of {length} tokens, top_p {args.top_p}): "
            f"wall {100 * (wall - 1):+.1f} %, processor {100 * (cpu - 1):+.1f} %; processor seconds without: {seconds}",
            flush=True,
        )


def compare(
    pools: list[EnginePool], requests: list[Request], rounds: int
) -> tuple[list[tuple[float, float]], list[float]]:
    """Return for each round the ratios (wall-clock, processor) of recording to not recording, and the plain seconds."""
    ratios, plain = [], []
    for number in range(-1, rounds):
        order = (0, 1) if number % 2 else (1, 0)
        measured = {index: measure(pools[index], requests) for index in order}
        (wall, cpu, tokens), (wall_on, cpu_on, tokens_on) = measured[0], measured[1]
        assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(tokens, tokens_on, strict=True))
        if number >= 0:  # the first round warms up
            ratios.append((wall_on / wall, cpu_on / cpu))
            plain.append(cpu)
    return ratios, plain


def benchmark_cure(args: argparse.Namespace) -> None:
    """Print the seconds of a step with and without, and compare the prefixes of the branches."""
    seconds: dict[tuple[bool, str], list[float]] = {}
    prefixes: dict[bool, list] = {}
    for number in range(args.rounds):
        for entropy in (True, False) if number % 2 else (False, True):
            run = Path(args.out) / f"{'with' if entropy else 'without'}_{number}"
            command = [sys.executable, "-m", "megatron_entropy", "train", args.config, "--overwrite", f"--output={run}"]
            subprocess.run([*command, f"--rollout.entropy={str(entropy).lower()}", *args.flags], check=True)
            for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
                if row["step"] > 0 and row["stage"] == args.stage:
                    for phase in ("step", "score", "generate", "update"):
                        seconds.setdefault((entropy, phase), []).append(row[f"timing/{phase}"])
            dump = next((run / "rollouts" / args.stage).glob("*1.jsonl"))
            samples = list(map(json.loads, dump.read_text().splitlines()))
            prefixes[entropy] = [s["tokens"][: s["prompt_length"]] for s in samples if s["parent"] is not None]
    for phase in ("step", "score", "generate", "update"):
        without, with_ = (statistics.median(seconds[entropy, phase]) for entropy in (False, True))
        print(f"{phase}: {without:.2f} s without, {with_:.2f} s with")
    same = sum(a == b for a, b in zip(prefixes[False], prefixes[True], strict=True))
    print(f"{same} of {len(prefixes[False])} branches of the first step have the same prefix")


def main() -> None:
    """Parse the command line and run a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    generation = commands.add_parser("generation")
    generation.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    generation.add_argument("--rounds", type=int, default=9)
    generation.add_argument("--requests", type=int, default=48)
    generation.add_argument("--tokens", type=int, default=32)
    generation.add_argument("--top-p", type=float, default=1.0)
    generation.add_argument("--dtype", default="float32")
    generation.add_argument("--threads", type=int, default=1)
    generation.set_defaults(run=benchmark_generation)
    cure = commands.add_parser("cure")
    cure.add_argument("--config", required=True)
    cure.add_argument("--stage", default="branching")
    cure.add_argument("--rounds", type=int, default=3)
    cure.add_argument("--out", default="runs/cure_entropy")
    cure.set_defaults(run=benchmark_cure)
    args, args.flags = parser.parse_known_args()
    run: Callable[[argparse.Namespace], None] = args.run
    run(args)


if __name__ == "__main__":
    main()
