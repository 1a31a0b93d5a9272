"""Host side of the Triton implementation; the same two functions as `chunked`.

Forward: one persistent kernel writes moments per split of the vocabulary, merged here in order.
Backward: per block of columns one kernel recomputes the logits (or reads the saved ones) and
writes their gradient in the weight's type; the two gradient products are cuBLAS calls that
accumulate in float32. Extra memory: the [rows, columns] gradient block and [rows, H] float32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .chunked import Saved, spans
from .moments import Coefficients, Moments, merge
from .records import Request
from .tiles import HiddenTiles
from .triton_kernels import gradient_kernel, moments_kernel

MOMENTS_KERNEL: Any = moments_kernel
GRADIENT_KERNEL: Any = gradient_kernel
"""Launchable by [grid], which their decorator does not tell a type checker."""
FIELDS = 7
GRADIENT_COLUMNS = 8192
GRADIENT_ELEMENTS = 1 << 26
"""Elements of the gradient block; long batches get fewer columns at a time."""
TILES_PER_SPLIT = 16


@dataclass(frozen=True)
class Blocks:
    """Tile shape and launch settings of both kernels."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def blocks(tiles: HiddenTiles, request: Request) -> Blocks:
    """Hopper's 128 x 256 x 64 for 16-bit operands; smaller for float32 and the interpreter."""
    if interpreted():
        columns = triton.next_power_of_2(request.vocab_tile or 64)
        return Blocks(16, min(64, max(16, columns)), 32, 1, 1)
    if tiles.hidden.dtype == torch.float32:
        return Blocks(64, 64, 32, 4, 2)
    if torch.cuda.get_device_capability(tiles.hidden.device)[0] >= 9:
        return Blocks(128, 256, 64, 8, 3)
    return Blocks(128, 128, 32, 8, 3)


def _uses_tma(tiles: HiddenTiles) -> bool:
    """TMA needs 16-byte aligned rows and a device (or an interpreter) that has it."""
    operands = (tiles.hidden, tiles.weight)
    aligned = all(x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in operands)
    if not aligned or tiles.hidden.dtype == torch.float32:
        return False
    return interpreted() or torch.cuda.get_device_capability(tiles.hidden.device)[0] >= 9


def _wide(tiles: HiddenTiles) -> bool:
    """Products in float32; always so in the interpreter, which has no bfloat16 product."""
    return tiles.hidden.dtype == torch.float32 or interpreted()


def _programs(tiles: HiddenTiles, tasks: int) -> tuple[int]:
    if interpreted():
        return (min(tasks, 4),)
    count = torch.cuda.get_device_properties(tiles.hidden.device).multi_processor_count
    return (min(tasks, count),)


def _operands(tiles: HiddenTiles, valid: int, block: Blocks) -> tuple[object, object, bool]:
    if not _uses_tma(tiles):
        return tiles.hidden, tiles.weight, False
    hidden = TensorDescriptor.from_tensor(tiles.hidden, [block.rows, block.depth])
    weight = TensorDescriptor.from_tensor(tiles.weight[:valid], [block.columns, block.depth])
    return hidden, weight, True


def _vector(value: Tensor | float | None, rows: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.float32).contiguous()
    return torch.full((rows,), 0.0 if value is None else value, device=device)


def forward(
    tiles: HiddenTiles, rows: int, request: Request, device: torch.device
) -> tuple[Moments, Saved | None, bool]:
    """Moments of this shard's part of the vocabulary, and what save mode keeps."""
    valid = request.shard.valid
    _contiguous_rows(tiles)
    if rows == 0 or valid == 0:
        like = torch.empty(0, device=device)
        return Moments.empty(rows, request, like), Saved.allocate(request, rows, 1, like), True
    block = blocks(tiles, request)
    count = triton.cdiv(valid, block.columns)
    splits = triton.cdiv(count, TILES_PER_SPLIT)
    out = torch.empty((splits, FIELDS, rows), device=device)
    saved = Saved.allocate(request, rows, block.columns, out)
    h, w, tma = _operands(tiles, valid, block)
    tasks = triton.cdiv(rows, block.rows) * splits
    MOMENTS_KERNEL[_programs(tiles, tasks)](
        h, w, request.labels, _vector(request.beta, rows, device),
        _vector(request.teacher_beta, rows, device), out,
        out if saved is None else saved.shifted, out if saved is None else saved.maxima,
        tiles.hidden.stride(0), tiles.weight.stride(0), rows, tiles.hidden.shape[1], valid,
        request.softcap or 1.0, splits, TILES_PER_SPLIT,
        TEACHER=request.teacher_beta is not None, FIRST=request.want_entropy,
        SECOND=request.want_variance, SAVE=saved is not None,
        HAS_CAP=request.softcap is not None, TMA=tma,
        IEEE=_wide(tiles),
        BLOCK_M=block.rows, BLOCK_N=block.columns, BLOCK_K=block.depth,
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    moments = Moments.empty(rows, request, out)
    for part in out:
        moments = merge(moments, _split_moments(part, request), request.betas)
    return moments, saved, True


def _contiguous_rows(tiles: HiddenTiles) -> None:
    """The kernels read rows with unit stride; other layouts are copied once."""
    if tiles.hidden.stride(1) != 1 and tiles.hidden.numel():
        tiles.hidden = tiles.hidden.contiguous()
    if tiles.weight.stride(1) != 1:
        tiles.weight = tiles.weight.contiguous()


def _split_moments(part: Tensor, request: Request) -> Moments:
    m, s, t, w, y, s2, t2 = part.unbind(0)
    two = request.teacher_beta is not None
    return Moments(
        maximum=m,
        sums=[s, s2] if two else [s],
        firsts=([t, t2] if two else [t]) if request.want_entropy else [],
        seconds=[w] if request.want_variance else [],
        label_logit=y,
    )


def backward(
    tiles: HiddenTiles,
    rows: int,
    request: Request,
    coefs: Coefficients,
    saved: Saved | None,
    kept: Tensor | None,
    infinite: bool,
) -> None:
    """Walk blocks of columns; each gradient block goes to `tiles.write`."""
    valid, device = request.shard.valid, coefs.shift.device
    _contiguous_rows(tiles)
    if rows == 0 or valid == 0:
        return
    block = blocks(tiles, request)
    wanted = request.vocab_tile or min(GRADIENT_COLUMNS, GRADIENT_ELEMENTS // rows)
    width = max(block.columns, wanted // block.columns * block.columns)
    # The interpreter truncates to bfloat16 where a device rounds to nearest; there torch rounds.
    dtype = torch.float32 if interpreted() else tiles.weight.dtype
    buffer = torch.empty(rows * min(width, valid), dtype=dtype, device=device)
    numbers = _numbers(coefs, rows, device)
    h, w, tma = _operands(tiles, valid, block)
    labels = coefs.spike_ids[:, 0].contiguous()
    for start, stop in spans(valid, width):
        tasks = triton.cdiv(rows, block.rows) * triton.cdiv(stop - start, block.columns)
        gradient = buffer[: rows * (stop - start)].view(rows, stop - start)
        GRADIENT_KERNEL[_programs(tiles, tasks)](
            h, w, labels, numbers, numbers if saved is None else saved.shifted,
            numbers if saved is None else saved.maxima, labels if kept is None else kept,
            gradient, tiles.hidden.stride(0), tiles.weight.stride(0), stop - start, rows,
            1 if saved is None else saved.maxima.shape[1], tiles.hidden.shape[1], start, stop,
            valid, request.softcap or 1.0,
            LINEAR=coefs.c1 is not None, SQUARE=coefs.c2 is not None,
            TEACHER=coefs.k0 is not None, SAVED=saved is not None, KEPT=kept is not None,
            HAS_CAP=request.softcap is not None, TMA=tma,
            IEEE=_wide(tiles),
            BLOCK_M=block.rows, BLOCK_N=block.columns, BLOCK_K=block.depth,
            num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
        tiles.load_weight(start, stop)
        tiles.write(slice(0, rows), gradient, torch.empty_like(gradient) if interpreted() else gradient)


def _numbers(coefs: Coefficients, rows: int, device: torch.device) -> Tensor:
    """The per-row numbers of the gradient kernel, in its order."""
    columns = [
        coefs.shift, coefs.beta, coefs.c0, coefs.c1, coefs.c2, coefs.spikes[:, 0],
        coefs.teacher_beta, coefs.teacher_log, coefs.k0, coefs.k1,
    ]  # fmt: skip
    return torch.stack([_vector(c, rows, device) for c in columns])
