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
