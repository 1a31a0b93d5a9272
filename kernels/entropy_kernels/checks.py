"""Every check on what the caller passed; each raises ValueError with the argument and the numbers.

Shapes, types and devices are always checked. Values (targets, temperatures) are checked always
on CPU, where looking at them costs nothing, and elsewhere only with `validate=True`, because
there it means waiting for the device.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")
SAVE_MODES = ("recompute", "half", "auto")
COVERED = ((9, 0), (10, 0))
"""Compute capabilities from 9.0 on that the compile table covers."""


def uncovered(capability: tuple[int, int]) -> str:
    """What keeps Triton from a generation for which nobody has compiled the tiles; the empty text if nothing does.

    There they may spill, or not fit its memory.
    """
    if capability < COVERED[0] or capability in COVERED:
        return ""
    known = ", ".join(f"{major}.{minor}" for major, minor in COVERED)
    found = ".".join(map(str, capability))
    return f"the Triton kernels are not compiled for compute capability {found} (only for {known})"


def check_matrix(name: str, value: Tensor) -> None:
    """A 2-D floating matrix."""
    if value.dim() != 2:
        raise ValueError(f"{name} must be 2-D, got shape {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        allowed = ", ".join(str(t) for t in FLOATS)
        raise ValueError(f"{name} has dtype {value.dtype}; supported: {allowed}")


def check_operands(hidden: Tensor, weight: Tensor) -> None:
    """hidden [T, H] and weight [V_l, H] fit together."""
    check_matrix("hidden", hidden)
    check_matrix("weight", weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"weight has {weight.shape[1]} columns but hidden has {hidden.shape[1]} (H)")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"weight has dtype {weight.dtype} but hidden has {hidden.dtype}")
    if hidden.device != weight.device:
        raise ValueError(f"weight is on {weight.device} but hidden is on {hidden.device}")


def check_teacher(teacher_hidden: Tensor, teacher_weight: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """A second model over the same tokens and vocabulary rows; its hidden size and dtype are its own."""
    check_matrix("teacher_hidden", teacher_hidden)
    check_matrix("teacher_weight", teacher_weight)
    width = teacher_hidden.shape[1]
    if teacher_weight.shape[1] != width:
        raise ValueError(f"teacher_weight has {teacher_weight.shape[1]} columns but teacher_hidden has {width} (H)")
    if teacher_weight.dtype != teacher_hidden.dtype:
        raise ValueError(
            f"teacher_weight has dtype {teacher_weight.dtype} but teacher_hidden has {teacher_hidden.dtype}"
        )
    if teacher_hidden.shape[0] != hidden.shape[0]:
        raise ValueError(f"teacher_hidden has {teacher_hidden.shape[0]} rows but hidden has {hidden.shape[0]}")
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"teacher_weight has {teacher_weight.shape[0]} rows but weight has {weight.shape[0]} (V/tp)")
    for name, value in (("teacher_hidden", teacher_hidden), ("teacher_weight", teacher_weight)):
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device} but hidden is on {hidden.device}")


def check_target(target: Tensor, tokens: int, device: torch.device) -> None:
    """target is an integer vector with one entry per token."""
    if target.dim() != 1 or target.shape[0] != tokens:
        raise ValueError(f"target must have shape ({tokens},), got {tuple(target.shape)}")
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"target must be int64 or int32, got {target.dtype}")
    if target.device != device:
        raise ValueError(f"target is on {target.device} but the inputs are on {device}")


def check_target_values(target: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Every target that counts is inside the true vocabulary."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"target[{row}] is {int(target[row])}: outside the vocabulary of {vocab_size} "
            f"and not ignore_index {ignore_index}"
        )


def check_temperature(name: str, value: float | Tensor, tokens: int, device: torch.device, values: bool) -> None:
    """A positive number, or a vector of one positive number per token."""
    if not isinstance(value, Tensor):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a finite number > 0, got {value}")
        return
    if value.dim() != 1 or value.shape[0] != tokens:
        raise ValueError(f"{name} must have shape ({tokens},), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the inputs are on {device}")
    if values:
        wrong = ~((value > 0) & torch.isfinite(value))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(f"{name}[{row}] is {float(value[row])}; it must be finite and > 0")


def check_vocabulary(vocab_size: int | None, local_rows: int, group: dist.ProcessGroup | None, validate: bool) -> int:
    """The true vocabulary size, which the shards of the group must be able to hold."""
    size = 1 if group is None else dist.get_world_size(group)
    total = local_rows * size
    if local_rows < 1:
        raise ValueError("weight has no vocabulary rows: V/tp is 0")
    if vocab_size is None:
        vocab_size = total
    if not 0 < vocab_size <= total:
        raise ValueError(f"vocab_size is {vocab_size}, but {size} shard(s) of {local_rows} rows hold {total}")
    if validate and group is not None and size > 1:
        sizes: list[int | None] = [None] * size
        dist.all_gather_object(sizes, local_rows, group=group)
        if len(set(sizes)) != 1:
            raise ValueError(f"group: its ranks hold shards of different sizes {sizes}")
    return vocab_size


def check_options(
    *,
    vocab_size: int,
    top_k: int,
    softcap: float | None,
    impl: str,
    save: str,
    skip_mass: float,
    compact: bool,
    row_chunk: int | None,
    vocab_tile: int | None,
) -> None:
    """The plain settings."""
    if not 0 <= top_k <= vocab_size:
        raise ValueError(f"top_k is {top_k}; it must lie in [0, vocab_size = {vocab_size}]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; known: {', '.join(IMPLEMENTATIONS)}")
    if save not in SAVE_MODES:
        raise ValueError(f"save is {save!r}; known: {', '.join(SAVE_MODES)}")
    if not 0 <= skip_mass < 1:
        raise ValueError(f"skip_mass must lie in [0, 1), got {skip_mass}")
    if skip_mass and not compact:
        raise ValueError(f"skip_mass is {skip_mass}: counting the rows that remain needs compact=True")
    check_tile("row_chunk", row_chunk)
    check_tile("vocab_tile", vocab_tile)


def check_tile(name: str, value: int | None) -> None:
    """A size of at least 1, or None for a good one."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1 or None, got {value}")


def check_number(name: str, value: float, lowest: float = float("-inf"), *, inclusive: bool = True) -> None:
    """A finite number not below `lowest`, or above it."""
    if not (lowest <= value if inclusive else lowest < value) or not abs(value) < float("inf"):
        relation = f" {'>=' if inclusive else '>'} {lowest:g}" if lowest > float("-inf") else ""
        raise ValueError(f"{name} must be a finite number{relation}, got {value}")


def check_search(
    bounds: tuple[float, float],
    top: int,
    pivot: float,
    slope: float,
    amplitude: float,
    floor: float,
    iterations: int,
) -> None:
    """The numbers of the temperature search."""
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < float("inf"):
        raise ValueError(f"bounds must be two finite temperatures, 0 < lowest <= highest, got {tuple(bounds)}")
    for name, count in (("top", top), ("iterations", iterations)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    check_number("pivot", pivot)
    check_number("floor", floor)
    for name, value in (("slope", slope), ("amplitude", amplitude)):
        check_number(name, value, lowest=0.0)


def check_main_grad(main_grad: Tensor | None, weight: Tensor) -> None:
    """The accumulation buffer has the weight's shape and a float32 (or float64) type."""
    if main_grad is None:
        return
    if main_grad.shape != weight.shape:
        raise ValueError(f"main_grad has shape {tuple(main_grad.shape)} but weight {tuple(weight.shape)}")
    expected = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if main_grad.dtype != expected:
        raise ValueError(f"main_grad must be {expected}, got {main_grad.dtype}")
    if main_grad.device != weight.device:
        raise ValueError(f"main_grad is on {main_grad.device} but weight is on {weight.device}")
