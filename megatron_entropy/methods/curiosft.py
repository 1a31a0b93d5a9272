"""CurioSFT (arXiv 2602.02244): supervised tuning that a tempered copy of the student keeps curious.

Against plain SFT: every target token has a second term, alpha/2 (log p - log q)^2, the K2 loss to a teacher. The
teacher is a copy of the student that follows it in steps; q is its distribution at a temperature of the token's own,
chosen so that its entropy rises where it is already high (entropy-guided temperature selection,
`records.GuidedTemperature`). The student is held back where it is surer of the label than the softened teacher, and
pushed where it is less sure.

Read from the release (github HaoooWang/CurioSFT, core_algos.py, dp_actor.py); of the paper only the abstract could be
read. The release moves 99 % of the way to the student every 5 steps (`ema_alpha`), a lagging copy; whoever reads
"EMA 0.99" as a slow teacher sets 0.01. Different from it: every target token of the step weighs the same (the release
takes the mean within micro-batches of 2 sequences first, `micro_batch = 2`); temperatures are searched in fp32 (there
in the logits' type); solutions over the length limit are left out (there cut, without an end token). Its script drops
the first `<think>` of a solution, which its template has written already; here the data must come so.

Switches: `distillation = "forward"` or `"reverse"` is the full-vocabulary divergence in place of K2, `"none"` plain SFT
(with `entropy_coefficient` the bonus baseline); `guided = false` a fixed temperature; `teacher = "policy"` the student
itself.

After it comes reinforcement learning: GRPO, or `curio_rl`, GRPO with the loss the release computes.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_entropy.config.schema import Config
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods.base import Method, Rollouts
from megatron_entropy.methods.grpo import Grpo, GrpoConfig
from megatron_entropy.methods.objectives import LOG_RATIO_LIMIT, k2, masked_mean, token_mean
from megatron_entropy.methods.sft import Sft, SftConfig
from megatron_entropy.records import Batch, Group, GuidedTemperature, Metric, Sample, refill, samples_of

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats


class CurioSft(Sft):
    """SFT plus distillation from a teacher that follows the student."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, CurioSftConfig)
        self.settings: CurioSftConfig = config.method
        self._passes = 0
        low, high = self.settings.temperature_bounds
        if not 0 < low <= high:
            raise ConfigError(
                f"method.temperature_bounds=[{low}, {high}] must be two positive numbers, the lower first"
            )
        if self.settings.distillation != "none":
            self.reference = self.settings.teacher
        if self.settings.distillation in ("forward", "reverse"):
            self.divergence = self.settings.distillation

    def score_reference(self, groups: list[Group], rollouts: Rollouts) -> list[Group]:
        """Move the teacher when it is time, then ask it; it moves before its pass, first after `every` of them."""
        config = self.settings
        if self.reference == "none":
            return groups
        if self.reference == "ema" and self._passes and self._passes % config.ema_every == 0:
            rollouts.update_ema(config.ema_alpha)
        self._passes += 1
        if config.guided:
            return rollouts.score_reference(groups, GuidedTemperature(bounds=config.temperature_bounds))
        groups = rollouts.score_reference(groups, config.temperature)
        fixed = [
            dataclasses.replace(sample, reference_temperature=sample.constant(config.temperature))
            for sample in samples_of(groups)
        ]
        return refill(groups, fixed)

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Every target token weighs the same, or as released the same within `micro_batch` sequences."""
        if not self.settings.micro_batch:
            return super().compute_advantages(groups)
        samples = samples_of(groups)
        parts = [samples[i : i + self.settings.micro_batch] for i in range(0, len(samples), self.settings.micro_batch)]
        return refill(groups, [sample for part in parts for sample in token_mean(part, parts=len(parts))])

    def loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """Negative log-likelihood plus `coefficient` times the distance to the teacher."""
        loss, metrics = super().loss(stats, batch)
        if self.reference == "none":
            return loss, metrics
        teacher = batch.reference_logprob
        assert teacher is not None
        distance = {
            "k2": lambda: k2(stats.logprob, teacher),
            "forward": lambda: stats.kl_forward,
            "reverse": lambda: stats.kl_reverse,
        }[self.settings.distillation]()
        trained = batch.weight != 0
        metrics["policy/teacher_distance"] = masked_mean(distance, trained)
        if batch.reference_temperature is not None:
            metrics["policy/teacher_temperature"] = masked_mean(batch.reference_temperature, trained)
        return loss + self.settings.coefficient * distance, metrics

    def state(self) -> dict[str, Any]:
        """How often the teacher was asked; its weights are the actor's to keep."""
        return {"passes": self._passes}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the count back."""
        super().restore({name: value for name, value in state.items() if name != "passes"})
        self._passes = state.get("passes", 0)


class CurioSftConfig(SftConfig):
    """Settings of CurioSFT, hard-coded in the release or set by its scripts/1_sft.sh."""

    method: ClassVar[type[Method]] = CurioSft
    name: Literal["curiosft"] = "curiosft"  # type: ignore[assignment]
    distillation: Literal["k2", "forward", "reverse", "none"] = "k2"
    coefficient: float = Field(default=1.0, ge=0)
    """alpha."""
    teacher: Literal["ema", "policy"] = "ema"
    ema_alpha: float = Field(default=0.99, ge=0, le=1)
    """ref_model_mixup_alpha: how far the teacher goes towards the student."""
    ema_every: PositiveInt = 5
    """ref_model_sync_steps."""
    guided: bool = True
    temperature: float = Field(default=1.0, gt=0)
    """The teacher's where it is not guided."""
    temperature_bounds: tuple[float, float] = (1.1, 1.5)
    micro_batch: NonNegativeInt = 0
    """Sequences over which the mean is taken first; 0: all of the step. The release: 2."""


class CurioRl(Grpo):
    """The release's reinforcement learning, loss branch "rl" of its core_algos.py.

    Not PPO's loss: max(A log p, A clip(r)) is maximised, with the log-probability where PPO has the ratio. As log p is
    never positive, a good answer is learned only while its ratio lies within the clip range, a bad one is unlearned
    without ratio or clip. A sequence's sum is divided by the length limit, not by its length.
    """

    def surrogate(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, Tensor]:
        """See the class."""
        assert batch.logprob is not None and batch.advantage is not None
        ratio = (stats.logprob - batch.logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        clipped = -batch.advantage * ratio.clamp(1 - self.settings.clip_low, 1 + self.settings.clip_high)
        plain = -batch.advantage * stats.logprob
        outside = (ratio < 1 - self.settings.clip_low) | (ratio > 1 + self.settings.clip_high)
        return plain.minimum(clipped), (clipped < plain) & outside

    def compute_weights(self, samples: list[Sample]) -> list[Sample]:
        return token_mean(samples, tokens=self.config.rollout.max_response_tokens * len(samples))


class CurioRlConfig(GrpoConfig):
    """Settings of the release's scripts/2_rl.sh; clip bounds, rewards and advantages are GRPO's own.

    `aggregation` and `dual_clip` have no effect. The release's reward also asks for a `</think>`.
    """

    method: ClassVar[type[Method]] = CurioRl
    name: Literal["curio_rl"] = "curio_rl"  # type: ignore[assignment]
