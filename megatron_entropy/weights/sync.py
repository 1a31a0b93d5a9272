"""The trainer's end of a weight push: from a source of Hugging Face tensors to every rollout engine.

Every trainer rank calls `WeightSync.push`; rank 0 passes the engines' clients, the others None. Reading the source is
a collective over the trainer's ranks (slices are gathered, or each rank writes its own into shared memory), so every
rank reads it to its end, whatever becomes of the engines. On rank 0 the push runs vLLM's weight-transfer protocol:
`init_weight_transfer_engine` for a new set of engines, then `start_weight_update`, `update_weights` while the bytes
travel, `finish_weight_update`.

When an engine dies or hangs, `push` raises `EngineLost` on rank 0 and returns normally on the others; the caller
restarts the engines named in it and lets all ranks push again. When an engine refuses the weights (a checksum that
differs, a tensor it does not know) `push` raises another `Fault` there.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import EngineLost, TransportError
from megatron_entropy.weights.buckets import BUCKET_BYTES, Slab, TensorMeta, max_size, plan_buckets
from megatron_entropy.weights.links import SharedMemory
from megatron_entropy.weights.transport import Sender, WeightClient

INIT_TIMEOUT = 120.0
"""Seconds engines may take to join a transfer group."""
GRACE = 20.0
"""Seconds engines may take to notice that a transfer has been broken off."""

Result = TypeVar("Result")


class WeightSource(Protocol):
    """A model's tensors under their Hugging Face names, read again and again.

    Reading is a collective over the trainer's ranks, which all read the same slabs in the same order.
    `gather_seconds`: spent so far waiting for what other ranks hold.
    """

    gather_seconds: float

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, type and full shape of every tensor."""
        ...

    def read(self, number: int, first: int, count: int, out: torch.Tensor | None, *, in_place: bool) -> None:
        """Write rows [first, first + count) of tensor `number` into `out`.

        Args:
            out: on rank 0 a tensor [count, ...]; elsewhere None, or with `in_place` the same memory.
            in_place: every rank writes what it holds itself; else rank 0 collects and writes everything.
        """
        ...


@dataclass(frozen=True)
class WeightSyncStats:
    """What a push took on rank 0: bytes sent to each engine, seconds of its parts, which follow one another.

    `connect_seconds`: forming the group, for new engines. `start_seconds`: engines make ready. `gather_seconds`:
    waiting for slices of other ranks, or until they are written. `convert_seconds`: cutting, casting and placing.
    `wire_seconds`: what sending takes beyond reading, with which it overlaps. `finish_seconds`: engines put the weights
    to use.

    `load_seconds`: of the engine that took longest to put tensors into its model, mostly while others travelled.
    """

    num_bytes: int
    connect_seconds: float
    start_seconds: float
    gather_seconds: float
    convert_seconds: float
    wire_seconds: float
    finish_seconds: float
    load_seconds: float


class WeightSync:
    """Pushes one source's weights to a set of engines, again and again.

    Args:
        source: what to push.
        address: of rank 0's machine, as the engines reach it.
        bucket_bytes: size of a bucket; two are held beside the model.
        checksum: prove on the engines' side that every tensor arrived as it was sent.
        timeout: seconds without progress after which an engine counts as lost.
        backend: what carries the bytes: `gloo`, `nccl`, or `shared_memory` if ranks and engines are on one machine.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        address: str = "127.0.0.1",
        bucket_bytes: int = BUCKET_BYTES,
        checksum: bool = False,
        timeout: float = 300.0,
        backend: str = "gloo",
    ) -> None:
        self._source = source
        self._address = address
        self._bucket_bytes = bucket_bytes
        self._checksum = checksum
        self._timeout = timeout
        self._backend = backend
        self._sender: Sender | None = None
        self._connected: list[WeightClient] = []
        self._memory: SharedMemory | None = None

    def push(self, version: int, clients: Sequence[WeightClient] | None) -> WeightSyncStats | None:
        """Send the source's present weights; a collective over the trainer's ranks.

        Args:
            version: policy version the weights belong to.
            clients: on rank 0 all engines in use, the same objects for as long as the engines live; elsewhere None.
        Returns:
            What it took, on rank 0.
        Raises:
            EngineLost: on rank 0, when engines died or hung.
            Fault: on rank 0, when an engine refused the weights.
        """
        reading = _Reading(self._source, self._bucket_bytes)
        if clients is None:
            self._take_part(reading)
            return None
        try:
            return self._push(version, reading, list(clients))
        except BaseException:
            self.close()
            raise
        finally:
            reading.drain()  # the other ranks are in this collective until its end

    def _push(self, version: int, reading: _Reading, clients: list[WeightClient]) -> WeightSyncStats:
        begin = time.monotonic()
        sender = self._connect(clients)
        connected = time.monotonic()
        info = {
            "names": [meta.name for meta in reading.metadata],
            "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in reading.metadata],
            "shapes": [list(meta.shape) for meta in reading.metadata],
        }
        _Calls(clients, lambda client: client.start_weight_update()).join(self._timeout)
        started = time.monotonic()
        reading.begin(sender.memory)
        receiving = _Calls(clients, lambda client: client.update_weights(info))
        num_bytes = _together(
            lambda: sender.send(reading.metadata, reading.read, receiving.check, reading.end_bucket),
            receiving,
            self._timeout,
            sender.close,
        )
        sent = time.monotonic()
        _Calls(clients, lambda client: client.finish_weight_update(str(version))).join(self._timeout)
        return WeightSyncStats(
            num_bytes,
            connect_seconds=connected - begin,
            start_seconds=started - connected,
            gather_seconds=reading.gather_seconds,
            convert_seconds=reading.seconds - reading.gather_seconds,
            wire_seconds=sent - started - reading.seconds,
            finish_seconds=time.monotonic() - sent,
            load_seconds=max(receiving.answers.values(), default=0.0),
        )

    def _take_part(self, reading: _Reading) -> None:
        """Read everything, on a rank that is not the first."""
        path = reading.begin("")
        if self._memory is not None and not (path and self._memory.is_at(path)):
            self._memory.close()
            self._memory = None
        if self._memory is None and path:
            self._memory = SharedMemory(path)
        reading.run(self._memory.buffers(reading.max_size(checksum=self._checksum)) if self._memory else [])

    def _connect(self, clients: list[WeightClient]) -> Sender:
        if self._sender is not None and len(clients) == len(self._connected):
            if all(client is known for client, known in zip(clients, self._connected, strict=True)):
                return self._sender
        self.close()
        offsets = {}
        num_workers = 0
        for client in clients:
            offsets[client.index] = 1 + num_workers
            num_workers += client.num_workers
        self._sender = sender = Sender(
            self._address,
            num_receivers=num_workers,
            bucket_bytes=self._bucket_bytes,
            checksum=self._checksum,
            timeout=self._timeout,
            backend=self._backend,
        )
        joining = _Calls(
            clients, lambda client: client.init_weight_transfer_engine(sender.init_info(offsets[client.index]))
        )
        _together(lambda: sender.connect(joining.check), joining, INIT_TIMEOUT, sender.close)
        self._connected = clients
        return sender

    def close(self) -> None:
        """Leave the transfer group; the next push forms a new one."""
        if self._sender is not None:
            self._sender.close()
        if self._memory is not None:
            self._memory.close()
        self._sender, self._connected, self._memory = None, [], None


class _Reading:
    """The collective part of a push: every rank reads every slab of the source, in order.

    All call `begin`; then rank 0 `read` and `end_bucket` as the sender asks for them, and whatever becomes of the push
    `drain`; the other ranks `run`.
    """

    def __init__(self, source: WeightSource, bucket_bytes: int) -> None:
        self.metadata = list(source.metadata())
        self.seconds = 0.0
        self.gather_seconds = 0.0
        """Of `seconds`, those spent waiting for other ranks."""
        self._source = source
        self._buckets = plan_buckets(self.metadata, bucket_bytes)
        self._in_place: bool | None = None
        # What is left: slabs, and None at the end of each bucket.
        self._left = collections.deque(step for bucket in self._buckets for step in (*bucket.slabs, None))

    def begin(self, memory: str) -> str:
        """Share what rank 0 says: where the buckets are that all can write into, "" when there are none."""
        memory = process_groups.broadcast_object(memory)
        self._in_place = bool(memory)
        return memory

    def max_size(self, *, checksum: bool) -> int:
        """Bytes of the largest bucket."""
        return max_size(self._buckets, checksum=checksum)

    def read(self, slab: Slab, out: torch.Tensor | None) -> None:
        """Read the next slab, which must be `slab`."""
        expected = self._left.popleft()
        assert slab == expected and self._in_place is not None, f"{slab} was read instead of {expected}"
        begin, gathered = time.monotonic(), self._source.gather_seconds
        self._source.read(*slab, out, in_place=self._in_place)
        self.gather_seconds += self._source.gather_seconds - gathered
        self.seconds += time.monotonic() - begin

    def end_bucket(self) -> None:
        """Wait until the slabs of a bucket are where they belong, when the bucket before it is no longer needed."""
        expected = self._left.popleft()
        assert expected is None, f"the bucket ended before {expected}"
        if self._in_place:
            begin = time.monotonic()
            process_groups.barrier()
            waited = time.monotonic() - begin
            self.gather_seconds += waited
            self.seconds += waited

    def run(self, buffers: Sequence[torch.Tensor]) -> None:
        """Read everything, on a rank that is not the first; into the two buffers, if there are any."""
        for turn, bucket in enumerate(self._buckets):
            if buffers:
                for slab, place in bucket.places(buffers[turn % 2], self.metadata):
                    self.read(slab, place)
            else:
                for slab in bucket.slabs:
                    self.read(slab, None)
            self.end_bucket()

    def drain(self) -> None:
        """Read all that is left, to no purpose but that no other rank waits."""
        if self._in_place is None:
            self.begin("")
        while self._left:
            slab = self._left[0]
            if slab is None:
                self.end_bucket()
            else:
                meta = self.metadata[slab.number]
                self.read(slab, torch.empty((slab.rows, *meta.shape[1:]), dtype=meta.dtype))


class _Calls:
    """One blocking call to each engine, all at the same time, each in a thread of its own.

    The threads are daemons: a call to an engine that hangs for ever must not keep the trainer from exiting.
    """

    def __init__(self, clients: Sequence[WeightClient], call: Callable[[WeightClient], Any]) -> None:
        self.answers: dict[int, Any] = {}
        self._clients = clients
        self._errors: dict[int, BaseException] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(client, call), daemon=True, name=f"engine-{client.index}")
            for client in clients
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, client: WeightClient, call: Callable[[WeightClient], Any]) -> None:
        try:
            self.answers[client.index] = call(client)
        except BaseException as error:  # carried over to the thread that joins
            self._errors[client.index] = error

    def check(self) -> None:
        """Raise what the calls have failed with so far."""
        errors = list(self._errors.values())
        lost = [error for error in errors if isinstance(error, EngineLost)]
        if lost:
            indices = sorted({index for error in lost for index in error.indices})
            raise EngineLost(indices, lost[0].reason)
        # When one side breaks the group, the others fail with a TransportError: tell the cause, not the consequence.
        for error in sorted(errors, key=lambda error: isinstance(error, TransportError)):
            raise error

    def join(self, timeout: float) -> None:
        """Wait for all calls.

        Raises:
            EngineLost: when a call failed so, or is not done in time.
            Exception: what else a call failed with.
        """
        deadline = time.monotonic() + timeout
        for client, thread in zip(self._clients, self._threads, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._errors[client.index] = EngineLost([client.index], "no answer during a weight push")
        self.check()


def _together(work: Callable[[], Result], calls: _Calls, timeout: float, abort: Callable[[], None]) -> Result:
    """The result of `work`, which needs the engines' calls to go on at the same time, once the calls are done too."""
    try:
        result = work()
    except TransportError:
        abort()  # engines that are alive stop waiting for data
        calls.join(GRACE)  # whoever has died or hangs says so
        raise
    except BaseException:
        abort()
        raise
    calls.join(timeout)
    return result
