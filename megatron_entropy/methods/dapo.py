"""DAPO (Yu et al. 2025, arXiv 2503.14476): GRPO with four changes.

Against GRPO: the upper clip bound is wider (clip-higher, eq. 10); groups whose responses are all correct or all wrong
are dropped, and new groups replace them (dynamic sampling, eq. 11); every token of the step has the same weight
(eq. 12); long responses get a soft penalty (eq. 13). Rewards are +1 and -1 (section 2.4).

The release (verl recipe/dapo) adds the dual clip (10). It stops with an error when `max_rounds` rounds do not fill the
batch; here the step trains on the groups it has, and `rollout/rounds` shows it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

from megatron_entropy.config.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from megatron_entropy.methods.base import Method, Rollouts
from megatron_entropy.methods.grpo import Grpo, GrpoConfig
from megatron_entropy.methods.objectives import soft_overlong_penalty
from megatron_entropy.monitor.history import StageHistory
from megatron_entropy.records import Group, Sample

ConfigT = TypeVar("ConfigT", bound="DapoConfig")


class Dapo(Grpo[ConfigT]):
    """Clip-higher, dynamic sampling, token-level loss, soft overlong penalty."""

    def generate(self, rollouts: Rollouts) -> list[Group]:
        """Sample until the batch is full of groups with correct and wrong responses, at most `max_rounds` rounds."""
        needed = self.config.batch.prompts
        per_round = self.settings.generation_prompts or needed
        kept: list[Group] = []
        rounds = 0
        while len(kept) < needed and rounds < self.settings.max_rounds:
            groups = self.sample_groups(rollouts, per_round)
            kept += [group for group in groups if _is_mixed(group)] if self.settings.dynamic_sampling else groups
            rounds += 1
            self.count("rollout/mixed_groups", sum(map(_is_mixed, groups)), len(groups))
        self.count("rollout/rounds", rounds)
        return kept[:needed]

    def sample_groups(self, rollouts: Rollouts, num_prompts: int) -> list[Group]:
        """Return one round of groups; a method that samples differently overrides this."""
        return rollouts.sample(rollouts.take_prompts(num_prompts), self.config.batch.samples)

    def reward_sample(self, sample: Sample) -> Sample:
        """Add the soft overlong penalty to the reward."""
        rewarded = super().reward_sample(sample)
        if rewarded.reward is None:
            return rewarded
        limit = self.config.rollout.max_response_tokens
        penalty = soft_overlong_penalty(sample.response_length, limit=limit, buffer=self.settings.overlong_buffer)
        return dataclasses.replace(rewarded, reward=rewarded.reward + self.settings.overlong_factor * penalty)

    @classmethod
    def explain_groups(cls, history: StageHistory) -> list[str]:
        """Say what dynamic sampling dropped."""
        mixed, rounds = history.mean("rollout/mixed_groups"), history.mean("rollout/rounds")
        if mixed is None or rounds is None or not history.method.get("dynamic_sampling"):
            return super().explain_groups(history)
        return [
            f"{mixed:.0%} of the sampled groups held right and wrong answers; the others teach nothing and were "
            f"replaced, in {rounds:.1f} rounds of sampling a step."
        ]


def _is_mixed(group: Group) -> bool:
    """Whether a group has correct and wrong responses; length penalties do not matter (eq. 11)."""
    verdicts = {s.grade.correct for s in group.samples if s.grade is not None and s.grade.correct is not None}
    return len(verdicts) == 2


class DapoConfig(GrpoConfig):
    """Settings of DAPO; values of the paper, if not stated otherwise."""

    method: ClassVar[type[Method[Any]]] = Dapo
    unused_with = {("overlong_buffer", 0): ("overlong_factor",)}
    name: str = "dapo"
    clip_high: NonNegativeFloat = 0.28
    """The probability ratio is clipped above at `1 + clip_high`."""
    dual_clip: NonNegativeFloat = 10.0
    """Bound of the loss at negative advantages, as a multiple of the advantage. 10 is the release's clip_ratio_c; the
    paper has none. 0: no bound."""
    wrong_reward: float = -1.0
    """Reward of a wrong response."""
    dynamic_sampling: bool = True
    """Drop groups whose responses are all correct or all wrong, and sample others for them."""
    max_rounds: PositiveInt = 10
    """Largest number of sampling rounds in a step; the release's max_num_gen_batches."""
    generation_prompts: NonNegativeInt = 0
    """Prompts of one sampling round. 0: as many as the batch. The release: three times the batch."""
    overlong_buffer: NonNegativeInt = 0
    """Number of tokens before the length limit over which the penalty grows; the paper: 4096 of 20480. 0: no
    penalty."""
    overlong_factor: NonNegativeFloat = 1.0
    """Penalty of a response at the length limit."""
