"""Triton form of `guided_teacher`: what is read from a chunk's logits, each in one pass, and the search.

The logits of a chunk exist in memory, [rows, columns] float32, for their largest; a program reads one row of them.
"""

# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# ruff: noqa: N803 - compile-time constants are written in capitals
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_engine import Blocks
from .triton_kernels import FLOOR

FAN = 4
"""Columns per block of the level of maxima that is made here; the same as guided.FAN."""
BLOCK = Blocks(1, 1024, 1, 4, 1, 1)
"""Columns that a program takes at a time (four of them with FAN), and its warps."""
MOST_SEARCHED = 4096
"""Largest `top` whose logits a program keeps in registers."""


@triton.jit
def _terms(z, shift):
    """e^(z - shift) and its product with z - shift."""
    x = tl.maximum(z - shift, FLOOR)
    e = tl.exp2(x * 1.4426950408889634)
    return e, e * x


@triton.jit
def summary_kernel(logits, maxima, out, stride, rows, quarter, BLOCK_N: tl.constexpr):
    """Of rows of 4 `quarter` logits: largest, sum e^d and sum e^d d into out [3, rows]; maxima [rows, quarter].

    With d = logit - largest. A maximum is that of columns i, i + quarter, i + 2 quarter, i + 3 quarter.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    m, s, t = float("-inf"), 0.0, 0.0
    for start in range(0, quarter, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        live = offs < quarter
        a = tl.load(base + offs, mask=live, other=float("-inf"))
        b = tl.load(base + quarter + offs, mask=live, other=float("-inf"))
        c = tl.load(base + 2 * quarter + offs, mask=live, other=float("-inf"))
        d = tl.load(base + 3 * quarter + offs, mask=live, other=float("-inf"))
        top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
        tl.store(maxima + row.to(tl.int64) * quarter + offs, top, mask=live)
        before = m
        m = tl.maximum(m, tl.max(top, 0))
        shift = tl.where(m == float("-inf"), 0.0, m)
        down = tl.maximum(before - shift, FLOOR)
        f = tl.exp2(down * LOG2E)
        t = f * (t + down * s)
        s = f * s
        quarters = (a, b, c, d)
        for index in tl.static_range(4):
            e, weighted = _terms(quarters[index], shift)
            s += tl.sum(e, 0)
            t += tl.sum(weighted, 0)
    tl.store(out + row, m)
    tl.store(out + rows + row, s)
    tl.store(out + 2 * rows + row, t)


@triton.jit
def temper_kernel(logits, maximum, temperature, out, stride, valid, BLOCK_N: tl.constexpr):
    """out [rows]: sum e^((logit - maximum) / temperature) over `valid` columns."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    shift = tl.load(maximum + row)
    scale = 1.4426950408889634 / tl.load(temperature + row)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, valid, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        z = tl.load(base + offs, mask=offs < valid, other=float("-inf"))
        total += tl.exp2((z - shift) * scale)
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def _entropy(x, temperature):
    """Nats, of logits `x` times log2(e) with maximum 0."""
    powers = x / temperature
    e = tl.exp2(powers)
    s = tl.sum(e, 0)
    return tl.log(s) - tl.sum(e * powers, 0) / s / 1.4426950408889634


@triton.jit
def search_kernel(
    tops, entropy, out, stride, count, low, high, pivot, slope, amplitude, floor, iterations, BLOCK_N: tl.constexpr
):
    """out [rows]: temperatures for rows of `count` logits; `entropy` [rows] is that of the whole row."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK_N)
    z = tl.load(tops + row.to(tl.int64) * stride + offs, mask=offs < count, other=float("-inf"))
    top = tl.max(z, 0)
    x = tl.maximum(z - tl.where(top == float("-inf"), 0.0, top), FLOOR) * 1.4426950408889634
    now = _entropy(x, 1.0)
    goal = now + amplitude / (1.0 + tl.exp(-slope * (now - pivot)))
    lowest = (goal <= _entropy(x, low)) | (tl.load(entropy + row) <= floor)
    highest = goal >= _entropy(x, high)
    left, right = low, high
    for _ in range(0, iterations):
        middle = (left + right) / 2
        below = _entropy(x, middle) < goal
        left = tl.where(below, middle, left)
        right = tl.where(below, right, middle)
    found = tl.where(highest, high, (left + right) / 2)
    tl.store(out + row, tl.where(lowest, low, found))


SUMMARY_KERNEL: Any = summary_kernel
TEMPER_KERNEL: Any = temper_kernel
SEARCH_KERNEL: Any = search_kernel
"""Launchable by [grid], which their decorator does not tell a type checker."""


def summarise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Moments [3, n] (largest, sum e^d, sum e^d d) of n rows of logits, and maxima [n, columns / 4]."""
    rows, width = logits.shape
    out = torch.empty((3, rows), device=logits.device)
    maxima = torch.empty((rows, width // FAN), device=logits.device)
    if rows:
        SUMMARY_KERNEL[(rows,)](
            logits, maxima, out, logits.stride(0), rows, width // FAN, BLOCK_N=BLOCK.columns, num_warps=BLOCK.warps
        )
    return out, maxima


def temper(logits: Tensor, maximum: Tensor, temperature: Tensor) -> Tensor:
    """[n] sums of e^((logit - maximum) / temperature) over rows of logits."""
    rows, valid = logits.shape
    out = torch.empty(rows, device=logits.device)
    if rows:
        TEMPER_KERNEL[(rows,)](
            logits, maximum.contiguous(), temperature.contiguous(), out, logits.stride(0), valid,
            BLOCK_N=BLOCK.columns, num_warps=BLOCK.warps,
        )  # fmt: skip
    return out


def temperature(search: Any, tops: Tensor, entropy: Tensor) -> Tensor:
    """[n] temperatures for top logits [n, K], as `Search.temperature` of `search`, a `guided.Search`."""
    if tops.shape[1] > MOST_SEARCHED:
        return search.temperature(tops, entropy)
    rows, count = tops.shape
    tops = tops.contiguous()
    out = torch.empty(rows, device=tops.device)
    if rows:
        SEARCH_KERNEL[(rows,)](
            tops, entropy.contiguous(), out, tops.stride(0), count, *search.bounds, search.pivot, search.slope,
            search.amplitude, search.floor, search.iterations,
            BLOCK_N=triton.next_power_of_2(count), num_warps=BLOCK.warps,
        )  # fmt: skip
    return out
