"""GRPO: advantages from the group, PPO's clipped loss (Shao et al. 2024, arXiv 2402.03300).

For each prompt G responses are sampled; a response's advantage is its reward standardised within the group and the
same for all its tokens. Differences to the paper, which are what the field runs today: the weight of a token is the
same over the whole optimizer step (`aggregation = "token"`, DAPO eq. 12; `"sequence"` is the paper's), and there is no
KL term to a reference policy unless `kl_coefficient` asks for it (the paper's is 0.04; k3 against the policy as the
stage began).

Counted, not trained on: answers the verifier could not judge (`reward/errors`), responses without a token
(`train/empty`); groups whose rewards are all equal, or of one member, have no advantage (`train/zero_advantage`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from megatron_entropy.config.schema import Config
from megatron_entropy.methods.base import Method, Registered, Rollouts
from megatron_entropy.methods.objectives import (
    clipped_surrogate,
    group_advantage,
    k3,
    masked_mean,
    sequence_mean,
    tis_weight,
    token_mean,
)
from megatron_entropy.records import Batch, Group, Metric, Sample, refill, samples_of

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats


class Grpo(Method):
    """Plain GRPO; other reinforcement-learning methods derive from it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, GrpoConfig)
        self.settings = config.method
        if self.settings.kl_coefficient:
            self.reference = "initial"

    def generate(self, rollouts: Rollouts) -> list[Group]:
        """One group per prompt, straight from the policy."""
        return rollouts.sample(rollouts.take(self.config.batch.prompts), self.config.batch.samples)

    def reward(self, groups: list[Group]) -> list[Group]:
        """`correct_reward` or `wrong_reward`; None where the verifier could not say."""
        return [group.with_samples([self.reward_sample(sample) for sample in group.samples]) for group in groups]

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Group-standardised advantages; ungraded and empty samples take part in no mean and are left out."""
        kept = []
        for group in groups:
            graded = [s for s in group.samples if s.reward is not None and s.response_length > 0]
            values = group_advantage(
                [s.reward for s in graded if s.reward is not None], norm_adv_by_std=self.settings.norm_adv_by_std
            )
            self.count("train/zero_advantage", not values.any())
            self.count("train/empty", sum(not s.response_length for s in group.samples), len(group.samples))
            kept.append(
                group.with_samples(
                    dataclasses.replace(sample, advantage=sample.constant(float(value)))
                    for sample, value in zip(graded, values, strict=True)
                )
            )
        samples = self.compute_weights(samples_of(kept))
        if self.settings.kl_coefficient:
            samples = [dataclasses.replace(s, kl_weight=s.constant(self.settings.kl_coefficient)) for s in samples]
        return refill(kept, samples)

    def penalty(self, stats: TokenStats, batch: Batch) -> Tensor:
        """Divergence of every token [T] whose coefficient is `kl_weight`: k3 to the reference."""
        assert batch.reference_logprob is not None
        return k3(stats.logprob, batch.reference_logprob)

    def loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """Clipped surrogate, plus `kl_weight` times the penalty, less `entropy_coefficient` times the entropy."""
        assert batch.logprob is not None and batch.advantage is not None and stats.entropy is not None
        config = self.settings
        loss, is_clipped = self.surrogate(stats, batch)
        trained = batch.weight != 0
        metrics = {
            "policy/entropy": masked_mean(stats.entropy, trained),
            "policy/clip_frac": masked_mean(is_clipped.float(), trained),
            "policy/approx_kl": masked_mean(k3(stats.logprob, batch.logprob), trained),
        }
        if batch.rollout_logprob is not None:
            metrics["policy/rollout_kl"] = masked_mean(k3(batch.rollout_logprob, batch.logprob), trained)
            if config.tis_cap:
                loss = loss * tis_weight(batch.logprob, batch.rollout_logprob, config.tis_cap)
        if batch.kl_weight is not None:
            penalty = self.penalty(stats, batch)
            chosen = trained & (batch.kl_weight > 0)
            metrics["policy/penalty"] = masked_mean(penalty, chosen)
            metrics["policy/penalised"] = masked_mean(chosen.float(), trained)
            loss = loss + batch.kl_weight * penalty
        if config.entropy_coefficient:
            loss = loss - config.entropy_coefficient * stats.entropy
        return loss, metrics

    def surrogate(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, Tensor]:
        """Policy loss of every token [T], and where clipping took its gradient away [T]."""
        assert batch.logprob is not None and batch.advantage is not None
        low, high, dual = self.settings.clip_low, self.settings.clip_high, self.settings.dual_clip
        return clipped_surrogate(stats.logprob, batch.logprob, batch.advantage, low=low, high=high, dual=dual)

    def compute_weights(self, samples: list[Sample]) -> list[Sample]:
        return (token_mean if self.settings.aggregation == "token" else sequence_mean)(samples)

    def reward_sample(self, sample: Sample) -> Sample:
        assert sample.grade is not None, "rollouts are graded"
        if sample.grade.correct is None:
            return sample
        reward = self.settings.correct_reward if sample.grade.correct else self.settings.wrong_reward
        return dataclasses.replace(sample, reward=reward)


class GrpoConfig(Registered):
    """Settings of GRPO."""

    method: ClassVar[type[Method]] = Grpo
    name: Literal["grpo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    """PPO's epsilon, both sides (DeepSeekMath does not state its own)."""
    dual_clip: float = 0.0
    """Bound for negative advantages, as a multiple of the advantage; 0: none."""
    norm_adv_by_std: bool = True
    aggregation: Literal["token", "sequence"] = "token"
    correct_reward: float = 1.0
    wrong_reward: float = 0.0
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Of the KL penalty to the policy as the stage began, for every token."""
    entropy_coefficient: float = 0.0
    tis_cap: float = 0.0
    """Truncated importance sampling between engine and trainer; 0: off. 2.0 is usual."""
