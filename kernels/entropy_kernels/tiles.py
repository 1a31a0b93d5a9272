"""Where tiles of logits come from and where tiles of their gradient go.

`HiddenTiles` makes them with matrix products and never holds more than one; `LogitTiles` reads
them from a matrix that already exists. Both offer the same few methods to `chunked`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .records import accumulate_dtype

Rows = slice | Tensor
"""Rows of a call: consecutive ones, or their indices."""


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right` into `out`, accumulated in float32 and never rounded to a 16-bit type."""
    if out.numel() == 0:
        return out
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return native.product(left, right, out)


class HiddenTiles:
    """Logit tiles of `hidden [N, H] @ weight [V_l, H]^T`, and the two gradient products."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden = hidden
        self.weight = weight
        self.dtype = accumulate_dtype(hidden.dtype)
        exact = hidden.dtype == self.dtype or hidden.is_cuda or native.serves(hidden, weight)
        self.wide_hidden = hidden if exact else hidden.to(self.dtype)
        self.rows = hidden.shape[0]

    def load_weight(self, start: int, stop: int) -> None:
        """Make columns [start, stop) of the logits the current ones."""
        self.span = (start, stop)
        tile = self.weight[start:stop]
        self.wide_tile = tile if self.wide_hidden is self.hidden else tile.to(self.dtype)

    def read(self, rows: Rows, out: Tensor) -> None:
        """Write the logits of `rows` and the current columns into `out`."""
        product(self.wide_hidden[rows], self.wide_tile.t(), out)

    def begin_backward(self, need: tuple[bool, bool], main_grad: Tensor | None, valid: int) -> None:
        """Allocate what the gradient products write to; rows from `valid` on are padding."""
        need_hidden, need_weight = need
        self.grad_hidden = self.grad_weight = None
        self.main_grad = main_grad if need_weight else None
        if need_hidden:
            self.grad_hidden = self.hidden.new_zeros(self.hidden.shape, dtype=self.dtype)
        if need_weight and main_grad is None:
            self.grad_weight = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
            self.grad_weight[valid if self.rows else 0 :].zero_()
        self.weight_tile: Tensor | None = None

    def write(self, rows: Rows, gradient: Tensor, scratch: Tensor, first: bool = True, last: bool = True) -> None:
        """Multiply out the logit gradient [rows, current columns]; `scratch` has its shape.

        `first` and `last` say whether these are the first and the last rows of the current columns.
        """
        start, stop = self.span
        weight, hidden = self.weight[start:stop], self.hidden[rows]
        if gradient.dtype != weight.dtype:
            narrow = scratch.view(-1).view(weight.dtype)[: gradient.numel()]
            gradient = narrow.view(gradient.shape).copy_(gradient)
        if self.grad_hidden is not None:
            target = self.grad_hidden[rows]
            self._add_product(target, gradient, weight)
            if isinstance(rows, Tensor):
                self.grad_hidden[rows] = target
        if self.main_grad is not None:
            self._add_product(self.main_grad[start:stop], gradient.t(), hidden)
        elif self.grad_weight is not None:
            self._write_weight(gradient, hidden, first, last)

    def _add_product(self, target: Tensor, left: Tensor, right: Tensor) -> None:
        if left.numel() == 0:
            return
        if target.dtype == left.dtype:
            target.addmm_(left, right)
        elif left.is_cuda:
            torch.addmm(target, left, right, out_dtype=target.dtype, out=target)
        elif native.serves(left, right):
            native.product(left, right, target, add=True)
        else:
            target.add_(torch.mm(left, right))

    def _write_weight(self, gradient: Tensor, hidden: Tensor, first: bool, last: bool) -> None:
        """A tile of the weight gradient: in place if one product makes it, else summed in fp32."""
        assert self.grad_weight is not None
        start, stop = self.span
        target = self.grad_weight[start:stop]
        if first and (last or target.dtype == self.dtype):
            torch.mm(gradient.t(), hidden, out=target)
            return
        if target.dtype == self.dtype:
            target.addmm_(gradient.t(), hidden)
            return
        if first:
            self.weight_tile = torch.zeros(target.shape, dtype=self.dtype, device=target.device)
        assert self.weight_tile is not None
        self._add_product(self.weight_tile, gradient.t(), hidden)
        if last:
            target.copy_(self.weight_tile)


class LogitTiles:
    """Tiles of some rows of logits [T, V_l] that already exist; their gradient in their type."""

    def __init__(self, logits: Tensor, chosen: Tensor | None) -> None:
        self.logits = logits
        self.chosen = chosen
        self.rows = logits.shape[0] if chosen is None else chosen.shape[0]
        self.dtype = accumulate_dtype(logits.dtype)

    def load_weight(self, start: int, stop: int) -> None:
        """Make columns [start, stop) the current ones."""
        self.span = (start, stop)

    def read(self, rows: Rows, out: Tensor) -> None:
        """Copy the logits of `rows` and the current columns into `out`."""
        where = rows if self.chosen is None else self.chosen[rows]
        out.copy_(self.logits[:, self.span[0] : self.span[1]][where])

    def begin_backward(self) -> None:
        """Allocate the gradient; padded columns and rows that were not chosen stay zero."""
        self.gradient = torch.zeros_like(self.logits, memory_format=torch.contiguous_format)

    def write(self, rows: Rows, gradient: Tensor, scratch: Tensor, first: bool, last: bool) -> None:
        """Store the gradient tile; the rest is what `HiddenTiles.write` needs."""
        where = rows if self.chosen is None else self.chosen[rows]
        self.gradient[:, self.span[0] : self.span[1]][where] = gradient.to(self.gradient.dtype)
