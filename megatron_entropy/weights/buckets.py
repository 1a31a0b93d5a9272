"""The bytes between the trainer and the rollout engines: tensors in buckets.

Rank 0 is the trainer's `Sender`, ranks 1..n are the engines' workers, each a `Receiver`; a `Link` carries the buckets.
Both sides are told the same list of `TensorMeta` and cut it into the same buckets, so that nothing but tensor bytes
(and checksums, when asked for) travels. A tensor is cut into slabs of rows that are an eighth of a bucket at most, so
that the sender never holds more than two buckets, whatever the size of a tensor: one that is filled and one on its
way. A receiver takes the next bucket while it loads the last.

A receiver that cannot use what it gets (a checksum that differs, a model that refuses a tensor) goes on receiving to
the end and raises then: the sender and the other receivers never wait for it. A peer that dies closes its sockets,
which is an error on the others at once; one that hangs is an error after `timeout` seconds. A group that has had an
error is of no further use: close it and connect anew.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_entropy.errors import ChecksumError

BUCKET_BYTES = 64 * 2**20

ALIGNMENT = 16  # a view of a byte buffer as another type must start at a multiple of its item size


class TensorMeta(NamedTuple):
    """Name, type on the wire and full shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Slab(NamedTuple):
    """Rows [first, first + rows) of tensor `number` of a list; a tensor without dimensions has one row."""

    number: int
    first: int
    rows: int

    def view(self, buffer: torch.Tensor, offset: int, meta: TensorMeta) -> torch.Tensor:
        """The slab's place in a byte buffer as a tensor [rows, ...]."""
        shape = (self.rows, *meta.shape[1:])
        num_bytes = torch.Size(shape).numel() * meta.dtype.itemsize
        return buffer[offset : offset + num_bytes].view(meta.dtype).view(shape)


@dataclass(frozen=True)
class Bucket:
    """Slabs at `offsets` (bytes) of a buffer; `num_bytes` of tensors, behind which there may be their checksums."""

    slabs: tuple[Slab, ...]
    offsets: tuple[int, ...]
    num_bytes: int

    def size(self, *, checksum: bool) -> int:
        """Bytes of the buffer."""
        return self._sums_start + 8 * len(self.slabs) if checksum else self.num_bytes

    def places(self, buffer: torch.Tensor, metadata: Sequence[TensorMeta]) -> Iterator[tuple[Slab, torch.Tensor]]:
        """Every slab with its place in the buffer, a tensor [rows, ...]."""
        for slab, offset in zip(self.slabs, self.offsets, strict=True):
            yield slab, slab.view(buffer, offset, metadata[slab.number])

    def merged(self, metadata: Sequence[TensorMeta]) -> Bucket:
        """The same bytes, with slabs of a tensor that lie right behind one another as one slab."""
        slabs: list[Slab] = []
        offsets: list[int] = []
        for slab, offset in zip(self.slabs, self.offsets, strict=True):
            if slabs and slabs[-1].number == slab.number:
                last = slabs[-1]
                row_bytes = metadata[slab.number].num_bytes // metadata[slab.number].shape[0]
                if offsets[-1] + last.rows * row_bytes == offset:
                    slabs[-1] = last._replace(rows=last.rows + slab.rows)
                    continue
            slabs.append(slab)
            offsets.append(offset)
        return Bucket(tuple(slabs), tuple(offsets), self.num_bytes)

    def sums(self, buffer: torch.Tensor) -> torch.Tensor:
        """The place of the checksums, int64 [slabs]."""
        return buffer[self._sums_start :].view(torch.int64)

    @property
    def _sums_start(self) -> int:
        return -(-self.num_bytes // ALIGNMENT) * ALIGNMENT


def plan_buckets(metadata: Sequence[TensorMeta], bucket_bytes: int) -> list[Bucket]:
    """Cut a list of tensors into slabs and these into buckets, in order; the same on every side.

    A tensor that fits into a bucket lies in one.

    Args:
        bucket_bytes: what one bucket and the making of its slabs may take; only a single row that is larger makes a
            larger one.
    """
    slab_bytes = bucket_bytes // 8
    buckets: list[Bucket] = []
    slabs: list[Slab] = []
    offsets: list[int] = []
    end = 0
    for number, meta in enumerate(metadata):
        rows = meta.shape[0] if meta.shape else 1
        row_bytes = meta.num_bytes // max(rows, 1)
        height = max(1, min(rows, slab_bytes // max(row_bytes, 1)))
        for first in range(0, max(rows, 1), height):
            count = min(height, rows - first)
            start = -(-end // ALIGNMENT) * ALIGNMENT
            whole_fits = first == 0 and meta.num_bytes <= bucket_bytes - slab_bytes
            if slabs and start + (meta.num_bytes if whole_fits else count * row_bytes) > bucket_bytes - slab_bytes:
                buckets.append(Bucket(tuple(slabs), tuple(offsets), end))
                slabs, offsets, start = [], [], 0
            slabs.append(Slab(number, first, count))
            offsets.append(start)
            end = start + count * row_bytes
    if slabs:
        buckets.append(Bucket(tuple(slabs), tuple(offsets), end))
    return buckets


def max_size(buckets: Sequence[Bucket], *, checksum: bool) -> int:
    """Bytes of the largest bucket."""
    return max((bucket.size(checksum=checksum) for bucket in buckets), default=0)


def checksum(data: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(_bytes(data).cpu().numpy().data)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class _Assembly:
    """Puts the slabs of tensors that were cut together again."""

    def __init__(self, metadata: Sequence[TensorMeta], *, checked: bool) -> None:
        self._metadata = metadata
        self._checked = checked
        self._partial: dict[int, torch.Tensor] = {}

    def add(self, bucket: Bucket, buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The tensors that a bucket completes.

        Raises:
            ChecksumError: naming the first tensor that arrived with other bytes than were sent.
        """
        if self._checked:
            self._check(bucket, buffer)
        done = []
        for slab, rows in bucket.merged(self._metadata).places(buffer, self._metadata):
            meta = self._metadata[slab.number]
            height = meta.shape[0] if meta.shape else 1
            if slab.rows == height:
                done.append((meta.name, rows.view(meta.shape)))
                continue
            if slab.number not in self._partial:
                self._partial[slab.number] = torch.empty(meta.shape, dtype=meta.dtype, device=rows.device)
            self._partial[slab.number][slab.first : slab.first + slab.rows] = rows
            if slab.first + slab.rows == height:
                done.append((meta.name, self._partial.pop(slab.number)))
        return done

    def _check(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        places = bucket.places(buffer, self._metadata)
        for (slab, rows), expected in zip(places, bucket.sums(buffer).tolist(), strict=True):
            if checksum(rows) != expected:
                raise ChecksumError(
                    f"{self._metadata[slab.number].name}: arrived with other bytes than were sent (rows {slab.first} "
                    f"to {slab.first + slab.rows}, checksum {expected:08x})"
                )
