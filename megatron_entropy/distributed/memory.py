"""Memory of a rank."""

from __future__ import annotations

import resource

import torch

GIGABYTE = 1e9


def peak_memory() -> float:
    """Return the most memory that this process has held so far, in GB: of the GPU in tensors, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGABYTE
