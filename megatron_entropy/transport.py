"""The bytes between trainer rank 0 and the rollout engines: buckets of tensors broadcast over a group of their own.

The group is a `TCPStore` with a gloo or an NCCL process group, never torch's global default group: rank 0 is the
trainer's `Sender`, ranks 1..n are the engines' workers, each a `Receiver`. Both sides are told the same list of
`TensorMeta` and cut it into the same buckets, so that nothing but tensor bytes (and checksums, when asked for) is on
the wire. A tensor is cut into slabs of rows that are an eighth of a bucket at most, so that the sender never holds more
than two buckets, whatever the size of a tensor: one that is filled and one on the wire. A receiver takes the next
bucket while it loads the last.

Over gloo the buckets lie in host memory; over NCCL on the GPUs, where every rank needs a GPU of its own.

A receiver that cannot use what it gets (a checksum that differs, a model that refuses a tensor) goes on receiving to
the end and raises then: the sender and the other receivers never wait for it. A peer that dies closes its sockets,
which is an error on the others at once; one that hangs is an error after `timeout` seconds. A group that has had an
error is of no further use: close it and connect anew.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from megatron_entropy.errors import Fault

BUCKET_BYTES = 64 * 2**20
ALIGNMENT = 16  # a view of a byte buffer as another type must start at a multiple of its item size


class TransportError(Fault):
    """The group broke: a peer died or did not answer in time."""


class ChecksumError(Fault):
    """A tensor arrived with other bytes than were sent; the message names it."""


class EngineLost(Fault):
    """Rollout engines died or hung; `indices` says which, so that they can be restarted."""

    def __init__(self, indices: Sequence[int], reason: str) -> None:
        super().__init__(f"lost rollout engine {', '.join(map(str, indices))}: {reason}")
        self.indices = tuple(indices)
        self.reason = reason

    def __reduce__(self) -> tuple[type[EngineLost], tuple[tuple[int, ...], str]]:
        return type(self), (self.indices, self.reason)


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
    """Slabs at `offsets` (bytes) of a buffer of `num_bytes`."""

    slabs: tuple[Slab, ...]
    offsets: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class LinkInfo:
    """What a receiver needs to join: plain values, so that it travels as a dictionary."""

    address: str
    port: int
    world_size: int
    rank_offset: int
    bucket_bytes: int
    checksum: bool
    timeout: float
    backend: str = "gloo"


class WeightClient(Protocol):
    """An engine as the sender of weights sees it: vLLM's four weight-sync methods and the engine's number.

    All block until the engine has answered. They raise `EngineLost` when the engine is gone and another `Fault` when
    it is alive but refused.
    """

    index: int
    num_workers: int

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the transfer group that a `LinkInfo` describes."""

    def start_weight_update(self) -> None:
        """Make the model ready to take weights."""

    def update_weights(self, update_info: dict[str, Any]) -> float:
        """Receive the tensors listed as `names`, `dtype_names` and `shapes`; returns the seconds spent loading them."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the received weights to use."""


def plan_buckets(metadata: Sequence[TensorMeta], bucket_bytes: int) -> list[Bucket]:
    """Cut a list of tensors into slabs and these into buckets, in order; the same on every side.

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
            if slabs and start + count * row_bytes > bucket_bytes - slab_bytes:
                buckets.append(Bucket(tuple(slabs), tuple(offsets), end))
                slabs, offsets, start = [], [], 0
            slabs.append(Slab(number, first, count))
            offsets.append(start)
            end = start + count * row_bytes
    if slabs:
        buckets.append(Bucket(tuple(slabs), tuple(offsets), end))
    return buckets


def checksum(data: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(_bytes(data).cpu().numpy().data)


class Sender:
    """Rank 0 of a transfer group. `connect` and `send` call `check` while they wait, which may raise to stop them.

    Args:
        address: of this machine, as the engines reach it.
        num_receivers: engine workers that will join.
        timeout: seconds without progress after which a wait is an error.
        backend: `gloo` or `nccl`.
    """

    def __init__(
        self,
        address: str,
        *,
        num_receivers: int,
        bucket_bytes: int = BUCKET_BYTES,
        checksum: bool = False,
        timeout: float = 300.0,
        backend: str = "gloo",
    ) -> None:
        self._store = dist.TCPStore(
            address, 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout)
        )
        self._info = LinkInfo(address, self._store.port, num_receivers + 1, 0, bucket_bytes, checksum, timeout, backend)
        self._link: _Link | None = None

    def init_info(self, rank_offset: int) -> dict[str, Any]:
        """What the engine whose first worker has rank `rank_offset` must be told to join."""
        return dataclasses.asdict(dataclasses.replace(self._info, rank_offset=rank_offset))

    def connect(self, check: Callable[[], None] = lambda: None) -> None:
        """Form the group once every receiver has come to the meeting point.

        Raises:
            TransportError: when one has not come in time.
        """
        # Forming a gloo group blocks until all are there, so absent peers are waited for here, where `check` runs.
        ranks = [_arrival(rank) for rank in range(1, self._info.world_size)]
        _poll(lambda: self._store.check(ranks), check, self._info.timeout, "engines to join the weight transfer")
        self._link = _Link(self._store, 0, self._info)

    def send(
        self,
        metadata: Sequence[TensorMeta],
        read: Callable[[Slab, torch.Tensor], None],
        check: Callable[[], None] = lambda: None,
    ) -> int:
        """Broadcast tensors; returns the number of bytes sent.

        While a bucket travels the next one is filled, so gathering and sending overlap.

        Args:
            read: writes a slab into a tensor [rows, ...]; called for every slab of `plan_buckets`, in order.
        Raises:
            TransportError: when a receiver died or the group made no progress in time.
        """
        assert self._link is not None, "connect() comes first"
        buckets = plan_buckets(metadata, self._info.bucket_bytes)
        size = max((bucket.num_bytes for bucket in buckets), default=0)
        buffers = [self._link.empty(size, torch.uint8) for _ in buckets[:2]]
        for turn, bucket in enumerate(buckets):
            buffer = buffers[turn % 2][: bucket.num_bytes]
            sums = self._fill(bucket, metadata, buffer, read)
            self._link.finish(check)
            self._link.start(buffer)
            if self._info.checksum:
                self._link.start(sums)
        self._link.finish(check)
        return sum(bucket.num_bytes for bucket in buckets)

    def _fill(
        self,
        bucket: Bucket,
        metadata: Sequence[TensorMeta],
        buffer: torch.Tensor,
        read: Callable[[Slab, torch.Tensor], None],
    ) -> torch.Tensor:
        """Fill the bucket's buffer; returns the checksum of each slab, int64 [slabs]."""
        sums = []
        for slab, offset in zip(bucket.slabs, bucket.offsets, strict=True):
            place = slab.view(buffer, offset, metadata[slab.number])
            read(slab, place)
            if self._info.checksum:
                sums.append(checksum(place))
        return torch.tensor(sums, dtype=torch.int64, device=buffer.device)

    def close(self) -> None:
        """Leave the group: receivers that still wait for data get an error."""
        if self._link is not None:
            self._link.close()
        self._link = None


class Receiver:
    """One engine worker of a transfer group; `rank` counts from 1. Forms the group when made, blocking till then.

    Raises:
        TransportError: when the sender is not there or the group does not form in time.
    """

    def __init__(self, info: LinkInfo, rank: int) -> None:
        self._info = info
        timeout = datetime.timedelta(seconds=info.timeout)
        try:
            store = dist.TCPStore(info.address, info.port, is_master=False, timeout=timeout)
            store.set(_arrival(rank), "here")
            self._link: _Link | None = _Link(store, rank, info)
        except (RuntimeError, dist.DistError) as error:
            raise TransportError(
                f"cannot join the weight transfer at {info.address}:{info.port}: {_reason(error)}"
            ) from error

    def receive(self, metadata: Sequence[TensorMeta], load: Callable[[list[tuple[str, torch.Tensor]]], None]) -> None:
        """Take one transfer and hand the tensors of each bucket to `load`, a tensor in slabs with its last one.

        The tensors are views of the bucket's buffer, which lives as long as any of them does, or of their own: `load`
        may keep them.

        Raises:
            TransportError: when the sender died or went silent.
            ChecksumError: naming the first tensor that differs.
            Exception: what `load` raised. The last two come after the whole transfer has been taken.
        """
        assert self._link is not None, "the receiver is closed"
        failure: Exception | None = None
        assembly = _Assembly(metadata)
        buckets = plan_buckets(metadata, self._info.bucket_bytes)
        coming = self._start(buckets[0]) if buckets else None
        for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
            self._link.finish()
            assert coming is not None
            buffer, sums = coming
            coming = self._start(following) if following else None
            if failure is None:
                try:
                    if tensors := assembly.add(bucket, buffer, sums):
                        load(tensors)
                except Exception as error:  # raised at the end: the group must not wait for this receiver
                    failure = error
        if failure is not None:
            raise failure

    def _start(self, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Begin to take a bucket: the memory for its bytes and for its checksums, where there are any."""
        assert self._link is not None
        buffer = self._link.empty(bucket.num_bytes, torch.uint8)
        self._link.start(buffer)
        if not self._info.checksum:
            return buffer, None
        sums = self._link.empty(len(bucket.slabs), torch.int64)
        self._link.start(sums)
        return buffer, sums

    def close(self) -> None:
        """Leave the group."""
        if self._link is not None:
            self._link.close()
        self._link = None


class _Link:
    """A group and the broadcasts from rank 0 that are under way.

    Gloo closes its connections, which is how the peers learn of an end, only when the group and every piece of work
    on it are gone. All of them are kept here and nowhere else, for a local variable would live on in the traceback of
    the very error that makes us close.
    """

    def __init__(self, store: dist.Store, rank: int, info: LinkInfo) -> None:
        self._timeout = info.timeout
        self._device = torch.device("cpu")
        if info.backend == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._group: Any = {"gloo": _gloo_group, "nccl": _nccl_group}[info.backend](store, rank, info)
        self._under_way: list[tuple[dist.Work, torch.Tensor]] = []

    def empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that can be broadcast."""
        return torch.empty(size, dtype=dtype, device=self._device)

    def start(self, tensor: torch.Tensor) -> None:
        """Begin to broadcast a contiguous tensor."""
        assert self._group is not None, "the link is closed"
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        try:
            self._under_way.append((self._group.broadcast([tensor], options), tensor))
        except RuntimeError as error:
            raise TransportError(f"weight transfer broke: {_reason(error)}") from error

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait for all broadcasts under way and let go of their tensors."""
        while self._under_way:
            _poll(self._first_is_done, check, self._timeout, "a bucket of weights to be taken")
            try:
                self._under_way[0][0].wait()
            except RuntimeError as error:
                raise TransportError(f"weight transfer broke: {_reason(error)}") from error
            del self._under_way[0]

    def _first_is_done(self) -> bool:
        return self._under_way[0][0].is_completed()

    def close(self) -> None:
        """Break off what is under way and leave the group."""
        self._under_way.clear()
        if self._device.type == "cuda" and self._group is not None:
            self._group.abort()  # NCCL would wait for the peers
        self._group = None


def _gloo_group(store: dist.Store, rank: int, info: LinkInfo) -> Any:
    gloo: Any = dist.ProcessGroupGloo  # torch's type stubs lack most of it
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=_interface_towards(info.address))]
    options._timeout = datetime.timedelta(seconds=info.timeout)
    return gloo(store, rank, info.world_size, options)


def _nccl_group(store: dist.Store, rank: int, info: LinkInfo) -> Any:
    """Not yet run: written against torch's interface on machines without a GPU."""
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = datetime.timedelta(seconds=info.timeout)
    # By default torch ends the whole process when a peer is lost; here that is an error like any other.
    setting = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(setting)
    os.environ[setting] = "0"
    try:
        return nccl(store, rank, info.world_size, options)
    finally:
        os.environ.pop(setting) if before is None else os.environ.update({setting: before})


def _arrival(rank: int) -> str:
    return f"arrived/{rank}"


def _interface_towards(address: str) -> str:
    """This machine's own address on the way to `address`; gloo would take the one its host name stands for."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # of a datagram socket: chooses a route, sends nothing
        return probe.getsockname()[0]


def _reason(error: BaseException) -> str:
    """What gloo says, without its source position and its guess at the cause."""
    return re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". This is typically")[0]


def _poll(done: Callable[[], bool], check: Callable[[], None], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    pause = 20e-6
    while not done():
        check()
        if time.monotonic() > deadline:
            raise TransportError(f"waited {timeout:.0f} s for {what}")
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class _Assembly:
    """Puts the slabs of tensors that were cut together again."""

    def __init__(self, metadata: Sequence[TensorMeta]) -> None:
        self._metadata = metadata
        self._partial: dict[int, torch.Tensor] = {}

    def add(self, bucket: Bucket, buffer: torch.Tensor, sums: torch.Tensor | None) -> list[tuple[str, torch.Tensor]]:
        """The tensors that a bucket completes.

        Raises:
            ChecksumError: naming the first tensor that arrived with other bytes than were sent.
        """
        done = []
        for position, (slab, offset) in enumerate(zip(bucket.slabs, bucket.offsets, strict=True)):
            meta = self._metadata[slab.number]
            rows = slab.view(buffer, offset, meta)
            if sums is not None and checksum(rows) != (expected := int(sums[position])):
                raise ChecksumError(
                    f"{meta.name}: arrived with other bytes than were sent (rows {slab.first} to "
                    f"{slab.first + slab.rows}, checksum {expected:08x})"
                )
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
