"""Clip-Cov and KL-Cov (Cui et al. 2025, arXiv 2505.22617): restrain the few tokens that use up the policy's entropy.

They are the tokens with the largest covariance of log-probability and advantage. The covariance of one token is
(log p - mean log p) (A - mean A), eq. 10, with means over all tokens of the step. Against GRPO: Clip-Cov removes some
of the tokens with a covariance within bounds from the loss (eq. 11, 12). KL-Cov adds |log p - log p_old| to the loss of
the tokens with the largest covariance, and clips no ratio (eq. 13, 14). Groups are filtered as in DAPO
(`dynamic_sampling`), as in verl's recipe.

Read from verl (core_algos.py, compute_policy_loss_clip_cov and _kl_cov, and its recipe/entropy); only notes on the
paper could be read. Differences from verl:
- Tokens are selected among all tokens of the optimizer step, by the policy before the step. verl selects within a
  micro-batch, by the current policy. At `batch.updates = 1` the policies are the same.
- verl never drops a token that PPO has clipped. Here the selection is made at ratio 1, where no token is clipped.
- At least one token is selected in every step; in verl in every micro-batch.
- |log p - log p_old| below 1e-4 is 0: before the first update there is no distance, and verl takes the sign of rounding
  errors for a gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from megatron_entropy.config.schema import Config
from megatron_entropy.config.types import NonNegativeFloat
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods.base import Method, warn_once
from megatron_entropy.methods.dapo import Dapo, DapoConfig
from megatron_entropy.methods.objectives import (
    absolute_log_ratio,
    concat_response_tokens,
    covariance,
    fraction_to_count,
    scatter_to_samples,
    top_k_mask,
    unclipped_surrogate,
)
from megatron_entropy.monitor.history import StageHistory
from megatron_entropy.records import Batch, Group, Sample, refill, samples_of

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats


class ClipCov(Dapo["ClipCovConfig"]):
    """GRPO without a few random tokens of high covariance."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not self.settings.covariance_low < self.settings.covariance_high:
            raise ConfigError(
                f"method.covariance_low={self.settings.covariance_low} must be below "
                f"method.covariance_high={self.settings.covariance_high}"
            )

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Set the advantage of dropped tokens to 0; they still count in the mean of the loss."""
        groups = super().compute_advantages(groups)
        samples = samples_of(groups)
        advantages, covariances = concat_response_tokens(samples, "advantage"), _covariances(samples)
        bounds = self.settings.covariance_low, self.settings.covariance_high
        seed = derive_seed(self.config.seed, self.config.name, "clip_cov", _digest(samples))
        dropped = draw_between(covariances, bounds, fraction=self.settings.clip_fraction, seed=seed)
        self.count("train/dropped_frac", float(dropped.sum()), len(dropped))
        self.count("policy/covariance", float(covariances.sum()), len(covariances))
        return refill(groups, scatter_to_samples(samples, "advantage", np.where(dropped, 0.0, advantages)))

    @classmethod
    def explain_groups(cls, history: StageHistory) -> list[str]:
        """Say how many tokens lost their gradient."""
        dropped = history.mean("train/dropped_frac")
        if dropped is None:
            return super().explain_groups(history)
        return [f"The gradient was dropped at {dropped:.2%} of the tokens, those whose log-prob and advantage covary."]


class KlCov(Dapo["KlCovConfig"]):
    """GRPO without clipping, with a penalty on the tokens of largest covariance."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.batch.updates == 1:
            warn_once(
                "batch.updates=1: kl_cov penalizes the distance to the policy before the step, which is 0 at the only "
                "update of a step, so the penalty has no effect; set batch.updates to 2 or more (the paper: 8)"
            )

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Fill `kl_weight`: the coefficient for the tokens of largest covariance, 0 for the others."""
        groups = super().compute_advantages(groups)
        samples = samples_of(groups)
        covariances = _covariances(samples)
        chosen = top_k_mask(covariances, fraction_to_count(len(covariances), self.settings.penalty_fraction))
        self.count("policy/covariance", float(covariances.sum()), len(covariances))
        self.count("policy/high_covariance", float(covariances[chosen].sum()), float(chosen.sum()))
        return refill(groups, scatter_to_samples(samples, "kl_weight", chosen * self.settings.penalty_coefficient))

    def policy_loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, Tensor]:
        """Minus advantage times ratio, without clipping."""
        assert batch.logprob is not None and batch.advantage is not None
        return unclipped_surrogate(stats.logprob, batch.logprob, batch.advantage)

    def kl_penalty(self, stats: TokenStats, batch: Batch) -> Tensor:
        """The absolute log-ratio to the policy before the step."""
        assert batch.logprob is not None
        return absolute_log_ratio(stats.logprob, batch.logprob)

    @classmethod
    def explain_groups(cls, history: StageHistory) -> list[str]:
        """Say how many tokens had the penalty."""
        penalized = history.mean("policy/penalized_frac")
        if penalized is None:
            return super().explain_groups(history)
        return [f"{penalized:.2%} of the tokens had a KL penalty, those whose log-prob and advantage covary most."]


def draw_between(covariances: np.ndarray, bounds: tuple[float, float], *, fraction: float, seed: int) -> np.ndarray:
    """Draw tokens with a covariance strictly between two bounds, uniformly without replacement: mask [N].

    Args:
        covariances: [N] of all tokens.
        fraction: number of drawn tokens as a fraction of N, at least one token; fewer if there are fewer candidates.
        seed: of the draw. It sorts Philox words, whose stream is the same in every version of numpy.
    """
    mask = np.zeros(len(covariances), bool)
    candidates = np.flatnonzero((covariances > bounds[0]) & (covariances < bounds[1]))
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(candidates))
    mask[candidates[np.argsort(words, kind="stable")[: fraction_to_count(len(mask), fraction)]]] = True
    return mask


def _covariances(samples: Sequence[Sample]) -> np.ndarray:
    return covariance(concat_response_tokens(samples, "logprob"), concat_response_tokens(samples, "advantage"))


def _digest(samples: Sequence[Sample]) -> str:
    """Hash the tokens of all samples: part of the seed of a step's draw, so that a resumed run draws the same."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        digest.update(sample.tokens.tobytes())
    return digest.hexdigest()


class ClipCovConfig(DapoConfig):
    """Settings of Clip-Cov; values of verl's recipe/entropy/7b_clip_cov.sh."""

    method: ClassVar[type[Method[Any]]] = ClipCov
    name: str = "clip_cov"
    clip_low: NonNegativeFloat = 1.0
    """The probability ratio is clipped below at `1 - clip_low`: at 1 never."""
    clip_high: NonNegativeFloat = 1.0
    """The probability ratio is clipped above at `1 + clip_high`."""
    dual_clip: NonNegativeFloat = 0.0
    """Bound of the loss at negative advantages, as a multiple of the advantage; verl's clip_cov has none. 0: no
    bound."""
    wrong_reward: float = 0.0
    """Reward of a wrong response."""
    clip_fraction: float = Field(default=2e-4, gt=0, le=1)
    """Largest fraction of all tokens that is dropped; clip_cov_ratio, r of the paper's section 4.3."""
    covariance_low: float = 1.0
    """Covariance (nats) above which a token may be dropped; clip_cov_lb, the paper's lower omega."""
    covariance_high: float = 5.0
    """Covariance (nats) below which a token may be dropped; clip_cov_ub, the paper's upper omega."""


class KlCovConfig(DapoConfig):
    """Settings of KL-Cov; values of verl's recipe/entropy/7b_kl_cov.sh."""

    method: ClassVar[type[Method[Any]]] = KlCov
    unused = ("clip_low", "clip_high", "dual_clip", "kl_coefficient")
    name: str = "kl_cov"
    wrong_reward: float = 0.0
    """Reward of a wrong response."""
    penalty_fraction: float = Field(default=2e-3, gt=0, le=1)
    """Fraction of all tokens that is penalized; kl_cov_ratio, k of the paper's section 4.3; 2e-4 for the 32B model."""
    penalty_coefficient: NonNegativeFloat = 1.0
    """Coefficient of the penalty (nats); ppo_kl_coef, the paper's beta. verl's own default is 0.1."""
