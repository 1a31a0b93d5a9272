"""The torch implementation: tiles over tokens and vocabulary, any device, any floating type.

At most one [row_chunk, vocab_tile] tile of logits (and one of the same size beside it) is alive,
forward and backward. Tiles are visited in a fixed order, so two runs agree bitwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .moments import FLOOR, Coefficients, Moments, Statistics, merge
from .records import Request, column, take
from .tiles import HiddenTiles, LogitTiles, Rows

Tiles = HiddenTiles | LogitTiles


@dataclass
class Saved:
    """What a forward keeps of its tiles for backward."""

    maxima: Tensor
    """[tiles, N], the largest logit."""
    shifted: Tensor | None = None
    """[N, V_l] float16(logit - tile maximum), with save="half"."""
    sums: list[Tensor] = field(default_factory=list)
    """With `skip_mass`, until tiles are chosen: sum e^{beta (logit - tile maximum)}, [tiles, N] per temperature."""
    alive: Tensor | None = None
    """[tiles, N] bool, with `skip_mass`: what backward computes."""

    @staticmethod
    def allocate(request: Request, rows: int, width: int, like: Tensor) -> Saved | None:
        """Room for tiles of `width` columns; None where backward needs nothing of them."""
        if not (request.save or request.skip_mass):
            return None
        valid = request.shard.valid
        saved = Saved(like.new_empty((-(-valid // width), rows)))
        if request.save:
            columns = aligned_columns(valid)
            saved.shifted = torch.empty((rows, columns), dtype=torch.float16, device=like.device)[:, :valid]
        if request.skip_mass:
            saved.sums = [torch.empty_like(saved.maxima) for _ in request.betas]
        return saved


def aligned_columns(columns: int) -> int:
    """Columns rounded up to 8, so that rows of a 16-bit matrix start at multiples of 16 bytes as TMA wants."""
    return -(-columns // 8) * 8


def tile_sizes(request: Request, rows: int, cuda: bool) -> tuple[int, int]:
    """(row_chunk, vocab_tile): the caller's, or sizes whose tile stays in the last-level cache."""
    default_rows, default_columns = (4096, 8192) if cuda else (4096, 384 if request.save else 512)
    chunk = request.row_chunk or default_rows
    return max(1, min(chunk, rows)), request.vocab_tile or default_columns


def spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """[start, stop) pairs that cover `length` in steps."""
    for start in range(0, length, step):
        yield start, min(start + step, length)


class Workspace:
    """Two reusable tile buffers."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.first = torch.empty(rows * columns, dtype=dtype, device=device)
        self.second = torch.empty_like(self.first)

    def pair(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Two contiguous [rows, columns] views."""
        count = rows * columns
        return self.first[:count].view(rows, columns), self.second[:count].view(rows, columns)


def forward(tiles: Tiles, rows: int, request: Request, device: torch.device) -> tuple[Moments, Saved | None, bool]:
    """Moments of this shard's part of the vocabulary.

    Returns the moments, what save mode keeps, and whether a -inf logit was met (backward then
    clamps; always True where finding out would need a device synchronisation).
    """
    valid = request.shard.valid
    like = torch.empty(0, dtype=tiles.dtype, device=device)
    chunk, width = tile_sizes(request, rows, device.type == "cuda")
    parts = {r: Moments.empty(r[1] - r[0], request, like) for r in spans(rows, chunk)}
    saved = Saved.allocate(request, rows, width, like)
    work = Workspace(chunk, min(width, max(valid, 1)), tiles.dtype, device)
    infinite = device.type != "cpu"
    for index, (start, stop) in enumerate(spans(valid, width)):
        tiles.load_weight(start, stop)
        for first, last in parts:
            z, e = work.pair(last - first, stop - start)
            tiles.read(slice(first, last), z)
            if request.softcap is not None:
                z.div_(request.softcap).tanh_().mul_(request.softcap)
            part, clamped = tile_moments(z, e, request, slice(first, last), start, infinite)
            infinite = infinite or clamped
            if saved is not None:
                saved.maxima[index, first:last] = part.maximum
                for total, values in zip(saved.sums, part.sums, strict=False):
                    total[index, first:last] = values
                if saved.shifted is not None:
                    saved.shifted[first:last, start:stop].copy_(z)
            parts[first, last] = merge(parts[first, last], part, [take(b, slice(first, last)) for b in request.betas])
    return _joined(list(parts.values()), rows, request, like), saved, infinite


def tile_moments(z: Tensor, e: Tensor, request: Request, rows: slice, start: int, clamp: bool) -> tuple[Moments, bool]:
    """Moments of one tile. On return `z` holds z - row maximum and `e` is scratch."""
    labels = request.labels[rows] - start
    maximum = z.amax(dim=1)
    clamp = clamp or not bool(torch.isfinite(z.amin(dim=1)).all())
    label_logit = _pick(z, labels)
    top = _tile_top(z, request, start)
    z.sub_(maximum.masked_fill(maximum == -torch.inf, 0.0)[:, None])
    if clamp:
        z.clamp_(min=FLOOR)
    sums, firsts, seconds = [], [], []
    for index, beta in enumerate(request.betas):
        beta = take(beta, rows)
        if isinstance(beta, float) and beta == 1.0:
            torch.exp(z, out=e)
        else:
            torch.mul(z, column(beta), out=e).exp_()
        sums.append(e.sum(dim=1))
        if not request.want_entropy:
            continue
        firsts.append(e.mul_(z).sum(dim=1))
        if index == 0 and request.want_variance:
            seconds.append(e.mul_(z).sum(dim=1))
    return Moments(maximum, sums, firsts, seconds, label_logit, *top), clamp


def _pick(z: Tensor, labels: Tensor) -> Tensor:
    """The logit of the label where this tile holds it, else -inf."""
    inside = (labels >= 0) & (labels < z.shape[1])
    picked = z.gather(1, labels.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    return picked.masked_fill(~inside, -torch.inf)


def _tile_top(z: Tensor, request: Request, start: int) -> tuple[Tensor | None, Tensor | None]:
    if not request.topk:
        return None, None
    count = min(request.topk, z.shape[1])
    values, ids = z.topk(count, dim=1)
    ids = ids + (start + request.shard.start)
    if count < request.topk:
        pad = (0, request.topk - count)
        values = torch.nn.functional.pad(values, pad, value=-torch.inf)
        ids = torch.nn.functional.pad(ids, pad, value=-1)
    return values, ids


def _joined(parts: list[Moments], rows: int, request: Request, like: Tensor) -> Moments:
    """Concatenate the moments of row chunks."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Moments.empty(rows, request, like)

    def cat(name: str) -> Tensor | None:
        values = [getattr(p, name) for p in parts]
        return None if values[0] is None else torch.cat(values)

    def cat_lists(name: str) -> list[Tensor]:
        return [torch.cat(list(v)) for v in zip(*(getattr(p, name) for p in parts), strict=True)]

    maximum, label_logit = cat("maximum"), cat("label_logit")
    assert maximum is not None and label_logit is not None
    return Moments(
        maximum,
        cat_lists("sums"),
        cat_lists("firsts"),
        cat_lists("seconds"),
        label_logit,
        cat("top_values"),
        cat("top_ids"),
    )


def choose_tiles(saved: Saved, statistics: Statistics, request: Request) -> Tensor:
    """Mark the tiles that backward computes in `saved`; returns each row's mass in the others, [N].

    A tile is left out if its probability, under the teacher too, is less than `skip_mass` and it
    holds neither the target nor one of the row's top-k.
    """
    sums, saved.sums = saved.sums, []
    shift = saved.maxima - statistics.maximum
    logs = zip(request.betas, statistics.log_sums, sums, strict=True)
    masses = torch.stack([torch.exp(beta * shift - log_sum) * part for beta, log_sum, part in logs])
    saved.alive = ~(masses < request.skip_mass).all(dim=0)
    ids = request.labels[:, None]
    if "topk_ids" in statistics.outputs:
        ids = torch.cat([ids, statistics.outputs["topk_ids"] - request.shard.start], dim=1)
    rows, places = ((ids >= 0) & (ids < request.shard.valid)).nonzero(as_tuple=True)
    width = tile_sizes(request, ids.shape[0], ids.is_cuda)[1]
    saved.alive[ids[rows, places] // width, rows] = True
    return masses.masked_fill(saved.alive, 0.0).sum(dim=1).amax(dim=0)


def backward(
    tiles: Tiles,
    rows: int,
    request: Request,
    coefs: Coefficients,
    saved: Saved | None,
    kept: Tensor | None,
    infinite: bool,
) -> None:
    """Walk the tiles again and hand every gradient tile to `tiles.write`.

    `kept` maps the N rows of `tiles` to rows of `saved` (None: they are the same rows).
    """
    device = coefs.shift.device
    chunk, width = tile_sizes(request, rows, device.type == "cuda")
    work = Workspace(chunk, min(width, max(request.shard.valid, 1)), tiles.dtype, device)
    chunks = list(spans(rows, chunk))
    selected = [coefs.select(slice(*c)) for c in chunks]
    maxima, shifted, alive = (None, None, None) if saved is None else (saved.maxima, saved.shifted, saved.alive)
    if alive is not None and kept is not None:
        alive = alive[:, kept]
    for index, (start, stop) in enumerate(spans(request.shard.valid, width)):
        tiles.load_weight(start, stop)
        for (first, last), coef in zip(chunks, selected, strict=True):
            part: Rows = slice(first, last)
            if alive is not None:
                part = alive[index, part].nonzero()[:, 0] + first
                coef = coefs.select(part)
            z, e = work.pair(coef.shift.shape[0], stop - start)
            if shifted is None or maxima is None:
                tiles.read(part, z)
                if request.softcap is not None:
                    z.div_(request.softcap).tanh_().mul_(request.softcap)
                z.sub_(coef.shift[:, None])
            else:
                where = part if kept is None else kept[part]
                z.copy_(shifted[where, start:stop])
                z.add_((maxima[index, where] - coef.shift)[:, None])
            if infinite or shifted is not None:
                z.clamp_(min=FLOOR)
            gradient = logit_gradient(z, e, coef, start, request.softcap)
            tiles.write(part, gradient, z, first == 0, last == rows)


def logit_gradient(delta: Tensor, e: Tensor, coef: Coefficients, start: int, softcap: float | None) -> Tensor:
    """The gradient tile, in the buffer `e`; `delta` (z - shift) is overwritten."""
    factor = None
    if softcap is not None:
        factor = 1.0 - ((delta + coef.shift[:, None]) / softcap) ** 2
    teacher = _teacher_term(delta, coef)
    if isinstance(coef.beta, float) and coef.beta == 1.0:
        torch.exp(delta, out=e)
    else:
        torch.mul(delta, column(coef.beta), out=e).exp_()
    if coef.c2 is not None:
        inner = delta * coef.c2[:, None]
        inner.add_(coef.c1[:, None] if coef.c1 is not None else 0.0)
        e.mul_(delta.mul_(inner).add_(coef.c0[:, None]))
    elif coef.c1 is not None:
        e.mul_(delta.mul_(coef.c1[:, None]).add_(coef.c0[:, None]))
    else:
        e.mul_(coef.c0[:, None])
    if teacher is not None:
        e.add_(teacher)
    local = coef.spike_ids - start
    inside = (local >= 0) & (local < e.shape[1])
    e.scatter_add_(1, local.clamp(0, e.shape[1] - 1), coef.spikes.masked_fill(~inside, 0.0))
    return e if factor is None else e.mul_(factor)


def _teacher_term(delta: Tensor, coef: Coefficients) -> Tensor | None:
    if coef.k0 is None or coef.k1 is None or coef.teacher_log is None:
        return None
    assert coef.teacher_beta is not None
    q = delta * column(coef.teacher_beta)
    q.add_(coef.teacher_log[:, None]).exp_()
    return q.mul_((delta * coef.k1[:, None]).add_(coef.k0[:, None]))
