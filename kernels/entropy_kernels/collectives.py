"""The four collectives of a call, over the tensor-parallel group or over nobody."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .moments import Moments, merge
from .records import Request, Shard


def locate(group: dist.ProcessGroup | None, local_rows: int, vocab_size: int | None) -> Shard:
    """This rank's place in the vocabulary: rows [rank * V_l, (rank + 1) * V_l)."""
    rank = 0 if group is None else dist.get_rank(group)
    size = 1 if group is None else dist.get_world_size(group)
    start = rank * local_rows
    total = local_rows * size if vocab_size is None else vocab_size
    return Shard(group, rank, size, start, max(0, min(local_rows, total - start)))


def gather_rows(local: Tensor, shard: Shard) -> Tensor:
    """[n, ...] of every rank stacked in rank order: [size * n, ...]."""
    if shard.size == 1:
        return local
    shape = (local.shape[0] * shard.size, *local.shape[1:])
    gathered = torch.empty(shape, dtype=local.dtype, device=local.device)
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=shard.group)
    return gathered


def reduce_gradient(gradient: Tensor, shard: Shard, scatter: bool) -> Tensor:
    """Sum over the ranks; with `scatter` each rank receives its own rows only."""
    if shard.size == 1:
        return gradient
    if scatter and dist.get_backend(shard.group) != "gloo":
        own = gradient.new_empty((gradient.shape[0] // shard.size, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(own, gradient, group=shard.group)
        return own
    dist.all_reduce(gradient, group=shard.group)
    if not scatter:
        return gradient
    return gradient.chunk(shard.size)[shard.rank].clone() if gradient.shape[0] else gradient


def merge_over_ranks(local: Moments, request: Request) -> Moments:
    """One all-gather of a few numbers per token, merged in rank order: the same bits everywhere."""
    if request.shard.size == 1:
        return local
    packed = local.pack()
    parts = gather_rows(packed[None], request.shard)
    merged = local.unpack(parts[0])
    for part in parts[1:]:
        merged = merge(merged, local.unpack(part), request.betas)
    return merged
