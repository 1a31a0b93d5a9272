"""CurioSFT (arXiv 2602.02244): supervised fine-tuning that keeps the policy open by distilling from a tempered teacher.

Against plain SFT: the loss of every target token has a second term, coefficient/2 (log p - log q)^2, the k2 divergence
to a teacher. The teacher is a copy of the policy that follows it in jumps. q is the teacher's distribution at a
temperature of its own for every token, chosen so that its entropy grows where it is already large (`GuidedTemperature`,
the entropy-guided temperature selection). The gradient shrinks where the policy is more certain of the label than the
tempered teacher, and grows where it is less certain.

Read from the release (github HaoooWang/CurioSFT, core_algos.py, dp_actor.py); only the abstract of the paper could be
read. The release moves the teacher 99 % of the way to the policy every 5 steps (`ema_alpha`), so it is a lagging copy;
to read "EMA 0.99" as a slow teacher, set 0.01. Differences from the release:
- Every target token of the step has the same weight; the release first takes the mean within micro-batches of 2
  sequences (`micro_batch = 2`).
- Temperatures are searched in float32; in the release in the type of the logits.
- Solutions above the length limit are left out; in the release they are cut, without an end token.
- Its script drops the first `<think>` of a solution, because its template has written one. Here the data must come so.

Switches: `distillation = "forward"` or `"reverse"` is a full-vocabulary divergence instead of k2, `"none"` is plain SFT
(with `entropy_coefficient` the entropy bonus baseline); `guided = false` is one fixed temperature; `teacher = "policy"`
is the policy itself.

Reinforcement learning follows: GRPO, or `curio_rl`, GRPO with the loss that the release computes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from megatron_entropy.config.schema import Config
from megatron_entropy.config.types import FloatPair, NonNegativeFloat, NonNegativeInt, PositiveInt, Temperature
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods.base import Method, Rollouts
from megatron_entropy.methods.grpo import Grpo, GrpoConfig
from megatron_entropy.methods.objectives import LOG_RATIO_LIMIT, k2, masked_mean, token_mean
from megatron_entropy.methods.sft import Sft, SftConfig
from megatron_entropy.monitor.history import StageHistory
from megatron_entropy.records import Batch, Group, HeadInputs, Metric, Sample, refill, samples_of

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats


@dataclass(frozen=True)
class GuidedTemperature:
    """The `TokenStatistics` of the teacher: a temperature for every token, from the teacher's own entropy there.

    The rule (`entropy_kernels.guided_teacher`) and its constants are those of the release (dp_actor.py,
    compute_tau_from_logits). The goal is the present entropy plus `amplitude * sigmoid(slope * (entropy - pivot))`;
    bisection finds the temperature with that entropy.
    """

    bounds: tuple[float, float] = (1.1, 1.5)
    """Lowest and highest temperature."""
    top: int = 512
    """The search takes the entropy of this many of the largest logits."""
    pivot: float = 1.2
    """Entropy (nats) at which half of `amplitude` is added."""
    slope: float = 2.0
    """Growth of the added entropy around `pivot`, per nat."""
    amplitude: float = 0.5
    """Largest added entropy, nats."""
    floor: float = 0.03
    """Where the full entropy is at most this (nats), the temperature is the lowest."""
    iterations: int = 20
    """Steps of the bisection."""

    def __call__(self, head: HeadInputs) -> dict[str, Tensor]:
        """Return `reference_logprob` (nats) and `reference_temperature`, [T] each."""
        from entropy_kernels import guided_teacher

        guided = guided_teacher(
            head.hidden,
            head.weight,
            head.targets,
            **dataclasses.asdict(self),
            group=head.group,
            sequence_parallel=head.sequence_parallel,
            vocab_size=head.vocab_size,
            impl=head.impl,
        )
        return {"reference_logprob": guided.logprob, "reference_temperature": guided.temperature}


class CurioSft(Sft["CurioSftConfig"]):
    """SFT with distillation from a teacher that follows the policy."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._passes = 0
        low, high = self.settings.temperature_bounds
        if not 0 < low <= high:
            raise ConfigError(f"method.temperature_bounds=[{low}, {high}] must be two positive numbers, lowest first")
        if self.settings.distillation != "none":
            self.reference = self.settings.teacher
        if self.settings.distillation in ("forward", "reverse"):
            self.divergence = self.settings.distillation

    def score_reference(self, groups: list[Group], rollouts: Rollouts) -> list[Group]:
        """Score by the teacher; before that, update it after every `ema_every` passes."""
        config = self.settings
        if self.reference == "none":
            return groups
        if self.reference == "ema" and self._passes and self._passes % config.ema_every == 0:
            rollouts.update_ema(config.ema_alpha)
        self._passes += 1
        if config.guided:
            return rollouts.score_reference(groups, statistics=GuidedTemperature(bounds=config.temperature_bounds))
        groups = rollouts.score_reference(groups, temperature=config.temperature)
        fixed = [
            dataclasses.replace(sample, reference_temperature=sample.constant(config.temperature))
            for sample in samples_of(groups)
        ]
        return refill(groups, fixed)

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Fill the weights: the same for every target token, of the step or within `micro_batch` sequences."""
        size = self.settings.micro_batch
        if not size:
            return super().compute_advantages(groups)
        samples = samples_of(groups)
        chunks = [samples[start : start + size] for start in range(0, len(samples), size)]
        return refill(groups, [s for chunk in chunks for s in token_mean(chunk, num_chunks=len(chunks))])

    def loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """Negative log-likelihood, plus `coefficient` times the distance to the teacher."""
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
        """Return the number of teacher passes; the actor keeps the teacher's weights."""
        return {"passes": self._passes}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back the number of teacher passes."""
        super().restore({name: value for name, value in state.items() if name != "passes"})
        self._passes = state.get("passes", 0)

    @classmethod
    def explain(cls, history: StageHistory) -> list[str]:
        """Say which temperatures the teacher had and how far it was, then what supervised training says."""
        heat, distance = history.values("policy/teacher_temperature"), history.values("policy/teacher_distance")
        said = super().explain(history)
        if not distance:
            return said
        copy = "the policy itself" if history.method.get("teacher") == "policy" else "a lagging copy of the policy"
        chosen = ""
        if heat:
            among = " chosen for every token by its entropy" if history.method.get("guided") else ""
            range_of_steps = f"means of steps: {min(heat):.2f} to {max(heat):.2f}"
            chosen = f" at a temperature{among}: {sum(heat) / len(heat):.2f} on average ({range_of_steps})"
        return [
            f"The teacher was {copy}{chosen}; the distance to it was {sum(distance) / len(distance):.3f} nats a token.",
            *said,
        ]


class CurioSftConfig(SftConfig):
    """Settings of CurioSFT; values of the release: constants of its code, or set by its scripts/1_sft.sh."""

    method: ClassVar[type[Method[Any]]] = CurioSft
    unused_with = {
        ("guided", True): ("temperature",),
        ("guided", False): ("temperature_bounds",),
        ("teacher", "policy"): ("ema_alpha", "ema_every"),
        ("distillation", "none"): (
            "coefficient",
            "teacher",
            "ema_alpha",
            "ema_every",
            "guided",
            "temperature",
            "temperature_bounds",
        ),
    }
    name: str = "curiosft"
    distillation: Literal["k2", "forward", "reverse", "none"] = "k2"
    """Distance to the teacher: k2 of the target token, a full-vocabulary divergence, or none."""
    coefficient: NonNegativeFloat = 1.0
    """Coefficient of the distance (nats); alpha."""
    teacher: Literal["ema", "policy"] = "ema"
    """`ema`: a copy that follows the policy. `policy`: the policy itself."""
    ema_alpha: float = Field(default=0.99, ge=0, le=1)
    """Fraction of the way to the policy that the teacher moves; ref_model_mixup_alpha."""
    ema_every: PositiveInt = 5
    """Training steps between two moves of the teacher; ref_model_sync_steps."""
    guided: bool = True
    """Choose the teacher's temperature for every token from the teacher's entropy."""
    temperature: Temperature = 1.0
    """Temperature of the teacher if it is not guided."""
    temperature_bounds: FloatPair = (1.1, 1.5)
    """Lowest and highest temperature of a guided teacher."""
    micro_batch: NonNegativeInt = 0
    """Sequences whose tokens are averaged first, before the mean over the step. 0: all of the step. The release: 2."""


class CurioRl(Grpo["CurioRlConfig"]):
    """The reinforcement learning of the release, loss branch "rl" of its core_algos.py.

    It is not PPO's loss: it maximizes max(A log p, A clip(r)), with the log-probability where PPO has the ratio. As
    log p is never positive, a good response is learned only while its ratio lies within the clip range; a bad one is
    unlearned without ratio or clip. The sum over a sequence is divided by the length limit, not by its length.
    """

    def policy_loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, Tensor]:
        """Minimum of -A log p and -A clip(r), see the class."""
        assert batch.logprob is not None and batch.advantage is not None
        ratio = (stats.logprob - batch.logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        clipped = -batch.advantage * ratio.clamp(1 - self.settings.clip_low, 1 + self.settings.clip_high)
        plain = -batch.advantage * stats.logprob
        outside = (ratio < 1 - self.settings.clip_low) | (ratio > 1 + self.settings.clip_high)
        return plain.minimum(clipped), (clipped < plain) & outside

    def compute_weights(self, samples: list[Sample]) -> list[Sample]:
        """Return the samples with equal weights: 1 / (length limit * number of samples)."""
        return token_mean(samples, num_tokens=self.config.rollout.max_response_tokens * len(samples))


class CurioRlConfig(GrpoConfig):
    """Settings of the release's scripts/2_rl.sh; clip bounds, rewards and advantages are those of GRPO.

    The release's reward also requires a `</think>`.
    """

    method: ClassVar[type[Method[Any]]] = CurioRl
    unused = ("aggregation", "dual_clip")
    name: str = "curio_rl"
