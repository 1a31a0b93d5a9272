"""CER (Cumulative Entropy Regulation, arXiv 2510.02249): right answers earn more when they were given with confidence.

Against GRPO: the reward of a right answer is (1 + (1 + exp(-TECA))) / 2, in (1, 1.5], that of a wrong one 0. TECA, the
token entropy cumulative average, is the running mean of the full-vocabulary entropies of the response; the reward takes
its last value, the mean over the response (end token included). The entropies are those of the old policy at the
rollout temperature, before any top-p cut, from the pass that computes the old log-probs anyway. A k3 penalty holds the
policy near the model without its adapters, which LoRA (`actor.lora`) trains.

Read from the release (github AusertDream/CumulativeEntropyRegulation, reward_manager/cer_manager.py and the runs' own
configurations); of the paper only summaries could be read. Different from it: the verifier is `reward.verifier` (the
release: `boxed`); a response without a token is left out and counted (the release divides by its length); the
reference's entropy is not computed (the release does, and drops it).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from megatron_entropy.config.schema import Config
from megatron_entropy.methods.base import Method
from megatron_entropy.methods.grpo import Grpo, GrpoConfig
from megatron_entropy.methods.objectives import running_mean
from megatron_entropy.records import Sample


class Cer(Grpo):
    """GRPO with the segmented entropy reward."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, CerConfig)
        self.settings: CerConfig = config.method

    def reward_sample(self, sample: Sample) -> Sample:
        rewarded = super().reward_sample(sample)
        if rewarded.reward is None or not sample.response_length:
            return rewarded
        teca = float(running_mean(sample.response("entropy"))[-1])
        self.count("reward/teca", teca)
        assert sample.grade is not None
        reward = segmented_reward(
            bool(sample.grade.correct),
            teca,
            accuracy_weight=self.settings.accuracy_weight,
            entropy_weight=self.settings.entropy_weight,
        )
        return dataclasses.replace(rewarded, reward=reward)


def segmented_reward(correct: bool, teca: float, *, accuracy_weight: float = 1.0, entropy_weight: float = 1.0) -> float:
    """The reward of an answer, 0 when it is wrong.

    Args:
        teca: mean entropy of the response's tokens, nats.
    Source:
        cer_manager.py: (w_acc * 1 + w_te * (exp(-TECA) + 1)) / 2.
    """
    return (accuracy_weight + entropy_weight * (np.exp(-teca) + 1)) / 2 if correct else 0.0


class CerConfig(GrpoConfig):
    """Settings of CER, those of the release's run_gsm8k_lora.sh and its recorded runs.

    `correct_reward` and `wrong_reward` have no effect.
    """

    method: ClassVar[type[Method]] = Cer
    name: Literal["cer"] = "cer"  # type: ignore[assignment]
    dual_clip: float = 3.0
    kl_coefficient: float = Field(default=0.001, ge=0)
    """k3 (low_var_kl) to the policy without its adapters."""
    accuracy_weight: float = 1.0
    entropy_weight: float = 1.0
