"""GRPO: advantages relative to the group, PPO's clipped loss (Shao et al. 2024, arXiv 2402.03300).

Each prompt gets G responses. The advantage of a response is its reward, standardized within the group, and it is the
same for all tokens of the response.

Differences from the paper, which are usual today: every token of the optimizer step has the same weight
(`aggregation = "token"`, DAPO eq. 12; `"sequence"` is the paper's), and there is no KL term by default
(`kl_coefficient`; the paper has 0.04, k3 against the initial policy).

Some samples are counted but not trained on: responses that the verifier could not grade (`reward/errors`) and responses
without a token (`train/empty`). A group with equal rewards, or with one member, has zero advantage
(`train/zero_advantage`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from megatron_entropy.config.schema import Config
from megatron_entropy.config.types import NonNegativeFloat
from megatron_entropy.methods.base import Method, MethodSettings, Rollouts
from megatron_entropy.methods.objectives import (
    K3_LIMIT,
    clipped_surrogate,
    group_advantage,
    k3,
    masked_mean,
    sequence_mean,
    tis_weight,
    token_mean,
)
from megatron_entropy.monitor.history import StageHistory
from megatron_entropy.records import Batch, Group, Metric, Sample, refill, samples_of

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats

ConfigT = TypeVar("ConfigT", bound="GrpoConfig")


class Grpo(Method[ConfigT]):
    """Plain GRPO; the other reinforcement learning methods derive from it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.settings.kl_coefficient:
            self.reference = "initial"

    def generate(self, rollouts: Rollouts) -> list[Group]:
        """Sample one group for each prompt."""
        return rollouts.sample(rollouts.take_prompts(self.config.batch.prompts), self.config.batch.samples)

    def reward(self, groups: list[Group]) -> list[Group]:
        """Fill the reward of every sample; it stays None where the verifier could not grade."""
        return [group.with_samples([self.reward_sample(sample) for sample in group.samples]) for group in groups]

    def reward_sample(self, sample: Sample) -> Sample:
        """Return the sample with `correct_reward` or `wrong_reward`."""
        assert sample.grade is not None, "rollouts are graded"
        if sample.grade.correct is None:
            return sample
        reward = self.settings.correct_reward if sample.grade.correct else self.settings.wrong_reward
        return dataclasses.replace(sample, reward=reward)

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Standardize rewards within each group; ungraded and empty samples are left out before."""
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

    def compute_weights(self, samples: list[Sample]) -> list[Sample]:
        """Return the samples of an optimizer step with the weight of every token, as `aggregation` sets it."""
        return (token_mean if self.settings.aggregation == "token" else sequence_mean)(samples)

    def loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """Policy loss, plus `kl_weight` times the KL penalty, minus `entropy_coefficient` times the entropy."""
        assert batch.logprob is not None and batch.advantage is not None and stats.entropy is not None
        config = self.settings
        loss, is_clipped = self.policy_loss(stats, batch)
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
            penalty = self.kl_penalty(stats, batch)
            penalized = trained & (batch.kl_weight > 0)
            metrics["policy/kl_penalty"] = masked_mean(penalty, penalized)
            metrics["policy/penalized_frac"] = masked_mean(penalized.float(), trained)
            loss = loss + batch.kl_weight * penalty
        if config.entropy_coefficient:
            loss = loss - config.entropy_coefficient * stats.entropy
        return loss, metrics

    def policy_loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the policy loss of every token [T], and where clipping removed its gradient [T] (bool)."""
        assert batch.logprob is not None and batch.advantage is not None
        low, high, dual = self.settings.clip_low, self.settings.clip_high, self.settings.dual_clip
        return clipped_surrogate(stats.logprob, batch.logprob, batch.advantage, low=low, high=high, dual=dual)

    def kl_penalty(self, stats: TokenStats, batch: Batch) -> Tensor:
        """Return the divergence of every token [T] that `kl_weight` multiplies: k3 to the reference, clamped."""
        assert batch.reference_logprob is not None
        return k3(stats.logprob, batch.reference_logprob).clamp(max=K3_LIMIT)

    @classmethod
    def explain(cls, history: StageHistory) -> list[str]:
        """Say what could be learned from, and how the entropy changed meanwhile."""
        return [*cls.explain_groups(history), *explain_entropy(history)]

    @classmethod
    def explain_groups(cls, history: StageHistory) -> list[str]:
        """Say how many groups taught something; a method with more to tell overrides this."""
        idle = history.mean("train/zero_advantage")
        if idle is None:
            return []
        return [f"{idle:.0%} of the groups earned equal rewards, so nothing was learned from them."]


def explain_entropy(history: StageHistory) -> list[str]:
    """Say how the entropy of the policy changed, and over how many generated tokens."""
    entropy = history.values("policy/entropy")
    if not entropy:
        return []
    tokens = f", over {tokens:,.0f} generated tokens" if (tokens := sum(history.values("rollout/tokens"))) else ""
    return [f"The policy's entropy in training went from {entropy[0]:.3f} to {entropy[-1]:.3f} nats{tokens}."]


class GrpoConfig(MethodSettings):
    """Settings of GRPO."""

    method: ClassVar[type[Method[Any]]] = Grpo
    name: str = "grpo"
    clip_low: NonNegativeFloat = 0.2
    """The probability ratio is clipped below at `1 - clip_low`; PPO's epsilon (DeepSeekMath does not state its own)."""
    clip_high: NonNegativeFloat = 0.2
    """The probability ratio is clipped above at `1 + clip_high`."""
    dual_clip: NonNegativeFloat = 0.0
    """Bound of the loss at negative advantages, as a multiple of the advantage (Ye et al. 2020). 0: no bound."""
    norm_adv_by_std: bool = True
    """Divide advantages by the standard deviation of the group; false is Dr. GRPO (arXiv 2503.20783)."""
    aggregation: Literal["token", "sequence"] = "token"
    """`token`: every token of the optimizer step has the same weight. `sequence`: every response has."""
    correct_reward: float = 1.0
    """Reward of a correct response."""
    wrong_reward: float = 0.0
    """Reward of a wrong response."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Coefficient of the KL penalty (k3, nats) to the initial policy, on every token; the paper: 0.04."""
    entropy_coefficient: float = 0.0
    """Coefficient of the entropy bonus (nats) in the loss. 0: none."""
    tis_cap: NonNegativeFloat = 0.0
    """Cap of truncated importance sampling between engine and trainer; 2.0 is usual. 0: off."""
