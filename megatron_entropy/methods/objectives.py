"""The formulas methods share: advantages, clipped surrogate, divergence estimators, weights, penalties.

Per-sample quantities are numpy, per-token ones torch tensors; torch itself is never imported, tensors bring their
operations along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_entropy.records import Metric, Sample

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped here before exp, as verl does (core_algos.py): e^20 is finite in every type."""

ROUNDING = 1e-4
"""Nats by which two passes over the same weights may differ; an absolute value makes a full gradient of their sign."""


def group_advantage(rewards: Sequence[float], *, eps: float = 1e-6, norm_adv_by_std: bool = True) -> np.ndarray:
    """Advantages of one group: reward minus mean, over the sample standard deviation (ddof = 1).

    Args:
        rewards: of the group's members.
        norm_adv_by_std: divide by the standard deviation (Dr. GRPO does not).
    Returns:
        [G] float64; zeros for a group of one and where all rewards are equal.
    Source:
        Shao et al. 2024 (GRPO), eq. in section 4.1.2; ddof and eps as in verl core_algos.py.
    """
    values = np.asarray(rewards, np.float64)
    centred = values - values.mean() if len(values) else values
    if len(values) < 2 or np.all(values == values[0]):
        return np.zeros(len(values))
    return centred / (values.std(ddof=1) + eps) if norm_adv_by_std else centred


def clipped_surrogate(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, *, low: float, high: float, dual: float = 0.0
) -> tuple[Tensor, Tensor]:
    """PPO's clipped policy loss per token, to be minimised.

    Args:
        logprob: [T] under the policy being trained; gradient flows.
        old_logprob: [T] under the policy before the update.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        dual: for negative advantages the loss is at most `-advantage * dual`; 0: no bound.
    Returns:
        loss [T], and [T] bool: where clipping took the gradient away.
    Source:
        Schulman et al. 2017; asymmetric bounds: DAPO, Yu et al. 2025, eq. 10; dual clip: Ye et al. 2020.
    """
    ratio = (logprob - old_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - low, 1 + high)
    loss = plain.maximum(clipped)
    is_clipped = clipped > plain
    if dual:
        bound = -advantage * dual
        is_clipped = is_clipped | ((advantage < 0) & (loss > bound))
        loss = loss.where(advantage >= 0, loss.minimum(bound))
    return loss, is_clipped


def unclipped_surrogate(logprob: Tensor, old_logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """The policy loss without PPO's clipping, minus advantage times ratio; returns what `clipped_surrogate` does."""
    loss = -advantage * (logprob - old_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return loss, loss.new_zeros(loss.shape, dtype=bool)  # type: ignore[arg-type]


def k1(logprob: Tensor, other: Tensor) -> Tensor:
    """Estimator of KL(policy || other) per token: the log-ratio. Unbiased, of either sign. Schulman 2020."""
    return logprob - other


def k2(logprob: Tensor, other: Tensor) -> Tensor:
    """Estimator of KL(policy || other) per token: half the squared log-ratio. Schulman 2020."""
    return 0.5 * (logprob - other).square()


def k3(logprob: Tensor, other: Tensor) -> Tensor:
    """Estimator of KL(policy || other) per token: r - 1 - log r with r = other / policy. Schulman 2020."""
    log_ratio = (other - logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - 1 - log_ratio


def absolute_log_ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """|log p - log p_old| per token, the penalty of KL-Cov and of SENT's release; 0 below `ROUNDING`."""
    distance = (logprob - old_logprob).abs()
    return distance * (distance > ROUNDING)


def tis_weight(old_logprob: Tensor, rollout_logprob: Tensor, cap: float) -> Tensor:
    """Truncated ratio between the trainer's and the engine's probability of a token: [T], no gradient.

    Source:
        Truncated importance sampling, Yao et al. 2025: min(pi_trainer / pi_engine, cap).
    """
    return (old_logprob - rollout_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=cap).detach()


def soft_overlong_penalty(length: int, *, limit: int, buffer: int) -> float:
    """Penalty in [-1, 0] for a response that enters the last `buffer` tokens before `limit`.

    Source:
        DAPO, eq. 13: 0 up to limit - buffer, then linear down to -1 at the limit.
    """
    return min(0.0, (limit - buffer - length) / buffer) if buffer else 0.0


def concat_response_tokens(samples: Sequence[Sample], field: str) -> np.ndarray:
    """A per-token field of all response tokens, sample after sample: [N] float64."""
    return np.concatenate([np.zeros(0), *(sample.response(field) for sample in samples)])


def scatter_to_samples(samples: Sequence[Sample], field: str, values: np.ndarray) -> list[Sample]:
    """The samples with a per-token field filled from `values` [N], as `concat_response_tokens` lists them; 0 on given tokens."""
    ends = np.cumsum([sample.response_length for sample in samples])
    filled = []
    for sample, part in zip(samples, np.split(values, ends[:-1]) if samples else [], strict=True):
        column = np.zeros(len(sample.tokens), np.float32)
        column[sample.prompt_length :] = part
        filled.append(dataclasses.replace(sample, **{field: column}))
    return filled


def covariance(logprob: np.ndarray, advantage: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Each token's part in the covariance of log-probability and advantage: [N].

    Args:
        logprob, advantage: [N] of all tokens that are compared.
        among: [N] bool, the tokens whose means are subtracted; None: all.
    Source:
        Cui et al. 2025 (The Entropy Mechanism, arXiv 2505.22617), eq. 10.
    """
    if not len(logprob):
        return np.zeros(0)
    chosen = slice(None) if among is None else among
    return (logprob - logprob[chosen].mean()) * (advantage - advantage[chosen].mean())


def bottom_k_mask(values: np.ndarray, count: int, among: np.ndarray | None = None) -> np.ndarray:
    """The `count` smallest of [N] values (of those where `among` [N] holds), as a mask [N]; of equal ones the first."""
    places = np.arange(len(values)) if among is None else np.flatnonzero(among)
    mask = np.zeros(len(values), bool)
    mask[places[np.argsort(values[places], kind="stable")[:count]]] = True
    return mask


def top_k_mask(values: np.ndarray, count: int, among: np.ndarray | None = None) -> np.ndarray:
    """The `count` largest of [N] values; see `bottom_k_mask`."""
    return bottom_k_mask(-values, count, among)


def fraction_to_count(count: int, fraction: float) -> int:
    """How many of `count` tokens a fraction of them is: rounded down, but at least one."""
    return max(1, int(fraction * count))


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the first t values, for every t: [n]. Of token entropies it is CER's TECA series."""
    return np.cumsum(values, dtype=np.float64) / np.arange(1, len(values) + 1)


def token_mean(samples: Sequence[Sample], *, tokens: int = 0, parts: int = 1) -> list[Sample]:
    """Every trained token weighs the same: 1 / number of trained tokens. DAPO, eq. 12.

    Args:
        tokens: take this for their number.
        parts: the samples are one of so many parts whose means are averaged.
    """
    tokens = tokens or sum(s.response_length for s in samples)
    return [dataclasses.replace(s, weight=s.constant(1 / (max(tokens, 1) * parts))) for s in samples]


def sequence_mean(samples: Sequence[Sample]) -> list[Sample]:
    """Mean over tokens of a response, then over responses. GRPO's own aggregation."""
    count = sum(s.response_length > 0 for s in samples)
    return [dataclasses.replace(s, weight=s.constant(1 / (max(s.response_length, 1) * max(count, 1)))) for s in samples]


def masked_mean(values: Tensor, mask: Tensor) -> Metric:
    """Mean of `values` [T] where `mask` [T] holds, as a metric that adds up over micro-batches."""
    return Metric(float((values.detach() * mask).sum()), float(mask.sum()))
