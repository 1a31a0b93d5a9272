"""The Triton kernels: moments of a vocabulary shard, and tiles of the logit gradient.

Both walk a flat list of tasks persistently (one program per multiprocessor, row blocks fastest so that neighbours share
a weight tile in L2). Logits stay on chip in float32. On Hopper and Blackwell operands and results go through TMA
descriptors; elsewhere, and for shapes TMA cannot address, through pointers. Every output element has one writer.

A tile is taken in parts of its columns, each as if it were a tile of its own, and sums are in units
of the exponent of two that a logit stands for, x = beta log2(e) (z - shift); otherwise the compiler
spills (compile_table.py). The difference comes first: a fused multiply-add would save an instruction,
but round the shift, so that adding a constant to all logits would change results.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# ruff: noqa: N803 - compile-time constants are written in capitals
from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e18)


@triton.jit
def logits_tile(
    h, w, h_stride, w_stride, row0, col0, rows, stop, H,
    TMA: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_M, BLOCK_N] of rows row0.. and columns col0..; whatever from column `stop` on."""
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
    return acc


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def column_parts(tile, PARTS: tl.constexpr):
    """The columns of a tile in 1, 2 or 4 parts, from left to right."""
    if PARTS == 1:
        return (tile,)
    elif PARTS == 2:
        return _halves(tile)
    else:
        left, right = _halves(tile)
        a, b = _halves(left)
        c, d = _halves(right)
        return a, b, c, d


@triton.jit
def _capped(z, cap):
    """cap * tanh(z / cap)."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(z * (2.8853900817779268 / cap)))


@triton.jit
def exponent(z, scale, offset):
    """scale (z + offset) per row, -1e18 at least."""
    return tl.maximum((z + offset[:, None]) * scale[:, None], FLOOR)


@triton.jit
def _add_part(
    z, scale, ratio, offset, s, t, q, s2, t2,
    TEACHER: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """The sums with the columns of `z` added; `offset` is minus the largest logit so far."""
    x = exponent(z, scale, offset)
    e = tl.exp2(x)
    s += tl.sum(e, 1)
    if FIRST:
        t += tl.sum(e * x, 1)
    if SECOND:
        q += tl.sum(e * x * x, 1)
    if TEACHER:
        e = tl.exp2(x * ratio[:, None])
        s2 += tl.sum(e, 1)
        t2 += tl.sum(e * x, 1)
    return s, t, q, s2, t2


@triton.jit
def _rebased(
    shift, ratio, s, t, q, s2, t2,
    TEACHER: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """The sums after `shift` was added to every exponent."""
    f = tl.exp2(shift)
    if SECOND:
        q = f * (q + shift * (2.0 * t + shift * s))
    if FIRST:
        t = f * (t + shift * s)
    s = f * s
    if TEACHER:
        f = tl.exp2(shift * ratio)
        t2 = f * (t2 + shift * s2)
        s2 = f * s2
    return s, t, q, s2, t2


@triton.jit
def _save_part(z, top, saved, saved_stride, row0, col0, rows, valid, TMA: tl.constexpr):
    """Store float16(z - maximum of the part)."""
    value = (z - tl.where(top == float("-inf"), 0.0, top)[:, None]).to(tl.float16)
    if TMA:
        saved.store([row0, col0], value)
    else:
        offs_m = row0 + tl.arange(0, z.shape[0])
        offs_n = col0 + tl.arange(0, z.shape[1])
        place = offs_m[:, None].to(tl.int64) * saved_stride + offs_n[None, :]
        tl.store(saved + place, value, mask=(offs_m < rows)[:, None] & (offs_n < valid)[None, :])


@triton.jit
def _label_logit(z, label, col0):
    """[BLOCK_M] the logit in column `label`, counted from the shard's start; -inf where it is not here."""
    offs_n = col0 + tl.arange(0, z.shape[1])
    return tl.max(tl.where(offs_n[None, :] == label[:, None], z, float("-inf")), 1)


@triton.jit
def _owned(label, col0, BLOCK_N: tl.constexpr):
    """Whether any row's label lies in the tile."""
    return tl.max(((label >= col0) & (label < col0 + BLOCK_N)).to(tl.int32), 0) > 0


@triton.jit
def moments_kernel(
    h, w, labels, beta, teacher_beta, out, saved, maxima,
    h_stride, w_stride, saved_stride, rows, H, valid, cap, splits, tiles_per_split,
    TEACHER: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SAVE: tl.constexpr,
    HAS_CAP: tl.constexpr, TMA: tl.constexpr, IEEE: tl.constexpr, SPECIALIZED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out [splits, 7, rows]: m, s, t, w, label logit, teacher s, teacher t of each split.

    SPECIALIZED: one group of warps loads and two compute. The compiler does so only for tiles in
    one part, without branches on the way and with descriptors made here, from pointers.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    blocks_m = tl.cdiv(rows, BLOCK_M)
    if SPECIALIZED:
        h = tl.make_tensor_descriptor(h, [rows, H], [h_stride, 1], [BLOCK_M, BLOCK_K])
        w = tl.make_tensor_descriptor(w, [valid, H], [w_stride, 1], [BLOCK_N, BLOCK_K])
    for task in range(tl.program_id(0), blocks_m * splits, tl.num_programs(0)):
        row0 = (task % blocks_m) * BLOCK_M
        split = task // blocks_m
        offs_m = row0 + tl.arange(0, BLOCK_M)
        live = offs_m < rows
        label = tl.load(labels + offs_m, mask=live, other=-1)
        scale = tl.load(beta + offs_m, mask=live, other=1.0) * LOG2E
        ratio = scale
        if TEACHER:
            ratio = tl.load(teacher_beta + offs_m, mask=live, other=1.0) * LOG2E / scale
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        y = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        s = tl.zeros((BLOCK_M,), tl.float32)
        t = tl.zeros((BLOCK_M,), tl.float32)
        q = tl.zeros((BLOCK_M,), tl.float32)
        s2 = tl.zeros((BLOCK_M,), tl.float32)
        t2 = tl.zeros((BLOCK_M,), tl.float32)
        first_tile = split * tiles_per_split
        last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(valid, BLOCK_N))
        for tile in tl.range(first_tile, last_tile, warp_specialize=SPECIALIZED):
            col0 = tile * BLOCK_N
            parts = column_parts(logits_tile(
                h, w, h_stride, w_stride, row0, col0, rows, valid, H,
                TMA, IEEE, BLOCK_M, BLOCK_N, BLOCK_K,
            ), PARTS)  # fmt: skip
            has_label = _owned(label, col0, BLOCK_N)
            for index in tl.static_range(PARTS):
                z, first = parts[index], col0 + index * WIDTH
                if HAS_CAP:
                    z = _capped(z, cap)
                if SPECIALIZED or first + WIDTH > valid:
                    z = tl.where((first + tl.arange(0, WIDTH) < valid)[None, :], z, float("-inf"))
                if SPECIALIZED or has_label:
                    y = tl.maximum(y, _label_logit(z, label, first))
                top = tl.max(z, 1)
                if SAVE:
                    if first < valid:
                        tl.store(maxima + (first // WIDTH) * rows + offs_m, top, mask=live)
                    _save_part(z, top, saved, saved_stride, row0, first, rows, valid, TMA)
                before = m
                m = tl.maximum(m, top)
                offset = tl.where(m == float("-inf"), 0.0, -m)
                shift = tl.maximum((before + offset) * scale, FLOOR)
                s, t, q, s2, t2 = _rebased(shift, ratio, s, t, q, s2, t2, TEACHER, FIRST, SECOND)
                s, t, q, s2, t2 = _add_part(z, scale, ratio, offset, s, t, q, s2, t2, TEACHER, FIRST, SECOND)
        base_out = out + split * 7 * rows + offs_m
        tl.store(base_out, m, mask=live)
        tl.store(base_out + rows, s, mask=live)
        tl.store(base_out + 2 * rows, t / scale, mask=live)
        tl.store(base_out + 3 * rows, q / (scale * scale), mask=live)
        tl.store(base_out + 4 * rows, y, mask=live)
        tl.store(base_out + 5 * rows, s2, mask=live)
        tl.store(base_out + 6 * rows, t2 / scale, mask=live)


@triton.jit
def _part_gradient(
    z, scale, offset, c0, c1, c2, ratio, lift, k0, k1,
    LINEAR: tl.constexpr, SQUARE: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """The gradient of a part but for its spikes and the softcap; `offset` is minus the shift."""
    x = exponent(z, scale, offset)
    p = tl.exp2(x)
    if SQUARE:
        g = p * (c0[:, None] + x * (c1[:, None] + x * c2[:, None]))
    elif LINEAR:
        g = p * (c0[:, None] + x * c1[:, None])
    else:
        g = p * c0[:, None]
    if TEACHER:
        g += tl.exp2(x * ratio[:, None] + lift[:, None]) * (k0[:, None] + x * k1[:, None])
    return g


@triton.jit
def gradient_kernel(
    h, w, labels, numbers, saved, maxima, kept, out,
    h_stride, w_stride, saved_stride, out_stride, rows, saved_rows, H, start, stop, cap,
    LINEAR: tl.constexpr, SQUARE: tl.constexpr, TEACHER: tl.constexpr,
    SAVED: tl.constexpr, KEPT: tl.constexpr,
    HAS_CAP: tl.constexpr, TMA: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out [rows, stop - start]: gradient of the logits of columns [start, stop).

    numbers [10, rows], in units of the exponent x: scale, shift, c0, c1, c2, spike, ratio, lift, k0, k1.
    """
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(stop - start, BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    for task in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        row0 = (task % blocks_m) * BLOCK_M
        col0 = start + (task // blocks_m) * BLOCK_N
        offs_m = row0 + tl.arange(0, BLOCK_M)
        live = offs_m < rows
        scale = tl.load(numbers + offs_m, mask=live, other=0.0)
        offset = -tl.load(numbers + rows + offs_m, mask=live, other=0.0)
        c0 = tl.load(numbers + 2 * rows + offs_m, mask=live, other=0.0)
        c1, c2, ratio, lift, k0, k1 = c0, c0, c0, c0, c0, c0
        if LINEAR:
            c1 = tl.load(numbers + 3 * rows + offs_m, mask=live, other=0.0)
        if SQUARE:
            c2 = tl.load(numbers + 4 * rows + offs_m, mask=live, other=0.0)
        if TEACHER:
            ratio = tl.load(numbers + 6 * rows + offs_m, mask=live, other=0.0)
            lift = tl.load(numbers + 7 * rows + offs_m, mask=live, other=0.0)
            k0 = tl.load(numbers + 8 * rows + offs_m, mask=live, other=0.0)
            k1 = tl.load(numbers + 9 * rows + offs_m, mask=live, other=0.0)
        spike = tl.load(numbers + 5 * rows + offs_m, mask=live, other=0.0)
        label = tl.load(labels + offs_m, mask=live, other=-1)
        has_spike = _owned(label, col0, BLOCK_N)
        top = tl.zeros((BLOCK_M,), tl.float32)
        source = offs_m
        if SAVED:
            if KEPT:
                source = tl.load(kept + offs_m, mask=live, other=0)
        else:
            parts = column_parts(logits_tile(
                h, w, h_stride, w_stride, row0, col0, rows, stop, H,
                TMA, IEEE, BLOCK_M, BLOCK_N, BLOCK_K,
            ), PARTS)  # fmt: skip
        for index in tl.static_range(PARTS):
            first = col0 + index * WIDTH
            offs_n = first + tl.arange(0, WIDTH)
            if SAVED:
                place = source[:, None].to(tl.int64) * saved_stride + offs_n[None, :]
                inside = live[:, None] & (offs_n < stop)[None, :]
                top = tl.load(maxima + tl.minimum(first, stop - 1) // WIDTH * saved_rows + source, mask=live, other=0.0)
                top = tl.where(top == float("-inf"), 0.0, top)
                z = tl.load(saved + place, mask=inside, other=0.0).to(tl.float32)
            else:
                z = parts[index]
                if HAS_CAP:
                    z = _capped(z, cap)
            g = _part_gradient(z, scale, offset + top, c0, c1, c2, ratio, lift, k0, k1, LINEAR, SQUARE, TEACHER)
            if has_spike:
                g += tl.where(offs_n[None, :] == label[:, None], spike[:, None], 0.0)
            if HAS_CAP:
                size = (z + top[:, None]) * (1.0 / cap)
                g = g * (1.0 - size * size)
            if TMA:
                out.store([row0, first - start], g.to(out.dtype))
            else:
                target = out + offs_m[:, None].to(tl.int64) * out_stride + (offs_n - start)[None, :]
                tl.store(target, g.to(out.dtype.element_ty), mask=live[:, None] & (offs_n < stop)[None, :])
