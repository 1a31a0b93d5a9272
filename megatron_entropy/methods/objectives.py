"""Formulas that methods share: advantages, clipped policy loss, divergence estimators, token selection, weights.

What is computed before the update (advantages, selections, weights) is numpy; what is computed in the loss is torch.
The module uses only methods of tensors, so it does not import torch.
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
"""Log-ratios are clamped to this before exp, as in verl (core_algos.py): e^20 is finite in every float type."""

K3_LIMIT = 10.0
"""Largest k3 of a token in a penalty, as in verl's low_var_kl. Above it, from a log-ratio of 2.61 on, the token has no
gradient."""

ROUNDING = 1e-4
"""Nats by which two passes over the same weights may differ. An absolute value has a full gradient at any distance."""


def group_advantage(rewards: Sequence[float], *, eps: float = 1e-6, norm_adv_by_std: bool = True) -> np.ndarray:
    """Return the advantages of one group: reward minus mean, divided by the standard deviation (ddof = 1).

    Args:
        rewards: of the members of the group.
        eps: added to the standard deviation.
        norm_adv_by_std: divide by the standard deviation (Dr. GRPO does not).
    Returns:
        [G] float64; zeros for a group of one and for equal rewards.
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
    """Return PPO's clipped policy loss of every token, to be minimized.

    Args:
        logprob: [T] under the policy being trained; gradient flows.
        old_logprob: [T] under the policy before the update.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        dual: for negative advantages the loss is at most `-advantage * dual`; 0: no bound.
    Returns:
        loss [T], and [T] bool: where clipping removed the gradient.
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
    """Return minus advantage times ratio: the loss of `clipped_surrogate` without clipping, in the same form."""
    loss = -advantage * (logprob - old_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return loss, loss.new_zeros(loss.shape, dtype=bool)  # type: ignore[arg-type]


def k1(logprob: Tensor, other: Tensor) -> Tensor:
    """Estimate KL(policy || other) per token: the log-ratio. Unbiased, of either sign. Schulman 2020."""
    return logprob - other


def k2(logprob: Tensor, other: Tensor) -> Tensor:
    """Estimate KL(policy || other) per token: half the squared log-ratio. Schulman 2020."""
    return 0.5 * (logprob - other).square()


def k3(logprob: Tensor, other: Tensor) -> Tensor:
    """Estimate KL(policy || other) per token: r - 1 - log r with r = other / policy. Schulman 2020."""
    log_ratio = (other - logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - 1 - log_ratio


def absolute_log_ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """Return |log p - log p_old| per token, 0 below `ROUNDING`: the penalty of KL-Cov and of SENT's release."""
    distance = (logprob - old_logprob).abs()
    return distance * (distance > ROUNDING)


def tis_weight(old_logprob: Tensor, rollout_logprob: Tensor, cap: float) -> Tensor:
    """Return the truncated ratio of the trainer's and the engine's probability of a token: [T], no gradient.

    Source:
        Truncated importance sampling, Yao et al. 2025: min(pi_trainer / pi_engine, cap).
    """
    return (old_logprob - rollout_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=cap).detach()


def soft_overlong_penalty(length: int, *, limit: int, buffer: int) -> float:
    """Return the penalty, in [-1, 0], of a response that reaches into the last `buffer` tokens before `limit`.

    Source:
        DAPO, eq. 13: 0 up to limit - buffer, then linear down to -1 at the limit.
    """
    return min(0.0, (limit - buffer - length) / buffer) if buffer else 0.0


def concat_response_tokens(samples: Sequence[Sample], field: str) -> np.ndarray:
    """Concatenate a per-token field of all response tokens, sample after sample: [N] float64."""
    return np.concatenate([np.zeros(0), *(sample.response(field) for sample in samples)])


def scatter_to_samples(samples: Sequence[Sample], field: str, values: np.ndarray) -> list[Sample]:
    """Fill a per-token field from `values` [N] in the order of `concat_response_tokens`; 0 at prompt tokens."""
    ends = np.cumsum([sample.response_length for sample in samples])
    filled = []
    for sample, response in zip(samples, np.split(values, ends[:-1]) if samples else [], strict=True):
        column = np.zeros(len(sample.tokens), np.float32)
        column[sample.prompt_length :] = response
        filled.append(dataclasses.replace(sample, **{field: column}))
    return filled


def covariance(logprob: np.ndarray, advantage: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Return the covariance of log-probability and advantage of each token: [N].

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
    """Mark the `count` smallest of [N] values, among those where `among` [N] is true: mask [N]. Ties: the first."""
    indices = np.arange(len(values)) if among is None else np.flatnonzero(among)
    mask = np.zeros(len(values), bool)
    mask[indices[np.argsort(values[indices], kind="stable")[:count]]] = True
    return mask


def top_k_mask(values: np.ndarray, count: int, among: np.ndarray | None = None) -> np.ndarray:
    """Mark the `count` largest of [N] values; see `bottom_k_mask`."""
    return bottom_k_mask(-values, count, among)


def fraction_to_count(count: int, fraction: float) -> int:
    """Return a fraction of `count` as a number of tokens: rounded down, but at least 1."""
    return max(1, int(fraction * count))


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of the first t values for every t: [n]. Of token entropies it is CER's TECA series."""
    return np.cumsum(values, dtype=np.float64) / np.arange(1, len(values) + 1)


def token_mean(samples: Sequence[Sample], *, num_tokens: int = 0, num_chunks: int = 1) -> list[Sample]:
    """Fill weights that are the same for every trained token: 1 / number of trained tokens. DAPO, eq. 12.

    Args:
        num_tokens: divisor. 0: the number of trained tokens.
        num_chunks: the samples are one of this many chunks, whose means are averaged.
    """
    num_tokens = num_tokens or sum(s.response_length for s in samples)
    return [dataclasses.replace(s, weight=s.constant(1 / (max(num_tokens, 1) * num_chunks))) for s in samples]


def sequence_mean(samples: Sequence[Sample]) -> list[Sample]:
    """Fill weights of a mean over the tokens of a response, then over responses: the aggregation of GRPO's paper."""
    count = sum(s.response_length > 0 for s in samples)
    return [dataclasses.replace(s, weight=s.constant(1 / (max(s.response_length, 1) * max(count, 1)))) for s in samples]


def masked_mean(values: Tensor, mask: Tensor) -> Metric:
    """Return the mean of `values` [T] where `mask` [T] is true, as a metric that adds up over micro-batches."""
    return Metric((values.detach() * mask).sum(), mask.sum())
