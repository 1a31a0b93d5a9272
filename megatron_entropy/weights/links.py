"""How buckets of bytes get from the trainer to the engines' workers: broadcast, or lying where all can see them.

Both kinds of link are used alike. After `begin` the sender fills one of its two `buffers` while the other is on its
way, and a receiver names memory for what comes next; either says `start` and later `finish`. The peers meet at a
`TCPStore` and form a process group of their own, never torch's global default group.

- `BroadcastLink`: rank 0 broadcasts, over gloo (host memory) or NCCL (the GPUs; every rank needs one of its own).
- `SharedMemoryLink`: the buffers are memory of this machine that every process maps, trainer ranks too, so that each
  writes what it holds straight where the engines read it; a gloo group only rings the bell.
"""

from __future__ import annotations

import datetime
import mmap
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_entropy.errors import TransportError

SHARED_MEMORY = "shared_memory"


@dataclass
class LinkInfo:
    """What a receiver needs to join: plain values, so that it travels as a dictionary.

    `backend`: `gloo`, `nccl` or `shared_memory`. `memory`: the sender's `SharedMemory.path`, where it has any.
    """

    address: str
    port: int
    world_size: int
    rank_offset: int
    bucket_bytes: int
    checksum: bool
    timeout: float
    backend: str = "gloo"
    memory: str = ""


class SharedMemory:
    """Room for two buckets that every process of this machine can map; it is gone with the last of them.

    Args:
        path: of one that another process has made; none makes a new one.
    Raises:
        TransportError: when the path is not there, as on another machine.
    """

    def __init__(self, path: str = "") -> None:
        if path:
            try:
                self._file = os.open(path, os.O_RDWR)
            except OSError as error:
                raise TransportError(
                    f"cannot open the trainer's shared memory {path} ({error.strerror}); where engines or ranks run on "
                    "other machines or in other containers, set rollout.weight_transfer to 'gloo' or 'nccl'"
                ) from error
        else:
            self._file = os.memfd_create("weights", os.MFD_CLOEXEC)
        self.path = path or f"/proc/{os.getpid()}/fd/{self._file}"
        self._both = torch.empty(0, dtype=torch.uint8)

    def buffers(self, size: int) -> list[torch.Tensor]:
        """Two buffers, uint8 [size]: the same memory in every process that asks for this size."""
        half = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        if os.fstat(self._file).st_size < 2 * half:
            os.ftruncate(self._file, 2 * half)
        if len(self._both) < 2 * half:
            self._both = torch.frombuffer(mmap.mmap(self._file, 2 * half), dtype=torch.uint8)
        return [self._both[:size], self._both[half : half + size]]

    def is_at(self, path: str) -> bool:
        """Whether it is still this memory that the path leads to; a path may come again."""
        return os.path.samestat(os.fstat(self._file), os.stat(path))

    def close(self) -> None:
        """Let go of it; buffers that are in use stay."""
        os.close(self._file)


class Link(Protocol):
    """What both kinds do; `device` is where a receiver's memory is to be."""

    device: torch.device

    def begin(self, size: int) -> None:
        """Make ready for a transfer whose largest bucket takes `size` bytes."""

    def buffers(self) -> list[torch.Tensor]:
        """The sender's two buffers, uint8 [size], to be used in turns."""
        ...

    def start(self, buffer: torch.Tensor) -> None:
        """Begin to send a bucket, or to take one into memory of the receiver's own."""

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until what was started has been sent, or has come.

        Args:
            check: called while waiting; what it raises ends the wait.
        Raises:
            TransportError: when a peer died or made no progress in time.
        """

    def close(self) -> None:
        """Break off what is under way and leave the group."""


class BroadcastLink:
    """A `Link` over which rank 0 broadcasts."""

    def __init__(self, store: dist.Store, rank: int, info: LinkInfo) -> None:
        self._group = _Group(store, rank, info)
        self.device = torch.device("cpu")
        if info.backend == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._size = 0

    def begin(self, size: int) -> None:
        """See `Link`."""
        self._size = size

    def buffers(self) -> list[torch.Tensor]:
        """See `Link`."""
        return [torch.empty(self._size, dtype=torch.uint8, device=self.device) for _ in range(2)]

    def start(self, buffer: torch.Tensor) -> None:
        """See `Link`."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        self._group.start("broadcast", [buffer], options)

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        """See `Link`."""
        self._group.finish(check)

    def close(self) -> None:
        """See `Link`."""
        self._group.close()


class SharedMemoryLink:
    """A `Link` whose receivers copy buckets out of the sender's memory.

    Two barriers make a bucket: at the first it is filled, at the second everyone has copied it. The sender starts both
    at once and finishes when the second is over.
    """

    def __init__(self, store: dist.Store, rank: int, info: LinkInfo) -> None:
        self._group = _Group(store, rank, info)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._sends = rank == 0
        self._memory = SharedMemory(info.memory)
        self._shared: list[torch.Tensor] = []
        self._coming: list[torch.Tensor] = []
        self._turn = 0

    def begin(self, size: int) -> None:
        """See `Link`."""
        self._shared = self._memory.buffers(size)
        self._turn = 0

    def buffers(self) -> list[torch.Tensor]:
        """See `Link`."""
        return self._shared

    def start(self, buffer: torch.Tensor) -> None:
        """See `Link`."""
        if self._sends:
            self._meet()
            self._meet()
        else:
            self._coming.append(buffer)

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        """See `Link`."""
        for buffer in self._coming:
            self._meet()
            self._group.finish(check)
            buffer.copy_(self._shared[self._turn][: len(buffer)])
            self._turn = 1 - self._turn
            self._meet()
        self._coming.clear()
        if self._sends:
            self._group.finish(check)

    def close(self) -> None:
        """See `Link`."""
        self._coming.clear()
        self._group.close()
        self._memory.close()

    def _meet(self) -> None:
        self._group.start("barrier")


class _Group:
    """A process group and the work on it that is under way.

    Gloo closes its connections, which is how the peers learn of an end, only when the group and every piece of work
    on it are gone. All of them are kept here and nowhere else, for a local variable would live on in the traceback of
    the very error that makes us close.
    """

    def __init__(self, store: dist.Store, rank: int, info: LinkInfo) -> None:
        self._timeout = info.timeout
        self._group: Any = (_nccl_group if info.backend == "nccl" else _gloo_group)(store, rank, info)
        self._is_nccl = info.backend == "nccl"
        self._under_way: list[dist.Work] = []

    def start(self, method: str, *arguments: Any) -> None:
        """Start an operation of the group."""
        assert self._group is not None, "the link is closed"
        try:
            self._under_way.append(getattr(self._group, method)(*arguments))
        except RuntimeError as error:
            raise TransportError(f"weight transfer broke: {reason_of(error)}") from error

    def finish(self, check: Callable[[], None]) -> None:
        """Wait for all operations under way."""
        while self._under_way:
            poll(self._first_is_done, check, self._timeout, "a bucket of weights to be taken")
            try:
                self._under_way[0].wait()
            except RuntimeError as error:
                raise TransportError(f"weight transfer broke: {reason_of(error)}") from error
            del self._under_way[0]

    def _first_is_done(self) -> bool:
        return self._under_way[0].is_completed()

    def close(self) -> None:
        """Break off what is under way and leave."""
        self._under_way.clear()
        if self._is_nccl and self._group is not None:
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


def _interface_towards(address: str) -> str:
    """This machine's own address on the way to `address`; gloo would take the one its host name stands for."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # of a datagram socket: chooses a route, sends nothing
        return probe.getsockname()[0]


def reason_of(error: BaseException) -> str:
    """What gloo says, without its source position and its guess at the cause."""
    return re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". This is typically")[0]


def poll(done: Callable[[], bool], check: Callable[[], None], timeout: float, what: str) -> None:
    """Wait until `done()`, calling `check` meanwhile.

    Raises:
        TransportError: after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    pause = 20e-6
    while not done():
        check()
        if time.monotonic() > deadline:
            raise TransportError(f"waited {timeout:.0f} s for {what}")
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)
