"""The records of the library: what a call returns and what a call was asked to do.

Shape letters: T tokens of the call, N tokens that are really computed (T minus the ignored ones),
H hidden size, V true vocabulary size, V_l rows of this rank's weight shard, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TokenStats:
    """Per-token statistics of the next-token distribution; rows that were ignored hold 0.

    All values are natural-log based, in float32 (float64 for float64 inputs).
    """

    logprob: Tensor
    """[T] nats, <= 0: log p(target)."""
    entropy: Tensor | None = None
    """[T] nats, in [0, log V]; None unless asked for."""
    varentropy: Tensor | None = None
    """[T] nats^2, >= 0: the variance of log p under p; None unless asked for."""
    teacher_logprob: Tensor | None = None
    """[T] nats: log q(target) with q at `teacher_temperature`."""
    teacher_entropy: Tensor | None = None
    """[T] nats: entropy of q."""
    kl_forward: Tensor | None = None
    """[T] nats, >= 0: KL(stop_gradient(q) || p)."""
    kl_reverse: Tensor | None = None
    """[T] nats, >= 0: KL(p || stop_gradient(q))."""
    topk_logprobs: Tensor | None = None
    """[T, K] nats, descending: the K largest log p of each row."""
    topk_ids: Tensor | None = None
    """[T, K] int64: their ids in the true vocabulary."""
    skipped_mass: Tensor | None = None
    """[T], in [0, 1): probability on this rank's shard that backward leaves out (with a teacher the
    larger of both distributions'); it differs between ranks. None unless `skip_mass` is set."""


@dataclass(frozen=True)
class Shard:
    """Where this rank's vocabulary rows lie."""

    group: ProcessGroup | None
    rank: int
    size: int
    start: int
    """Vocabulary id of the first local row."""
    valid: int
    """Number of local rows inside the true vocabulary."""


@dataclass(frozen=True)
class Request:
    """What to compute for the N rows of a call; everything but the big operands."""

    shard: Shard
    labels: Tensor
    """[N] int64, target id counted from the shard's first row; outside [0, valid): another rank's."""
    beta: Tensor | float
    """[N] or scalar inverse temperature."""
    teacher_beta: Tensor | float | None
    want_entropy: bool
    """Whether the first moment is needed (entropy, varentropy or a KL)."""
    want_variance: bool
    """Whether the second moment is needed (varentropy, or its gradient)."""
    topk: int
    softcap: float | None
    row_chunk: int | None
    vocab_tile: int | None
    save: bool
    """Keep float16(logit - tile maximum) for backward instead of recomputing the logits."""
    skip_mass: float
    """Backward leaves out a row's tile with less probability than this; 0: none."""

    @property
    def betas(self) -> list[Tensor | float]:
        """Inverse temperatures in the order of the moments: student, then teacher."""
        return [self.beta] if self.teacher_beta is None else [self.beta, self.teacher_beta]


def column(value: Tensor | float) -> Tensor | float:
    """A per-row value as a broadcastable [N, 1] column; a scalar as it is."""
    return value[:, None] if isinstance(value, Tensor) else value


def take(value: Tensor | float, rows: Tensor | slice) -> Tensor | float:
    """The entries of a per-row value for `rows`; a scalar as it is."""
    return value[rows] if isinstance(value, Tensor) else value


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type statistics are kept in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
