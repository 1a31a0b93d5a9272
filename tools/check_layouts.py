#!/usr/bin/env python3
"""Measure the actor's layout invariance: every layout computes the same numbers from one batch.

Loads a small random Hugging Face checkpoint, and one with experts, into the real Megatron model under every layout, on
CPU ranks of this machine, in fp32. Scores one batch of sequences of uneven lengths and takes two optimizer steps on it,
then a third with the divergence to an EMA reference of alpha 0.5. Compares log-probabilities, entropies, the
reference's log-probabilities and guided temperatures, losses, gradient norms and the final parameters with the
single-rank run. Methods must select the same tokens from them (critical tokens, lowest entropies, highest covariances).

    python tools/check_layouts.py [--out layouts.json] [--tolerance 1e-5] [--fp8 RECIPE ...]

Prints a table, writes it as JSON, and exits with code 1 if a difference exceeds the tolerance.

With `--fp8` the dense model is wider, so that shards are whole blocks, and computes in emulated FP8. There the order of
a sum may decide how a value next to a boundary is rounded, and micro-batches decide the blocks of weight gradients, so
numbers differ by far more than 1e-5. The exit code is 1 if a selection differs under a recipe whose scales are powers
of two for each token (`blockwise`, `mxfp8`). Differences are reported under scales for each tensor, which depend on the
layout, and under fp32 scales (`blockwise_fp32`), which the last digit of an attention's sum reaches.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from local_ranks import run_on_ranks

from entropy_kernels import TokenStats
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.fp8 import Fp8Config
from megatron_entropy.config.schema import ActorConfig, OptimizerConfig, ParallelConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.methods.objectives import bottom_k_mask, concat_response_tokens, covariance, top_k_mask
from megatron_entropy.records import Batch, Metric, Sample

TOLERANCE = 1e-5
"""fp32 sums in another order differ by about 1e-7 relative; two optimizer steps stay well below this."""

NUMBERS = ("logprob", "entropy", "reference", "temperature", "selected", "loss", "grad_norm")
"""Fields of `Outcome` that are compared number by number."""

COLUMNS = (*NUMBERS, "parameters")

LENGTHS = ((3, 40), (17, 23), (8, 5), (30, 64), (12, 1), (5, 33), (21, 18), (9, 51))
"""(prompt, response) tokens: short, long, one-token, so that every pack is uneven and crosses bucket sizes."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A named layout; `max_tokens_per_microbatch` decides how the batch is split."""

    name: str
    parallel: ParallelConfig
    max_tokens_per_microbatch: int = 192
    recompute: Literal["none", "full"] = "none"


LAYOUTS = (
    Layout("1x1", ParallelConfig()),
    Layout("1x1, one micro-batch", ParallelConfig(), 1024),
    Layout("TP2", ParallelConfig(tp=2)),
    Layout("TP2+SP", ParallelConfig(tp=2, sequence_parallel=True)),
    Layout("PP2", ParallelConfig(pp=2)),
    Layout("PP2, other split", ParallelConfig(pp=2), 96),
    Layout("PP2+VPP2", ParallelConfig(pp=2, vpp=2)),
    Layout("DP2", ParallelConfig(dp=2)),
    Layout("TP2xPP2", ParallelConfig(tp=2, pp=2)),
    Layout("PP3, stages of 1, 2, 1 layers", ParallelConfig(pp=3)),
    Layout("TP4, 2 key/value heads", ParallelConfig(tp=4)),
    Layout("CP2", ParallelConfig(cp=2)),
    Layout("CP4, one micro-batch", ParallelConfig(cp=4), 1024),
    Layout("DP2xCP2+distributed optimizer", ParallelConfig(dp=2, cp=2, distributed_optimizer=True)),
    Layout("TP2+SPxCP2", ParallelConfig(tp=2, cp=2, sequence_parallel=True)),
    Layout("PP2xCP2, recomputed", ParallelConfig(pp=2, cp=2), recompute="full"),
)
EXPERT_LAYOUTS = (
    Layout("experts", ParallelConfig()),
    Layout("experts, TP2+SP", ParallelConfig(tp=2, sequence_parallel=True)),
    Layout("experts, EP2", ParallelConfig(dp=2, ep=2)),
    Layout("experts, EP2+distributed optimizer", ParallelConfig(dp=2, ep=2, distributed_optimizer=True)),
    Layout("experts, TP2+SP, EP2", ParallelConfig(tp=2, ep=2, sequence_parallel=True)),
    Layout("experts, PP2xEP2", ParallelConfig(pp=2, dp=2, ep=2)),
    Layout("experts, CP2, EP2", ParallelConfig(cp=2, ep=2)),
)


EXACT = Fp8Config()
RECIPES = {
    "current": Fp8Config(recipe="current", emulate=True),
    "delayed": Fp8Config(recipe="delayed", emulate=True),
    "blockwise": Fp8Config(recipe="blockwise", emulate=True),
    "blockwise_fp32": Fp8Config(recipe="blockwise", block_scales="fp32", emulate=True),
    "mxfp8": Fp8Config(recipe="mxfp8", emulate=True),
}
"""Emulated FP8 by the names of `--fp8`."""
PER_TOKEN = ("blockwise", "mxfp8")
"""Recipes with powers of two as scales for each token: neither the layout nor the last digit of a sum reaches them."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of one layout: arrays over all response tokens, one number per step, parameters by name."""

    logprob: np.ndarray
    entropy: np.ndarray
    reference: np.ndarray
    temperature: np.ndarray
    selected: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    parameters: dict[str, np.ndarray]


def make_samples(vocab_size: int, seed: int = 0) -> list[Sample]:
    """Random sequences with weights that sum to one and advantages of both signs."""
    generator = np.random.default_rng(seed)
    total = sum(response for _, response in LENGTHS)
    samples = []
    for prompt, response in LENGTHS:
        sample = Sample(generator.integers(0, vocab_size, prompt + response).astype(np.int32), prompt, "stop", "")
        samples.append(
            dataclasses.replace(
                sample, weight=sample.constant(1 / total), advantage=sample.constant(generator.normal())
            )
        )
    return samples


def measure(folder: str, layout: Layout, fp8: Fp8Config = EXACT) -> Outcome | None:
    """Score, update and collect, on every rank; rank 0 returns the outcome."""
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.actor.statistics import policy_statistics
    from megatron_entropy.methods.curiosft import GuidedTemperature
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import ShardedSource, load

    process_groups.init_model_parallel(layout.parallel, seed=1)
    arch = read_architecture(folder)
    # Adam's first steps are lr * sign(gradient) however small the gradient, so rounding could cause a difference of
    # 2 lr. A large eps keeps an update proportional to its gradient.
    optimizer = OptimizerConfig(lr=1e-3, eps=1e-3, weight_decay=0.1, clip_grad=0.5)
    config = ActorConfig(
        parallel=layout.parallel,
        optimizer=optimizer,
        fp8=fp8,
        dtype="float32",
        max_tokens_per_microbatch=layout.max_tokens_per_microbatch,
        recompute=layout.recompute,
    )
    actor = Actor(arch, config, total_updates=2)
    load(TensorFolder(folder), arch, actor.config.parallel, actor.named_shards())
    actor.after_load()
    actor.set_reference("ema")
    samples = make_samples(arch.vocab_size)
    scored = actor.score(samples, policy_statistics(temperature=0.8))

    def loss(stats, batch):
        ratio = (stats.logprob - batch.logprob).exp()
        return -batch.advantage * ratio - 0.01 * stats.entropy, {"entropy": Metric(0.0)}

    losses, norms = [], []
    for _ in range(2):
        metrics = actor.update(scored, loss, temperature=0.8)
        losses.append(metrics["train/loss"].value)
        norms.append(metrics["train/grad_norm"].value)
    assert actor.reference is not None
    actor.reference.update_ema(0.5)
    guided = actor.score_reference(scored, GuidedTemperature(top=32, pivot=4.0))
    metrics = actor.update(guided, _distil, temperature=1.0, divergence="reverse")
    losses.append(metrics["train/loss"].value)
    norms.append(metrics["train/grad_norm"].value)
    source = ShardedSource(arch, actor.config.parallel, actor.named_shards(), torch.float32)
    parameters = {name: tensor.numpy().copy() for name, tensor in source if tensor is not None}
    if process_groups.rank() != 0:
        return None
    return Outcome(
        np.concatenate([s.response("logprob") for s in scored]),
        np.concatenate([s.response("entropy") for s in scored]),
        np.concatenate([s.response("reference_logprob") for s in guided]),
        np.concatenate([s.response("reference_temperature") for s in guided]),
        select(scored),
        np.array(losses),
        np.array(norms),
        parameters,
    )


def _distil(stats: TokenStats, batch: Batch) -> tuple[torch.Tensor, dict[str, Metric]]:
    assert stats.kl_reverse is not None
    return stats.kl_reverse - stats.logprob, {}


def select(samples: list[Sample]) -> np.ndarray:
    """Tokens that methods select, as bits: 1 lowest entropies (SENT), 2 highest covariances, 4 critical (CURE)."""
    entropy, logprob, advantage = (
        concat_response_tokens(samples, field) for field in ("entropy", "logprob", "advantage")
    )
    low = bottom_k_mask(entropy, int(0.8 * len(entropy)))
    high = top_k_mask(covariance(logprob, advantage), len(entropy) // 10, among=low)
    uncertain = [top_k_mask(sample.response("entropy"), 3) for sample in samples]
    return 1 * low + 2 * high + 4 * np.concatenate(uncertain)


def compare(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """Largest absolute difference of each quantity, and the number of tokens that are selected otherwise."""
    differences = {name: float(np.abs(getattr(outcome, name) - getattr(reference, name)).max()) for name in NUMBERS}
    assert outcome.parameters.keys() == reference.parameters.keys()
    differences["selections"] = int((outcome.selected != reference.selected).sum())
    differences["parameters"] = max(
        float(np.abs(value - reference.parameters[name]).max()) for name, value in outcome.parameters.items()
    )
    return differences


def make_checkpoint(folder: Path, *, experts: bool = False, wide: bool = False) -> None:
    """A small random Qwen3 checkpoint: 4 layers, grouped queries, q/k norm, a vocabulary that needs padding.

    Args:
        wide: every shard under TP4 is a multiple of 128, the largest block of a recipe.
    """
    import transformers

    sizes = dict(
        vocab_size=301, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=False,
        initializer_range=0.1,
    )  # fmt: skip
    if wide:
        sizes |= dict(hidden_size=512, intermediate_size=512, head_dim=128, initializer_range=0.04)
    if experts:
        sizes |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True)
    family = "Qwen3Moe" if experts else "Qwen3"
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)


def run(layouts: tuple[Layout, ...] = LAYOUTS, *, experts: bool = False, fp8: Fp8Config = EXACT) -> list[dict]:
    """Measure every layout of a dense model, or of one with experts, against the first; one row per layout."""
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), experts=experts, wide=bool(fp8.recipe))
        reference = None
        rows = []
        for layout in layouts:
            start = time.perf_counter()
            outcome = run_on_ranks(measure, layout.parallel.world_size, folder, layout, fp8)[0]
            assert outcome is not None
            reference = reference or outcome
            rows.append({"layout": layout.name, **compare(outcome, reference), "seconds": time.perf_counter() - start})
    return rows


def main() -> int:
    """Print the table and write the JSON; exit code 1 as the module says."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("layouts.json"))
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--fp8", nargs="+", choices=RECIPES, default=[], metavar="RECIPE", help=", ".join(RECIPES))
    arguments = parser.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # megatron-core's, from every rank
    if arguments.fp8:
        return check_fp8(arguments.fp8, arguments.out)
    rows = run() + run(EXPERT_LAYOUTS, experts=True)
    print_rows(rows)
    worst = max(row[c] for row in rows for c in COLUMNS)
    arguments.out.write_text(json.dumps({"tolerance": arguments.tolerance, "worst": worst, "rows": rows}, indent=2))
    print(f"largest difference {worst:.1e}, tolerance {arguments.tolerance:.0e}; written to {arguments.out}")
    return int(worst > arguments.tolerance)


def check_fp8(recipes: list[str], out: Path) -> int:
    """Compare the layouts under emulated recipes; exit code 1 as the module says."""
    found = {}
    for recipe in recipes:
        found[recipe] = run(fp8=RECIPES[recipe])
        print(f"\nFP8 {recipe}, emulated")
        print_rows(found[recipe])
    changed = {recipe: sum(row["selections"] for row in rows) for recipe, rows in found.items()}
    total = len(LAYOUTS) * sum(response for _, response in LENGTHS)
    for recipe, count in changed.items():
        print(f"{recipe} (emulated): {count} of {total} tokens selected otherwise")
    out.write_text(json.dumps({"emulated": True, "tokens": total, "changed": changed, "rows": found}, indent=2))
    return int(any(changed[recipe] for recipe in recipes if recipe in PER_TOKEN))


def print_rows(rows: list[dict]) -> None:
    """Print the table."""
    print(f"{'layout':36s}" + "".join(f"{c:>12s}" for c in (*COLUMNS, "selections")) + f"{'seconds':>9s}")
    for row in rows:
        numbers = "".join(f"{row[c]:12.1e}" for c in COLUMNS)
        print(f"{row['layout']:36s}{numbers}{row['selections']:12d}{row['seconds']:9.1f}")


if __name__ == "__main__":
    sys.exit(main())
