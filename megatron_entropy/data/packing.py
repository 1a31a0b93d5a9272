"""Packing of samples into micro-batches: sequences are laid end to end, without padding between them.

A micro-batch holds at most `max_tokens_per_microbatch` tokens. Every data-parallel rank gets the same number of
micro-batches with about the same number of tokens. The plan is a pure function of the lengths, so all ranks compute
the same one without communication.

Context parallelism cuts the sequences of a micro-batch: each is padded to a multiple of 2 * cp tokens and cut into as
many chunks, of which rank r holds chunks r and 2 * cp - 1 - r. Under a causal mask all ranks then have the same work.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
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


def num_chunks(cp: int) -> int:
    """Chunks that context parallelism cuts a sequence into; 1 without it."""
    return 2 * cp if cp > 1 else 1


def packed_length(sample: Sample, cp: int) -> int:
    """Positions of a sample in a micro-batch over all context parallel ranks, padding included."""
    chunks = num_chunks(cp)
    return -(-(len(sample.tokens) - 1) // chunks) * chunks


def own_positions(length: int, *, cp_rank: int, cp: int) -> np.ndarray:
    """Positions of a sequence that a context parallel rank holds: [length / cp], ascending.

    Args:
        length: of the padded sequence.
    """
    chunks = np.arange(length).reshape(num_chunks(cp), -1)
    return chunks[[cp_rank, -1 - cp_rank]].flatten() if cp > 1 else chunks[0]


def pack(
    samples: Sequence[Sample],
    indices: Sequence[int],
    *,
    multiple: int = 1,
    cp_rank: int = 0,
    cp: int = 1,
    device: torch.device,
) -> Batch:
    """Build one rank's part of the micro-batch of `samples[i] for i in indices`.

    Args:
        samples: all samples of the step.
        indices: those of this micro-batch; may be empty.
        multiple: the tokens of a rank are padded to a multiple of this with one extra sequence, since sequence
            parallelism cuts them evenly over tensor-parallel ranks.
        cp_rank: this context parallel rank, out of `cp`.
        device: where the tensors go.
    Returns:
        The batch; in `order` the padding sequence is -1. A per-token field is None where any of the samples lacks it.
    """
    chosen = [samples[i] for i in indices]
    sizes = [packed_length(s, cp) for s in chosen]
    order = list(indices)
    multiple = cp * math.lcm(multiple, num_chunks(cp) // cp)
    padding = -sum(sizes) % multiple if sizes else multiple
    if padding:
        sizes.append(padding)
        order.append(-1)
    positions = [own_positions(size, cp_rank=cp_rank, cp=cp) for size in sizes]

    def column(arrays: list[np.ndarray], fill: float, dtype: torch.dtype) -> torch.Tensor:
        arrays = [*arrays, np.empty(0)] if padding else arrays
        whole = [np.append(a, np.full(size - len(a), fill)) for a, size in zip(arrays, sizes, strict=True)]
        own = np.concatenate([a[at] for a, at in zip(whole, positions, strict=True)])
        return torch.as_tensor(own).to(device=device, dtype=dtype)

    def field(name: str) -> torch.Tensor | None:
        values = [getattr(s, name) for s in chosen]
        if any(v is None for v in values):
            return None
        return column([v[1:] for v in values], 0.0, torch.float32)

    weight = field("weight")
    edges = np.cumsum([0, *map(len, positions)])
    return Batch(
        tokens=column([s.tokens[:-1] for s in chosen], 0, torch.int64),
        targets=column([_targets(s) for s in chosen], IGNORE_INDEX, torch.int64),
        positions=torch.as_tensor(np.concatenate(positions)).to(device),
        boundaries=torch.tensor(edges, dtype=torch.int32, device=device),
        edges=tuple(edges.tolist()),
        order=tuple(order),
        weight=weight if weight is not None else torch.zeros(int(edges[-1]), device=device),
        **{name: field(name) for name in _PER_TOKEN_FIELDS},
    )


def _targets(sample: Sample) -> np.ndarray:
    targets = sample.tokens[1:].astype(np.int64)
    targets[: sample.prompt_length - 1] = IGNORE_INDEX
    return targets
