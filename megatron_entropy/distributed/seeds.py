"""Seeds: derived from names and numbers, so that a draw depends on what it is for, not on when it happens."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """Hash the parts to a seed below 2**31: equal on every machine, different for different parts."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % (2**31 - 1)


def seed_generators(seed: int) -> None:
    """Seed every generator of this rank: equal on all ranks, except Megatron's, which differ by model-parallel rank."""
    import torch
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
