"""Supervised fine-tuning: the negative log-likelihood of worked solutions, every target token weighing the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from megatron_entropy.config.schema import Config
from megatron_entropy.errors import DataError
from megatron_entropy.methods.base import Method, Registered, Rollouts
from megatron_entropy.methods.objectives import masked_mean, token_mean
from megatron_entropy.records import Batch, Group, Metric, Prompt, Sample, refill, samples_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from entropy_kernels import TokenStats


class Sft(Method):
    """Imitate the data set's solutions."""

    uses_rollouts: ClassVar[bool] = False
    scores: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, SftConfig)
        self.settings = config.method

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """All prompts; each must have a solution.

        Raises:
            DataError: naming the first row without one.
        """
        for prompt in prompts:
            if prompt.target is None:
                raise DataError(
                    f"method {self.settings.name} needs worked solutions, "
                    f"but row {prompt.index} of data.train has no target"
                )
        return list(prompts)

    def generate(self, rollouts: Rollouts) -> list[Group]:
        """The next prompts with their solutions as the one response."""
        return [Group(prompt, (_solution(prompt),)) for prompt in rollouts.take(self.config.batch.prompts)]

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Every target token weighs the same."""
        return refill(groups, token_mean(samples_of(groups)))

    def loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """Negative log-likelihood, less `entropy_coefficient` times the entropy."""
        assert stats.entropy is not None
        metrics = {"policy/entropy": masked_mean(stats.entropy, batch.weight != 0)}
        loss = -stats.logprob
        if self.settings.entropy_coefficient:
            loss = loss - self.settings.entropy_coefficient * stats.entropy
        return loss, metrics


def _solution(prompt: Prompt) -> Sample:
    assert prompt.target is not None, "checked by select"
    tokens = np.array(prompt.tokens + prompt.target, np.int32)
    return Sample(tokens, len(prompt.tokens), "stop", "")


class SftConfig(Registered):
    """Settings of supervised fine-tuning."""

    method: ClassVar[type[Method]] = Sft
    name: Literal["sft"] = "sft"
    entropy_coefficient: float = 0.0
