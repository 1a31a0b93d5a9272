"""The Triton kernels: moments of a vocabulary shard, and tiles of the logit gradient.

Both walk a flat list of tasks persistently (one program per multiprocessor, row blocks fastest so
that neighbours share a weight tile in L2). Logits live in registers in float32. On Hopper the
operands come through TMA descriptors; elsewhere, and for shapes TMA cannot address, through
pointers. No atomics: every output element has one writer.
"""

# ruff: noqa: N803 - compile-time constants are written in capitals
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1e18)


@triton.jit
def _logits_tile(
    h, w, h_stride, w_stride, row0, col0, rows, stop, H, cap,
    HAS_CAP: tl.constexpr, TMA: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_M, BLOCK_N] of rows row0.. and columns col0.., -inf from column `stop` on."""
    offs_m = row0 + tl.arange(0, BLOCK_M)
    offs_n = col0 + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        if TMA:
            a = h.load([row0, k])
            b = w.load([col0, k])
        else:
            inside = (k + offs_k) < H
            a = tl.load(
                h + offs_m[:, None].to(tl.int64) * h_stride + (k + offs_k)[None, :],
                mask=(offs_m < rows)[:, None] & inside[None, :],
                other=0.0,
            )
            b = tl.load(
                w + offs_n[:, None].to(tl.int64) * w_stride + (k + offs_k)[None, :],
                mask=(offs_n < stop)[:, None] & inside[None, :],
                other=0.0,
            )
        if IEEE:
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32).T, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b.T, acc)
    if HAS_CAP:
        acc = cap * (2.0 * tl.sigmoid(2.0 * acc / cap) - 1.0)
    return tl.where((offs_n < stop)[None, :], acc, float("-inf"))


@triton.jit
def moments_kernel(
    h, w, labels, beta, teacher_beta, out, saved, maxima,
    h_stride, w_stride, rows, H, valid, cap, splits, tiles_per_split,
    TEACHER: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SAVE: tl.constexpr,
    HAS_CAP: tl.constexpr, TMA: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [splits, 7, rows]: m, s, t, w, label logit, teacher s, teacher t of each split."""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    for task in range(tl.program_id(0), blocks_m * splits, tl.num_programs(0)):
        row0 = (task % blocks_m) * BLOCK_M
        split = task // blocks_m
        offs_m = row0 + tl.arange(0, BLOCK_M)
        live = offs_m < rows
        label = tl.load(labels + offs_m, mask=live, other=-1)
        b = tl.load(beta + offs_m, mask=live, other=1.0)
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        y = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        s = tl.zeros((BLOCK_M,), tl.float32)
        t = tl.zeros((BLOCK_M,), tl.float32)
        q = tl.zeros((BLOCK_M,), tl.float32)
        s2 = tl.zeros((BLOCK_M,), tl.float32)
        t2 = tl.zeros((BLOCK_M,), tl.float32)
        if TEACHER:
            b2 = tl.load(teacher_beta + offs_m, mask=live, other=1.0)
        first_tile = split * tiles_per_split
        last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(valid, BLOCK_N))
        for tile in range(first_tile, last_tile):
            col0 = tile * BLOCK_N
            z = _logits_tile(
                h, w, h_stride, w_stride, row0, col0, rows, valid, H, cap,
                HAS_CAP, TMA, IEEE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            offs_n = col0 + tl.arange(0, BLOCK_N)
            here = offs_n[None, :].to(tl.int64) == label[:, None]
            y = tl.maximum(y, tl.max(tl.where(here, z, float("-inf")), 1))
            top = tl.max(z, 1)
            if SAVE:
                safe_top = tl.where(top == float("-inf"), 0.0, top)
                inside = live[:, None] & (offs_n < valid)[None, :]
                place = offs_m[:, None].to(tl.int64) * valid + offs_n[None, :]
                tl.store(saved + place, (z - safe_top[:, None]).to(tl.float16), mask=inside)
                tl.store(maxima + tile * rows + offs_m, top, mask=live)
            m_new = tl.maximum(m, top)
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            shift = tl.maximum(m - safe, FLOOR)
            d = z - safe[:, None]
            e = tl.exp2(d * (b * LOG2E)[:, None])
            d = tl.maximum(d, FLOOR)
            f = tl.exp2(shift * b * LOG2E)
            if SECOND:
                q = f * (q + shift * (2.0 * t + shift * s)) + tl.sum(e * d * d, 1)
            if FIRST:
                t = f * (t + shift * s) + tl.sum(e * d, 1)
            s = f * s + tl.sum(e, 1)
            if TEACHER:
                e2 = tl.exp2(d * (b2 * LOG2E)[:, None])
                f2 = tl.exp2(shift * b2 * LOG2E)
                t2 = f2 * (t2 + shift * s2) + tl.sum(e2 * d, 1)
                s2 = f2 * s2 + tl.sum(e2, 1)
            m = m_new
        base = out + split * 7 * rows + offs_m
        tl.store(base, m, mask=live)
        tl.store(base + rows, s, mask=live)
        tl.store(base + 2 * rows, t, mask=live)
        tl.store(base + 3 * rows, q, mask=live)
        tl.store(base + 4 * rows, y, mask=live)
        tl.store(base + 5 * rows, s2, mask=live)
        tl.store(base + 6 * rows, t2, mask=live)


@triton.jit
def gradient_kernel(
    h, w, labels, numbers, saved, maxima, kept, out,
    h_stride, w_stride, out_stride, rows, saved_rows, H, start, stop, valid, cap,
    LINEAR: tl.constexpr, SQUARE: tl.constexpr, TEACHER: tl.constexpr,
    SAVED: tl.constexpr, KEPT: tl.constexpr,
    HAS_CAP: tl.constexpr, TMA: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows, stop - start]: gradient of the logits of columns [start, stop).

    numbers [10, rows]: shift, beta, c0, c1, c2, spike, teacher beta, teacher log, k0, k1.
    """
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(stop - start, BLOCK_N)
    for task in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        row0 = (task % blocks_m) * BLOCK_M
        col0 = start + (task // blocks_m) * BLOCK_N
        offs_m = row0 + tl.arange(0, BLOCK_M)
        offs_n = col0 + tl.arange(0, BLOCK_N)
        live = offs_m < rows
        inside = live[:, None] & (offs_n < stop)[None, :]
        shift = tl.load(numbers + offs_m, mask=live, other=0.0)
        b = tl.load(numbers + rows + offs_m, mask=live, other=1.0)
        c0 = tl.load(numbers + 2 * rows + offs_m, mask=live, other=0.0)
        spike = tl.load(numbers + 5 * rows + offs_m, mask=live, other=0.0)
        label = tl.load(labels + offs_m, mask=live, other=-1)
        if SAVED:
            source = offs_m
            if KEPT:
                source = tl.load(kept + offs_m, mask=live, other=0)
            place = source[:, None].to(tl.int64) * valid + offs_n[None, :]
            tile = col0 // BLOCK_N
            top = tl.load(maxima + tile * saved_rows + source, mask=live, other=0.0)
            top = tl.where(top == float("-inf"), 0.0, top)
            z = tl.load(saved + place, mask=inside, other=float("-inf")).to(tl.float32)
            delta = z + (top - shift)[:, None]
        else:
            z = _logits_tile(
                h, w, h_stride, w_stride, row0, col0, rows, stop, H, cap,
                HAS_CAP, TMA, IEEE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            delta = z - shift[:, None]
        delta = tl.maximum(delta, FLOOR)
        p = tl.exp2(delta * (b * LOG2E)[:, None])
        factor = c0[:, None] + tl.zeros_like(delta)
        if LINEAR:
            c1 = tl.load(numbers + 3 * rows + offs_m, mask=live, other=0.0)
            factor += c1[:, None] * delta
        if SQUARE:
            c2 = tl.load(numbers + 4 * rows + offs_m, mask=live, other=0.0)
            factor += c2[:, None] * delta * delta
        g = p * factor
        if TEACHER:
            b2 = tl.load(numbers + 6 * rows + offs_m, mask=live, other=1.0)
            lift = tl.load(numbers + 7 * rows + offs_m, mask=live, other=0.0)
            k0 = tl.load(numbers + 8 * rows + offs_m, mask=live, other=0.0)
            k1 = tl.load(numbers + 9 * rows + offs_m, mask=live, other=0.0)
            q = tl.exp2((delta * b2[:, None] + lift[:, None]) * LOG2E)
            g += q * (k0[:, None] + k1[:, None] * delta)
        g += tl.where(offs_n[None, :].to(tl.int64) == label[:, None], spike[:, None], 0.0)
        if HAS_CAP:
            ratio = (delta + shift[:, None]) / cap
            g = g * (1.0 - ratio * ratio)
        target = out + offs_m[:, None].to(tl.int64) * out_stride + (offs_n - start)[None, :]
        tl.store(target, g.to(out.dtype.element_ty), mask=inside)
