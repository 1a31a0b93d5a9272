"""Carry buckets of bytes from the trainer to the engines' workers: by broadcast or through shared memory.

Both kinds of `Link` are used in the same way. After `begin` the sender fills one of its two `buffers` while the other
is being sent, and a receiver passes a buffer for the next bucket; both call `start` and later `finish`. The peers meet
at a `TCPStore` and form a process group of their own, never torch's global default group.

- `BroadcastLink`: rank 0 broadcasts over gloo (host memory) or NCCL (every rank needs a GPU of its own).
- `RelayLink`: over gloo one receiver of each machine gets the broadcast and shares it with the others of its machine,
  so the network carries the weights once for each machine.
- `SharedMemoryLink`: the buffers are memory of this machine, of the host or of a GPU, that engines and trainer ranks
  map, so every trainer rank writes its slices where the engines read them; a gloo group carries the barriers.
"""

from __future__ import annotations

import datetime
import json
import mmap
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_entropy.distributed.network import address_towards, machine_id
from megatron_entropy.errors import TransportError
from megatron_entropy.weights import device_memory
from megatron_entropy.weights.device_memory import DeviceMemory

SHARED_MEMORY = "shared_memory"
CUDA_IPC = "cuda_ipc"
IN_MEMORY = (SHARED_MEMORY, CUDA_IPC)
"""Backends whose buckets lie in memory that all processes of a machine map."""


@dataclass
class LinkInfo:
    """What a receiver needs to join: plain values, which are sent as a dictionary.

    `backend`: `gloo`, `nccl`, `shared_memory` or `cuda_ipc`. `memory`: the path of the sender's; empty without one.
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
    """Memory for two buckets that every process of this machine can map; the kernel frees it with the last of them.

    Args:
        path: the `path` of another process's memory; empty creates a new one.
    Raises:
        TransportError: when the path does not exist, as on another machine.
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
        """Return two buffers, uint8 [size]: the same memory in every process that passes this size."""
        half = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        if os.fstat(self._file).st_size < 2 * half:
            os.ftruncate(self._file, 2 * half)
        if len(self._both) < 2 * half:
            self._both = torch.frombuffer(mmap.mmap(self._file, 2 * half), dtype=torch.uint8)
        return [self._both[:size], self._both[half : half + size]]

    def is_at(self, path: str) -> bool:
        """Whether the path still is this memory's; a path may be used again for another one."""
        return os.path.samestat(os.fstat(self._file), os.stat(path))

    def settle(self) -> None:
        """Nothing: a copy to or from host memory is complete when it returns."""

    def close(self) -> None:
        """Close the file; buffers that are in use stay valid."""
        os.close(self._file)


def create_memory(backend: str, size: int) -> SharedMemory | DeviceMemory | None:
    """Create the memory of a backend, for buckets of up to `size` bytes; None if it has none."""
    if backend == CUDA_IPC:
        return DeviceMemory(size=size)
    return SharedMemory() if backend == SHARED_MEMORY else None


def open_memory(path: str) -> SharedMemory | DeviceMemory:
    """Open the memory that another process has created."""
    return DeviceMemory(path) if path.startswith(device_memory.PREFIX) else SharedMemory(path)


class Link(Protocol):
    """Sends buckets, or receives them into buffers on `device`."""

    device: torch.device

    def begin(self, size: int) -> None:
        """Prepare a transfer whose largest bucket has `size` bytes."""

    def buffers(self) -> list[torch.Tensor]:
        """Return the sender's two buffers, uint8 [size], which are used in turns."""
        ...

    def start(self, buffer: torch.Tensor) -> None:
        """Start to send a bucket, or to receive one into the receiver's buffer."""

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until every bucket that was started has been sent or received.

        Args:
            check: called while waiting; an exception of it ends the wait.
        Raises:
            TransportError: when a peer died or made no progress in time.
        """

    def close(self) -> None:
        """Abort the running operations and leave the group."""


class BroadcastLink:
    """A `Link` that broadcasts from rank 0."""

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

    Each bucket has two barriers: before the first it has been filled, before the second every receiver has copied it.
    The sender starts both at once and finishes with the second.
    """

    def __init__(
        self, store: dist.Store, rank: int, info: LinkInfo, memory: SharedMemory | DeviceMemory | None = None
    ) -> None:
        """Form the group.

        Args:
            memory: of this process; by default that of `info.memory`.
        """
        self._group = _Group(store, rank, info)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._sends = rank == 0
        self._memory = memory or open_memory(info.memory)
        self._shared: list[torch.Tensor] = []
        self._pending: list[torch.Tensor] = []
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
            self._group.start("barrier")
            self._group.start("barrier")
        else:
            self._pending.append(buffer)

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        """See `Link`."""
        for buffer in self._pending:
            self._group.start("barrier")
            self._group.finish(check)
            buffer.copy_(self._shared[self._turn][: len(buffer)])
            self._memory.settle()
            self._turn = 1 - self._turn
            self._group.start("barrier")
        self._pending.clear()
        if self._sends:
            self._group.finish(check)

    def close(self) -> None:
        """See `Link`."""
        self._pending.clear()
        self._group.close()
        self._memory.close()


class RelayLink:
    """The `Link` of a receiver that hands every bucket on to the other receivers of its machine.

    Args:
        outer: from the sender.
        local: to the others, through memory that this receiver has created.
    """

    def __init__(self, outer: BroadcastLink, local: SharedMemoryLink) -> None:
        self.device = outer.device
        self._outer = outer
        self._local = local
        self._pending: list[torch.Tensor] = []
        self._turn = 0

    def begin(self, size: int) -> None:
        """See `Link`."""
        self._local.finish()
        self._outer.begin(size)
        self._local.begin(size)
        self._turn = 0

    def buffers(self) -> list[torch.Tensor]:
        """See `Link`."""
        raise AssertionError("a receiver passes its own buffers")

    def start(self, buffer: torch.Tensor) -> None:
        """See `Link`."""
        self._outer.start(buffer)
        self._pending.append(buffer)

    def finish(self, check: Callable[[], None] = lambda: None) -> None:
        """See `Link`; the others copy the last bucket while the next one comes."""
        self._outer.finish(check)
        for buffer in self._pending:
            self._local.finish(check)
            self._local.buffers()[self._turn][: len(buffer)].copy_(buffer)
            self._local.start(buffer)
            self._turn = 1 - self._turn
        self._pending.clear()

    def close(self) -> None:
        """See `Link`."""
        self._pending.clear()
        self._outer.close()
        self._local.close()


def arrive(store: dist.Store, rank: int) -> None:
    """Say on which machine a receiver is; `form` waits for all of them."""
    store.set(f"machine/{rank}", json.dumps(machine_id()))


def have_arrived(store: Any, world_size: int) -> bool:
    """Whether all receivers are there."""
    return store.check([f"machine/{rank}" for rank in range(1, world_size)])


def form(store: dist.Store, rank: int, info: LinkInfo, memory: SharedMemory | DeviceMemory | None = None) -> Link:
    """Form the link of a rank: 0 is the sender, the others are receivers; blocks until all are there.

    Args:
        memory: the sender's, which the link closes.
    """
    if info.backend in IN_MEMORY:
        return SharedMemoryLink(store, rank, info, memory)
    if info.backend == "nccl":
        return BroadcastLink(store, rank, info)
    machines: dict[bytes, list[int]] = {}
    for receiver in range(1, info.world_size):
        machines.setdefault(store.get(f"machine/{receiver}"), []).append(receiver)
    groups = [[0], *machines.values()]
    index = next(number for number, group in enumerate(groups) if rank in group)
    group, leader = groups[index], rank == groups[index][0]
    outer = BroadcastLink(store, index, replace(info, world_size=len(groups))) if leader else None
    if len(group) == 1:
        assert outer is not None
        return outer
    path = "" if leader else store.get(f"memory/{group[0]}").decode()
    local_info = replace(info, world_size=len(group), backend=SHARED_MEMORY, memory=path)
    inner = dist.PrefixStore(f"group/{group[0]}", store)
    if outer is None:
        return SharedMemoryLink(inner, group.index(rank), local_info)
    created = SharedMemory()
    store.set(f"memory/{rank}", created.path)
    return RelayLink(outer, SharedMemoryLink(inner, 0, local_info, created))


class _Group:
    """A process group and its running operations.

    Gloo closes its connections, which is how the peers see the end, only when the group and all operations on it are
    freed. All references to them are in here: a local variable would stay alive in the traceback of the error that we
    close after.
    """

    def __init__(self, store: dist.Store, rank: int, info: LinkInfo) -> None:
        self._timeout = info.timeout
        self._group: Any = (_nccl_group if info.backend == "nccl" else _gloo_group)(store, rank, info)
        self._is_nccl = info.backend == "nccl"
        self._running: list[dist.Work] = []

    def start(self, method: str, *arguments: Any) -> None:
        """Start an operation of the group."""
        assert self._group is not None, "the link is closed"
        try:
            self._running.append(getattr(self._group, method)(*arguments))
        except RuntimeError as error:
            raise TransportError(f"weight transfer broke: {reason_of(error)}") from error

    def finish(self, check: Callable[[], None]) -> None:
        """Wait for all running operations."""
        while self._running:
            poll(self._first_is_done, check, self._timeout, "a bucket of weights to be received")
            try:
                self._running[0].wait()
            except RuntimeError as error:
                raise TransportError(f"weight transfer broke: {reason_of(error)}") from error
            del self._running[0]

    def _first_is_done(self) -> bool:
        return self._running[0].is_completed()

    def close(self) -> None:
        """Abort the running operations and leave.

        Gloo frees a group only after its running operations. They wait for peers, which may live and never come, so
        a thread does it.
        """
        if self._is_nccl and self._group is not None:
            self._group.abort()  # NCCL would wait for the peers
        held = [self._group, *self._running]
        self._group, self._running = None, []
        if len(held) > 1:
            threading.Thread(target=held.clear, daemon=True, name="free-group").start()


def _gloo_group(store: dist.Store, rank: int, info: LinkInfo) -> Any:
    gloo: Any = dist.ProcessGroupGloo  # torch's type stubs lack most of it
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address_towards(info.address))]
    options._timeout = datetime.timedelta(seconds=info.timeout)
    return gloo(store, rank, info.world_size, options)


def _nccl_group(store: dist.Store, rank: int, info: LinkInfo) -> Any:
    """Form a NCCL group. Not yet run on a GPU: written from torch's interface."""
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = datetime.timedelta(seconds=info.timeout)
    # By default torch ends the process when a peer is lost; here it must raise an error.
    setting = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(setting)
    os.environ[setting] = "0"
    try:
        return nccl(store, rank, info.world_size, options)
    finally:
        os.environ.pop(setting) if before is None else os.environ.update({setting: before})


def reason_of(error: BaseException) -> str:
    """Gloo's error message without its source position and its guess of the cause."""
    return re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". This is typically")[0]


def poll(done: Callable[[], bool], check: Callable[[], None], timeout: float, what: str) -> None:
    """Wait until `done()` is true, and call `check` meanwhile.

    Args:
        what: is waited for; for the error message.
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
