"""Host memory in place of a GPU's, for tests of `weights.device_memory`: what calls CUDA is replaced, all else runs."""

from __future__ import annotations

import functools
import mmap
import os

import torch

from megatron_entropy.weights import device_memory


@functools.cache
def allocate(size: int) -> tuple[int, bytes]:
    """Memory behind a file descriptor, which stands for the address; its path, which stands for the handle."""
    file = os.memfd_create("buckets")
    os.ftruncate(file, size)
    return file, f"/proc/{os.getpid()}/fd/{file}".encode().ljust(64, b"\0")


@functools.cache
def map_handle(handle: bytes) -> int:
    """Open another process's memory."""
    return os.open(handle.rstrip(b"\0"), os.O_RDWR)


def view(pointer: int, size: int) -> torch.Tensor:
    """Map the memory: uint8 [size]."""
    return torch.frombuffer(mmap.mmap(pointer, size), dtype=torch.uint8)


def install() -> None:
    """Replace the functions in this process."""
    device_memory.allocate, device_memory.map_handle, device_memory.view = allocate, map_handle, view
