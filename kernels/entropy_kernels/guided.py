"""CurioSFT's entropy-guided teacher: a temperature per token, and the label's log-prob under it.

The temperature raises the entropy of the teacher's top logits by an amount that depends on that
entropy (Wang et al., CurioSFT, arXiv 2602.02244; the rule is that of the released code,
`dp_actor.py`, compute_tau_from_logits). Whole logits never exist: for some rows at a time this
rank's [rows, V/tp] are made once, summarised, tempered in place and forgotten.

Exponentials are powers of two: torch's CPU exp2 is as exact as its exp and several times faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks
from .chunked import spans
from .collectives import gather_rows, locate
from .head import kept_rows, spread
from .moments import FLOOR, Moments, merge
from .prepare import uses_triton
from .records import Shard, column
from .tiles import HiddenTiles

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LOG2E = 1.0 / math.log(2.0)
CPU_LOGIT_BYTES, GPU_LOGIT_BYTES = 1 << 27, 1 << 29
"""What the logits of one row chunk may take."""
CPU_ROWS, GPU_ROWS = 256, 4096
"""Most rows of a chunk: a CPU's product gains nothing from more."""
CPU_COLUMNS, GPU_COLUMNS = 1024, 8192
"""Columns of one product."""
CACHE_BYTES = 1 << 22
"""Logits that a CPU summarises at a time: they and two buffers like them fit its last-level cache."""
FAN = 4
"""Columns per block in the search for the largest, and blocks per block of the next level."""


@dataclass(frozen=True)
class GuidedTeacher:
    """What a guided teacher says about each token; ignored rows hold 0. No gradient.

    Values are float32 (float64 for float64 inputs), the same bits on every rank.
    """

    logprob: Tensor
    """[T] nats, <= 0: log q(target) with q = softmax(logits / temperature), whole vocabulary."""
    temperature: Tensor
    """[T], within `bounds` (or `fixed`)."""
    entropy: Tensor
    """[T] nats: entropy of softmax(logits), temperature 1, whole vocabulary."""


def guided_teacher(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bounds: tuple[float, float] = (1.1, 1.5),
    top: int = 512,
    pivot: float = 1.2,
    slope: float = 2.0,
    amplitude: float = 0.5,
    floor: float = 0.03,
    iterations: int = 20,
    fixed: float | None = None,
    group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    row_chunk: int | None = None,
) -> GuidedTeacher:
    """Log-prob of the target under a teacher whose temperature its own entropy chooses.

    Args:
        hidden: [T, H] of the teacher, or [T/tp, H] with `sequence_parallel` (it is gathered).
        weight: [V/tp, H], this rank's rows of the teacher's output embedding; same dtype.
        target: [T] int64 ids in the whole vocabulary, or `ignore_index`.
        bounds: lowest and highest temperature.
        top: the search looks at this many of the largest logits (all of them if V is less).
        pivot: nats; the entropy at which half of `amplitude` is added.
        slope: per nat; how fast the added entropy grows around the pivot.
        amplitude: nats; the most that is added.
        floor: nats; a row whose whole entropy is at most this gets the lowest temperature.
        iterations: halvings of the bisection.
        fixed: a constant temperature instead of the search.
        group: tensor-parallel group over which the vocabulary is split; None: not split. Every
            rank of it must pass the same tokens.
        sequence_parallel: hidden is split over the group.
        vocab_size: true size over all shards; later rows are padding and never count.
        ignore_index: rows with this target are not computed: outputs 0.
        impl: "chunked", "triton" or "auto" (triton on CUDA where it is installed). The logits are
            torch's products in each; Triton reads them in fewer passes.
        row_chunk: rows whose logits [row_chunk, V/tp] exist at a time; None: a good number.

    Returns:
        GuidedTeacher with three [T] vectors. The temperature of a row depends on its logits only,
        not on the other rows, `row_chunk` or the group.

    Raises:
        ValueError: an argument does not fit; the message names it and the numbers.

    Source:
        CurioSFT, arXiv 2602.02244; `custom_verl/recipe/curio_sft/dp_actor.py` of its release.
    """
    checks.check_operands(hidden, weight)
    vocab_size = checks.check_vocabulary(vocab_size, weight.shape[0], group, validate=False)
    checks.check_search(bounds, top, pivot, slope, amplitude, floor, iterations)
    if fixed is not None:
        checks.check_number("fixed", fixed, lowest=0.0, inclusive=False)
    checks.check_tile("row_chunk", row_chunk)
    triton = uses_triton(impl, hidden)
    shard = locate(group, weight.shape[0], vocab_size)
    gathers = sequence_parallel and shard.size > 1
    tokens = hidden.shape[0] * (shard.size if sequence_parallel else 1)
    checks.check_target(target, tokens, hidden.device)
    if hidden.device.type == "cpu":
        checks.check_target_values(target, ignore_index, vocab_size)
    search = Search(bounds, min(top, vocab_size), pivot, slope, amplitude, floor, iterations)
    with torch.no_grad():
        full = gather_rows(hidden, shard) if gathers else hidden
        rows = kept_rows(target != ignore_index, compact=True)
        active, chosen = (full, target) if rows is None else (full[rows], target[rows])
        labels = chosen.to(torch.int64) - shard.start
        values = _compute(HiddenTiles(active, weight), labels, shard, search, fixed, row_chunk, triton)
        return GuidedTeacher(*(spread(value, rows, tokens) for value in values))


def guided_temperature(
    top_logits: Tensor,
    entropy: Tensor | None = None,
    *,
    bounds: tuple[float, float] = (1.1, 1.5),
    pivot: float = 1.2,
    slope: float = 2.0,
    amplitude: float = 0.5,
    floor: float = 0.03,
    iterations: int = 20,
) -> Tensor:
    """The temperature at which the entropy of the top logits has grown by the guided amount.

    With H(tau) the entropy (nats) of softmax(top_logits / tau), the goal is
    `H(1) + amplitude * sigmoid(slope * (H(1) - pivot))`. A goal that the lowest temperature exceeds
    gives the lowest, one that the highest does not reach gives the highest; between them the
    interval is halved `iterations` times and its midpoint is the answer.

    Args:
        top_logits: [N, K] float32 (or float64), a row's largest logits in any order.
        entropy: [N] nats, of the whole row at temperature 1; rows at or below `floor` get the
            lowest temperature. None: no such rule.
        bounds: lowest and highest temperature; the other numbers are those of `guided_teacher`.

    Returns:
        [N] temperatures in the dtype of top_logits.

    Raises:
        ValueError: an argument does not fit; the message names it and the numbers.

    Source:
        CurioSFT, arXiv 2602.02244; compute_tau_from_logits of its release.
    """
    checks.check_matrix("top_logits", top_logits)
    if entropy is not None and entropy.shape != top_logits.shape[:1]:
        raise ValueError(f"entropy must have shape ({top_logits.shape[0]},), got {tuple(entropy.shape)}")
    checks.check_search(bounds, top_logits.shape[1], pivot, slope, amplitude, floor, iterations)
    search = Search(bounds, top_logits.shape[1], pivot, slope, amplitude, floor, iterations)
    with torch.no_grad():
        return search.temperature(top_logits, entropy)


@dataclass(frozen=True)
class Search:
    """The numbers of the temperature rule, and the rule."""

    bounds: tuple[float, float]
    top: int
    pivot: float
    slope: float
    amplitude: float
    floor: float
    iterations: int

    def temperature(self, logits: Tensor, entropy: Tensor | None) -> Tensor:
        """[N] temperatures for [N, K] top logits; see `guided_temperature`."""
        low, high = self.bounds
        shifted = _shifted(logits)
        goal = self.goal(top_entropy(shifted, 1.0))
        lowest = goal <= top_entropy(shifted, low)
        if entropy is not None:
            lowest |= entropy <= self.floor
        highest = ~lowest & (goal >= top_entropy(shifted, high))
        result = torch.full_like(goal, low).masked_fill_(highest, high)
        between = (~(lowest | highest)).nonzero()[:, 0]
        result[between] = self._bisect(shifted[between], goal[between])
        return result

    def goal(self, entropy: Tensor) -> Tensor:
        """The entropy to reach from this one, nats."""
        return entropy + self.amplitude * torch.sigmoid(self.slope * (entropy - self.pivot))

    def _bisect(self, shifted: Tensor, goal: Tensor) -> Tensor:
        low, high = (torch.full_like(goal, bound) for bound in self.bounds)
        for _ in range(self.iterations):
            middle = (low + high) / 2
            below = top_entropy(shifted, middle) < goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def top_entropy(shifted: Tensor, temperature: Tensor | float) -> Tensor:
    """[N] nats: entropies of softmax(shifted / temperature), for [N, K] logits with row maximum 0."""
    powers = shifted * column(LOG2E / temperature)
    terms = torch.exp2(powers)
    sums = terms.sum(dim=1)
    return sums.log() - terms.mul_(powers).sum(dim=1) / sums / LOG2E


def _shifted(logits: Tensor) -> Tensor:
    """Logits minus their row's maximum; impossible tokens (-inf) stay finite."""
    maximum = logits.amax(dim=1, keepdim=True)
    return (logits - maximum.masked_fill(maximum == -torch.inf, 0.0)).clamp_(min=FLOOR)


def _compute(
    tiles: HiddenTiles,
    labels: Tensor,
    shard: Shard,
    search: Search,
    fixed: float | None,
    row_chunk: int | None,
    triton: bool,
) -> Tensor:
    """[3, N]: log-prob, temperature and entropy of the N rows of `tiles`."""
    chunk = _Chunk.allocate(tiles, labels, shard, row_chunk, triton)
    results = torch.empty((3, tiles.rows), dtype=tiles.dtype, device=labels.device)
    for first, last in spans(tiles.rows, chunk.logits.shape[0]):
        chunk.load(first, last)
        tops, local = chunk.summarise(0 if fixed is not None else search.top)
        packed, tops = _exchange(local, tops, shard)
        moments = local.unpack(packed[0])
        for part in packed[1:]:
            moments = merge(moments, local.unpack(part), [1.0])
        entropy = moments.sums[0].log() - moments.firsts[0] / moments.sums[0]
        if fixed is None:
            temperature = _shared_search(tops, entropy, shard, search, triton)
        else:
            temperature = torch.full_like(entropy, fixed)
        sums = gather_rows(chunk.temper(moments.maximum, temperature)[None], shard).sum(dim=0)
        logprob = (moments.label_logit - moments.maximum) / temperature - sums.log()
        results[:, first:last] = torch.stack([logprob, temperature, entropy])
    return results


def _exchange(local: Moments, tops: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """One all-gather: every rank's packed moments [tp, fields, n] and top logits [tp, n, K]."""
    moments = local.pack()
    fields, rows = moments.shape
    gathered = gather_rows(torch.cat([moments.view(-1), tops.view(-1)])[None], shard)
    split = fields * rows
    size = shard.size
    return gathered[:, :split].view(size, fields, rows), gathered[:, split:].view(size, *tops.shape)


def _shared_search(tops: Tensor, entropy: Tensor, shard: Shard, search: Search, triton: bool) -> Tensor:
    """[n] temperatures from every rank's top logits; each rank merges and searches its share of the rows."""
    rows = entropy.shape[0]
    share = -(-rows // shard.size)
    own = slice(min(rows, shard.rank * share), min(rows, (shard.rank + 1) * share))
    merged = tops[:, own].transpose(0, 1).flatten(1)
    merged = merged.topk(search.top, dim=1).values
    found = entropy.new_ones(share)
    if triton:
        from . import triton_guided

        found[: merged.shape[0]] = triton_guided.temperature(search, merged, entropy[own])
    else:
        found[: merged.shape[0]] = search.temperature(merged, entropy[own])
    return gather_rows(found, shard)[:rows]


@dataclass
class _Chunk:
    """The logits of some rows on this rank, and what is read from them."""

    tiles: HiddenTiles
    labels: Tensor
    """[N] counted from the shard's first row."""
    logits: Tensor
    """[rows, width] buffer: `valid` columns of logits, then -inf up to whole blocks."""
    scratch: Tensor
    """[2, block rows, valid]; Triton needs none."""
    valid: int
    triton: bool
    rows: slice = field(default_factory=lambda: slice(0, 0))

    @staticmethod
    def allocate(tiles: HiddenTiles, labels: Tensor, shard: Shard, row_chunk: int | None, triton: bool) -> _Chunk:
        """Buffers for `row_chunk` rows (None: as many as are good)."""
        cuda, valid = labels.is_cuda, shard.valid
        width = max(1, -(-valid // FAN**3)) * FAN**3
        size = width * torch.empty((), dtype=tiles.dtype).element_size()
        budget, most = (GPU_LOGIT_BYTES, GPU_ROWS) if cuda else (CPU_LOGIT_BYTES, CPU_ROWS)
        count = max(1, min(row_chunk or min(most, budget // size), tiles.rows))
        block = count if cuda else max(1, min(count, CACHE_BYTES // size))
        logits = torch.empty((count, width), dtype=tiles.dtype, device=labels.device)
        logits[:, valid:] = -torch.inf
        return _Chunk(tiles, labels, logits, logits.new_empty((2, 0 if triton else block, valid)), valid, triton)

    def load(self, first: int, last: int) -> None:
        """Make [first, last) the current rows: one product, in tiles of columns."""
        self.rows = slice(first, last)
        step = GPU_COLUMNS if self.logits.is_cuda else CPU_COLUMNS
        for start, stop in spans(self.valid, step):
            self.tiles.load_weight(start, stop)
            self.tiles.read(self.rows, self.logits[: last - first, start:stop])

    def blocks(self) -> list[slice]:
        """The current rows, counted from 0, in blocks that stay in the cache."""
        return [slice(*span) for span in spans(self.rows.stop - self.rows.start, self.scratch.shape[1])]

    def summarise(self, top: int) -> tuple[Tensor, Moments]:
        """The largest logits [n, top] in no order, and the moments at temperature 1."""
        rows = self.rows.stop - self.rows.start
        if self.triton:
            return self._summarise_at_once(rows, top)
        tops = self.logits.new_empty((rows, top))
        maximum, sums, firsts = self.logits.new_empty((3, rows))
        for block in self.blocks():
            z = self.logits[block]
            pyramid = _pyramid(z, max(top, 1))
            maximum[block] = pyramid[-1].amax(dim=1)
            if top:
                tops[block] = _largest(pyramid, top)
            shift = maximum[block].masked_fill(maximum[block] == -torch.inf, 0.0)
            shifted, terms = self.scratch[:, : z.shape[0]]
            torch.sub(z[:, : self.valid], shift[:, None], out=shifted).clamp_(min=FLOOR)
            torch.mul(shifted, LOG2E, out=terms).exp2_()
            sums[block] = terms.sum(dim=1)
            firsts[block] = terms.mul_(shifted).sum(dim=1)
        return tops, Moments(maximum, [sums], [firsts], [], self._label_logit(rows))

    def _summarise_at_once(self, rows: int, top: int) -> tuple[Tensor, Moments]:
        """`summarise` with Triton, which also makes the lowest level of the maxima."""
        from . import triton_guided

        z = self.logits[:rows]
        (maximum, sums, firsts), maxima = triton_guided.summarise(z)
        pyramid = [z, *_pyramid(maxima, top)] if maxima.shape[1] >= top else [z]
        tops = _largest(pyramid, top) if top else z[:, :0]
        return tops, Moments(maximum, [sums], [firsts], [], self._label_logit(rows))

    def _label_logit(self, rows: int) -> Tensor:
        """[n], -inf where another rank holds the label."""
        labels = self.labels[self.rows]
        inside = (labels >= 0) & (labels < self.valid)
        picked = self.logits[:rows].gather(1, labels.masked_fill(~inside, 0)[:, None])[:, 0]
        return picked.masked_fill(~inside, -torch.inf)

    def temper(self, maximum: Tensor, temperature: Tensor) -> Tensor:
        """[n] sums of e^{(z - maximum) / temperature} over this shard; the logits may be overwritten."""
        if self.triton:
            from . import triton_guided

            return triton_guided.temper(self.logits[: maximum.shape[0], : self.valid], maximum, temperature)
        sums = torch.empty_like(maximum)
        for block in self.blocks():
            z = self.logits[block, : self.valid]
            z.sub_(maximum[block, None]).mul_(LOG2E / temperature[block, None]).exp2_()
            sums[block] = z.sum(dim=1)
        return sums


def _pyramid(values: Tensor, top: int) -> list[Tensor]:
    """`values` and the maxima of its blocks of FAN, of their blocks, ... while they are many.

    Block i of a level with n columns holds its columns i, i + n/FAN, ...: the maxima of adjacent
    blocks are then taken by one vector instruction.
    """
    levels = [values]
    while (width := levels[-1].shape[1]) % FAN == 0 and width // FAN >= top:
        levels.append(levels[-1].unflatten(1, (FAN, width // FAN)).amax(dim=1))
    return levels


def _largest(pyramid: list[Tensor], top: int) -> Tensor:
    """[n, top] largest values of each row of the lowest level, in no order; -inf where it has fewer.

    The blocks with the `top` largest maxima hold the `top` largest values, ties or not.
    """
    count = min(top, pyramid[-1].shape[1])
    values, ids = pyramid[-1].topk(count, dim=1, sorted=False)
    for level in reversed(pyramid[:-1]):
        step = level.shape[1] // FAN
        members = torch.cat([ids + part * step for part in range(FAN)], dim=1)
        values, order = level.gather(1, members).topk(count, dim=1, sorted=False)
        ids = members.gather(1, order)
    return torch.nn.functional.pad(values, (0, top - count), value=-torch.inf)
