"""Memory of a rank."""

from __future__ import annotations

import ctypes
import gc
import resource

import psutil
import torch

GIGABYTE = 1e9


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


def release() -> None:
    """Free what nobody can reach any more, and return memory that torch or the C library keep for later use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
