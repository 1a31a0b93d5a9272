"""Packing of samples into micro-batches: sequences are laid end to end, without padding between them.

A micro-batch holds at most `max_tokens_per_microbatch` tokens. Every data-parallel rank gets the same number of
micro-batches with about the same number of tokens. The plan is a pure function of the lengths, so all ranks compute
the same one without communication.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np
import torch

from megatron_entropy.records import Batch, Sample

IGNORE_INDEX = -100
"""Target of positions that are neither trained nor scored."""

_PER_TOKEN_FIELDS = tuple(field.name for field in dataclasses.fields(Batch) if field.default is None)


def plan_microbatches(
    lengths: Sequence[int], *, max_tokens_per_microbatch: int, ranks: int, multiple: int = 1
) -> list[list[list[int]]]:
    """Distribute sequences over ranks and micro-batches.

    Args:
        lengths: tokens of each sequence.
        max_tokens_per_microbatch: upper bound; a longer sequence gets a micro-batch of its own.
        ranks: data-parallel ranks.
        multiple: the number of micro-batches per rank is a multiple of this (the interleaved schedule requires it).
    Returns:
        `[rank][micro-batch] -> indices` into `lengths`, ascending. Some micro-batches are empty when there are fewer
        sequences than micro-batches.
    """
    step = ranks * multiple
    count = max(step, -(-sum(lengths) // max_tokens_per_microbatch))
    while True:
        count = -(-count // step) * step
        bins = _balance(lengths, count)
        if count >= len(lengths) or all(
            sum(lengths[i] for i in b) <= max_tokens_per_microbatch or len(b) == 1 for b in bins
        ):
            break
        count += step
    bins.sort(key=lambda b: (-sum(lengths[i] for i in b), b))
    per_rank: list[list[list[int]]] = [[] for _ in range(ranks)]
    for index, members in enumerate(bins):
        # Bins are sorted by size, so ranks take turns in alternating order to keep their sums level.
        turn, rank = divmod(index, ranks)
        per_rank[rank if turn % 2 == 0 else ranks - 1 - rank].append(members)
    return per_rank


def _balance(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Assign the longest sequence first, each to the bin with the fewest tokens (Graham 1969)."""
    heap = [(0, b) for b in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, b = heapq.heappop(heap)
        bins[b].append(index)
        heapq.heappush(heap, (load + lengths[index], b))
    return [sorted(b) for b in bins]


def pack(samples: Sequence[Sample], indices: Sequence[int], *, multiple: int = 1, device: torch.device) -> Batch:
    """Build one micro-batch from `samples[i] for i in indices`.

    Args:
        samples: all samples of the step.
        indices: those of this micro-batch; may be empty.
        multiple: the total length is padded to a multiple of this with one extra sequence, since sequence parallelism
            cuts the pack evenly over tensor-parallel ranks.
        device: where the tensors go.
    Returns:
        The batch; in `order` the padding sequence is -1. A per-token field is None where any of the samples lacks it.
    """
    chosen = [samples[i] for i in indices]
    sizes = [len(s.tokens) - 1 for s in chosen]
    order = list(indices)
    padding = -sum(sizes) % multiple if sizes else multiple
    if padding:
        sizes.append(padding)
        order.append(-1)
    tail = np.zeros(padding)

    def column(arrays: list[np.ndarray], fill: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(np.concatenate([*arrays, tail + fill])).to(device=device, dtype=dtype)

    def field(name: str) -> torch.Tensor | None:
        values = [getattr(s, name) for s in chosen]
        if any(v is None for v in values):
            return None
        return column([v[1:] for v in values], 0.0, torch.float32)

    weight = field("weight")
    edges = np.cumsum([0, *sizes])
    return Batch(
        tokens=column([s.tokens[:-1] for s in chosen], 0, torch.int64),
        targets=column([_targets(s) for s in chosen], IGNORE_INDEX, torch.int64),
        positions=column([np.arange(size) for size in sizes[: len(chosen)]], 0, torch.int64),
        boundaries=torch.tensor(edges, dtype=torch.int32, device=device),
        edges=tuple(edges.tolist()),
        order=tuple(order),
        weight=weight if weight is not None else torch.zeros(sum(sizes), device=device),
        **{name: field(name) for name in _PER_TOKEN_FIELDS},
    )


def _targets(sample: Sample) -> np.ndarray:
    targets = sample.tokens[1:].astype(np.int64)
    targets[: sample.prompt_length - 1] = IGNORE_INDEX
    return targets
