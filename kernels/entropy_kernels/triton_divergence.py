"""Triton form of `distillation`: sums over both models' logits, and the student's logit gradient.

As in triton_kernels.py: a program makes a tile of either model's logits and takes both in parts
of their columns. Sums are in units of the exponent of two, x = log2(e) (logit / temperature - shift). Formulas in
distillation.py, where A is the distribution the expectation is under and B the other.
"""

# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# ruff: noqa: N803 - compile-time constants are written in capitals
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import aligned_columns, spans
from .tiles import HiddenTiles
from .triton_engine import (
    GRADIENT_COLUMNS,
    GRADIENT_ELEMENTS,
    NARROW,
    TILES_PER_SPLIT,
    Blocks,
    choose_blocks,
    contiguous_rows,
    interpreted,
    operands,
    output,
    programs,
    uses_tma,
    vector,
    wide,
)
from .triton_kernels import FLOOR, column_parts, exponent, logits_tile

FIELDS = 5
LOG2E = math.log2(math.e)


@triton.jit
def _masked(z, first, stop):
    """-inf from column `stop` on."""
    if first + z.shape[1] > stop:
        z = tl.where((first + tl.arange(0, z.shape[1]) < stop)[None, :], z, float("-inf"))
    return z


@triton.jit
def _raised(m, z, scale):
    """The larger maximum, minus it (0 where all is impossible), and what the exponents so far change by."""
    top = tl.maximum(m, tl.max(z, 1))
    offset = tl.where(top == float("-inf"), 0.0, -top)
    return top, offset, tl.maximum((m + offset) * scale, FLOOR)


@triton.jit
def divergence_kernel(
    h, w, teacher_h, teacher_w, beta, teacher_beta, out,
    h_stride, w_stride, teacher_h_stride, teacher_w_stride, rows, H, teacher_H, valid, splits, tiles_per_split,
    REVERSE: tl.constexpr, TMA: tl.constexpr, IEEE: tl.constexpr, TEACHER_IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out [splits, 5, rows]: m_A, s_A, u, m_B, s_B of each split."""
    LN2: tl.constexpr = 0.6931471805599453
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    blocks_m = tl.cdiv(rows, BLOCK_M)
    for task in range(tl.program_id(0), blocks_m * splits, tl.num_programs(0)):
        row0 = (task % blocks_m) * BLOCK_M
        split = task // blocks_m
        offs_m = row0 + tl.arange(0, BLOCK_M)
        live = offs_m < rows
        scale_a = tl.load(beta + offs_m, mask=live, other=1.0) / LN2
        scale_b = tl.load(teacher_beta + offs_m, mask=live, other=1.0) / LN2
        if not REVERSE:
            scale_a, scale_b = scale_b, scale_a
        m_a = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        m_b = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        s_a = tl.zeros((BLOCK_M,), tl.float32)
        s_b = tl.zeros((BLOCK_M,), tl.float32)
        u = tl.zeros((BLOCK_M,), tl.float32)
        first_tile = split * tiles_per_split
        last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(valid, BLOCK_N))
        for tile in range(first_tile, last_tile):
            col0 = tile * BLOCK_N
            students = column_parts(logits_tile(
                h, w, h_stride, w_stride, row0, col0, rows, valid, H, TMA, IEEE, BLOCK_M, BLOCK_N, BLOCK_K,
            ), PARTS)  # fmt: skip
            teachers = column_parts(logits_tile(
                teacher_h, teacher_w, teacher_h_stride, teacher_w_stride, row0, col0, rows, valid, teacher_H,
                TMA, TEACHER_IEEE, BLOCK_M, BLOCK_N, BLOCK_K,
            ), PARTS)  # fmt: skip
            for index in tl.static_range(PARTS):
                first = col0 + index * WIDTH
                if REVERSE:
                    a, b = _masked(students[index], first, valid), _masked(teachers[index], first, valid)
                else:
                    a, b = _masked(teachers[index], first, valid), _masked(students[index], first, valid)
                m_a, offset_a, shift_a = _raised(m_a, a, scale_a)
                m_b, offset_b, shift_b = _raised(m_b, b, scale_b)
                f = tl.exp2(shift_a)
                u = f * (u + (shift_a - shift_b) * s_a)
                s_a = f * s_a
                s_b = tl.exp2(shift_b) * s_b
                x_a, x_b = exponent(a, scale_a, offset_a), exponent(b, scale_b, offset_b)
                e = tl.exp2(x_a)
                s_a += tl.sum(e, 1)
                u += tl.sum(e * (x_a - x_b), 1)
                s_b += tl.sum(tl.exp2(x_b), 1)
        base_out = out + split * 5 * rows + offs_m
        tl.store(base_out, m_a * scale_a * LN2, mask=live)
        tl.store(base_out + rows, s_a, mask=live)
        tl.store(base_out + 2 * rows, u * LN2, mask=live)
        tl.store(base_out + 3 * rows, m_b * scale_b * LN2, mask=live)
        tl.store(base_out + 4 * rows, s_b, mask=live)


@triton.jit
def divergence_gradient_kernel(
    h, w, teacher_h, teacher_w, numbers, out,
    h_stride, w_stride, teacher_h_stride, teacher_w_stride, out_stride, rows, H, teacher_H, start, stop,
    REVERSE: tl.constexpr, TMA: tl.constexpr, IEEE: tl.constexpr, TEACHER_IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out [rows, stop - start]: gradient of the student's logits of columns [start, stop).

    numbers [6, rows], in units of the exponent: scale and log-normaliser of the student, the same of
    the teacher, divergence, and factor of the gradient.
    """
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(stop - start, BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    for task in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        row0 = (task % blocks_m) * BLOCK_M
        col0 = start + (task // blocks_m) * BLOCK_N
        offs_m = row0 + tl.arange(0, BLOCK_M)
        live = offs_m < rows
        scale_p = tl.load(numbers + offs_m, mask=live, other=0.0)
        log_p = tl.load(numbers + rows + offs_m, mask=live, other=0.0)
        scale_q = tl.load(numbers + 2 * rows + offs_m, mask=live, other=0.0)
        log_q = tl.load(numbers + 3 * rows + offs_m, mask=live, other=0.0)
        divergence = log_p
        if REVERSE:
            divergence = tl.load(numbers + 4 * rows + offs_m, mask=live, other=0.0)
        factor = tl.load(numbers + 5 * rows + offs_m, mask=live, other=0.0)
        students = column_parts(logits_tile(
            h, w, h_stride, w_stride, row0, col0, rows, stop, H, TMA, IEEE, BLOCK_M, BLOCK_N, BLOCK_K,
        ), PARTS)  # fmt: skip
        teachers = column_parts(logits_tile(
            teacher_h, teacher_w, teacher_h_stride, teacher_w_stride, row0, col0, rows, stop, teacher_H,
            TMA, TEACHER_IEEE, BLOCK_M, BLOCK_N, BLOCK_K,
        ), PARTS)  # fmt: skip
        for index in tl.static_range(PARTS):
            first = col0 + index * WIDTH
            x = tl.maximum(students[index] * scale_p[:, None] - log_p[:, None], FLOOR)
            y = tl.maximum(teachers[index] * scale_q[:, None] - log_q[:, None], FLOOR)
            if REVERSE:
                g = tl.exp2(x) * (x - y - divergence[:, None]) * factor[:, None]
            else:
                g = (tl.exp2(x) - tl.exp2(y)) * factor[:, None]
            if TMA:
                out.store([row0, first - start], g.to(out.dtype))
            else:
                offs_n = first + tl.arange(0, WIDTH)
                target = out + offs_m[:, None].to(tl.int64) * out_stride + (offs_n - start)[None, :]
                tl.store(target, g.to(out.dtype.element_ty), mask=live[:, None] & (offs_n < stop)[None, :])


DIVERGENCE_KERNEL: Any = divergence_kernel
GRADIENT_KERNEL: Any = divergence_gradient_kernel
"""Launchable by [grid], which their decorator does not tell a type checker."""


def device_blocks(capability: int) -> Blocks:
    """Tile of 16-bit operands on the covered generations, both alike; two models' logits are in registers."""
    return NARROW


def _operands(student: HiddenTiles, teacher: HiddenTiles, valid: int, block: Blocks) -> tuple[list[object], bool]:
    """Both models' operands, through TMA if both can, and whether they go through it."""
    tma = uses_tma(student) and uses_tma(teacher)
    return [x for tiles in (student, teacher) for x in operands(tiles, valid, block, tma)], tma


def _launch(student: HiddenTiles, teacher: HiddenTiles, block: Blocks, tma: bool, reverse: bool) -> dict[str, Any]:
    """Constants and settings of a launch."""
    return {
        "REVERSE": reverse, "TMA": tma, "IEEE": wide(student), "TEACHER_IEEE": wide(teacher),
        "BLOCK_M": block.rows, "BLOCK_N": block.columns, "BLOCK_K": block.depth, "PARTS": block.parts,
        "num_warps": block.warps, "num_stages": block.stages,
    }  # fmt: skip


def _blocks(student: HiddenTiles, teacher: HiddenTiles) -> Blocks:
    widest = teacher if wide(teacher) else student
    return choose_blocks(widest, device_blocks, 32)


def forward(
    student: HiddenTiles, teacher: HiddenTiles, valid: int, betas: tuple[Tensor | float, Tensor | float], reverse: bool
) -> Tensor:
    """[splits, 5, N]: m_A, s_A, u, m_B, s_B of consecutive parts of this shard's columns."""
    rows, device = student.rows, student.hidden.device
    contiguous_rows(student)
    contiguous_rows(teacher)
    if rows == 0 or valid == 0:
        return torch.empty((0, FIELDS, rows), device=device)
    block = _blocks(student, teacher)
    splits = triton.cdiv(triton.cdiv(valid, block.columns), TILES_PER_SPLIT)
    out = torch.empty((splits, FIELDS, rows), device=device)
    pointers, tma = _operands(student, teacher, valid, block)
    DIVERGENCE_KERNEL[programs(student, triton.cdiv(rows, block.rows) * splits)](
        *pointers, vector(betas[0], rows, device), vector(betas[1], rows, device), out,
        *_strides(student, teacher), rows, student.hidden.shape[1], teacher.hidden.shape[1], valid,
        splits, TILES_PER_SPLIT, **_launch(student, teacher, block, tma, reverse),
    )  # fmt: skip
    return out


def _strides(student: HiddenTiles, teacher: HiddenTiles) -> list[int]:
    return [x.stride(0) for x in (student.hidden, student.weight, teacher.hidden, teacher.weight)]


def backward(
    student: HiddenTiles,
    teacher: HiddenTiles,
    valid: int,
    betas: tuple[Tensor | float, Tensor | float],
    reverse: bool,
    numbers: list[Tensor],
    upstream: Tensor,
) -> None:
    """Walk blocks of columns; each block of the gradient goes to `student.write`."""
    rows, device = student.rows, student.hidden.device
    contiguous_rows(student)
    contiguous_rows(teacher)
    if rows == 0 or valid == 0:
        return
    block = _blocks(student, teacher)
    width = max(block.columns, min(GRADIENT_COLUMNS, GRADIENT_ELEMENTS // rows) // block.columns * block.columns)
    # The interpreter truncates to bfloat16 where a device rounds to nearest; there torch rounds.
    dtype = torch.float32 if interpreted() else student.weight.dtype
    buffer = torch.empty((rows, aligned_columns(min(width, valid))), dtype=dtype, device=device)
    pointers, tma = _operands(student, teacher, valid, block)
    packed = _numbers(betas, reverse, numbers, upstream)
    for start, stop in spans(valid, width):
        tasks = triton.cdiv(rows, block.rows) * triton.cdiv(stop - start, block.columns)
        gradient = buffer[:, : stop - start]
        GRADIENT_KERNEL[programs(student, tasks)](
            *pointers, packed, output(gradient, block, tma), *_strides(student, teacher), gradient.stride(0), rows,
            student.hidden.shape[1], teacher.hidden.shape[1], start, stop,
            **_launch(student, teacher, block, tma, reverse),
        )  # fmt: skip
        student.load_weight(start, stop)
        student.write(slice(0, rows), gradient, torch.empty_like(gradient) if interpreted() else gradient)


def _numbers(
    betas: tuple[Tensor | float, Tensor | float], reverse: bool, numbers: list[Tensor], upstream: Tensor
) -> Tensor:
    """[6, N], in the order and units of the gradient kernel."""
    log_p, log_q, divergence = (number.float() * LOG2E for number in numbers)
    rows, device = log_p.shape[0], log_p.device
    beta, teacher_beta = (vector(b, rows, device) for b in betas)
    factor = upstream.float() * beta / (LOG2E if reverse else 1.0)
    return torch.stack([beta * LOG2E, log_p, teacher_beta * LOG2E, log_q, divergence, factor])
