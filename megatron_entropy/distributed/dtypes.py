"""What `dtype = "auto"` stands for: of the trainer's weights, and of the engines'."""

from __future__ import annotations

from typing import Literal

import torch

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.distributed import cpu

DtypeName = Literal["float32", "bfloat16"]
DtypeSetting = Literal["auto", "float32", "bfloat16"]
MIN_BFLOAT16_WIDTH = 512
"""Hidden size from which bfloat16 is faster on a CPU that multiplies it. Processor time of an update against float32 by
`tools/benchmark_update.py --shape`: 1.5 times at 64, 0.9 times at 256."""


def resolve_dtype(name: DtypeSetting, arch: ModelArchitecture) -> torch.dtype:
    """Return the type that `actor.dtype` or `rollout.dtype` stands for on this machine."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[resolve_name(name, arch)]


def resolve_name(name: DtypeSetting, arch: ModelArchitecture) -> DtypeName:
    """Return the name of the type that `actor.dtype` or `rollout.dtype` stands for on this machine."""
    return choose_dtype(arch)[0] if name == "auto" else name


def choose_dtype(arch: ModelArchitecture) -> tuple[DtypeName, str]:
    """Return what `auto` is for a model on this machine, and the reason."""
    if torch.cuda.is_available():
        return "bfloat16", "on a GPU"
    if not cpu.multiplies_bfloat16():
        return "float32", "this processor has neither AMX-BF16 nor AVX512-BF16"
    if arch.hidden_size < MIN_BFLOAT16_WIDTH:
        return "float32", f"on a CPU for models narrower than {MIN_BFLOAT16_WIDTH}"
    return "bfloat16", "this processor multiplies it, which is faster"
