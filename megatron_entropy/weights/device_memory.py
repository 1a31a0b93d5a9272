"""GPU memory for two buckets that the processes of one machine map by CUDA IPC.

Not yet run on a GPU: written from CUDA's interface. The tests replace the functions `allocate`, `map_handle` and `view`
by host memory. Memory and mappings live as long as their process: CUDA leaves undefined what happens when memory is
freed while another process maps it, and a run needs only two buckets.
"""

from __future__ import annotations

import ctypes
import functools
import secrets
from typing import Any

import torch

from megatron_entropy.errors import TransportError

PREFIX = "cuda-ipc:"
ALIGNMENT = 512
"""Bytes; each bucket starts at a multiple, as CUDA's own allocations do."""
_HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE


class DeviceMemory:
    """Memory for two buckets on this process's GPU; see `links.SharedMemory`, which is the same on the host.

    Args:
        path: the `path` of another process's memory; empty allocates.
        size: bytes of the largest bucket, to allocate.
    Raises:
        TransportError: CUDA cannot allocate or map the memory.
    """

    def __init__(self, path: str = "", *, size: int = 0) -> None:
        if path:
            half, handle = path.rsplit(":", 2)[1:]
            self._half, pointer = int(half), map_handle(bytes.fromhex(handle))
        else:
            self._half = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
            pointer, handle = allocate(2 * self._half)
            path = f"{PREFIX}{secrets.token_hex(8)}:{self._half}:{handle.hex()}"
        self.path = path
        self._both = view(pointer, 2 * self._half)

    def buffers(self, size: int) -> list[torch.Tensor]:
        """Return two buffers, uint8 [size]: the same memory in every process."""
        assert size <= self._half, f"a bucket of {size} bytes, but the memory is for {self._half}"
        return [self._both[:size], self._both[self._half : self._half + size]]

    def is_at(self, path: str) -> bool:
        """Whether the path is this memory's."""
        return path == self.path

    def settle(self) -> None:
        """Wait until what was written or read on the GPU is done: barriers are the host's and do not."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def close(self) -> None:
        """Nothing: see the module."""


@functools.cache
def allocate(size: int) -> tuple[int, bytes]:
    """Allocate memory on the current GPU; returns its address and handle. A second call returns the same."""
    pointer = _cuda("cudaMalloc", size)
    handle = _cuda("cudaIpcGetMemHandle", pointer)
    return int(pointer), ctypes.string_at(handle.getPtr(), _HANDLE_BYTES)


@functools.cache
def map_handle(handle: bytes) -> int:
    """Map another process's memory; returns its address here."""
    from cuda.bindings import runtime

    structure = runtime.cudaIpcMemHandle_t()
    ctypes.memmove(structure.getPtr(), handle, _HANDLE_BYTES)
    return int(_cuda("cudaIpcOpenMemHandle", structure, runtime.cudaIpcMemLazyEnablePeerAccess))


def view(pointer: int, size: int) -> torch.Tensor:
    """View GPU memory as uint8 [size], without a copy."""
    array = _Array()
    array.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3}
    device = _cuda("cudaPointerGetAttributes", pointer).device
    tensor = torch.as_tensor(array, device=torch.device("cuda", device))
    if tensor.data_ptr() != pointer:
        raise TransportError("PyTorch copies memory mapped by CUDA IPC; set rollout.weight_transfer to 'shared_memory'")
    return tensor


class _Array:
    """Carries the attribute that PyTorch looks for."""

    __cuda_array_interface__: dict[str, Any]


def _cuda(function: str, *arguments: Any) -> Any:
    """Call a function of CUDA's runtime; returns its result."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise TransportError(
            "rollout.weight_transfer='cuda_ipc' needs the package cuda-bindings, which CUDA builds of PyTorch bring; "
            "install it, or set weight_transfer to 'shared_memory'"
        ) from None
    error, *values = getattr(runtime, function)(*arguments)
    if error:
        reason = runtime.cudaGetErrorString(error)[1].decode()
        raise TransportError(f"{function}: {reason}; set rollout.weight_transfer to 'shared_memory'")
    return values[0] if values else None
