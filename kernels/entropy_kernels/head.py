"""The autograd function behind `token_stats`: rows, collectives and the order of things.

Forward: gather hidden (sequence parallel) -> drop ignored rows -> moments of the shard -> one
all-gather of moments -> statistics. Backward: coefficients per row -> drop rows without gradient
-> gradient tiles -> sum of the hidden gradient over the ranks (the only collective).

Kept for backward: the weight (by reference), the hidden rows that were computed (a reference when
none was dropped and nothing was gathered), a handful of numbers per row, in save mode float16
[N, V_l], and with `skip_mass` a few bytes per row and tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked
from .collectives import gather_rows, merge_over_ranks, reduce_gradient
from .moments import Coefficients, Moments, Statistics, coefficients, finish
from .records import Request, take
from .tiles import HiddenTiles

OUTPUTS = (
    "logprob",
    "entropy",
    "varentropy",
    "teacher_logprob",
    "teacher_entropy",
    "kl_forward",
    "kl_reverse",
    "topk_logprobs",
    "topk_ids",
    "skipped_mass",
)


class Engine(Protocol):
    """What an implementation offers: the modules `chunked` and `triton_engine`."""

    def forward(
        self, tiles: HiddenTiles, rows: int, request: Request, device: torch.device
    ) -> tuple[Moments, chunked.Saved | None, bool]:
        """Moments of the shard, what save mode keeps, whether backward must clamp."""
        ...

    def backward(
        self,
        tiles: HiddenTiles,
        rows: int,
        request: Request,
        coefs: Coefficients,
        saved: chunked.Saved | None,
        kept: Tensor | None,
        infinite: bool,
    ) -> None:
        """Hand every tile of the logit gradient to `tiles.write`."""
        ...


@dataclass
class Call:
    """One call's settings that are not per-row numbers."""

    request: Request
    keep: Tensor
    """[T] bool, rows that count."""
    outputs: tuple[str, ...]
    """Names of the outputs to return, in the order of OUTPUTS."""
    entropy_grad: bool
    sequence_parallel: bool
    main_grad: Tensor | None
    engine: Engine | None
    """None: the reference."""
    compact: bool


def select_rows(request: Request, rows: Tensor | None) -> Request:
    """The request restricted to some rows (None: all)."""
    if rows is None:
        return request
    teacher = None if request.teacher_beta is None else take(request.teacher_beta, rows)
    return replace(
        request,
        labels=request.labels[rows],
        beta=take(request.beta, rows),
        teacher_beta=teacher,
    )


def kept_rows(keep: Tensor, compact: bool) -> Tensor | None:
    """Indices of the True rows, or None for all of them (on a GPU this reads one number back)."""
    if not compact:
        return None
    rows = keep.nonzero()[:, 0]
    return None if rows.numel() == keep.numel() else rows


def spread(values: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """Per-row values back at their places among `total` rows, 0 elsewhere."""
    if rows is None:
        return values
    full = values.new_zeros((total, *values.shape[1:]))
    return full.index_copy_(0, rows, values)


def finalise_outputs(ctx: Any, call: Call, values: list[Tensor]) -> tuple[Tensor, ...]:
    """Zero ignored rows that were computed all the same, and mark what carries no gradient."""
    if not call.compact:
        keeps = [call.keep if v.dim() == 1 else call.keep[:, None] for v in values]
        values = [v.masked_fill(~k, 0) for v, k in zip(values, keeps, strict=True)]
    fixed = [v for v, n in zip(values, call.outputs, strict=True) if n in ("topk_ids", "skipped_mass")]
    if not call.entropy_grad and "entropy" in call.outputs:
        fixed.append(values[call.outputs.index("entropy")])
    ctx.mark_non_differentiable(*fixed)
    ctx.set_materialize_grads(False)
    return tuple(values)


def upstream(
    call: Call, gradients: tuple[Tensor | None, ...], rows: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The upstream gradients that exist, by output name, for the computed rows."""
    present = {n: g for n, g in zip(call.outputs, gradients, strict=True) if g is not None}
    if not call.compact:
        keeps = {n: call.keep if g.dim() == 1 else call.keep[:, None] for n, g in present.items()}
        present = {n: g.masked_fill(~keeps[n], 0.0) for n, g in present.items()}
    return {name: (gradient if rows is None else gradient[rows]).to(dtype) for name, gradient in present.items()}


class TokenStatsFunction(torch.autograd.Function):
    """hidden [T or T/tp, H], weight [V_l, H] -> the outputs named by the call."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, call: Call) -> tuple[Tensor, ...]:
        """The outputs of the call, [T] each."""
        shard = call.request.shard
        full = gather_rows(hidden, shard) if call.sequence_parallel else hidden
        total = full.shape[0]
        rows = kept_rows(call.keep, call.compact)
        request = select_rows(call.request, rows)
        active = full if rows is None else full[rows]
        tiles = HiddenTiles(active, weight)
        assert call.engine is not None
        moments, saved, infinite = call.engine.forward(tiles, active.shape[0], request, hidden.device)
        statistics = finish(merge_over_ranks(moments, request), request)
        if saved is not None and request.skip_mass:
            statistics.outputs["skipped_mass"] = chunked.choose_tiles(saved, statistics, request)
        ctx.call, ctx.rows, ctx.total, ctx.infinite = call, rows, total, infinite
        _remember(ctx, active, weight, statistics, saved)
        values = [spread(statistics.outputs[name], rows, total) for name in call.outputs]
        return finalise_outputs(ctx, call, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden and weight from those of the outputs."""
        call: Call = ctx.call
        active, weight, statistics, saved, top_ids = _recall(ctx)
        request = select_rows(call.request, ctx.rows)
        grads = upstream(call, gradients, ctx.rows, statistics.maximum.dtype)
        coefs = coefficients(statistics, request, grads, top_ids)
        live = kept_rows(coefs.active(), call.compact)
        if live is not None:
            coefs, active = coefs.select(live), active[live]
            request = select_rows(request, live)
        tiles = HiddenTiles(active, weight)
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        tiles.begin_backward(need, call.main_grad, request.shard.valid)
        assert call.engine is not None
        call.engine.backward(tiles, active.shape[0], request, coefs, saved, live, ctx.infinite)
        return _hidden_gradient(ctx, tiles.grad_hidden, live), weight_gradient(tiles, weight), None


def _remember(ctx: Any, active: Tensor, weight: Tensor, statistics: Statistics, saved: chunked.Saved | None) -> None:
    kept = [active, weight, statistics.outputs.get("topk_ids")]
    kept += [None, None, None] if saved is None else [saved.maxima, saved.shifted, saved.alive]
    ctx.save_for_backward(*kept, *statistics.kept())


def _recall(
    ctx: Any,
) -> tuple[Tensor, Tensor, Statistics, chunked.Saved | None, Tensor | None]:
    active, weight, top_ids, maxima, shifted, alive, *numbers = ctx.saved_tensors
    statistics = Statistics.restore(numbers, len(ctx.call.request.betas))
    saved = None if maxima is None else chunked.Saved(maxima, shifted, alive=alive)
    return active, weight, statistics, saved, top_ids


def _hidden_gradient(ctx: Any, gradient: Tensor | None, live: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    call: Call = ctx.call
    rows = ctx.rows
    if live is not None:
        rows = live if rows is None else rows[live]
    gradient = spread(gradient, rows, ctx.total)
    gradient = reduce_gradient(gradient, call.request.shard, call.sequence_parallel)
    return gradient.to(ctx.saved_tensors[0].dtype)


def weight_gradient(tiles: HiddenTiles, weight: Tensor) -> Tensor | None:
    """The gradient to return; with `main_grad` it is already where it belongs.

    Megatron-Core's data-parallel hooks run where a gradient arrives. A parameter that carries
    `grad_added_to_main_grad` (their protocol) is marked, so that they ignore its gradient, and gets
    some numbers that take no memory. With `zero_out_wgrad` they add what arrives: the gradient of
    another use, such as a tied embedding, which makes them run as well.
    """
    if tiles.main_grad is None:
        return tiles.grad_weight
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010 - not an attribute of Tensor
    if getattr(weight, "zero_out_wgrad", False):
        return None
    return tiles.main_grad.view(-1).view(weight.dtype)[: weight.numel()].view(weight.shape)
