"""Send tensors in buckets from the trainer to the rollout engines.

Rank 0 of a transfer group is the trainer's `Sender`, ranks 1..n are the engines' workers, each a `Receiver`; a `Link`
carries the buckets. The sender holds two buckets, whatever the size of a tensor: one that is filled and one that is
sent. A receiver receives the next bucket while it loads the last one.

A receiver that cannot use a tensor (its checksum differs, the model refuses it) receives all buckets and raises at the
end, so the sender and the other receivers never wait for it. The sockets of a peer that dies are closed, which is an
error on the others at once; a peer that hangs is an error after `timeout` seconds. After an error the group must be
closed and formed again.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_entropy.errors import TransportError
from megatron_entropy.weights.buckets import (
    BUCKET_BYTES,
    Bucket,
    Slab,
    TensorAssembler,
    TensorMeta,
    checksum,
    max_size,
    plan_buckets,
)
from megatron_entropy.weights.links import (
    Link,
    LinkInfo,
    arrive,
    create_memory,
    form,
    have_arrived,
    poll,
    reason_of,
)


class Sender:
    """Rank 0 of a transfer group. `connect` and `send` call `check` while they wait; an exception of it ends the wait.

    Args:
        address: of this machine, as the engines reach it.
        num_receivers: number of engine workers that will join.
        timeout: seconds without progress after which a wait is an error.
        backend: `gloo`, `nccl`, `shared_memory` or `cuda_ipc`.
        max_bytes: of the largest bucket, which `cuda_ipc` allocates.
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
        max_bytes: int = BUCKET_BYTES,
    ) -> None:
        store = dist.TCPStore(
            address, 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout)
        )
        self._store: Any = store
        self._shared = create_memory(backend, max_bytes)
        self.memory = self._shared.path if self._shared else ""
        """Path of the memory that other trainer ranks may write into; empty where the backend has none."""
        self._info = LinkInfo(
            address, store.port, num_receivers + 1, 0, bucket_bytes, checksum, timeout, backend, self.memory
        )
        self._link: Link | None = None

    def init_info(self, rank_offset: int) -> dict[str, Any]:
        """Return what an engine needs to join when its first worker has rank `rank_offset`."""
        return dataclasses.asdict(dataclasses.replace(self._info, rank_offset=rank_offset))

    def connect(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait for every receiver and form the group.

        Raises:
            TransportError: when a receiver has not come in time.
        """
        # Forming a gloo group blocks until all peers are there, so they are waited for here, where `check` is called.
        poll(self._all_arrived, check, self._info.timeout, "engines to join the weight transfer")
        try:
            self._link = form(self._store, 0, self._info, self._shared)
        except (RuntimeError, dist.DistError) as error:
            raise TransportError(f"cannot form the weight transfer: {reason_of(error)}") from error

    def _all_arrived(self) -> bool:
        # No local variable holds the store: it would stay alive in the traceback of an exception of `check`.
        return have_arrived(self._store, self._info.world_size)

    def send(
        self,
        metadata: Sequence[TensorMeta],
        read: Callable[[Slab, torch.Tensor], None],
        check: Callable[[], None] = lambda: None,
        filled: Callable[[], None] = lambda: None,
    ) -> int:
        """Send tensors; returns the number of their bytes. A bucket is filled while the one before it is sent.

        Args:
            read: writes a slab into a tensor [rows, ...]; called for every slab of `plan_buckets`, in order.
            filled: called after the slabs of each bucket, when the bucket before it has been received; where other
                ranks write into shared memory, it waits for them.
        Raises:
            TransportError: when a receiver died or the group made no progress in time.
        """
        assert self._link is not None, "connect() comes first"
        buckets = plan_buckets(metadata, self._info.bucket_bytes)
        self._link.begin(max_size(buckets, checksum=self._info.checksum))
        buffers = self._link.buffers()
        for turn, bucket in enumerate(buckets):
            buffer = buffers[turn % 2][: bucket.size(checksum=self._info.checksum)]
            for slab, view in bucket.views(buffer, metadata):
                read(slab, view)
            self._link.finish(check)
            filled()
            if self._info.checksum:
                self._seal(bucket, metadata, buffer)
            self._link.start(buffer)
        self._link.finish(check)
        return sum(bucket.num_bytes for bucket in buckets)

    def _seal(self, bucket: Bucket, metadata: Sequence[TensorMeta], buffer: torch.Tensor) -> None:
        """Write the checksums behind the slabs."""
        checksums = [checksum(view) for _, view in bucket.views(buffer, metadata)]
        bucket.checksums(buffer).copy_(torch.tensor(checksums))

    def close(self) -> None:
        """Leave the group: receivers that wait for data or for other receivers get an error."""
        if self._link is not None:
            self._link.close()
        elif self._shared is not None:
            self._shared.close()
        self._link, self._store, self._shared = None, None, None


class Receiver:
    """One engine worker of a transfer group; its `rank` counts from 1. Creating it blocks until the group is formed.

    Raises:
        TransportError: when the sender is not there or the group is not formed in time.
    """

    def __init__(self, info: LinkInfo, rank: int) -> None:
        self._info = info
        timeout = datetime.timedelta(seconds=info.timeout)
        try:
            store = dist.TCPStore(info.address, info.port, is_master=False, timeout=timeout)
            arrive(store, rank)
            self._link: Link | None = form(store, rank, info)
        except (RuntimeError, dist.DistError) as error:
            raise TransportError(
                f"cannot join the weight transfer at {info.address}:{info.port}: {reason_of(error)}"
            ) from error

    def receive(self, metadata: Sequence[TensorMeta], load: Callable[[list[tuple[str, torch.Tensor]]], None]) -> None:
        """Receive one transfer, and call `load` with the tensors that each bucket completes.

        `load` may keep the tensors: their memory is not written again.

        Raises:
            TransportError: when the sender died or made no progress in time.
            ChecksumError: naming the first tensor that differs, after the whole transfer has been received.
            Exception: the first one that `load` raised, after the whole transfer has been received.
        """
        assert self._link is not None, "the receiver is closed"
        try:
            failure = self._receive(metadata, load)
        except BaseException:
            self.close()  # at once: others may wait for this receiver and not see that the sender is gone
            raise
        if failure is not None:
            raise failure

    def _receive(
        self, metadata: Sequence[TensorMeta], load: Callable[[list[tuple[str, torch.Tensor]]], None]
    ) -> Exception | None:
        """Receive all buckets; returns the error that makes them useless."""
        assert self._link is not None
        failure: Exception | None = None
        assembler = TensorAssembler(metadata, checked=self._info.checksum)
        buckets = plan_buckets(metadata, self._info.bucket_bytes)
        self._link.begin(max_size(buckets, checksum=self._info.checksum))
        pending = self._start(buckets[0]) if buckets else None
        for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
            self._link.finish()
            assert pending is not None
            buffer, pending = pending, self._start(following) if following else None
            if failure is None:
                try:
                    if tensors := assembler.add(bucket, buffer):
                        load(tensors)
                except Exception as error:  # raised at the end: the group must not wait for this receiver
                    failure = error
        return failure

    def _start(self, bucket: Bucket) -> torch.Tensor:
        """Start to receive a bucket into the buffer that is returned."""
        assert self._link is not None
        size = bucket.size(checksum=self._info.checksum)
        buffer = torch.empty(size, dtype=torch.uint8, device=self._link.device)
        self._link.start(buffer)
        return buffer

    def close(self) -> None:
        """Leave the group."""
        if self._link is not None:
            self._link.close()
        self._link = None
