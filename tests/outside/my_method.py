"""Entropy-shaped advantages (after Cheng et al. 2025, arXiv 2506.14758): a bonus for uncertain tokens.

Against GRPO: the advantage of every token grows by min(scale * entropy, |advantage| / cap). As `cap` is above 1, the
sign of an advantage never changes.
"""

import dataclasses

import numpy as np
from pydantic import Field

from megatron_entropy.methods.grpo import Grpo, GrpoConfig
from megatron_entropy.records import Group, Sample


class MyMethod(Grpo["MyConfig"]):
    """GRPO with a bonus for uncertain tokens."""

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Add the bonus to GRPO's advantages."""
        groups = super().compute_advantages(groups)
        return [group.with_samples([self.add_bonus(sample) for sample in group.samples]) for group in groups]

    def add_bonus(self, sample: Sample) -> Sample:
        """Return the sample with larger advantages; entropies are those of the policy before the step."""
        assert sample.entropy is not None and sample.advantage is not None
        bonus = np.minimum(self.settings.scale * sample.entropy, np.abs(sample.advantage) / self.settings.cap)
        self.count("policy/entropy_bonus", float(bonus.sum()), sample.response_length)
        return dataclasses.replace(sample, advantage=sample.advantage + bonus)


class MyConfig(GrpoConfig):
    """Settings of the method; the defaults are examples."""

    method = MyMethod
    scale: float = Field(default=0.4, ge=0)
    """Bonus per nat of entropy."""
    cap: float = Field(default=2.0, gt=1)
    """The bonus is at most the size of the advantage divided by this."""
