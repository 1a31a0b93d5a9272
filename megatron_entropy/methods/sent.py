"""SENT (arXiv 2512.04359): a curriculum from certain to uncertain questions, and a KL penalty on tokens of low entropy.

Against GRPO: questions are sorted by semantic entropy (`methods/semantic_entropy.py`) and each stage trains on its part
of them, from low to high; and in the loss every token t of low entropy has a penalty,

    beta_low * KL_t where its covariance is not high, beta_high * KL_t where it is,   beta_high > beta_low,

with KL_t the k3 estimate against the policy as the stage began. The covariance is that of log-probability and advantage
(`methods/cov.py`), by which a token uses up entropy. Entropies and log-probs that decide are those of the policy before
the step, chosen over all response tokens of an optimizer step; the release computes them anew at every update of a
rollout batch, which from the second update on (`batch.updates`) is not the same.

Read from the release (github zldscr0/SENT, core_algos.py, dp_actor.py and examples/grpo_curriculum); of the paper its
figures and a summary could be read. The two disagree, so there are two forms, and a switch for each difference:

    switch            form = "paper"                 form = "release"
    low_rule          fraction (0.8 by rank)         the same; the paper's own is a threshold it does not tell
    high_rule         fraction of the low ones       the same; the paper's own is a threshold it does not tell
    covariance_over   all: means over all tokens     low: means over those of low entropy
    penalised         low: all of low entropy        extremes: beta_high on the top_k_mask covariances, beta_low on as
                                                     many bottom_k_mask ones (which win where both meet), 0 on the others
    penalty_to        reference: k3                  old: |log p - log p_old|, to the policy before the step
    clip              true                           false
    kl_coefficient    0                              0.001, k3 to the reference on every token besides

The release chooses within micro-batches of 4 sequences, where its fraction gives one token of each kind, so next to
nothing is penalised; `selection_sequences = 4` comes close to it (4 sequences that follow one another, whatever rank
computes them). Different from it, too: its integer mask picks the covariances of other tokens than meant, here they are
the tokens' own; every token of the optimizer step weighs the same, not of the micro-batch; a |log p - log p_old| below
1e-4 is 0, as rounding errors alone would otherwise have a gradient.

Two [[stages]] with `curriculum_stage` 1 and 2 are the release's two runs: the second starts from the model that the
first exported, with a new optimizer, and that model is its reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from megatron_entropy.config.schema import Config
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.methods.base import Method
from megatron_entropy.methods.grpo import Grpo, GrpoConfig
from megatron_entropy.methods.objectives import (
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
from megatron_entropy.records import Batch, Group, Metric, Prompt, Sample, refill, samples_of

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats

K3_LIMIT = 10.0
"""The release clamps its uniform penalty here (core_algos.py, low_var_kl)."""


class Sent(Grpo):
    """GRPO with the curriculum and the penalty."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, SentConfig)
        self.settings: SentConfig = config.method
        self._check(config.batch.updates)
        if self.settings.penalty_to == "reference" or self.settings.kl_coefficient:
            self.reference = "initial"

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The stage's part of the curriculum, low entropies first; with one stage all prompts.

        Raises:
            DataError: a prompt has no semantic entropy.
            ConfigError: no prompt falls into the stage.
        """
        config = self.settings
        if config.curriculum_stages == 1:
            return list(prompts)
        entropies = []
        for prompt in prompts:
            if prompt.semantic_entropy is None:
                raise DataError(
                    f"row {prompt.index} of data.train has no column semantic_entropy, by which "
                    f"method.curriculum_stages={config.curriculum_stages} are cut; tools/semantic_entropy.py writes it"
                )
            entropies.append(prompt.semantic_entropy)
        thresholds = config.curriculum_thresholds if config.curriculum_split == "threshold" else ()
        parts = split_curriculum(entropies, stages=config.curriculum_stages, thresholds=thresholds)
        chosen = parts[config.curriculum_stage - 1]
        if not len(chosen):
            sizes = ", ".join(str(len(part)) for part in parts)
            raise ConfigError(
                f"method.curriculum_stage={config.curriculum_stage} of {config.curriculum_stages} holds no prompt: "
                f"{len(prompts)} prompts with semantic entropies from {min(entropies):.3f} to {max(entropies):.3f} "
                f"make stages of {sizes}; change method.curriculum_thresholds or method.curriculum_stages"
            )
        return [prompts[place] for place in chosen]

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """GRPO's advantages, then the penalty's coefficient of every token."""
        groups = super().compute_advantages(groups)
        samples = samples_of(groups)
        size = self.settings.selection_sequences or max(len(samples), 1)
        parts = [self._regulate(samples[start : start + size]) for start in range(0, len(samples), size)]
        return refill(groups, [sample for part in parts for sample in part])

    def penalty(self, stats: TokenStats, batch: Batch) -> Tensor:
        """k3 to the reference, or the absolute log-ratio to the policy before the step."""
        if self.settings.penalty_to == "reference":
            return super().penalty(stats, batch)
        assert batch.logprob is not None
        return absolute_log_ratio(stats.logprob, batch.logprob)

    def surrogate(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, Tensor]:
        """PPO's clipped loss, or the same without clipping."""
        if self.settings.clip:
            return super().surrogate(stats, batch)
        assert batch.logprob is not None and batch.advantage is not None
        return unclipped_surrogate(stats.logprob, batch.logprob, batch.advantage)

    def loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """GRPO's, with the chosen tokens' penalty, plus `kl_coefficient` times k3 to the reference."""
        loss, metrics = super().loss(stats, batch)
        if self.settings.kl_coefficient:
            assert batch.reference_logprob is not None
            distance = k3(stats.logprob, batch.reference_logprob).clamp(max=K3_LIMIT)
            metrics["policy/kl_reference"] = masked_mean(distance, batch.weight != 0)
            loss = loss + self.settings.kl_coefficient * distance
        return loss, metrics

    def _regulate(self, samples: list[Sample]) -> list[Sample]:
        chosen = choose(
            self.settings,
            entropy=concat_response_tokens(samples, "entropy"),
            logprob=concat_response_tokens(samples, "logprob"),
            advantage=concat_response_tokens(samples, "advantage"),
        )
        num_tokens, num_low, num_high = (float(n) for n in (len(chosen.low), chosen.low.sum(), chosen.high.sum()))
        self.count("train/low_entropy", num_low, num_tokens)
        self.count("train/high_covariance", num_high, num_tokens)
        self.count("policy/covariance", float(chosen.covariance.sum()), num_tokens)
        self.count("policy/covariance_high", float(chosen.covariance[chosen.high].sum()), num_high)
        return scatter_to_samples(samples, "kl_weight", chosen.coefficient)

    def _check(self, updates: int) -> None:
        config = self.settings
        if config.curriculum_stage > config.curriculum_stages:
            raise ConfigError(
                f"method.curriculum_stage={config.curriculum_stage} is above "
                f"method.curriculum_stages={config.curriculum_stages}; stages count from 1"
            )
        thresholds = config.curriculum_thresholds
        wanted = config.curriculum_stages - 1 if config.curriculum_split == "threshold" else 0
        if len(thresholds) != wanted or list(thresholds) != sorted(set(thresholds)):
            raise ConfigError(
                f"method.curriculum_thresholds={list(thresholds)} must be {wanted} ascending numbers for "
                f'method.curriculum_split="{config.curriculum_split}" and {config.curriculum_stages} stages'
            )
        if config.beta_low > config.beta_high:
            raise ConfigError(f"method.beta_low={config.beta_low} is above method.beta_high={config.beta_high}")
        if config.penalty_to == "old" and updates == 1:
            raise ConfigError(
                'batch.updates=1: with method.penalty_to="old" the penalty is the distance to the policy before the '
                "step, which is 0 at a step's only update; set batch.updates to 2, as the release"
            )


@dataclass(frozen=True)
class Chosen:
    """What is chosen among N tokens: masks, their covariances, and the penalty's coefficients, each [N]."""

    low: np.ndarray
    high: np.ndarray
    covariance: np.ndarray
    coefficient: np.ndarray


def choose(config: SentConfig, *, entropy: np.ndarray, logprob: np.ndarray, advantage: np.ndarray) -> Chosen:
    """The tokens of low entropy and, among them, of high covariance, with their coefficients.

    Of equal values the first token is taken. A fraction is rounded down, but is one token at least.

    Args:
        entropy, logprob, advantage: [N] of all tokens that are compared.
    """
    if config.low_rule == "fraction":
        low = bottom_k_mask(entropy, fraction_to_count(len(entropy), config.low_fraction))
    else:
        low = entropy < config.low_threshold
    if low.any():
        parts = covariance(logprob, advantage, low if config.covariance_over == "low" else None)
    else:
        parts = np.zeros(len(low))
    count = fraction_to_count(int(low.sum()), config.high_fraction)
    high = top_k_mask(parts, count, low) if config.high_rule == "fraction" else low & (parts > config.high_threshold)
    if config.penalised == "low":
        coefficient = np.where(high, config.beta_high, low * config.beta_low)
    else:
        bottom = bottom_k_mask(parts, int(high.sum()), low)
        coefficient = np.where(bottom, config.beta_low, high * config.beta_high)
    return Chosen(low, high, parts, coefficient)


RELEASE: dict[str, Any] = {
    "covariance_over": "low",
    "penalised": "extremes",
    "penalty_to": "old",
    "clip": False,
    "kl_coefficient": 0.001,
    "selection_sequences": 4,
}
"""What `form = "release"` sets where the configuration says nothing."""


class SentConfig(GrpoConfig):
    """Settings of SENT; numbers the paper's accessible parts do not tell are the release's, see the module's text."""

    method: ClassVar[type[Method]] = Sent
    name: Literal["sent"] = "sent"  # type: ignore[assignment]
    form: Literal["paper", "release"] = "paper"
    """`release` changes the defaults of the switches below to those of the released code."""
    wrong_reward: float = -1.0
    """reward_score/math_dapo.py."""
    curriculum_stages: PositiveInt = 1
    """Parts the questions are cut into; 1: no curriculum. The release: 2 (stage1.sh, stage2.sh)."""
    curriculum_stage: PositiveInt = 1
    """Which of them this stage trains on, from 1."""
    curriculum_split: Literal["quantile", "threshold"] = "quantile"
    """`quantile`: parts of equal size. `threshold`: at `curriculum_thresholds`; the release's file names tell of 2."""
    curriculum_thresholds: list[float] = []
    """Nats, ascending, one fewer than stages; a question at a threshold is above it."""
    low_rule: Literal["fraction", "threshold"] = "fraction"
    low_fraction: float = Field(default=0.8, gt=0, le=1)
    """Hard-coded in core_algos.py: the 80 % of tokens with the bottom_k_mask entropy."""
    low_threshold: float = Field(default=0.5, gt=0)
    """tau_H, nats; the paper's is not known."""
    high_rule: Literal["fraction", "threshold"] = "fraction"
    high_fraction: float = Field(default=2e-4, gt=0, le=1)
    """kl_cov_ratio of ppo_trainer.yaml, of the tokens of low entropy."""
    high_threshold: float = 1.0
    """tau_cov; the paper's is not known."""
    covariance_over: Literal["all", "low"] = "all"
    penalised: Literal["low", "extremes"] = "low"
    beta_low: float = Field(default=0.05, ge=0)
    """ppo_kl_coef 0.1 of ppo_trainer.yaml times the 0.5 hard-coded in core_algos.py."""
    beta_high: float = Field(default=0.2, ge=0)
    """The same times 2."""
    penalty_to: Literal["reference", "old"] = "reference"
    clip: bool = True
    """False: `clip_low`, `clip_high` and `dual_clip` have no effect."""
    selection_sequences: NonNegativeInt = 0
    """Tokens are chosen within so many sequences that follow one another; 0: within the whole optimizer step."""

    @model_validator(mode="before")
    @classmethod
    def _take_form(cls, settings: Any) -> Any:
        is_release = isinstance(settings, dict) and settings.get("form") == "release"
        return {**RELEASE, **settings} if is_release else settings
