"""Shifted softmax moments, their merge, and the statistics and gradients they give.

With z the logits of one row, m = max z, d = z - m <= 0 and one inverse temperature b:
    s = sum e^{bd},   t = sum e^{bd} d,   w = sum e^{bd} d^2.
Shifting by the maximum keeps every term small, so the entropy log s - b t/s of a peaked row is a
difference of two small numbers instead of two large ones. One m serves every temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .records import Request

FLOOR = -1e18
"""Stands for -inf where a shift is multiplied: its square is finite in float32, and e^FLOOR is 0."""


@dataclass
class Moments:
    """Moments of N rows over some part of the vocabulary; lists hold one entry per temperature."""

    maximum: Tensor
    sums: list[Tensor]
    firsts: list[Tensor]
    """t per temperature; empty when only log-probs are wanted."""
    seconds: list[Tensor]
    """w of the student temperature in a list of one; empty unless wanted."""
    label_logit: Tensor
    """[N], -inf where the target lies in another part."""
    top_values: Tensor | None = None
    """[N, K] largest logits, descending."""
    top_ids: Tensor | None = None
    """[N, K] int64 vocabulary ids; -1 where the part has fewer than K columns."""

    @staticmethod
    def empty(rows: int, request: Request, like: Tensor) -> Moments:
        """The moments of no columns at all: the neutral element of `merge`."""
        zeros = [like.new_zeros(rows) for _ in request.betas]
        lowest = like.new_full((rows,), -torch.inf)
        moments = Moments(
            maximum=lowest,
            sums=zeros,
            firsts=[z.clone() for z in zeros] if request.want_entropy else [],
            seconds=[zeros[0].clone()] if request.want_variance else [],
            label_logit=lowest.clone(),
        )
        if request.topk:
            moments.top_values = like.new_full((rows, request.topk), -torch.inf)
            moments.top_ids = torch.full_like(moments.top_values, -1, dtype=torch.int64)
        return moments

    def pack(self) -> Tensor:
        """[fields, N] in one floating tensor, for one collective; ids travel as their bits."""
        parts = [self.maximum, *self.sums, *self.firsts, *self.seconds, self.label_logit]
        packed = torch.stack(parts)
        if self.top_values is None or self.top_ids is None:
            return packed
        bits = torch.int64 if packed.dtype == torch.float64 else torch.int32
        ids = self.top_ids.to(bits).view(packed.dtype)
        return torch.cat([packed, self.top_values.t(), ids.t()])

    def unpack(self, packed: Tensor) -> Moments:
        """The inverse of `pack`, for a tensor packed from moments of this one's form."""
        rows = list(packed.unbind(0))
        count, firsts, seconds = len(self.sums), len(self.firsts), len(self.seconds)
        position = 1 + count + firsts + seconds
        moments = Moments(
            maximum=rows[0],
            sums=rows[1 : 1 + count],
            firsts=rows[1 + count : 1 + count + firsts],
            seconds=rows[1 + count + firsts : position],
            label_logit=rows[position],
        )
        if self.top_values is not None:
            width = self.top_values.shape[1]
            bits = torch.int64 if packed.dtype == torch.float64 else torch.int32
            moments.top_values = packed[position + 1 : position + 1 + width].t()
            ids = packed[position + 1 + width :].contiguous().view(bits)
            moments.top_ids = ids.t().to(torch.int64)
        return moments


def merge(left: Moments, right: Moments, betas: list[Tensor | float]) -> Moments:
    """The moments of the union of two disjoint parts of the vocabulary."""
    maximum = torch.maximum(left.maximum, right.maximum)
    finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
    merged = Moments(maximum, [], [], [], torch.maximum(left.label_logit, right.label_logit))
    for part in (left, right):
        shift = (part.maximum - finite).clamp(min=FLOOR)
        for index, beta in enumerate(betas):
            factor = torch.exp(beta * shift)
            s = part.sums[index]
            _accumulate(merged.sums, index, factor * s)
            if part.firsts:
                t = part.firsts[index]
                _accumulate(merged.firsts, index, factor * (t + shift * s))
                if index == 0 and part.seconds:
                    w = part.seconds[0] + shift * (2 * t + shift * s)
                    _accumulate(merged.seconds, 0, factor * w)
    _merge_top(merged, left, right)
    return merged


def _accumulate(terms: list[Tensor], index: int, value: Tensor) -> None:
    if index < len(terms):
        terms[index] = terms[index] + value
    else:
        terms.append(value)


def _merge_top(merged: Moments, left: Moments, right: Moments) -> None:
    if left.top_values is None or left.top_ids is None:
        return
    assert right.top_values is not None and right.top_ids is not None
    values = torch.cat([left.top_values, right.top_values], dim=1)
    ids = torch.cat([left.top_ids, right.top_ids], dim=1)
    merged.top_values, order = values.topk(left.top_values.shape[1], dim=1)
    merged.top_ids = ids.gather(1, order)


@dataclass
class Statistics:
    """What the merged moments say about N rows; the part of it a gradient needs is kept."""

    maximum: Tensor
    log_sums: list[Tensor]
    means: list[Tensor]
    """E[d] per temperature, <= 0."""
    variance: Tensor | None
    """Var[z] at the student temperature."""
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def kept(self) -> list[Tensor | None]:
        """The tensors a backward needs, in the order `restore` takes them."""
        return [self.maximum, self.variance, *self.log_sums, *self.means]

    @staticmethod
    def restore(kept: list[Tensor], temperatures: int) -> Statistics:
        """The inverse of `kept`."""
        maximum, variance, *rest = kept
        return Statistics(maximum, rest[:temperatures], rest[temperatures:], variance)


def finish(moments: Moments, request: Request) -> Statistics:
    """Turn merged moments into statistics (formulas in the library's README)."""
    betas = request.betas
    log_sums = [s.log() for s in moments.sums]
    means = [t / s for t, s in zip(moments.firsts, moments.sums, strict=False)]
    shifted_label = moments.label_logit - moments.maximum
    outputs = {"logprob": betas[0] * shifted_label - log_sums[0]}
    variance = None
    if means:
        outputs["entropy"] = log_sums[0] - betas[0] * means[0]
    if moments.seconds:
        variance = (moments.seconds[0] / moments.sums[0] - means[0] ** 2).clamp(min=0.0)
        outputs["varentropy"] = betas[0] ** 2 * variance
    if len(betas) == 2:
        gap = betas[1] - betas[0]
        outputs["teacher_logprob"] = betas[1] * shifted_label - log_sums[1]
        outputs["teacher_entropy"] = log_sums[1] - betas[1] * means[1]
        outputs["kl_forward"] = (gap * means[1] - log_sums[1] + log_sums[0]).clamp(min=0.0)
        outputs["kl_reverse"] = (log_sums[1] - log_sums[0] - gap * means[0]).clamp(min=0.0)
    if moments.top_values is not None and moments.top_ids is not None:
        shifted = moments.top_values - moments.maximum[:, None]
        beta = betas[0][:, None] if isinstance(betas[0], Tensor) else betas[0]
        outputs["topk_logprobs"] = beta * shifted - log_sums[0][:, None]
        outputs["topk_ids"] = moments.top_ids
    return Statistics(moments.maximum, log_sums, means, variance, outputs)


@dataclass
class Coefficients:
    """Per-row numbers that turn a tile of logits into a tile of their gradient.

    With delta = z - shift, p~ = e^{b delta} and q = e^{b' delta + teacher_log}:
        g = p~ (c0 + c1 delta + c2 delta^2) + q (k0 + k1 delta) + sum_i spike_i 1[j = id_i].
    """

    shift: Tensor
    beta: Tensor | float
    c0: Tensor
    c1: Tensor | None
    c2: Tensor | None
    teacher_beta: Tensor | float | None
    teacher_log: Tensor | None
    k0: Tensor | None
    k1: Tensor | None
    spike_ids: Tensor
    """[N, 1 + K] int64 counted from the shard's first row."""
    spikes: Tensor
    """[N, 1 + K]."""

    def select(self, rows: Tensor | slice) -> Coefficients:
        """The same numbers for some of the rows."""
        changed: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            changed[name] = value[rows] if isinstance(value, Tensor) else value
        return replace(self, **changed)

    def active(self) -> Tensor:
        """[N] bool: rows whose gradient is not identically zero."""
        live = self.c0 != 0
        for term in (self.c1, self.c2, self.k0, self.k1):
            if term is not None:
                live = live | (term != 0)
        return live | (self.spikes != 0).any(dim=1)


def coefficients(
    statistics: Statistics, request: Request, grads: dict[str, Tensor], top_ids: Tensor | None
) -> Coefficients:
    """Upstream gradients per output ([N], missing = zero) as coefficients of the logit gradient."""
    beta = request.beta
    zero = torch.zeros_like(statistics.maximum)
    a = grads.get("logprob", zero)
    flat, linear, square = -a * beta, None, None
    if "kl_forward" in grads:
        flat = flat + beta * grads["kl_forward"]
    spike_ids, spikes = request.labels[:, None], (a * beta)[:, None]
    if "topk_logprobs" in grads and top_ids is not None:
        scaled = grads["topk_logprobs"] * (beta[:, None] if isinstance(beta, Tensor) else beta)
        flat = flat - scaled.sum(dim=1)
        spike_ids = torch.cat([spike_ids, top_ids - request.shard.start], dim=1)
        spikes = torch.cat([spikes, scaled], dim=1)
    if "entropy" in grads:
        linear = -(beta**2) * grads["entropy"]
    if "kl_reverse" in grads and request.teacher_beta is not None:
        term = beta * (beta - request.teacher_beta) * grads["kl_reverse"]
        linear = term if linear is None else linear + term
    if "varentropy" in grads:
        e = grads["varentropy"]
        assert statistics.variance is not None
        flat = flat - e * beta**3 * statistics.variance
        linear = 2 * e * beta**2 if linear is None else linear + 2 * e * beta**2
        square = e * beta**3
    return _normalised(statistics, request, grads, (flat, linear, square), spike_ids, spikes)


def _normalised(
    statistics: Statistics,
    request: Request,
    grads: dict[str, Tensor],
    terms: tuple[Tensor, Tensor | None, Tensor | None],
    spike_ids: Tensor,
    spikes: Tensor,
) -> Coefficients:
    """Fold the softmax normalisers and the teacher's terms into the coefficients."""
    beta, teacher_beta = request.beta, request.teacher_beta
    mean = statistics.means[0] if statistics.means else torch.zeros_like(statistics.maximum)
    scale = torch.exp(beta * mean - statistics.log_sums[0])
    c0, c1, c2 = (None if term is None else term * scale for term in terms)
    k0 = k1 = teacher_log = None
    if teacher_beta is not None and grads.keys() & {
        "kl_forward",
        "teacher_logprob",
        "teacher_entropy",
    }:
        zero = torch.zeros_like(statistics.maximum)
        a = grads.get("teacher_logprob", zero)
        gap = mean - statistics.means[1]
        k1 = -(teacher_beta**2) * grads.get("teacher_entropy", zero)
        k0 = k1 * gap - a * teacher_beta - request.beta * grads.get("kl_forward", zero)
        teacher_log = teacher_beta * mean - statistics.log_sums[1]
        first = spikes[:, :1] + (a * teacher_beta)[:, None]
        spikes = torch.cat([first, spikes[:, 1:]], dim=1)
    assert c0 is not None
    return Coefficients(
        shift=statistics.maximum + mean,
        beta=beta,
        c0=c0,
        c1=c1,
        c2=c2,
        teacher_beta=teacher_beta,
        teacher_log=teacher_log,
        k0=k0,
        k1=k1,
        spike_ids=spike_ids,
        spikes=spikes,
    )
