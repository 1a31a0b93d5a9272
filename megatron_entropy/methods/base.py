"""What a method is: six hooks, called in the order of a step.

A method with a memory between steps adds `state` and `restore`; one that draws random numbers may use the global
generators, which every step seeds anew, or seeds of its own (`config.derive_seed`).

A method imports records, objectives and nothing that knows of ranks, engines or models. Every rank calls every hook
with the same records, so a hook is plain sequential code; what it needs from the outside it gets from `Rollouts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from megatron_entropy.config.schema import Config, MethodConfig
from megatron_entropy.errors import CheckpointError
from megatron_entropy.records import Batch, Group, GuidedTemperature, Metric, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats


class Rollouts(Protocol):
    """What the hooks may ask for."""

    def take(self, count: int) -> list[Prompt]:
        """The next prompts of the training data."""
        ...

    def sample(self, prompts: Sequence[Prompt], samples: int, *, grade_prefix: bool = False) -> list[Group]:
        """So many graded responses to each prompt, by the current policy; continuations of `Prompt.response_prefix` if there is.

        Args:
            grade_prefix: the verifier sees the given part of an answer too, not only what was generated.
        """
        ...

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with `logprob` and `entropy` filled by the actor at the rollout temperature.

        Samples that have both keep them, so nothing is computed twice.
        """
        ...

    def score_reference(
        self, groups: Sequence[Group], temperature: float | GuidedTemperature | None = None
    ) -> list[Group]:
        """The groups with `reference_logprob` filled by the reference, without any gradient.

        Args:
            temperature: None: the rollout temperature (1 without rollouts). Guided, `reference_temperature` is filled
                too.
        """
        ...

    def update_ema(self, share: float) -> None:
        """The reference becomes `(1 - share) * reference + share * policy`."""
        ...

    def text(self, token: int) -> str:
        """The text of a single token; nothing for special tokens."""
        ...


class Method:
    """A training method; a subclass overrides the hooks in which it differs.

    `uses_rollouts`: responses come from the engines. `scores`: what the actor computes for every response before
    `reward` (`logprob`, `entropy`); nothing is computed when empty. `reference`: what `score_reference` asks: the
    policy as the stage began (with LoRA its base, else a copy), a copy that `update_ema` moves, or the policy
    itself. `divergence`: the full-vocabulary divergence between reference and policy that `loss` finds in its
    statistics, `kl_forward` (from the reference) or `kl_reverse`.
    """

    uses_rollouts: ClassVar[bool] = True
    scores: ClassVar[frozenset[str]] = frozenset({"logprob", "entropy"})
    reference: Literal["none", "initial", "ema", "policy"] = "none"
    divergence: Literal["none", "forward", "reverse"] = "none"

    def __init__(self, config: Config) -> None:
        """Take the stage's settings.

        Raises:
            ConfigError: the method's settings and the stage's do not fit.
        """
        self.config = config
        self._counted: dict[str, Metric] = {}

    def count(self, name: str, total: float, of: float = 1.0) -> None:
        """Add to a metric of the step, the mean `total / of`; hooks may call it."""
        self._counted[name] = self._counted.get(name, Metric(0.0, 0.0)) + Metric(total, of)

    def counted(self) -> dict[str, Metric]:
        """What has been counted since the last call."""
        counted, self._counted = self._counted, {}
        return counted

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Which prompts of the data set this stage trains on; called once. Default: all."""
        return list(prompts)

    def generate(self, rollouts: Rollouts) -> list[Group]:
        """The step's groups of samples."""
        raise NotImplementedError

    def score_reference(self, groups: list[Group], rollouts: Rollouts) -> list[Group]:
        """Fill per-token fields that come from the reference. Default: `reference_logprob` where there is one."""
        return rollouts.score_reference(groups) if self.reference != "none" else groups

    def reward(self, groups: list[Group]) -> list[Group]:
        """Fill `reward` of every graded sample. Default: unchanged."""
        return groups

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Fill `advantage` and `weight` of every sample of one optimizer step; weights hold the normalisation.

        Whatever is chosen among the tokens of a step is chosen here, on all of them at once, so that the choice does
        not depend on how ranks and micro-batches cut them.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What the method knows from earlier steps, for a checkpoint: small, of JSON's types. Default: nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; called before the first step of a resumed stage.

        Raises:
            CheckpointError: it is another method's.
        """
        if state:
            raise CheckpointError(
                f"the checkpoint holds what another method remembers ({', '.join(state)}), for which "
                f"{type(self).__name__} has no use; resume with the method.name the stage began with"
            )

    def loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """The loss of every token of a micro-batch, before weights: [T], and metrics."""
        raise NotImplementedError


class Registered(MethodConfig):
    """Base of method configurations: remembers the class it configures.

    One that derives from several takes a setting's default from the first class, in Python's order, that states it, as
    Python does with attributes; pydantic alone would take what the first base has only inherited.
    """

    method: ClassVar[type[Method]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if len(cls.__bases__) > 1:
            for base in reversed(cls.__mro__[1:]):
                stated = base.__dict__.get("__annotations__", {}).keys() & cls.model_fields.keys()
                for name in stated - cls.__dict__.get("__annotations__", {}).keys():
                    cls.model_fields[name] = base.model_fields[name]
            cls.model_rebuild(force=True)
