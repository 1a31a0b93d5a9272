"""Inputs and comparisons shared by the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor

import entropy_kernels as ek

EVERYTHING = {
    "entropy": True,
    "varentropy": True,
    "top_k": 3,
    "teacher_temperature": 1.7,
}
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
    hidden = torch.randn(tokens, hidden_size, generator=generator) * scale
    weight = torch.randn(vocab, hidden_size, generator=generator) * 2 / hidden_size**0.5
    target = torch.randint(vocab, (tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), target


def combine(stats: ek.TokenStats, seed: int = 1) -> Tensor:
    """A scalar that depends on every differentiable output with random per-token weights."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=stats.logprob.dtype)
    for name in DIFFERENTIABLE:
        value = getattr(stats, name)
        if value is not None:
            weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.requires_grad:
                total = total + (value * weights.to(value)).sum()
    return total


def run(hidden: Tensor, weight: Tensor, target: Tensor, **options: object) -> tuple[ek.TokenStats, Tensor, Tensor]:
    """Statistics and both gradients of `combine`."""
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_()
    stats = ek.token_stats(hidden, weight, target, **options)
    grads = torch.autograd.grad(combine(stats), (hidden, weight))
    return stats, *grads


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
