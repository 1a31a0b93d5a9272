"""SENT (arXiv 2512.04359): a curriculum from certain to uncertain questions, and a KL penalty on low-entropy tokens.

Against GRPO: questions are sorted by semantic entropy (`methods/semantic_entropy.py`), and each stage trains on its
range, from low to high. In the loss every token t of low entropy has a penalty,

    beta_low * KL_t  if its covariance is not high,  beta_high * KL_t  if it is,   beta_high > beta_low,

where KL_t is the k3 estimate against the initial policy. The covariance is that of log-probability and advantage
(`methods/cov.py`); a token with a high one uses up entropy. Tokens are selected among all response tokens of an
optimizer step, by entropies and log-probabilities of the policy before the step. The release computes them again at
every update of a rollout batch, which differs from the second update on (`batch.updates`).

Read from the release (github zldscr0/SENT, core_algos.py, dp_actor.py and examples/grpo_curriculum); of the paper its
figures and a summary could be read. The two disagree, so there are two forms, and a switch for each difference:

    switch            form = "paper"                  form = "release"
    low_rule          fraction (0.8 by rank)          the same; the paper has a threshold but does not state it
    high_rule         fraction of the low ones        the same; the paper has a threshold but does not state it
    covariance_over   all: means over all tokens      low: means over the low-entropy tokens
    penalized         low: all low-entropy tokens     extremes: beta_high on the highest covariances, beta_low on as
                                                      many lowest ones (which win where both meet), 0 on the others
    penalty_to        reference: k3                   old: |log p - log p_old|, to the policy before the step
    clip              true                            false
    kl_coefficient    0                               0.001, in addition k3 to the reference on every token

The release selects within micro-batches of 4 sequences, where its fraction gives one token of each kind, so almost
nothing is penalized. `selection_sequences = 4` is close to it (4 consecutive sequences, whatever rank computes them).
Other differences from the release: its integer mask picks the covariances of wrong tokens, here they are those of the
tokens themselves; every token of the optimizer step has the same weight, not of the micro-batch; a |log p - log p_old|
below 1e-4 is 0, because otherwise rounding errors alone have a gradient. The paper's objective is a mean over the
tokens of a response, then over responses: `aggregation = "sequence"`; the default is what the release runs.

Two [[stages]] with `curriculum_stage` 1 and 2 are the two runs of the release: the second starts from the model that
the first exported, with a new optimizer, and that model is its reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from megatron_entropy.config.schema import Config
from megatron_entropy.config.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.methods.base import Method, warn_once
from megatron_entropy.methods.grpo import Grpo, GrpoConfig
from megatron_entropy.methods.objectives import (
    K3_LIMIT,
    absolute_log_ratio,
    bottom_k_mask,
    concat_response_tokens,
    covariance,
    fraction_to_count,
    k3,
    masked_mean,
    scatter_to_samples,
    top_k_mask,
    unclipped_surrogate,
)
from megatron_entropy.methods.semantic_entropy import split_curriculum
from megatron_entropy.monitor.history import StageHistory
from megatron_entropy.records import Batch, Group, Metric, Prompt, Sample, refill, samples_of

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats


class Sent(Grpo["SentConfig"]):
    """GRPO with the curriculum and the penalty; the entropies that select tokens are always the actor's."""

    takes_rollout_entropy = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._check(config.batch.updates)
        if self.settings.penalty_to == "reference" or self.settings.kl_coefficient:
            self.reference = "initial"

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the stage's range of the curriculum, low entropies first; with one stage all prompts.

        Raises:
            DataError: a prompt has no semantic entropy.
            ConfigError: the stage has no prompt.
        """
        config = self.settings
        if config.curriculum_stages == 1:
            return list(prompts)
        entropies = []
        for prompt in prompts:
            if prompt.semantic_entropy is None:
                raise DataError(
                    f"row {prompt.index} of data.train has no column semantic_entropy, which "
                    f"method.curriculum_stages={config.curriculum_stages} needs; `megatron-entropy semantic-entropy` "
                    "writes it"
                )
            entropies.append(prompt.semantic_entropy)
        thresholds = config.curriculum_thresholds if config.curriculum_split == "threshold" else ()
        ranges = split_curriculum(entropies, stages=config.curriculum_stages, thresholds=thresholds)
        chosen = ranges[config.curriculum_stage - 1]
        if not len(chosen):
            sizes = ", ".join(str(len(indices)) for indices in ranges)
            raise ConfigError(
                f"method.curriculum_stage={config.curriculum_stage} of {config.curriculum_stages} has no prompt: "
                f"{len(prompts)} prompts with semantic entropies from {min(entropies):.3f} to {max(entropies):.3f} "
                f"make stages of {sizes}; change method.curriculum_thresholds or method.curriculum_stages"
            )
        return [prompts[index] for index in chosen]

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Fill GRPO's advantages, then `kl_weight`: the penalty's coefficient of every token."""
        groups = super().compute_advantages(groups)
        samples = samples_of(groups)
        size = self.settings.selection_sequences or max(len(samples), 1)
        chunks = [self._fill_kl_weight(samples[start : start + size]) for start in range(0, len(samples), size)]
        return refill(groups, [sample for chunk in chunks for sample in chunk])

    def kl_penalty(self, stats: TokenStats, batch: Batch) -> Tensor:
        """k3 to the reference, or the absolute log-ratio to the policy before the step."""
        if self.settings.penalty_to == "reference":
            return super().kl_penalty(stats, batch)
        assert batch.logprob is not None
        return absolute_log_ratio(stats.logprob, batch.logprob)

    def policy_loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, Tensor]:
        """PPO's clipped loss, or the loss without clipping."""
        if self.settings.clip:
            return super().policy_loss(stats, batch)
        assert batch.logprob is not None and batch.advantage is not None
        return unclipped_surrogate(stats.logprob, batch.logprob, batch.advantage)

    def loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """GRPO's loss with the penalty of the selected tokens, plus `kl_coefficient` times k3 to the reference."""
        loss, metrics = super().loss(stats, batch)
        if self.settings.kl_coefficient:
            assert batch.reference_logprob is not None
            distance = k3(stats.logprob, batch.reference_logprob)
            metrics["policy/reference_kl"] = masked_mean(distance, batch.weight != 0)
            loss = loss + self.settings.kl_coefficient * distance.clamp(max=K3_LIMIT)
        return loss, metrics

    @classmethod
    def explain_groups(cls, history: StageHistory) -> list[str]:
        """Say how many tokens were selected, and how many had the penalty."""
        low, high = history.mean("train/low_entropy_frac"), history.mean("train/high_covariance_frac")
        penalized = history.mean("policy/penalized_frac")
        if low is None or high is None or penalized is None:
            return super().explain_groups(history)
        return [
            f"{low:.1%} of the tokens counted as of low entropy, {high:.2%} as of high covariance too; {penalized:.1%} "
            "had a KL penalty."
        ]

    def _fill_kl_weight(self, samples: list[Sample]) -> list[Sample]:
        selected = select_tokens(
            self.settings,
            entropy=concat_response_tokens(samples, "entropy"),
            logprob=concat_response_tokens(samples, "logprob"),
            advantage=concat_response_tokens(samples, "advantage"),
        )
        num_tokens, num_low, num_high = (float(n) for n in (len(selected.low), selected.low.sum(), selected.high.sum()))
        self.count("train/low_entropy_frac", num_low, num_tokens)
        self.count("train/high_covariance_frac", num_high, num_tokens)
        self.count("policy/covariance", float(selected.covariance.sum()), num_tokens)
        self.count("policy/high_covariance", float(selected.covariance[selected.high].sum()), num_high)
        return scatter_to_samples(samples, "kl_weight", selected.coefficient)

    def _check(self, updates: int) -> None:
        config = self.settings
        if config.curriculum_stage > config.curriculum_stages:
            raise ConfigError(
                f"method.curriculum_stage={config.curriculum_stage} is above "
                f"method.curriculum_stages={config.curriculum_stages}; stages count from 1"
            )
        thresholds = config.curriculum_thresholds
        needed = config.curriculum_stages - 1 if config.curriculum_split == "threshold" else 0
        if len(thresholds) != needed or list(thresholds) != sorted(set(thresholds)):
            raise ConfigError(
                f"method.curriculum_thresholds={list(thresholds)} must be {needed} ascending numbers for "
                f"method.curriculum_stages={config.curriculum_stages}"
            )
        if config.beta_low > config.beta_high:
            raise ConfigError(f"method.beta_low={config.beta_low} is above method.beta_high={config.beta_high}")
        if config.penalty_to == "old" and updates == 1:
            warn_once(
                'batch.updates=1: with method.penalty_to="old" the penalty is the distance to the policy before the '
                "step, which is 0 at the only update of a step, so it has no effect; set batch.updates to 2, as in the "
                "release"
            )


@dataclass(frozen=True)
class TokenSelection:
    """Selection among N tokens: masks, covariances, and the penalty's coefficients, each [N]."""

    low: np.ndarray
    high: np.ndarray
    covariance: np.ndarray
    coefficient: np.ndarray


def select_tokens(
    config: SentConfig, *, entropy: np.ndarray, logprob: np.ndarray, advantage: np.ndarray
) -> TokenSelection:
    """Select the tokens of low entropy and, among them, those of high covariance.

    Of equal values the first token wins. A fraction is rounded down to whole tokens, but to one token at least.

    Args:
        entropy, logprob, advantage: [N] of all tokens that are compared; nats.
    """
    if config.low_rule == "fraction":
        low = bottom_k_mask(entropy, fraction_to_count(len(entropy), config.low_fraction))
    else:
        low = entropy < config.low_threshold
    if low.any():
        values = covariance(logprob, advantage, low if config.covariance_over == "low" else None)
    else:
        values = np.zeros(len(low))
    count = fraction_to_count(int(low.sum()), config.high_fraction)
    high = top_k_mask(values, count, low) if config.high_rule == "fraction" else low & (values > config.high_threshold)
    if config.penalized == "low":
        coefficient = np.where(high, config.beta_high, low * config.beta_low)
    else:
        bottom = bottom_k_mask(values, int(high.sum()), low)
        coefficient = np.where(bottom, config.beta_low, high * config.beta_high)
    return TokenSelection(low, high, values, coefficient)


RELEASE: dict[str, Any] = {
    "covariance_over": "low",
    "penalized": "extremes",
    "penalty_to": "old",
    "clip": False,
    "kl_coefficient": 0.001,
    "selection_sequences": 4,
}
"""Defaults under `form = "release"`."""


class SentConfig(GrpoConfig):
    """Settings of SENT; numbers that the readable sections of the paper lack are the release's, see the module."""

    method: ClassVar[type[Method[Any]]] = Sent
    unused_with = {
        ("clip", False): ("clip_low", "clip_high", "dual_clip"),
        ("low_rule", "fraction"): ("low_threshold",),
        ("low_rule", "threshold"): ("low_fraction",),
        ("high_rule", "fraction"): ("high_threshold",),
        ("high_rule", "threshold"): ("high_fraction",),
        ("curriculum_stages", 1): ("curriculum_split",),
        ("curriculum_split", "quantile"): ("curriculum_thresholds",),
    }
    name: str = "sent"
    form: Literal["paper", "release"] = "paper"
    """`release`: the switches below have the defaults of the released code."""
    wrong_reward: float = -1.0
    """Reward of a wrong response; reward_score/math_dapo.py."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Coefficient of k3 (nats) to the initial policy on every token, in addition to the penalty. The release: 0.001."""
    curriculum_stages: PositiveInt = 1
    """Number of ranges that the questions are split into. 1: no curriculum. The release: 2 (stage1.sh, stage2.sh)."""
    curriculum_stage: PositiveInt = 1
    """Number of the range that this stage trains on, from 1."""
    curriculum_split: Literal["quantile", "threshold"] = "quantile"
    """`quantile`: ranges of equal size. `threshold`: split at `curriculum_thresholds`; the file names of the release
    mention 2."""
    curriculum_thresholds: list[float] = []
    """Semantic entropies (nats) between the ranges, ascending, one fewer than stages; a question at a threshold is in
    the upper range."""
    low_rule: Literal["fraction", "threshold"] = "fraction"
    """How tokens of low entropy are selected: by `low_fraction`, or below `low_threshold`."""
    low_fraction: float = Field(default=0.8, gt=0, le=1)
    """Fraction of tokens with the lowest entropy; a constant of core_algos.py."""
    low_threshold: PositiveFloat = 0.5
    """Entropy (nats) below which a token has low entropy; tau_H, the paper's value is not known."""
    high_rule: Literal["fraction", "threshold"] = "fraction"
    """How tokens of high covariance are selected: by `high_fraction`, or above `high_threshold`."""
    high_fraction: float = Field(default=2e-4, gt=0, le=1)
    """Fraction of the low-entropy tokens with the highest covariance; kl_cov_ratio of ppo_trainer.yaml."""
    high_threshold: float = 1.0
    """Covariance (nats) above which it is high; tau_cov, the paper's value is not known."""
    covariance_over: Literal["all", "low"] = "all"
    """Tokens over which the covariance's means are taken: all, or those of low entropy. The release: `low`."""
    penalized: Literal["low", "extremes"] = "low"
    """`low`: all low-entropy tokens. `extremes`: those of highest covariance, and as many of lowest. The release:
    `extremes`."""
    beta_low: NonNegativeFloat = 0.05
    """Coefficient of the penalty without high covariance; ppo_kl_coef 0.1 of ppo_trainer.yaml times 0.5 of
    core_algos.py."""
    beta_high: NonNegativeFloat = 0.2
    """Coefficient of the penalty with high covariance; ppo_kl_coef 0.1 times 2 of core_algos.py."""
    penalty_to: Literal["reference", "old"] = "reference"
    """`reference`: k3 to the initial policy. `old`: absolute log-ratio to the policy before the step. The release:
    `old`."""
    clip: bool = True
    """Clip the probability ratio as PPO does. The release: false."""
    selection_sequences: NonNegativeInt = 0
    """Tokens are selected within this many consecutive sequences. 0: within the optimizer step. The release: 4."""

    @model_validator(mode="before")
    @classmethod
    def _take_form(cls, settings: Any) -> Any:
        is_release = isinstance(settings, dict) and settings.get("form") == "release"
        return {**RELEASE, **settings} if is_release else settings
