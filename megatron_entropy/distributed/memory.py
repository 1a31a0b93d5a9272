"""Memory of a rank."""

from __future__ import annotations

import ctypes
import gc
import resource

import psutil
import torch

GIGABYTE = 1e9
_M_ARENA_MAX = -8  # of mallopt(3)


def peak_memory() -> float:
    """Return the most memory that this process has held so far, in GB: of the GPU in tensors, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGABYTE


def used_memory() -> float:
    """Return the memory that this process holds now, in GB: of the GPU in tensors, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / GIGABYTE
    return psutil.Process().memory_info().rss / GIGABYTE


def use_one_heap() -> None:
    """Let all threads of this process allocate from one heap, whose free end goes back to the kernel in `release`.

    Of a heap for each thread, glibc's default, it stays: about 10 MB more after each stage.
    """
    _call_glibc("mallopt", _M_ARENA_MAX, 1)


def release() -> None:
    """Free what nobody can reach any more, and return memory that torch or the C library keep for later use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    """Call a function of the C library that others than glibc do not have."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
