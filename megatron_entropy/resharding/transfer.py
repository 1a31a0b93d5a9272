"""The trainer's end of a weight push: from a source of Hugging Face tensors to every rollout engine.

Every trainer rank calls `WeightPush.push`; rank 0 passes the engines' clients, the others None. Reading the source is
a collective over the trainer's ranks (slices are gathered), so every rank reads it to its end, whatever becomes of the
engines. On rank 0 the push runs vLLM's weight-transfer protocol: `init_weight_transfer_engine` for a
new set of engines, then `start_weight_update`, `update_weights` while the bytes are broadcast, `finish_weight_update`.

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

from megatron_entropy.transport import (
    BUCKET_BYTES,
    EngineLost,
    Sender,
    Slab,
    TensorMeta,
    TransportError,
    WeightClient,
    plan_buckets,
)

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

    def read(self, number: int, first: int, count: int, out: torch.Tensor | None) -> None:
        """Write rows [first, first + count) of tensor `number` into `out` on rank 0; `out` is None elsewhere."""
        ...


@dataclass(frozen=True)
class PushStats:
    """What a push took on rank 0: bytes sent to each engine, seconds of its parts, which follow one another.

    `connect_seconds`: forming the group, for new engines. `start_seconds`: engines make ready. `gather_seconds`:
    waiting for slices of other ranks. `convert_seconds`: cutting, casting and placing. `wire_seconds`: what sending
    takes beyond reading, with which it overlaps. `finish_seconds`: engines put the weights to use.

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


class WeightPush:
    """Pushes one source's weights to a set of engines, again and again.

    Args:
        source: what to push.
        address: of rank 0's machine, as the engines reach it.
        bucket_bytes: size of a bucket; two are held beside the model.
        checksum: prove on the engines' side that every tensor arrived as it was sent.
        timeout: seconds without progress after which an engine counts as lost.
        backend: what carries the bytes, `gloo` or `nccl`.
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

    def push(self, version: int, clients: Sequence[WeightClient] | None) -> PushStats | None:
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
        slabs = _Slabs(self._source, self._bucket_bytes)
        try:
            return None if clients is None else self._push(version, slabs, list(clients))
        except BaseException:
            self.close()
            raise
        finally:
            slabs.drain(on_first_rank=clients is not None)  # the other ranks are in this collective until its end

    def _push(self, version: int, slabs: _Slabs, clients: list[WeightClient]) -> PushStats:
        begin = time.monotonic()
        sender = self._connect(clients)
        connected = time.monotonic()
        info = {
            "names": [meta.name for meta in slabs.metadata],
            "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in slabs.metadata],
            "shapes": [list(meta.shape) for meta in slabs.metadata],
        }
        _Calls(clients, lambda client: client.start_weight_update()).join(self._timeout)
        started = time.monotonic()
        gathered = self._source.gather_seconds
        receiving = _Calls(clients, lambda client: client.update_weights(info))
        num_bytes = _together(
            lambda: sender.send(slabs.metadata, slabs.read, receiving.check), receiving, self._timeout, sender.close
        )
        sent = time.monotonic()
        gather_seconds = self._source.gather_seconds - gathered
        _Calls(clients, lambda client: client.finish_weight_update(str(version))).join(self._timeout)
        return PushStats(
            num_bytes,
            connect_seconds=connected - begin,
            start_seconds=started - connected,
            gather_seconds=gather_seconds,
            convert_seconds=slabs.seconds - gather_seconds,
            wire_seconds=sent - started - slabs.seconds,
            finish_seconds=time.monotonic() - sent,
            load_seconds=max(receiving.answers.values(), default=0.0),
        )

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
        self._sender, self._connected = None, []


class _Slabs:
    """The slabs of one push, in order; whatever becomes of the push, `drain` reads what is left."""

    def __init__(self, source: WeightSource, bucket_bytes: int) -> None:
        self.metadata = list(source.metadata())
        self.seconds = 0.0
        self._source = source
        buckets = plan_buckets(self.metadata, bucket_bytes)
        self._left = collections.deque(slab for bucket in buckets for slab in bucket.slabs)

    def read(self, slab: Slab, out: torch.Tensor | None) -> None:
        """Read the next slab, which must be `slab`."""
        begin = time.monotonic()
        expected = self._left.popleft()
        assert slab == expected, f"{slab} was read instead of {expected}"
        self._source.read(*slab, out)
        self.seconds += time.monotonic() - begin

    def drain(self, *, on_first_rank: bool) -> None:
        """Read all that is left, to no purpose but that no other rank waits."""
        while self._left:
            slab = self._left[0]
            meta = self.metadata[slab.number]
            shape = (slab.rows, *meta.shape[1:])
            self.read(slab, torch.empty(shape, dtype=meta.dtype) if on_first_rank else None)


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
