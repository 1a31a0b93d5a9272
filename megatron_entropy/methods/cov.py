"""Clip-Cov and KL-Cov (Cui et al. 2025, arXiv 2505.22617): hold back the few tokens that use up the policy's entropy.

It is those whose log-probability and advantage vary together most. A token's part in that covariance is
(log p - mean log p) (A - mean A), eq. 10, means over all tokens of the step. Against GRPO: Clip-Cov takes some of the
tokens with a covariance within bounds out of the loss (eq. 11, 12); KL-Cov adds |log p - log p_old| to the loss of
those with the largest and clips no ratio at all (eq. 13, 14).

Read from verl (core_algos.py, compute_policy_loss_clip_cov and _kl_cov, and its recipe/entropy); of the paper only
notes could be read. Different from it: tokens are chosen among those of the whole optimizer step, not of a micro-batch,
by the policy before the step, where verl takes the policy of the moment; at `batch.updates = 1` the two are the same.
verl never drops a token that PPO has clipped; at ratio 1, where the choice is made here, there is none. At least one
token is chosen of every micro-batch there, of every step here. A |log p - log p_old| below 1e-4 is 0 here: before the
first update there is none, and verl takes the sign of rounding errors for a gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_entropy.config.schema import Config
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods.base import Method
from megatron_entropy.methods.grpo import Grpo, GrpoConfig
from megatron_entropy.methods.objectives import (
    absolute_log_ratio,
    concat_response_tokens,
    covariance,
    fraction_to_count,
    scatter_to_samples,
    top_k_mask,
    unclipped_surrogate,
)
from megatron_entropy.records import Batch, Group, Sample, refill, samples_of

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats


class ClipCov(Grpo):
    """GRPO without a few tokens of high covariance, drawn at random."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, ClipCovConfig)
        self.settings: ClipCovConfig = config.method
        if not self.settings.covariance_low < self.settings.covariance_high:
            raise ConfigError(
                f"method.covariance_low={self.settings.covariance_low} must be below "
                f"method.covariance_high={self.settings.covariance_high}"
            )

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """A dropped token has advantage 0; it keeps its place in the mean."""
        groups = super().compute_advantages(groups)
        samples = samples_of(groups)
        advantages, covariances = concat_response_tokens(samples, "advantage"), _covariances(samples)
        bounds = self.settings.covariance_low, self.settings.covariance_high
        seed = derive_seed(self.config.seed, self.config.name, "clip_cov", _digest(samples))
        dropped = drawn_between(covariances, bounds, fraction=self.settings.clip_fraction, seed=seed)
        self.count("train/dropped", float(dropped.sum()), len(dropped))
        self.count("policy/covariance", float(covariances.sum()), len(covariances))
        return refill(groups, scatter_to_samples(samples, "advantage", np.where(dropped, 0.0, advantages)))


class KlCov(Grpo):
    """GRPO without clipping, with a penalty on the tokens of top_k_mask covariance."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, KlCovConfig)
        self.settings: KlCovConfig = config.method
        if self.settings.kl_coefficient:
            raise ConfigError(
                "method.kl_coefficient must be 0: kl_cov penalises chosen tokens, with method.penalty_coefficient"
            )
        if config.batch.updates == 1:
            raise ConfigError(
                "batch.updates=1: kl_cov penalises the distance to the policy before the step, which is 0 at a step's "
                "only update; set batch.updates to 2 or more (the paper: 8)"
            )

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """The penalty's coefficient on the tokens of top_k_mask covariance, 0 on the others."""
        groups = super().compute_advantages(groups)
        samples = samples_of(groups)
        covariances = _covariances(samples)
        chosen = top_k_mask(covariances, fraction_to_count(len(covariances), self.settings.penalty_fraction))
        self.count("policy/covariance", float(covariances.sum()), len(covariances))
        self.count("policy/covariance_high", float(covariances[chosen].sum()), float(chosen.sum()))
        return refill(groups, scatter_to_samples(samples, "kl_weight", chosen * self.settings.penalty_coefficient))

    def surrogate(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, Tensor]:
        """Minus advantage times ratio; nothing is clipped."""
        assert batch.logprob is not None and batch.advantage is not None
        return unclipped_surrogate(stats.logprob, batch.logprob, batch.advantage)

    def penalty(self, stats: TokenStats, batch: Batch) -> Tensor:
        """The absolute log-ratio to the policy before the step."""
        assert batch.logprob is not None
        return absolute_log_ratio(stats.logprob, batch.logprob)


def drawn_between(covariances: np.ndarray, bounds: tuple[float, float], *, fraction: float, seed: int) -> np.ndarray:
    """A mask [N] of tokens whose covariance lies strictly between two bounds, drawn evenly without replacement.

    Args:
        covariances: [N] of all tokens.
        fraction: of the N tokens, how many are drawn (at least one), if there are so many to draw from.
        seed: decides the draw; it sorts Philox words, whose stream is the same in every version of numpy.
    """
    mask = np.zeros(len(covariances), bool)
    candidates = np.flatnonzero((covariances > bounds[0]) & (covariances < bounds[1]))
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(candidates))
    mask[candidates[np.argsort(words, kind="stable")[: fraction_to_count(len(mask), fraction)]]] = True
    return mask


def _covariances(samples: Sequence[Sample]) -> np.ndarray:
    return covariance(concat_response_tokens(samples, "logprob"), concat_response_tokens(samples, "advantage"))


def _digest(samples: Sequence[Sample]) -> str:
    """Of the responses' tokens: what a step's draw is seeded with, so that a resumed run draws the same."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        digest.update(sample.tokens.tobytes())
    return digest.hexdigest()


class ClipCovConfig(GrpoConfig):
    """Settings of Clip-Cov, those of verl's recipe/entropy/7b_clip_cov.sh."""

    method: ClassVar[type[Method]] = ClipCov
    name: Literal["clip_cov"] = "clip_cov"  # type: ignore[assignment]
    clip_low: float = 1.0
    clip_high: float = 1.0
    """Wide: ratios above 2 only are clipped."""
    clip_fraction: float = Field(default=2e-4, gt=0, le=1)
    """clip_cov_ratio, r of the paper's section 4.3: of all tokens, how many are dropped at most."""
    covariance_low: float = 1.0
    covariance_high: float = 5.0
    """clip_cov_lb, clip_cov_ub, the paper's omega."""


class KlCovConfig(GrpoConfig):
    """Settings of KL-Cov, those of verl's recipe/entropy/7b_kl_cov.sh.

    `clip_low`, `clip_high` and `dual_clip` have no effect.
    """

    method: ClassVar[type[Method]] = KlCov
    name: Literal["kl_cov"] = "kl_cov"  # type: ignore[assignment]
    penalty_fraction: float = Field(default=2e-3, gt=0, le=1)
    """kl_cov_ratio, k of the paper's section 4.3: of all tokens, how many are penalised; 2e-4 for the 32B model."""
    penalty_coefficient: float = Field(default=1.0, ge=0)
    """ppo_kl_coef, the paper's beta; verl's own default is 0.1."""
