"""DAPO (Yu et al. 2025, arXiv 2503.14476): GRPO with four changes.

Against GRPO: the upper clip bound is wider (clip-higher, eq. 10); groups whose answers are all right or all wrong are
dropped and replaced by fresh ones (dynamic sampling, eq. 11); every token of the step weighs the same (eq. 12); long
responses are penalised softly (eq. 13). Rewards are +1 and -1 (section 2.4).

The release (verl recipe/dapo) adds the dual clip (10) and stops with an error when `max_rounds` rounds do not fill the
batch; here the step then trains on the groups it has, and `rollout/rounds` shows it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from megatron_entropy.config.schema import Config
from megatron_entropy.methods.base import Method, Rollouts
from megatron_entropy.methods.grpo import Grpo, GrpoConfig
from megatron_entropy.methods.objectives import soft_overlong_penalty
from megatron_entropy.records import Group, Sample


class Dapo(Grpo):
    """Clip-higher, dynamic sampling, token-level loss, soft overlong penalty."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, DapoConfig)
        self.settings: DapoConfig = config.method

    def generate(self, rollouts: Rollouts) -> list[Group]:
        """Sample until enough groups hold right and wrong answers, or `max_rounds` rounds are done."""
        wanted = self.config.batch.prompts
        per_round = self.settings.generation_prompts or wanted
        kept: list[Group] = []
        rounds = 0
        while len(kept) < wanted and rounds < self.settings.max_rounds:
            groups = self.explore(rollouts, per_round)
            kept += [group for group in groups if _is_mixed(group)] if self.settings.dynamic_sampling else groups
            rounds += 1
            self.count("rollout/mixed_groups", sum(map(_is_mixed, groups)), len(groups))
        self.count("rollout/rounds", rounds)
        return kept[:wanted]

    def explore(self, rollouts: Rollouts, prompts: int) -> list[Group]:
        """One round of groups; methods that sample in another way override this."""
        return rollouts.sample(rollouts.take(prompts), self.config.batch.samples)

    def reward_sample(self, sample: Sample) -> Sample:
        rewarded = super().reward_sample(sample)
        if rewarded.reward is None:
            return rewarded
        limit = self.config.rollout.max_response_tokens
        penalty = soft_overlong_penalty(sample.response_length, limit=limit, buffer=self.settings.overlong_buffer)
        return dataclasses.replace(rewarded, reward=rewarded.reward + self.settings.overlong_factor * penalty)


def _is_mixed(group: Group) -> bool:
    """Whether the verifier called some answers right and some wrong; penalties play no part (eq. 11)."""
    verdicts = {s.grade.correct for s in group.samples if s.grade is not None and s.grade.correct is not None}
    return len(verdicts) == 2


class DapoConfig(GrpoConfig):
    """Settings of DAPO, the paper's where not said otherwise."""

    method: ClassVar[type[Method]] = Dapo
    name: Literal["dapo"] = "dapo"  # type: ignore[assignment]
    clip_high: float = 0.28
    dual_clip: float = 10.0
    """As in the release (clip_ratio_c); the paper has none."""
    wrong_reward: float = -1.0
    dynamic_sampling: bool = True
    max_rounds: int = 10
    """The release's max_num_gen_batches."""
    generation_prompts: int = 0
    """Prompts per sampling round; 0: as many as the batch. The release draws three times the batch."""
    overlong_buffer: int = 0
    """Tokens before the length limit over which the penalty grows; the paper: 4096 of 20480."""
    overlong_factor: float = 1.0
