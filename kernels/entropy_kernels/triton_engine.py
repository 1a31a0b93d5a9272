"""Host side of the Triton implementation; the same two functions as `chunked`.

Forward: one persistent kernel writes moments per split of the vocabulary, merged here in order. On
Hopper it has two forms, plain and warp-specialised (triton_choice.py).
Backward: per block of columns one kernel recomputes the logits (or reads the saved ones) and
writes their gradient in the weight's type; the two gradient products are cuBLAS calls that
accumulate in float32. Extra memory: the [rows, columns] gradient block and [rows, H] float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import checks, triton_choice
from .chunked import Saved, aligned_columns, spans
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
    parts: int = 2
    """How many column parts a tile's epilogue takes one after the other."""
    specialized: bool = False
    """Whether one group of warps loads and the others compute."""


WIDE, NARROW = Blocks(128, 256, 64, 8, 3, 4), Blocks(128, 128, 64, 8, 3, 2)
FINE, SINGLE = Blocks(128, 128, 64, 8, 3, 4), Blocks(128, 64, 64, 8, 3, 1)
"""Tiles of the covered generations, by `device_blocks`."""
SPECIALIZED = Blocks(128, 256, 64, 4, 3, 1, specialized=True)
"""Tile of the warp-specialised form of the forward kernel; the compiler makes 12 warps of the 4."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def blocks(tiles: HiddenTiles, request: Request, use: str) -> Blocks:
    """Tile of a launch; `use` as in `device_blocks`."""
    columns = min(64, max(16, triton.next_power_of_2(request.vocab_tile or 64)))
    return choose_blocks(tiles, functools.partial(device_blocks, use, request.softcap is not None), columns)


def choose_blocks(tiles: HiddenTiles, covered: Callable[[int], Blocks], columns: int) -> Blocks:
    """Tile for 16-bit operands on a covered device; smaller for float32, older devices and the interpreter.

    Args:
        covered: what to take on a covered generation, by its major number.
        columns: of the interpreter's tile.
    """
    if interpreted():
        return Blocks(16, columns, 32, 1, 1, 4 if columns == 64 else 2)
    if tiles.hidden.dtype == torch.float32:
        return Blocks(64, 64, 32, 4, 2)
    capability = torch.cuda.get_device_capability(tiles.hidden.device)
    if capability[0] >= 9:
        if problem := checks.uncovered(capability):
            raise ValueError(
                f'{problem}: pass impl="chunked", or add it to checks.COVERED and to kernels/compile_table.py'
            )
        return covered(capability[0])
    return Blocks(128, 128, 32, 8, 3)


def device_blocks(use: str, softcap: bool, capability: int) -> Blocks:
    """Tile of 16-bit operands on a covered generation, the widest with which nothing spills (docs/kernels.md).

    Save mode agrees on parts of 64 columns.

    Args:
        use: "moments", "gradient" (of logits that are made again) or "saved" (of saved logits).
        capability: its major number.
    """
    if capability == 9:
        return NARROW if softcap else WIDE
    if use == "saved":
        return SINGLE
    return FINE if softcap and use == "gradient" else WIDE


def can_specialize(*, SAVE: bool, HAS_CAP: bool, SECOND: bool, TEACHER: bool, **unused: bool) -> bool:
    """Whether the forward kernel with these options has a warp-specialised form; with others it spills."""
    return not (SAVE or HAS_CAP or (SECOND and TEACHER))


def specialized_blocks(tiles: HiddenTiles, plain: Blocks) -> Blocks | None:
    """Tile of the warp-specialised form; None but on Hopper and in the interpreter: on Blackwell it spills."""
    if interpreted():
        return dataclasses.replace(plain, parts=1, specialized=True)
    return SPECIALIZED if torch.cuda.get_device_capability(tiles.hidden.device)[0] == 9 else None


def uses_tma(tiles: HiddenTiles) -> bool:
    """TMA needs 16-byte aligned rows and a device (or an interpreter) that has it."""
    both = (tiles.hidden, tiles.weight)
    aligned = all(x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in both)
    if not aligned or tiles.hidden.dtype == torch.float32:
        return False
    return interpreted() or torch.cuda.get_device_capability(tiles.hidden.device)[0] >= 9


def wide(tiles: HiddenTiles) -> bool:
    """Products in float32; always so in the interpreter, which has no bfloat16 product."""
    return tiles.hidden.dtype == torch.float32 or interpreted()


def programs(tiles: HiddenTiles, tasks: int) -> tuple[int]:
    """The grid of a persistent kernel."""
    if interpreted():
        return (min(tasks, 4),)
    count = torch.cuda.get_device_properties(tiles.hidden.device).multi_processor_count
    return (min(tasks, count),)


def operands(tiles: HiddenTiles, valid: int, block: Blocks, tma: bool) -> tuple[object, object]:
    """What a kernel loads hidden and weight from."""
    if not tma:
        return tiles.hidden, tiles.weight
    hidden = TensorDescriptor.from_tensor(tiles.hidden, [block.rows, block.depth])
    return hidden, TensorDescriptor.from_tensor(tiles.weight[:valid], [block.columns, block.depth])


def output(matrix: Tensor, block: Blocks, tma: bool) -> object:
    """What a kernel stores parts of tiles to."""
    if not tma:
        return matrix
    return TensorDescriptor.from_tensor(matrix, [block.rows, block.columns // block.parts])


def vector(value: Tensor | float | None, rows: int, device: torch.device) -> Tensor:
    """[rows] float32: per-row values, or one for all (None: 0)."""
    if isinstance(value, Tensor):
        return value.to(torch.float32).contiguous()
    return torch.full((rows,), 0.0 if value is None else value, device=device)


def forward(
    tiles: HiddenTiles, rows: int, request: Request, device: torch.device
) -> tuple[Moments, Saved | None, bool]:
    """Moments of this shard's part of the vocabulary, and what save mode keeps."""
    valid = request.shard.valid
    contiguous_rows(tiles)
    if rows == 0 or valid == 0:
        like = torch.empty(0, device=device)
        return Moments.empty(rows, request, like), Saved.allocate(request, rows, 1, like), True
    block = blocks(tiles, request, "moments")
    count = triton.cdiv(valid, block.columns)
    splits = triton.cdiv(count, TILES_PER_SPLIT)
    out = torch.empty((splits, FIELDS, rows), device=device)
    saved = Saved.allocate(request, rows, block.columns // block.parts, out)
    tma = uses_tma(tiles)
    kept = out if saved is None or saved.shifted is None else saved.shifted
    grid = programs(tiles, triton.cdiv(rows, block.rows) * splits)
    labels, beta = request.labels.to(torch.int32), vector(request.beta, rows, device)
    teacher_beta = vector(request.teacher_beta, rows, device)
    options = {
        "TEACHER": request.teacher_beta is not None, "FIRST": request.want_entropy, "SECOND": request.want_variance,
        "SAVE": saved is not None, "HAS_CAP": request.softcap is not None, "TMA": tma, "IEEE": wide(tiles),
    }  # fmt: skip

    def launch(form: Blocks) -> Tensor:
        if form.specialized:
            triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        MOMENTS_KERNEL[grid](
            *operands(tiles, valid, form, tma and not form.specialized), labels, beta, teacher_beta, out,
            out if saved is None else output(kept, form, tma), out if saved is None else saved.maxima,
            tiles.hidden.stride(0), tiles.weight.stride(0), kept.stride(0), rows, tiles.hidden.shape[1], valid,
            request.softcap or 1.0, splits, TILES_PER_SPLIT, **options, SPECIALIZED=form.specialized,
            BLOCK_M=form.rows, BLOCK_N=form.columns, BLOCK_K=form.depth, PARTS=form.parts,
            num_warps=form.warps, num_stages=form.stages,
        )  # fmt: skip
        return out

    other = specialized_blocks(tiles, block) if tma and can_specialize(**options) else None
    if other is not None:
        rounded = triton.next_power_of_2(rows)
        shape = (device, tiles.hidden.dtype, rounded, tiles.hidden.shape[1], valid, *options.values())
        block = triton_choice.choose(shape, block, other, launch)
    launch(block)
    moments = Moments.empty(rows, request, out)
    for part in out:
        moments = merge(moments, _split_moments(part, request), request.betas)
    return moments, saved, True


def contiguous_rows(tiles: HiddenTiles) -> None:
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
    contiguous_rows(tiles)
    if rows == 0 or valid == 0:
        return
    block = blocks(tiles, request, "gradient" if saved is None or saved.shifted is None else "saved")
    wanted = request.vocab_tile or min(GRADIENT_COLUMNS, GRADIENT_ELEMENTS // rows)
    width = max(block.columns, wanted // block.columns * block.columns)
    # The interpreter truncates to bfloat16 where a device rounds to nearest; there torch rounds.
    dtype = torch.float32 if interpreted() else tiles.weight.dtype
    buffer = torch.empty((rows, aligned_columns(min(width, valid))), dtype=dtype, device=device)
    numbers = _numbers(coefs, rows, device)
    source = numbers if saved is None or saved.shifted is None else saved.shifted
    tma = uses_tma(tiles)
    h, w = operands(tiles, valid, block, tma)
    labels = coefs.spike_ids[:, 0].to(torch.int32)
    for start, stop in spans(valid, width):
        tasks = triton.cdiv(rows, block.rows) * triton.cdiv(stop - start, block.columns)
        gradient = buffer[:, : stop - start]
        GRADIENT_KERNEL[programs(tiles, tasks)](
            h, w, labels, numbers, source, numbers if saved is None else saved.maxima, labels if kept is None else kept,
            output(gradient, block, tma), tiles.hidden.stride(0), tiles.weight.stride(0),
            source.stride(0), gradient.stride(0), rows,
            1 if saved is None else saved.maxima.shape[1], tiles.hidden.shape[1], start, stop,
            request.softcap or 1.0,
            LINEAR=coefs.c1 is not None, SQUARE=coefs.c2 is not None,
            TEACHER=coefs.k0 is not None, SAVED=saved is not None, KEPT=kept is not None,
            HAS_CAP=request.softcap is not None, TMA=tma,
            IEEE=wide(tiles),
            BLOCK_M=block.rows, BLOCK_N=block.columns, BLOCK_K=block.depth, PARTS=block.parts,
            num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
        tiles.load_weight(start, stop)
        tiles.write(slice(0, rows), gradient, torch.empty_like(gradient) if interpreted() else gradient)


def _numbers(coefs: Coefficients, rows: int, device: torch.device) -> Tensor:
    """The per-row numbers of the gradient kernel, [10, rows], in its order and units."""

    def numbers(value: Tensor | float | None) -> Tensor:
        return vector(value, rows, device)

    log2e = math.log2(math.e)
    beta = numbers(coefs.beta)
    scale = beta * log2e
    columns = [
        scale, numbers(coefs.shift), numbers(coefs.c0), numbers(coefs.c1) / scale,
        numbers(coefs.c2) / (scale * scale), numbers(coefs.spikes[:, 0]), numbers(coefs.teacher_beta) / beta,
        numbers(coefs.teacher_log) * log2e, numbers(coefs.k0), numbers(coefs.k1) / scale,
    ]  # fmt: skip
    return torch.stack(columns)
