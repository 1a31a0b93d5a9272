"""Sync the policy's weights from the trainer to every rollout engine.

Every trainer rank calls `WeightSync.sync`; rank 0 passes the engines' clients, the others None. Reading the source is
a collective over the trainer's ranks, so every rank reads it to its end, also when an engine fails. On rank 0 the sync
runs vLLM's weight-transfer protocol: `init_weight_transfer_engine` for a new set of engines, then
`start_weight_update`, `update_weights` while the bytes are sent, `finish_weight_update`.

When an engine dies or hangs, `sync` raises `EngineLost` on rank 0 and returns normally on the others; the caller
restarts the engines that it names, and all ranks sync again. When an engine refuses the weights (a checksum differs, a
tensor is unknown) `sync` raises another `Fault` on rank 0.
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
from megatron_entropy.weights.device_memory import DeviceMemory
from megatron_entropy.weights.links import SharedMemory, open_memory
from megatron_entropy.weights.transport import Sender

INIT_TIMEOUT = 120.0
"""Seconds that engines may take to join a transfer group."""
ABORT_TIMEOUT = 20.0
"""Seconds that engines may take to fail after a transfer has been aborted."""

Result = TypeVar("Result")


class WeightClient(Protocol):
    """An engine as the sender of weights sees it: vLLM's four weight-transfer methods and the engine's number.

    Every method blocks until the engine has answered. It raises `EngineLost` when the engine is gone, and another
    `Fault` when the engine is alive but refused.
    """

    index: int
    num_workers: int

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the transfer group that a `LinkInfo` describes."""

    def start_weight_update(self) -> None:
        """Prepare the model for new weights."""

    def update_weights(self, update_info: dict[str, Any]) -> float:
        """Receive the tensors listed as `names`, `dtype_names` and `shapes`; returns the seconds spent loading them."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Use the received weights from now on."""


class WeightSource(Protocol):
    """A model's tensors under their Hugging Face names, which can be read any number of times.

    Reading is a collective over the trainer's ranks, which all read the same slabs in the same order.
    `gather_seconds`: seconds spent so far waiting for slices of other ranks.
    """

    gather_seconds: float

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, type and full shape of every tensor."""
        ...

    def read(self, number: int, first: int, count: int, out: torch.Tensor | None, *, in_place: bool) -> None:
        """Write rows [first, first + count) of tensor `number` into `out`.

        Args:
            out: on rank 0 a tensor [count, ...]; elsewhere None, or with `in_place` the same memory.
            in_place: every rank writes its own slices; else rank 0 receives and writes all of them.
        """
        ...


@dataclass(frozen=True)
class WeightSyncStats:
    """Bytes and seconds of a sync on rank 0; the phases follow one another, apart from `load_seconds`."""

    num_bytes: int
    """Bytes sent to each engine."""
    connect_seconds: float
    """Forming the transfer group, for new engines."""
    start_seconds: float
    """The engines prepare their models."""
    gather_seconds: float
    """Waiting for slices of other ranks, or until they are written."""
    convert_seconds: float
    """Cutting, casting and writing slices."""
    wire_seconds: float
    """Sending, as far as it takes longer than reading, which it overlaps."""
    finish_seconds: float
    """The engines switch to the new weights."""
    load_seconds: float
    """Loading tensors into the model, of the slowest engine; mostly while other tensors are sent."""


class WeightSync:
    """Syncs one source's weights to a set of engines, any number of times.

    Args:
        source: the weights.
        address: of rank 0's machine, as the engines reach it.
        bucket_bytes: size of a bucket; two are held beside the model.
        checksum: verify in the engines that every tensor arrived as it was sent.
        timeout: seconds without progress after which an engine counts as lost.
        backend: transport: `gloo`, `nccl`, or `shared_memory` or `cuda_ipc` if ranks and engines are on one machine.
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
        self._memory: SharedMemory | DeviceMemory | None = None

    def sync(self, version: int, clients: Sequence[WeightClient] | None) -> WeightSyncStats | None:
        """Send the source's present weights to every engine; a collective over the trainer's ranks.

        Args:
            version: policy version of the weights.
            clients: on rank 0 all engines in use, the same objects for as long as the engines live; elsewhere None.
        Returns:
            Bytes and seconds, on rank 0.
        Raises:
            EngineLost: on rank 0, when engines died or hung.
            Fault: on rank 0, when an engine refused the weights.
        """
        reader = _SourceReader(self._source, self._bucket_bytes)
        if clients is None:
            self._read(reader)
            return None
        try:
            return self._send(version, reader, list(clients))
        except BaseException:
            self.close()
            raise
        finally:
            reader.drain()  # the other ranks are in this collective until its end

    def _send(self, version: int, reader: _SourceReader, clients: list[WeightClient]) -> WeightSyncStats:
        """Run the sync on rank 0."""
        begin = time.monotonic()
        sender = self._connect(clients, reader.max_size(checksum=self._checksum))
        connected = time.monotonic()
        info = {
            "names": [meta.name for meta in reader.metadata],
            "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in reader.metadata],
            "shapes": [list(meta.shape) for meta in reader.metadata],
        }
        _EngineCalls(clients, lambda client: client.start_weight_update()).join(self._timeout)
        started = time.monotonic()
        reader.begin(sender.memory)
        receiving = _EngineCalls(clients, lambda client: client.update_weights(info))
        num_bytes = _run_beside(
            lambda: sender.send(reader.metadata, reader.read, receiving.check, reader.end_bucket),
            receiving,
            self._timeout,
            sender.close,
        )
        sent = time.monotonic()
        _EngineCalls(clients, lambda client: client.finish_weight_update(str(version))).join(self._timeout)
        return WeightSyncStats(
            num_bytes,
            connect_seconds=connected - begin,
            start_seconds=started - connected,
            gather_seconds=reader.gather_seconds,
            convert_seconds=reader.seconds - reader.gather_seconds,
            wire_seconds=sent - started - reader.seconds,
            finish_seconds=time.monotonic() - sent,
            load_seconds=max(receiving.answers.values(), default=0.0),
        )

    def _read(self, reader: _SourceReader) -> None:
        """Run the sync on the other ranks, which only read."""
        path = reader.begin("")
        if self._memory is not None and not (path and self._memory.is_at(path)):
            self._memory.close()
            self._memory = None
        if self._memory is None and path:
            self._memory = open_memory(path)
        reader.run(self._memory.buffers(reader.max_size(checksum=self._checksum)) if self._memory else [])

    def _connect(self, clients: list[WeightClient], max_bytes: int) -> Sender:
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
            max_bytes=max_bytes,
        )
        joining = _EngineCalls(
            clients, lambda client: client.init_weight_transfer_engine(sender.init_info(offsets[client.index]))
        )
        _run_beside(lambda: sender.connect(joining.check), joining, INIT_TIMEOUT, sender.close)
        self._connected = clients
        return sender

    def close(self) -> None:
        """Leave the transfer group; the next sync forms a new one."""
        if self._sender is not None:
            self._sender.close()
        if self._memory is not None:
            self._memory.close()
        self._sender, self._connected, self._memory = None, [], None


class _SourceReader:
    """The collective part of a sync: every rank reads every slab of the source, in order.

    All ranks call `begin`. Then rank 0 calls `read` and `end_bucket` as the sender needs them, and `drain` also after
    an error; the other ranks call `run`.
    """

    def __init__(self, source: WeightSource, bucket_bytes: int) -> None:
        self.metadata = list(source.metadata())
        self.seconds = 0.0
        """Spent in reading."""
        self.gather_seconds = 0.0
        """Of `seconds`, those spent waiting for other ranks."""
        self._source = source
        self._buckets = plan_buckets(self.metadata, bucket_bytes)
        self._in_place: bool | None = None
        # What has not been read: slabs, and None at the end of each bucket.
        self._remaining = collections.deque(step for bucket in self._buckets for step in (*bucket.slabs, None))

    def begin(self, memory: str) -> str:
        """Broadcast rank 0's path of the shared memory; empty without one."""
        memory = process_groups.broadcast_object(memory)
        self._in_place = bool(memory)
        return memory

    def max_size(self, *, checksum: bool) -> int:
        """Bytes of the largest bucket."""
        return max_size(self._buckets, checksum=checksum)

    def read(self, slab: Slab, out: torch.Tensor | None) -> None:
        """Read the next slab, which must be `slab`."""
        expected = self._remaining.popleft()
        assert slab == expected and self._in_place is not None, f"{slab} was read instead of {expected}"
        begin, gathered = time.monotonic(), self._source.gather_seconds
        self._source.read(*slab, out, in_place=self._in_place)
        self.gather_seconds += self._source.gather_seconds - gathered
        self.seconds += time.monotonic() - begin

    def end_bucket(self) -> None:
        """Wait until every rank has written its slices of a bucket; the bucket before it has been received by then."""
        expected = self._remaining.popleft()
        assert expected is None, f"the bucket ended before {expected}"
        if self._in_place:
            begin = time.monotonic()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the slices are written
            process_groups.barrier()
            waited = time.monotonic() - begin
            self.gather_seconds += waited
            self.seconds += waited

    def run(self, buffers: Sequence[torch.Tensor]) -> None:
        """Read everything on a rank that is not the first, into the two buffers if there are any."""
        for turn, bucket in enumerate(self._buckets):
            if buffers:
                for slab, view in bucket.views(buffers[turn % 2], self.metadata):
                    self.read(slab, view)
            else:
                for slab in bucket.slabs:
                    self.read(slab, None)
            self.end_bucket()

    def drain(self) -> None:
        """Read and drop what remains, because the other ranks are in the same collective."""
        if self._in_place is None:
            self.begin("")
        while self._remaining:
            slab = self._remaining[0]
            if slab is None:
                self.end_bucket()
            else:
                meta = self.metadata[slab.number]
                self.read(slab, torch.empty((slab.rows, *meta.shape[1:]), dtype=meta.dtype))


class _EngineCalls:
    """One blocking call to each engine, all at the same time, each in its own thread.

    The threads are daemons: a call to an engine that hangs must not keep the trainer from exiting.
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
        except BaseException as error:  # raised in the thread that joins
            self._errors[client.index] = error

    def check(self) -> None:
        """Raise the error of a call that has failed so far."""
        errors = list(self._errors.values())
        lost = [error for error in errors if isinstance(error, EngineLost)]
        if lost:
            indices = sorted({index for error in lost for index in error.indices})
            raise EngineLost(indices, lost[0].reason)
        # When one engine breaks the group, the others fail with a TransportError: raise the cause, not the effect.
        for error in sorted(errors, key=lambda error: isinstance(error, TransportError)):
            raise error

    def join(self, timeout: float) -> None:
        """Wait for all calls.

        Raises:
            EngineLost: when a call raised it, or is not done in time.
            Exception: another error of a call.
        """
        deadline = time.monotonic() + timeout
        for client, thread in zip(self._clients, self._threads, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._errors[client.index] = EngineLost([client.index], "no answer during a weight sync")
        self.check()


def _run_beside(work: Callable[[], Result], calls: _EngineCalls, timeout: float, abort: Callable[[], None]) -> Result:
    """Run `work` while the engines' calls run, which it needs; returns its result when the calls are done too."""
    try:
        result = work()
    except TransportError:
        abort()  # live engines stop waiting for data
        calls.join(ABORT_TIMEOUT)  # raises the error of an engine that died or hangs
        raise
    except BaseException:
        abort()
        raise
    calls.join(timeout)
    return result
