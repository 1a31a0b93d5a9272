"""Cut a list of tensors into slabs of rows, and pack the slabs into buckets of bytes.

Sender and receivers plan the same buckets from the same list of `TensorMeta`, so only tensor bytes (and, optionally,
their checksums) are sent. A slab is at most an eighth of a bucket, so the memory that a slab is made in does not grow
with the size of a tensor.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_entropy.errors import ChecksumError

BUCKET_BYTES = 64 * 2**20

ALIGNMENT = 16  # a view of a byte buffer as another type must start at a multiple of its item size


class TensorMeta(NamedTuple):
    """Name, type and full shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Length of the first dimension; 1 for a tensor without dimensions."""
        return self.shape[0] if self.shape else 1

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


class Slab(NamedTuple):
    """Rows [first, first + rows) of tensor `number` of a list; a tensor without dimensions has one row."""

    number: int
    first: int
    rows: int

    def view(self, buffer: torch.Tensor, offset: int, meta: TensorMeta) -> torch.Tensor:
        """View the slab's bytes in a buffer as a tensor [rows, ...]."""
        shape = (self.rows, *meta.shape[1:])
        num_bytes = math.prod(shape) * meta.dtype.itemsize
        return buffer[offset : offset + num_bytes].view(meta.dtype).view(shape)


@dataclass(frozen=True)
class Bucket:
    """Slabs at `offsets` (bytes) of a buffer: `num_bytes` of tensors, then, optionally, the slabs' checksums."""

    slabs: tuple[Slab, ...]
    offsets: tuple[int, ...]
    num_bytes: int

    def size(self, *, checksum: bool) -> int:
        """Bytes of the buffer."""
        return self._checksums_start + 8 * len(self.slabs) if checksum else self.num_bytes

    def views(self, buffer: torch.Tensor, metadata: Sequence[TensorMeta]) -> Iterator[tuple[Slab, torch.Tensor]]:
        """Yield every slab and its view in the buffer, a tensor [rows, ...]."""
        for slab, offset in zip(self.slabs, self.offsets, strict=True):
            yield slab, slab.view(buffer, offset, metadata[slab.number])

    def coalesce(self, metadata: Sequence[TensorMeta]) -> Bucket:
        """Join adjacent slabs of the same tensor into one slab each; the bytes are the same."""
        slabs: list[Slab] = []
        offsets: list[int] = []
        for slab, offset in zip(self.slabs, self.offsets, strict=True):
            if slabs and slabs[-1].number == slab.number:
                last = slabs[-1]
                row_bytes = metadata[slab.number].num_bytes // metadata[slab.number].num_rows
                if offsets[-1] + last.rows * row_bytes == offset:
                    slabs[-1] = last._replace(rows=last.rows + slab.rows)
                    continue
            slabs.append(slab)
            offsets.append(offset)
        return Bucket(tuple(slabs), tuple(offsets), self.num_bytes)

    def checksums(self, buffer: torch.Tensor) -> torch.Tensor:
        """View the checksums in the buffer, int64 [slabs]."""
        return buffer[self._checksums_start :].view(torch.int64)

    @property
    def _checksums_start(self) -> int:
        return -(-self.num_bytes // ALIGNMENT) * ALIGNMENT


def plan_buckets(metadata: Sequence[TensorMeta], bucket_bytes: int) -> list[Bucket]:
    """Cut a list of tensors into slabs and pack these into buckets, in order; the same on every side.

    A tensor that fits into a bucket is not split over two.

    Args:
        bucket_bytes: largest size of a bucket together with one slab in the making. Only a single row that is larger
            makes a larger bucket.
    """
    slab_bytes = bucket_bytes // 8
    buckets: list[Bucket] = []
    slabs: list[Slab] = []
    offsets: list[int] = []
    end = 0
    for number, meta in enumerate(metadata):
        rows = meta.num_rows
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
    return zlib.crc32(data.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)


class TensorAssembler:
    """Rebuilds whole tensors from the slabs of one bucket after the other.

    Args:
        checked: buckets have checksums, which are compared.
    """

    def __init__(self, metadata: Sequence[TensorMeta], *, checked: bool) -> None:
        self._metadata = metadata
        self._checked = checked
        self._partial: dict[int, torch.Tensor] = {}

    def add(self, bucket: Bucket, buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Take the slabs of a bucket; returns the tensors that are complete now, views of the buffer where possible.

        Raises:
            ChecksumError: naming the first tensor that arrived with other bytes than were sent.
        """
        if self._checked:
            self._check(bucket, buffer)
        complete = []
        for slab, rows in bucket.coalesce(self._metadata).views(buffer, self._metadata):
            meta = self._metadata[slab.number]
            if slab.rows == meta.num_rows:
                complete.append((meta.name, rows.view(meta.shape)))
                continue
            if slab.number not in self._partial:
                self._partial[slab.number] = torch.empty(meta.shape, dtype=meta.dtype, device=rows.device)
            self._partial[slab.number][slab.first : slab.first + slab.rows] = rows
            if slab.first + slab.rows == meta.num_rows:
                complete.append((meta.name, self._partial.pop(slab.number)))
        return complete

    def _check(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        views = bucket.views(buffer, self._metadata)
        for (slab, rows), expected in zip(views, bucket.checksums(buffer).tolist(), strict=True):
            if (found := checksum(rows)) != expected:
                raise ChecksumError(
                    f"{self._metadata[slab.number].name}: arrived with other bytes than were sent (rows {slab.first} "
                    f"to {slab.first + slab.rows}, checksum {found:08x} instead of {expected:08x})"
                )
