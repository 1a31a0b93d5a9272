"""Supervised fine-tuning: the negative log-likelihood of worked solutions, with the same weight for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from megatron_entropy.errors import DataError
from megatron_entropy.methods.base import Method, MethodSettings, Rollouts
from megatron_entropy.methods.objectives import masked_mean, token_mean
from megatron_entropy.monitor.history import StageHistory
from megatron_entropy.records import Batch, Group, Metric, Prompt, Sample, refill, samples_of

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats

ConfigT = TypeVar("ConfigT", bound="SftConfig")


class Sft(Method[ConfigT]):
    """Train on the solutions of the data set."""

    uses_rollouts: ClassVar[bool] = False
    scores: ClassVar[frozenset[str]] = frozenset()

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return all prompts; each must have a solution.

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
        """Return the next prompts, each with its solution as the only sample."""
        return [Group(prompt, (_solution(prompt),)) for prompt in rollouts.take_prompts(self.config.batch.prompts)]

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Fill the weights: the same for every target token. There are no advantages."""
        return refill(groups, token_mean(samples_of(groups)))

    def loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """Negative log-likelihood, minus `entropy_coefficient` times the entropy."""
        assert stats.entropy is not None
        metrics = {"policy/entropy": masked_mean(stats.entropy, batch.weight != 0)}
        loss = -stats.logprob
        if self.settings.entropy_coefficient:
            loss = loss - self.settings.entropy_coefficient * stats.entropy
        return loss, metrics

    @classmethod
    def explain(cls, history: StageHistory) -> list[str]:
        """Say how the loss and the entropy changed."""
        loss, entropy = history.values("train/loss"), history.values("policy/entropy")
        if not loss or not entropy:
            return []
        return [
            f"The loss of a solution's token went from {loss[0]:.2f} to {loss[-1]:.2f}, the policy's entropy there "
            f"from {entropy[0]:.2f} to {entropy[-1]:.2f} nats."
        ]


def _solution(prompt: Prompt) -> Sample:
    assert prompt.target is not None, "checked by select"
    tokens = np.array(prompt.tokens + prompt.target, np.int32)
    return Sample(tokens, len(prompt.tokens), "stop", "")


class SftConfig(MethodSettings):
    """Settings of supervised fine-tuning."""

    method: ClassVar[type[Method[Any]]] = Sft
    name: str = "sft"
    entropy_coefficient: float = 0.0
    """Coefficient of the entropy bonus (nats) in the loss. 0: none."""
