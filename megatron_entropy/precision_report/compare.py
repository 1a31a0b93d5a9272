"""What changes between two passes over one batch: per token, and in what methods select.

Intervals are 95 % percentiles over resampled sequences: tokens of a sequence are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_entropy.methods.cer import segmented_reward
from megatron_entropy.methods.cure import CureConfig, critical_positions
from megatron_entropy.methods.dapo import DapoConfig
from megatron_entropy.methods.objectives import running_mean
from megatron_entropy.methods.sent import SentConfig, select_tokens
from megatron_entropy.precision_report.measure import Pass

RESAMPLES = 2000
QUANTILES = (0.001, 0.01, 0.05, 0.5, 0.95, 0.99, 0.999)
DECILES = 10


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Shift:
    """Mean and standard deviation of the difference to the base, in nats."""

    bias: Estimate
    sd: Estimate


@dataclass(frozen=True)
class Decile:
    """Tokens of one tenth by the base's entropy: its largest entropy (nats), their number, and what they shift by."""

    top: float
    tokens: int
    logprob: Shift
    entropy: Shift


@dataclass(frozen=True)
class Comparison:
    """A precision against the base.

    `ratio_quantiles`: of the importance ratio p / p_base, at `QUANTILES`. `outside_clip`: share of tokens whose ratio
    DAPO would clip before any update. `cure_changed`: share of a response's candidates for a cut (the 20 of largest
    entropy) that are no longer among them, mean over responses. `first_top_changed`: responses whose most probable
    first token is another one. `top_changed`: the same share over all tokens. `sent_changed`: share of SENT's
    set of low entropy that is no longer in it. `cer_change`: of the reward of a right response, absolute, mean over
    responses. `cer_pairs_swapped`: share of pairs of responses that change their order by CER's reward.
    """

    logprob: Shift
    entropy: Shift
    deciles: tuple[Decile, ...]
    ratio_quantiles: tuple[float, ...]
    outside_clip: Estimate
    cure_changed: Estimate
    first_top_changed: int
    top_changed: Estimate
    sent_changed: Estimate
    cer_change: Estimate
    cer_pairs_swapped: float


def compare(
    found: Pass, base: Pass, responses: Sequence[Sequence[int]], token_text: Callable[[int], str], *, seed: int = 1
) -> Comparison:
    """Compare a pass with the base.

    Args:
        responses: token ids of each response.
        token_text: text of a token id, empty for special tokens (CURE does not cut there).
        seed: of the resampling.
    """
    chosen = np.random.default_rng(seed).integers(len(responses), size=(RESAMPLES, len(responses)))
    lengths = np.array([len(response) for response in responses], float)
    logprob, entropy = (_differences(getattr(found, name), getattr(base, name)) for name in ("logprob", "entropy"))
    clip = DapoConfig()
    outside = [(np.exp(d) < 1 - clip.clip_low) | (np.exp(d) > 1 + clip.clip_high) for d in logprob]
    tops = [a != b for a, b in zip(found.top_token, base.top_token, strict=True)]
    cuts = [
        _candidates_changed(a, b, list(tokens), token_text)
        for a, b, tokens in zip(found.entropy, base.entropy, responses, strict=True)
    ]
    rewards, base_rewards = (
        np.array([segmented_reward(True, float(running_mean(values)[-1])) for values in entropies])
        for entropies in (found.entropy, base.entropy)
    )
    ones = np.ones(len(responses))
    return Comparison(
        _shift(logprob, chosen),
        _shift(entropy, chosen),
        tuple(_deciles(logprob, entropy, base.entropy, chosen)),
        tuple(float(q) for q in np.quantile(np.exp(np.concatenate(logprob)), QUANTILES)),
        _mean(np.array([o.sum() for o in outside]), lengths, chosen),
        _mean(np.array([changed for changed, _ in cuts]), np.array([size for _, size in cuts]), chosen),
        int(sum(top[0] for top in tops)),
        _mean(np.array([top.sum() for top in tops]), lengths, chosen),
        _mean(*_low_set_changes(found.entropy, base.entropy), chosen),
        _mean(np.abs(rewards - base_rewards), ones, chosen),
        _pairs_swapped(rewards, base_rewards),
    )


def _differences(found: Sequence[np.ndarray], base: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [a.astype(float) - b for a, b in zip(found, base, strict=True)]


def _candidates_changed(
    found: np.ndarray, base: np.ndarray, response: list[int], token_text: Callable[[int], str]
) -> tuple[float, float]:
    """Share of CURE's candidates that changed, and 1; both 0 for a response without a candidate."""
    config = CureConfig()
    sets = [
        set(
            critical_positions(
                np.argsort(-values, kind="stable"), response, token_text, config.top, config.min_characters
            )
        )
        for values in (found, base)
    ]
    return (len(sets[1] - sets[0]) / len(sets[1]), 1.0) if sets[1] else (0.0, 0.0)


def _low_set_changes(found: Sequence[np.ndarray], base: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of tokens of each response that leave SENT's set, and that are in it at the base."""
    masks = []
    for entropies in (found, base):
        values = np.concatenate(entropies)
        nothing = np.zeros(len(values))
        masks.append(select_tokens(SentConfig(), entropy=values, logprob=nothing, advantage=nothing).low)
    ends = np.cumsum([len(values) for values in base])[:-1]
    left, inside = (np.split(mask, ends) for mask in (masks[1] & ~masks[0], masks[1]))
    return np.array([part.sum() for part in left]), np.array([part.sum() for part in inside])


def _pairs_swapped(found: np.ndarray, base: np.ndarray) -> float:
    first, second = np.triu_indices(len(base), 1)
    return float(np.mean(np.sign(found[first] - found[second]) != np.sign(base[first] - base[second])))


def _deciles(
    logprob: Sequence[np.ndarray], entropy: Sequence[np.ndarray], base: Sequence[np.ndarray], chosen: np.ndarray
) -> list[Decile]:
    edges = np.quantile(np.concatenate(base), np.linspace(0, 1, DECILES + 1))
    found = []
    for index in range(DECILES):
        low = -np.inf if index == 0 else edges[index]
        members = [(values > low) & (values <= edges[index + 1]) for values in base]
        inside = [[d[m] for d, m in zip(deltas, members, strict=True)] for deltas in (logprob, entropy)]
        tokens = int(sum(m.sum() for m in members))
        if tokens:
            found.append(Decile(float(edges[index + 1]), tokens, _shift(inside[0], chosen), _shift(inside[1], chosen)))
    return found


def _shift(differences: Sequence[np.ndarray], chosen: np.ndarray) -> Shift:
    counts, sums, squares = (
        np.array([float((d**power).sum()) for d in differences]) for power in (0, 1, 2)
    )  # fmt: skip
    mean, spread = _moments(counts.sum(), sums.sum(), squares.sum())
    totals = [values[chosen].sum(axis=1) for values in (counts, sums, squares)]
    means, spreads = _moments(*totals)
    return Shift(_estimate(mean, means), _estimate(spread, spreads))


def _moments(count: np.ndarray, total: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = total / np.maximum(count, 1)
    return mean, np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))


def _mean(sums: np.ndarray, counts: np.ndarray, chosen: np.ndarray) -> Estimate:
    """Sum over sequences divided by their count."""
    return _estimate(sums.sum() / counts.sum(), sums[chosen].sum(axis=1) / np.maximum(counts[chosen].sum(axis=1), 1e-9))


def _estimate(value: np.ndarray | float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))
