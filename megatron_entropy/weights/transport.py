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

import contextlib
import dataclasses
import datetime
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_entropy.errors import TransportError
from megatron_entropy.weights.buckets import (
    BUCKET_BYTES,
    Bucket,
    Slab,
    TensorMeta,
    _Assembly,
    checksum,
    max_size,
    plan_buckets,
)
from megatron_entropy.weights.links import (
    SHARED_MEMORY,
    BroadcastLink,
    Link,
    LinkInfo,
    SharedMemory,
    SharedMemoryLink,
    poll,
    reason_of,
)


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


class Sender:
    """Rank 0 of a transfer group. `connect` and `send` call `check` while they wait, which may raise to stop them.

    Args:
        address: of this machine, as the engines reach it.
        num_receivers: engine workers that will join.
        timeout: seconds without progress after which a wait is an error.
        backend: `gloo`, `nccl` or `shared_memory`.
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
        store = dist.TCPStore(
            address, 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout)
        )
        self._store: Any = store
        self._shared = SharedMemory() if backend == SHARED_MEMORY else None
        self.memory = self._shared.path if self._shared else ""
        """Path of the memory that other ranks may write into as well, if the backend has any."""
        self._info = LinkInfo(
            address, store.port, num_receivers + 1, 0, bucket_bytes, checksum, timeout, backend, self.memory
        )
        self._link: Link | None = None

    def init_info(self, rank_offset: int) -> dict[str, Any]:
        """What the engine whose first worker has rank `rank_offset` must be told to join."""
        return dataclasses.asdict(dataclasses.replace(self._info, rank_offset=rank_offset))

    def connect(self, check: Callable[[], None] = lambda: None) -> None:
        """Form the group once every receiver has come to the meeting point.

        Raises:
            TransportError: when one has not come in time.
        """
        # Forming a gloo group blocks until all are there, so absent peers are waited for here, where `check` runs.
        poll(self._all_are_here, check, self._info.timeout, "engines to join the weight transfer")
        try:
            self._link = _link(self._store, 0, self._info)
        except (RuntimeError, dist.DistError) as error:
            raise TransportError(f"cannot form the weight transfer: {reason_of(error)}") from error

    def _all_are_here(self) -> bool:
        # No local variable holds the store: one would live on in the traceback of what `check` raises.
        return self._store.check([_arrival(rank) for rank in range(1, self._info.world_size)])

    def send(
        self,
        metadata: Sequence[TensorMeta],
        read: Callable[[Slab, torch.Tensor], None],
        check: Callable[[], None] = lambda: None,
        filled: Callable[[], None] = lambda: None,
    ) -> int:
        """Send tensors; returns the number of their bytes.

        While a bucket travels the next one is filled, so gathering and sending overlap.

        Args:
            read: writes a slab into a tensor [rows, ...]; called for every slab of `plan_buckets`, in order.
            filled: called after the slabs of each bucket, when the bucket before it has been taken; where other ranks
                write into shared memory, it waits until they have.
        Raises:
            TransportError: when a receiver died or the group made no progress in time.
        """
        assert self._link is not None, "connect() comes first"
        buckets = plan_buckets(metadata, self._info.bucket_bytes)
        self._link.begin(max_size(buckets, checksum=self._info.checksum))
        buffers = self._link.buffers()
        for turn, bucket in enumerate(buckets):
            buffer = buffers[turn % 2][: bucket.size(checksum=self._info.checksum)]
            for slab, place in bucket.places(buffer, metadata):
                read(slab, place)
            self._link.finish(check)
            filled()
            if self._info.checksum:
                self._seal(bucket, metadata, buffer)
            self._link.start(buffer)
        self._link.finish(check)
        return sum(bucket.num_bytes for bucket in buckets)

    def _seal(self, bucket: Bucket, metadata: Sequence[TensorMeta], buffer: torch.Tensor) -> None:
        """Put the checksums behind the slabs."""
        sums = [checksum(place) for _, place in bucket.places(buffer, metadata)]
        bucket.sums(buffer).copy_(torch.tensor(sums))

    def close(self) -> None:
        """Leave the group: receivers that still wait for data get an error."""
        if self._link is not None:
            self._link.close()
        self._link = None
        self._store = None  # who still waits for others to come gets an error too
        if self._shared is not None:
            self._shared.close()
        self._shared = None


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
            self._link: Link | None = _link(store, rank, info)
        except (RuntimeError, dist.DistError) as error:
            raise TransportError(
                f"cannot join the weight transfer at {info.address}:{info.port}: {reason_of(error)}"
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
        try:
            failure = self._receive(metadata, load)
        except BaseException:
            self.close()  # at once: the others may wait for this receiver, and not see that the sender has gone
            raise
        if failure is not None:
            raise failure

    def _receive(
        self, metadata: Sequence[TensorMeta], load: Callable[[list[tuple[str, torch.Tensor]]], None]
    ) -> Exception | None:
        """Take everything; returns what made it useless."""
        assert self._link is not None
        failure: Exception | None = None
        assembly = _Assembly(metadata, checked=self._info.checksum)
        buckets = plan_buckets(metadata, self._info.bucket_bytes)
        size = max_size(buckets, checksum=self._info.checksum)
        self._link.begin(size)
        memory = _Memory(size, self._link.device)
        coming = self._start(buckets[0], memory) if buckets else None
        for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
            self._link.finish()
            assert coming is not None
            buffer = coming
            coming = self._start(following, memory) if following else None
            if failure is None:
                try:
                    if tensors := assembly.add(bucket, buffer):
                        load(tensors)
                except Exception as error:  # raised at the end: the group must not wait for this receiver
                    failure = error
        return failure

    def _start(self, bucket: Bucket, memory: _Memory) -> torch.Tensor:
        """Begin to take a bucket, into the memory that is returned."""
        assert self._link is not None
        buffer = memory.take(bucket.size(checksum=self._info.checksum))
        self._link.start(buffer)
        return buffer

    def close(self) -> None:
        """Leave the group."""
        if self._link is not None:
            self._link.close()
        self._link = None


def _link(store: dist.Store, rank: int, info: LinkInfo) -> Link:
    return (SharedMemoryLink if info.backend == SHARED_MEMORY else BroadcastLink)(store, rank, info)


def _arrival(rank: int) -> str:
    return f"arrived/{rank}"


class _Memory:
    """Blocks for buckets, each used again as soon as nobody has a tensor in it any more.

    On a CPU the kernel takes longer to find fresh memory than to copy a bucket into it; a GPU's allocator does this
    itself.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._blocks: list[mmap.mmap] = []

    def take(self, size: int) -> torch.Tensor:
        """A tensor uint8 [size], of one block at most."""
        if size == 0 or self._device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        for number in range(len(self._blocks)):
            # A tensor over a block holds a reference; beside it there are the list's and that of the call.
            if sys.getrefcount(self._blocks[number]) == 2:
                return torch.frombuffer(self._blocks[number], dtype=torch.uint8, count=size)
        block = mmap.mmap(-1, self._block_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
        self._blocks.append(block)
        return torch.frombuffer(block, dtype=torch.uint8, count=size)
