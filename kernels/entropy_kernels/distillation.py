"""Full-vocabulary distillation: KL divergences to a second model, and their gradient.

Tiles of both models' logits are made side by side and forgotten, forward and backward; of the
forward only three numbers per row are kept. Formulas, with x = logits / temperature - maximum of
one model, s = sum e^x, and A the distribution the expectation is under, B the other:

    u = sum e^{x_A} (x_A - x_B)        KL(A || B) = u / s_A - log s_A + log s_B

Two parts of a vocabulary merge with D = part's maximum - common maximum:

    s <- sum e^D s_part                u <- sum e^{D_A} (u_part + (D_A - D_B) s_A,part)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks
from .chunked import Workspace, spans
from .collectives import gather_rows, locate, reduce_gradient
from .guided import LOG2E
from .head import kept_rows, spread, weight_gradient
from .moments import FLOOR
from .prepare import uses_triton
from .records import Shard, accumulate_dtype, column, take
from .tiles import HiddenTiles

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DIRECTIONS = ("forward", "reverse")
CPU_TILE, GPU_TILE = (4096, 512), (4096, 8192)
"""Rows and columns of a tile; there are two of it per call."""


def distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor = 1.0,
    direction: str = "forward",
    group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    main_grad: Tensor | None = None,
    row_chunk: int | None = None,
) -> Tensor:
    """KL divergence per token between a student and a teacher over the whole vocabulary.

    p = softmax(hidden @ weight^T / temperature) is the student, q the teacher's softmax at
    `teacher_temperature`; q is a constant. No factor temperature^2.

    Args:
        hidden: [T, H] of the student, or [T/tp, H] with `sequence_parallel`.
        weight: [V/tp, H], this rank's rows of the student's output embedding; same dtype.
        teacher_hidden: [T, H'] (or [T/tp, H']); H' and the dtype may differ from the student's.
        teacher_weight: [V/tp, H'], the same vocabulary rows.
        target: [T] int64; only where it is `ignore_index` matters.
        temperature: > 0, one number or [T] (what it holds for ignored rows does not matter).
        teacher_temperature: the same, such as `guided_teacher(...).temperature`.
        direction: "forward" is KL(q || p), "reverse" is KL(p || q).
        group: tensor-parallel group over which both vocabularies are split; None: not split.
        sequence_parallel: both hiddens are split over the group; the student's gradient is
            reduce-scattered. Without it the gradient is all-reduced.
        vocab_size: true size over all shards; later rows are padding and never count.
        ignore_index: rows with this target are not computed: 0, no gradient.
        impl: "chunked", "triton" or "auto" (triton on CUDA where it is installed).
        main_grad: float32 [V/tp, H]; the weight gradient is added here instead of returned.
        row_chunk: rows of a tile; None: a good size. Triton's tiles do not heed it.

    Returns:
        [T] nats, >= 0, float32 (float64 for float64 students), the same bits on every rank;
        gradient into hidden and weight only. A token impossible (-inf) under one distribution that
        the other allows adds a finite number of the order 1e18 times its probability.

    Raises:
        ValueError: an argument does not fit; the message names it and the numbers.

    Source:
        Hinton et al., arXiv 1503.02531; with a temperature per token the full-vocabulary form of
        CurioSFT's self-distillation (arXiv 2602.02244), whose release compares the label only.
    """
    checks.check_operands(hidden, weight)
    checks.check_main_grad(main_grad, weight)
    checks.check_teacher(teacher_hidden, teacher_weight, hidden, weight)
    vocab_size = checks.check_vocabulary(vocab_size, weight.shape[0], group, validate=False)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; known: {', '.join(DIRECTIONS)}")
    checks.check_tile("row_chunk", row_chunk)
    shard = locate(group, weight.shape[0], vocab_size)
    tokens = hidden.shape[0] * (shard.size if sequence_parallel else 1)
    device, look = hidden.device, hidden.device.type == "cpu"
    checks.check_target(target, tokens, device)
    keep = target != ignore_index
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        checks.check_temperature(name, _counted(value, keep), tokens, device, look)
    dtype = accumulate_dtype(hidden.dtype)
    call = _Call(
        shard=shard,
        keep=keep,
        beta=_inverse(temperature, dtype),
        teacher_beta=_inverse(teacher_temperature, dtype),
        reverse=direction == "reverse",
        sequence_parallel=sequence_parallel and shard.size > 1,
        main_grad=main_grad,
        row_chunk=row_chunk,
        triton=uses_triton(impl, hidden, teacher_hidden),
    )
    return _Distillation.apply(hidden, weight, teacher_hidden.detach(), teacher_weight.detach(), call)


@dataclass(frozen=True)
class _Call:
    """One call's settings."""

    shard: Shard
    keep: Tensor
    """[T] bool, rows that count."""
    beta: Tensor | float
    teacher_beta: Tensor | float
    reverse: bool
    sequence_parallel: bool
    main_grad: Tensor | None
    row_chunk: int | None
    triton: bool

    def betas(self, rows: Tensor | None) -> _Betas:
        """The inverse temperatures of some rows (None: all)."""
        if rows is None:
            return self.beta, self.teacher_beta
        return take(self.beta, rows), take(self.teacher_beta, rows)


_Betas = tuple[Tensor | float, Tensor | float]
"""Inverse temperatures of student and teacher."""


def _counted(temperature: float | Tensor, keep: Tensor) -> float | Tensor:
    """The temperature with 1 for ignored rows, if it fits the tokens at all."""
    if isinstance(temperature, Tensor) and temperature.shape == keep.shape and temperature.device == keep.device:
        return temperature.masked_fill(~keep, 1)
    return temperature


def _inverse(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    if isinstance(temperature, Tensor):
        return 1.0 / temperature.detach().to(dtype)
    return 1.0 / float(temperature)


class _Distillation(torch.autograd.Function):
    """hidden, weight, teacher's hidden and weight -> [T] divergences."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, call: _Call
    ) -> Tensor:
        rows = kept_rows(call.keep, compact=True)
        student = _active(hidden, call, rows)
        teacher = _active(teacher_hidden, call, rows)
        pair = _Pair.of(student, weight, teacher, teacher_weight, call)
        log_p, log_q, divergence = _forward(pair, call.betas(rows), call)
        ctx.call, ctx.rows = call, rows
        ctx.save_for_backward(student, weight, teacher, teacher_weight, log_p, log_q, divergence)
        return spread(divergence, rows, call.keep.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call, rows = ctx.call, ctx.rows
        student, weight, teacher, teacher_weight, *numbers = ctx.saved_tensors
        upstream = gradients[0] if rows is None else gradients[0][rows]
        live = kept_rows(upstream != 0, compact=True)
        if live is not None:
            student, teacher, upstream = student[live], teacher[live], upstream[live]
            numbers = [number[live] for number in numbers]
            rows = live if rows is None else rows[live]
        pair = _Pair.of(student, weight, teacher, teacher_weight, call)
        pair.student.begin_backward(ctx.needs_input_grad[:2], call.main_grad, call.shard.valid)
        if call.triton:
            from . import triton_divergence

            sides = pair.student, pair.teacher, pair.valid
            triton_divergence.backward(*sides, call.betas(rows), call.reverse, numbers, upstream)
        else:
            _backward(pair, call.betas(rows), call, numbers, upstream)
        grad_hidden = pair.student.grad_hidden
        if grad_hidden is not None:
            grad_hidden = spread(grad_hidden, rows, call.keep.shape[0])
            grad_hidden = reduce_gradient(grad_hidden, call.shard, call.sequence_parallel).to(weight.dtype)
        return grad_hidden, weight_gradient(pair.student, weight), None, None, None


def _active(hidden: Tensor, call: _Call, rows: Tensor | None) -> Tensor:
    """The rows of hidden that are computed."""
    full = gather_rows(hidden, call.shard) if call.sequence_parallel else hidden
    return full if rows is None else full[rows]


@dataclass
class _Pair:
    """Tiles of both models' logits for the same rows and columns."""

    student: HiddenTiles
    teacher: HiddenTiles
    valid: int
    sizes: tuple[int, int]
    """Rows and columns of a tile."""

    @staticmethod
    def of(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, call: _Call) -> _Pair:
        """Both models over the same rows."""
        rows, columns = GPU_TILE if student.is_cuda else CPU_TILE
        rows = max(1, min(call.row_chunk or rows, student.shape[0]))
        tiles = HiddenTiles(student, weight), HiddenTiles(teacher, teacher_weight)
        return _Pair(*tiles, call.shard.valid, (rows, min(columns, max(1, call.shard.valid))))

    def walk(self, betas: _Betas) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, student's logits, teacher's logits), both divided by the temperature; columns outermost."""
        rows, columns = self.sizes
        device, dtype = self.student.hidden.device, self.student.dtype
        work = Workspace(rows, columns, dtype, device)
        narrow = None if self.teacher.dtype == dtype else Workspace(rows, columns, self.teacher.dtype, device)
        for start, stop in spans(self.valid, columns):
            self.student.load_weight(start, stop)
            self.teacher.load_weight(start, stop)
            for span in spans(self.student.rows, rows):
                part = slice(*span)
                x, y = work.pair(span[1] - span[0], stop - start)
                self.student.read(part, x)
                if narrow is None:
                    self.teacher.read(part, y)
                else:
                    other = narrow.pair(*y.shape)[0]
                    self.teacher.read(part, other)
                    y.copy_(other)
                yield part, x.mul_(column(take(betas[0], part))), y.mul_(column(take(betas[1], part)))


_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""m_A, s_A, u, m_B, s_B of some columns, [N] each."""


def _no_columns(pair: _Pair) -> Tensor:
    """[5, N] sums over no columns at all."""
    totals = torch.zeros((5, pair.student.rows), dtype=pair.student.dtype, device=pair.student.hidden.device)
    totals[[0, 3]] = -torch.inf
    return totals


def _sums(pair: _Pair, betas: _Betas, call: _Call) -> Tensor:
    """[5, N] sums over this shard's columns."""
    totals = _no_columns(pair)
    for part, x, y in pair.walk(betas):
        a, b = (x, y) if call.reverse else (y, x)
        merged = _merge(_unbind(totals[:, part]), _tile_parts(a, b))
        totals[:, part] = torch.stack(merged)
    return totals


def _merged(parts: Tensor) -> Tensor:
    """[5, N] sums of the union of parts [n, 5, N], in their order."""
    first, *rest = parts
    for other in rest:
        first = torch.stack(_merge(_unbind(first), _unbind(other)))
    return first


def _forward(pair: _Pair, betas: _Betas, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """[N] each: log-normalisers of student and teacher, and the divergence; over the whole group."""
    if call.triton:
        from . import triton_divergence

        parts = triton_divergence.forward(pair.student, pair.teacher, pair.valid, betas, call.reverse)
        local = _merged(torch.cat([_no_columns(pair)[None], parts]))
    else:
        local = _sums(pair, betas, call)
    m_a, s_a, u, m_b, s_b = _merged(gather_rows(local[None], call.shard))
    divergence = (u / s_a - s_a.log() + s_b.log()).clamp(min=0.0)
    log_a, log_b = m_a + s_a.log(), m_b + s_b.log()
    return (log_a, log_b, divergence) if call.reverse else (log_b, log_a, divergence)


def _unbind(packed: Tensor) -> _Parts:
    m_a, s_a, u, m_b, s_b = packed.unbind(0)
    return m_a, s_a, u, m_b, s_b


def _tile_parts(a: Tensor, b: Tensor) -> _Parts:
    """The sums of one tile; both tiles are overwritten."""
    m_a, m_b = (_subtract_maximum(tile) for tile in (a, b))
    s_b = torch.exp2(b * LOG2E).sum(dim=1)
    b.neg_().add_(a)
    a.mul_(LOG2E).exp2_()
    s_a = a.sum(dim=1)
    return m_a, s_a, a.mul_(b).sum(dim=1), m_b, s_b


def _subtract_maximum(tile: Tensor) -> Tensor:
    """[n] maxima, subtracted in place; impossible tokens become finite."""
    maximum = tile.amax(dim=1)
    tile.sub_(maximum.masked_fill(maximum == -torch.inf, 0.0)[:, None]).clamp_(min=FLOOR)
    return maximum


def _merge(left: _Parts, right: _Parts) -> _Parts:
    """The sums over the union of two disjoint sets of columns."""
    m_a, m_b = torch.maximum(left[0], right[0]), torch.maximum(left[3], right[3])
    finite_a, finite_b = (m.masked_fill(m == -torch.inf, 0.0) for m in (m_a, m_b))
    s_a, u, s_b = (torch.zeros_like(m_a) for _ in range(3))
    for part in (left, right):
        shift_a, shift_b = (part[0] - finite_a).clamp(min=FLOOR), (part[3] - finite_b).clamp(min=FLOOR)
        factor = shift_a.exp()
        s_a = s_a + factor * part[1]
        u = u + factor * (part[2] + (shift_a - shift_b) * part[1])
        s_b = s_b + shift_b.exp() * part[4]
    return m_a, s_a, u, m_b, s_b


def _backward(pair: _Pair, betas: _Betas, call: _Call, numbers: list[Tensor], upstream: Tensor) -> None:
    """Hand every tile of the student's logit gradient to its tiles.

    With g the upstream gradient: forward g (p - q) / temperature, reverse
    g p (log p - log q - KL) / temperature.
    """
    log_p, log_q, divergence = numbers
    scale = upstream.to(log_p.dtype) * betas[0]
    for part, x, y in pair.walk(betas):
        x.sub_(log_p[part, None]).clamp_(min=FLOOR)
        y.sub_(log_q[part, None]).clamp_(min=FLOOR)
        if call.reverse:
            y.neg_().add_(x).sub_(divergence[part, None])
            y.mul_(x.mul_(LOG2E).exp2_())
        else:
            x.mul_(LOG2E).exp2_()
            y.mul_(LOG2E).exp2_().neg_().add_(x)
        y.mul_(scale[part, None])
        pair.student.write(part, y, x, part.start == 0, part.stop == pair.student.rows)
