"""The distributed optimizer's state as sharded tensors of the model's parameters, without a gather.

Each data-parallel rank holds a range of every parameter's elements. A range of a row-major tensor is at most three
boxes: the end of a row, whole rows, the start of a row. A rank saves exactly its boxes, so nothing is gathered and
every byte is written once. At load a rank reads the rows that its range touches, at most two more than its own. The
names, shapes and values in a checkpoint are those that the plain optimizer writes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size in each dimension."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A range of an optimizer tensor on this rank and the box of the checkpoint that holds it.

    `key`: unique on this rank. `target`: [n], a view of the optimizer's tensor. `elements`: where `target` lies in the
    flattened box; all of it, unless whole rows are read for a part of them.
    """

    key: str
    target: Tensor
    box: ShardedTensor
    elements: slice


def optimizer_pieces(
    optimizer: Any, sharded: dict[int, ShardedTensor | ShardedTensorFactory], *, whole_rows: bool
) -> Iterator[Piece]:
    """Describe the state of a `DistributedOptimizer` on this rank.

    Args:
        optimizer: with its state created.
        sharded: of the model's parameters, by the identity of the parameter.
        whole_rows: for loading: one box of whole rows for each range, and no tensor where the range is not all of it.
    """
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                    span = range(ranges["param"].start, ranges["param"].end)
                    for name, tensor in tensors.items():
                        if name != "step":
                            prefix = f"optimizer.state.{name}"
                            yield from _pieces(sharded[id(parameter)], prefix, tensor, span, whole_rows=whole_rows)


def boxes(shape: Sequence[int], first: int, last: int) -> Iterator[Box]:
    """Split the elements [first, last) of a row-major tensor into boxes, in the order of the elements."""
    if len(shape) == 1:
        yield (first,), (last - first,)
        return
    row = math.prod(shape[1:])
    while first < last:
        index, inside = divmod(first, row)
        whole = (last - first) // row
        if inside == 0 and whole:
            yield (index, *[0] * (len(shape) - 1)), (whole, *shape[1:])
            first += whole * row
            continue
        stop = min(row, inside + last - first)
        for offset, size in boxes(shape[1:], inside, stop):
            yield (index, *offset), (1, *size)
        first += stop - inside


def covering_rows(shape: Sequence[int], first: int, last: int) -> tuple[Box, int]:
    """The box of whole rows that holds the elements [first, last), and the number of its first element."""
    row = math.prod(shape[1:])
    start, stop = first // row, -(-last // row)
    return ((start, *[0] * (len(shape) - 1)), (stop - start, *shape[1:])), start * row


def _pieces(
    sharded: ShardedTensor | ShardedTensorFactory, prefix: str, tensor: Tensor, span: range, *, whole_rows: bool
) -> Iterator[Piece]:
    """The pieces of one tensor, which holds the elements `span` of a parameter's shard."""
    flat = tensor.detach().view(-1)
    for part, start in _parts(sharded):
        shape = part.local_shape
        first, last = max(span.start - start, 0), min(span.stop - start, math.prod(shape))
        if first >= last:
            continue
        if whole_rows:
            rows, origin = covering_rows(shape, first, last)
            described = [(rows, first, last, slice(first - origin, last - origin))]
        else:
            described, at = [], first
            for box in boxes(shape, first, last):
                count = math.prod(box[1])
                described.append((box, at, at + count, slice(0, count)))
                at += count
        for (offset, size), a, b, elements in described:
            target = flat[start + a - span.start : start + b - span.start]
            is_whole = target.numel() == math.prod(size)
            box = _box(part, prefix, offset, size, target if is_whole else None, dtype=tensor.dtype)
            yield Piece(f"{box.key}@{box.global_offset}", target, box, elements)


def _parts(sharded: ShardedTensor | ShardedTensorFactory) -> list[tuple[ShardedTensor, int]]:
    """The sharded tensors that a parameter is stored as, each with the number of its first element in the parameter.

    A factory splits a parameter into several (gate and up projection); it is asked with a tensor without memory.
    """
    if isinstance(sharded, ShardedTensor):
        return [(sharded, 0)]
    stand_in = torch.empty(sharded.data.shape, device="meta")
    parts = [part for part in nested_values(dataclasses.replace(sharded, data=stand_in).build())]
    assert all(part.data.is_contiguous() for part in parts), f"{sharded.key}: parts are ranges of the parameter"
    return [(part, int(part.data.storage_offset())) for part in parts]


def _box(
    part: ShardedTensor, prefix: str, offset: Sequence[int], size: Sequence[int], data: Tensor | None, *, dtype: Any
) -> ShardedTensor:
    """A box of a parameter's shard in the optimizer's tensor of the checkpoint; this data-parallel rank owns it."""
    stacked = part.prepend_axis_num
    shape = (*[1] * stacked, *size)
    corner = [
        *part.global_offset[:stacked],
        *(a + b for a, b in zip(part.global_offset[stacked:], offset, strict=True)),
    ]
    assert isinstance(part.replica_id, tuple) and len(part.replica_id) == 3, "pipeline, tensor, data parallel"
    return ShardedTensor(
        key=f"{prefix}.{part.key}",
        data=None if data is None else data.view(shape),
        dtype=dtype,
        local_shape=shape,
        global_shape=part.global_shape,
        global_offset=tuple(corner),
        axis_fragmentations=None,  # the boxes are no grid
        replica_id=(*part.replica_id[:2], 0),
    )
