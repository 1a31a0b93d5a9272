"""Inputs and comparisons shared by the kernel tests, and the implementation under test.

ENTROPY_KERNELS_TEST_IMPL names it ("chunked" unless set); test_triton runs the same files with
"triton". Triton serves neither float64 nor top-k nor logits that already exist, so the bodies take
their types from WIDE and their options from EVERYTHING, or carry `chunked_only` with the reason.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek

IMPL = os.environ.get("ENTROPY_KERNELS_TEST_IMPL", "chunked")
DEVICE = "cuda" if IMPL == "triton" and os.environ.get("TRITON_INTERPRET", "0") != "1" else "cpu"
if DEVICE == "cuda":
    torch.set_default_device(DEVICE)
WIDE = torch.float32 if IMPL == "triton" else torch.float64
"""The widest type the implementation serves."""
INTERPRETED = IMPL == "triton" and DEVICE == "cpu"
"""Slow: problems are smaller, and what does not enter a kernel is left to "chunked"."""
RANKS = [2] if INTERPRETED else [1, 2, 4]
"""Sizes of the tensor-parallel group: the kernels know nothing of it."""
TILES = {"row_chunk": 4, "vocab_tile": 16}
"""Tiles smaller than the problems."""
EVERYTHING = {"entropy": True, "varentropy": True, "teacher_temperature": 1.7}
if IMPL != "triton":
    EVERYTHING["top_k"] = 3
DIFFERENTIABLE = (
    "logprob",
    "entropy",
    "varentropy",
    "teacher_logprob",
    "teacher_entropy",
    "kl_forward",
    "kl_reverse",
    "topk_logprobs",
)

Results = tuple[ek.TokenStats, Tensor, Tensor]
"""Statistics, gradient of hidden, gradient of weight."""

token_stats = functools.partial(ek.token_stats, impl=IMPL)
distillation = functools.partial(ek.distillation, impl=IMPL)
"""The front doors with the implementation under test; another `impl` overrides it."""


def chunked_only(reason: str) -> pytest.MarkDecorator:
    """Skip for Triton, with the reason."""
    return pytest.mark.skipif(IMPL == "triton", reason=reason)


DOORS = ["hidden", pytest.param("logits", marks=chunked_only("Triton has no from-logits form"))]
"""Both front doors, for `stats_of`."""


def limit(float64: float, float32: float) -> float:
    """The tolerance for the widest type the implementation serves."""
    return float64 if WIDE == torch.float64 else float32


def operands(
    tokens: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, target with logits of standard deviation about 2 * scale."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator, device="cpu") * scale
    weight = torch.randn(vocab, hidden_size, generator=generator, device="cpu") * 2 / hidden_size**0.5
    target = torch.randint(vocab, (tokens,), generator=generator, device="cpu")
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), target.to(DEVICE)


def factors(logits: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [T, 2T] and weight [V, 2T] whose product is `logits` to the bit, differentiable in them.

    Impossible tokens (-inf) are finite operands whose product overflows float32, so that zero times
    a weight stays zero in the hidden gradient.
    """
    impossible = logits == -torch.inf
    eye = torch.eye(logits.shape[0], dtype=logits.dtype)
    weight = torch.cat([logits.masked_fill(impossible, 0.0), -1e30 * impossible.to(logits)])
    return torch.cat([eye, 1e30 * eye], dim=1), weight.t()


def stats_of(logits: Tensor, target: Tensor, door: str, **options: object) -> ek.TokenStats:
    """Statistics of given logits, through either front door."""
    options = {"impl": IMPL} | options
    if door == "logits":
        return ek.token_stats_from_logits(logits, target, **options)
    return ek.token_stats(*factors(logits), target, **options)


def combine(stats: ek.TokenStats, seed: int = 1) -> Tensor:
    """A scalar that depends on every differentiable output with random per-token weights."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=stats.logprob.dtype)
    for name in DIFFERENTIABLE:
        value = getattr(stats, name)
        if value is not None:
            weights = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu")
            if value.requires_grad:
                total = total + (value * weights.to(value)).sum()
    return total


def run(hidden: Tensor, weight: Tensor, target: Tensor, **options: object) -> Results:
    """Statistics and both gradients of `combine`."""
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_()
    stats = token_stats(hidden, weight, target, **options)
    grads = torch.autograd.grad(combine(stats), (hidden, weight))
    return stats, *grads


def run_exact(hidden: Tensor, weight: Tensor, target: Tensor, **options: object) -> Results:
    """`run` by the definition in float64; options that only say how to compute are left out."""
    options = {name: value for name, value in options.items() if name not in (*TILES, "save", "compact")}
    return run(hidden.double(), weight.double(), target, **options, impl="reference")


def assert_stats_close(left: ek.TokenStats, right: ek.TokenStats, atol: float) -> None:
    """Every field present in either agrees."""
    for name in (*DIFFERENTIABLE, "topk_ids"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.shape == b.shape, (name, a.shape, b.shape)
            gap = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
            assert gap <= atol, (name, gap)


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest absolute error over the largest expected magnitude (at least 1e-3)."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().clamp(min=1e-3)
    return ((got.double() - expected.double()).abs().max() / scale).item()
