"""CER (Cumulative Entropy Regulation, arXiv 2510.02249): a correct response earns more if the policy was confident.

Against GRPO: a correct response has the reward (1 + (1 + exp(-TECA))) / 2, in (1, 1.5]; a wrong one has 0. TECA (token
entropy cumulative average) is the running mean of the token entropies of the response. The reward uses its last value,
the mean over the response, end token included. The entropies are those of the old policy over the full vocabulary, at
the rollout temperature and before any top-p cut; the pass that computes the old log-probabilities gives them too, or
with `rollout.entropy` the engine that sampled the tokens. A k3 penalty keeps the policy near the base model. LoRA
(`actor.lora`) trains the policy.

Read from the release (github AusertDream/CumulativeEntropyRegulation, reward_manager/cer_manager.py and the
configurations of the runs); only summaries of the paper could be read. Differences from the release: the verifier is
`reward.verifier` (the release: `boxed`); a response without a token is left out and counted (the release divides by its
length); the entropy of the reference is not computed (the release computes it and does not use it).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from megatron_entropy.config.types import NonNegativeFloat
from megatron_entropy.methods.base import Method
from megatron_entropy.methods.grpo import Grpo, GrpoConfig
from megatron_entropy.methods.objectives import running_mean
from megatron_entropy.monitor.history import StageHistory
from megatron_entropy.records import Sample


class Cer(Grpo["CerConfig"]):
    """GRPO with the segmented entropy reward."""

    def reward_sample(self, sample: Sample) -> Sample:
        """Return the sample with the segmented reward; a sample without a token has no TECA."""
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

    @classmethod
    def explain_groups(cls, history: StageHistory) -> list[str]:
        """Say how the cumulative entropy changed that lowers the reward of a right answer."""
        teca = history.values("reward/teca")
        if not teca:
            return super().explain_groups(history)
        return [
            f"A right answer earned more with less cumulative entropy (TECA), which went from {teca[0]:.3f} to "
            f"{teca[-1]:.3f} nats."
        ]


def segmented_reward(correct: bool, teca: float, *, accuracy_weight: float = 1.0, entropy_weight: float = 1.0) -> float:
    """Return the reward of a response; 0 if it is wrong.

    Args:
        teca: mean entropy of the tokens of the response, nats.
    Source:
        cer_manager.py: (w_acc * 1 + w_te * (exp(-TECA) + 1)) / 2.
    """
    return (accuracy_weight + entropy_weight * (np.exp(-teca) + 1)) / 2 if correct else 0.0


class CerConfig(GrpoConfig):
    """Settings of CER; values of the release's run_gsm8k_lora.sh and its recorded runs."""

    method: ClassVar[type[Method[Any]]] = Cer
    unused = ("correct_reward", "wrong_reward")
    name: str = "cer"
    dual_clip: NonNegativeFloat = 3.0
    """Bound of the loss at negative advantages, as a multiple of the advantage. 0: no bound."""
    kl_coefficient: NonNegativeFloat = 0.001
    """Coefficient of the KL penalty (k3, the release's low_var_kl; nats) to the policy without its adapters."""
    accuracy_weight: NonNegativeFloat = 1.0
    """Weight of the constant 1 in a correct response's reward; w_acc of cer_manager.py."""
    entropy_weight: NonNegativeFloat = 1.0
    """Weight of 1 + exp(-TECA) in a correct response's reward; w_te of cer_manager.py."""
