"""The definition, in plain torch operations and autograd: the logits exist, nothing is clever.

Every other implementation is tested against this one in float64. Under tensor parallelism the
logits of all shards are gathered, so it needs the memory the library exists to avoid.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import gather_rows, reduce_gradient
from .records import Request, Shard, accumulate_dtype, column


class _GatherHidden(torch.autograd.Function):
    """Full hidden states for every shard; backward sums the shards' contributions."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: Shard, scatter: bool) -> Tensor:
        ctx.shard, ctx.scatter = shard, scatter
        return gather_rows(hidden, shard) if scatter else hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return reduce_gradient(gradients[0].clone(), ctx.shard, ctx.scatter), None, None


class _GatherColumns(torch.autograd.Function):
    """Logits of all shards side by side; every rank repeats the rest, so backward only slices."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: Shard) -> Tensor:
        ctx.shard, ctx.width = shard, logits.shape[1]
        parts = [torch.empty_like(logits) for _ in range(shard.size)]
        dist.all_gather(parts, logits.contiguous(), group=shard.group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        start = ctx.shard.rank * ctx.width
        return gradients[0][:, start : start + ctx.width], None


def from_hidden(
    hidden: Tensor, weight: Tensor, request: Request, vocab_size: int, sequence_parallel: bool
) -> dict[str, Tensor]:
    """Every statistic the request names, from hidden [T or T/tp, H] and weight [V_l, H]."""
    shard = request.shard
    dtype = accumulate_dtype(hidden.dtype)
    full = hidden.to(dtype)
    if shard.size > 1:
        full = _GatherHidden.apply(full, shard, sequence_parallel)
    return from_logits(full @ weight.to(dtype).t(), request, vocab_size)


def from_logits(logits: Tensor, request: Request, vocab_size: int) -> dict[str, Tensor]:
    """Every statistic the request names, from this shard's logits [T, V_l]."""
    logits = logits.to(accumulate_dtype(logits.dtype))
    if request.shard.size > 1:
        logits = _GatherColumns.apply(logits, request.shard)
    logits = logits[:, :vocab_size]
    if request.softcap is not None:
        logits = request.softcap * torch.tanh(logits / request.softcap)
    labels = (request.labels + request.shard.start).clamp(0, vocab_size - 1)
    logp = torch.log_softmax(logits * column(request.beta), dim=1)
    p, finite = logp.exp(), _finite(logp)
    outputs = {"logprob": logp.gather(1, labels[:, None])[:, 0]}
    outputs["entropy"] = -(p * finite).sum(dim=1)
    surprise = finite + outputs["entropy"][:, None]
    outputs["varentropy"] = (p * surprise**2).sum(dim=1)
    if request.topk:
        outputs["topk_logprobs"], outputs["topk_ids"] = logp.topk(request.topk, dim=1)
    if request.teacher_beta is not None:
        logq = torch.log_softmax(logits * column(request.teacher_beta), dim=1)
        q, finite_q = logq.exp(), _finite(logq)
        outputs["teacher_logprob"] = logq.gather(1, labels[:, None])[:, 0]
        outputs["teacher_entropy"] = -(q * finite_q).sum(dim=1)
        outputs["kl_forward"] = (q.detach() * (finite_q.detach() - finite)).sum(dim=1)
        outputs["kl_reverse"] = (p * (finite - finite_q.detach())).sum(dim=1)
    return outputs


def _finite(logp: Tensor) -> Tensor:
    """Log-probs with 0 for impossible tokens, so that 0 * log 0 is 0 there, gradient included."""
    return logp.masked_fill(logp == -torch.inf, 0.0)


def guided(
    logits: Tensor,
    target: Tensor,
    *,
    bounds: tuple[float, float] = (1.1, 1.5),
    top: int = 512,
    pivot: float = 1.2,
    slope: float = 2.0,
    amplitude: float = 0.5,
    floor: float = 0.03,
    iterations: int = 20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, temperature and entropy of `guided_teacher`, row by row from logits [T, V]."""
    rows = []
    for z, label in zip(logits, target, strict=True):
        largest = z.topk(min(top, z.shape[0])).values
        now = _entropy(largest)
        goal = now + amplitude / (1.0 + torch.exp(-slope * (now - pivot)))
        low, high = bounds
        if _entropy(z) <= floor or goal <= _entropy(largest / low):
            temperature = low
        elif goal >= _entropy(largest / high):
            temperature = high
        else:
            for _ in range(iterations):
                middle = (low + high) / 2
                if _entropy(largest / middle) < goal:
                    low = middle
                else:
                    high = middle
            temperature = (low + high) / 2
        logprob = torch.log_softmax(z / temperature, dim=0)[label]
        rows.append(torch.stack([logprob, z.new_tensor(temperature), _entropy(z)]))
    logprob, temperature, entropy = torch.stack(rows).unbind(1)
    return logprob, temperature, entropy


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits [V]), nats."""
    logp = torch.log_softmax(logits, dim=0)
    return -(logp.exp() * _finite(logp)).sum()


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    direction: str,
) -> Tensor:
    """[T] KL(q || p) ("forward") or KL(p || q) of logits [T, V]; the teacher q is a constant."""
    logp = torch.log_softmax(logits / column(temperature), dim=1)
    logq = torch.log_softmax(teacher_logits.detach() / column(teacher_temperature), dim=1)
    left, right = (logq, logp) if direction == "forward" else (logp, logq)
    return (left.exp() * (_finite(left) - _finite(right))).sum(dim=1)
