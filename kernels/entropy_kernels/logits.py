"""The autograd function behind `token_stats_from_logits`: the logits are read, never written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked
from .collectives import merge_over_ranks
from .head import Call, finalise_outputs, kept_rows, select_rows, spread, upstream
from .moments import Statistics, coefficients, finish
from .tiles import LogitTiles


class LogitStatsFunction(torch.autograd.Function):
    """logits [T, V_l] -> the outputs named by the call. Kept: the logits, by reference."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: Call) -> tuple[Tensor, ...]:
        """The outputs of the call, [T] each."""
        rows = kept_rows(call.keep, call.compact)
        request = select_rows(call.request, rows)
        tiles = LogitTiles(logits, rows)
        moments, _, infinite = chunked.forward(tiles, tiles.rows, request, logits.device)
        statistics = finish(merge_over_ranks(moments, request), request)
        ctx.call, ctx.rows, ctx.infinite = call, rows, infinite
        top_ids = statistics.outputs.get("topk_ids")
        ctx.save_for_backward(logits, top_ids, *statistics.kept())
        values = [spread(statistics.outputs[n], rows, logits.shape[0]) for n in call.outputs]
        return finalise_outputs(ctx, call, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        """The gradient of the logits, in their dtype."""
        call: Call = ctx.call
        logits, top_ids, *numbers = ctx.saved_tensors
        statistics = Statistics.restore(numbers, len(call.request.betas))
        request = select_rows(call.request, ctx.rows)
        grads = upstream(call, gradients, ctx.rows, statistics.maximum.dtype)
        coefs = coefficients(statistics, request, grads, top_ids)
        live = kept_rows(coefs.active(), call.compact)
        rows = ctx.rows
        if live is not None:
            coefs, request = coefs.select(live), select_rows(request, live)
            rows = live if rows is None else rows[live]
        tiles = LogitTiles(logits, rows)
        tiles.begin_backward()
        chunked.backward(tiles, tiles.rows, request, coefs, None, None, ctx.infinite)
        return tiles.gradient, None
