"""What a method is: six hooks, called in the order of a step.

A method with a memory between steps adds `state` and `restore`; one that draws random numbers may use the global
generators, which every step seeds anew, or seeds of its own (`config.seed_of`).

A method imports records, objectives and nothing that knows of ranks, engines or models. Every rank calls every hook
with the same records, so a hook is plain sequential code; what it needs from the outside it gets from `Rollouts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from megatron_entropy.config import Config, MethodConfig
from megatron_entropy.errors import CheckpointError
from megatron_entropy.records import Batch, Group, Metric, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats


class Rollouts(Protocol):
    """What `generate` may ask for."""

    def take(self, count: int) -> list[Prompt]:
        """The next prompts of the training data."""
        ...

    def sample(self, prompts: Sequence[Prompt], samples: int) -> list[Group]:
        """So many graded responses to each prompt, by the current policy."""
        ...

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with `logprob` and `entropy` filled by the actor at the rollout temperature."""
        ...

    def count(self, name: str, metric: Metric) -> None:
        """Add to a metric of the step."""
        ...


class Method:
    """A training method; a subclass overrides the hooks in which it differs.

    `uses_rollouts`: responses come from the engines. `scores`: what the actor computes for every response before
    `reward` (`logprob`, `entropy`); nothing is computed when empty.
    """

    uses_rollouts: ClassVar[bool] = True
    scores: ClassVar[frozenset[str]] = frozenset({"logprob", "entropy"})

    def __init__(self, stage: Config) -> None:
        self.stage = stage

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Which prompts of the data set this stage trains on; called once. Default: all."""
        return list(prompts)

    def generate(self, rollouts: Rollouts) -> list[Group]:
        """The step's groups of samples."""
        raise NotImplementedError

    def teacher(self, groups: list[Group]) -> list[Group]:
        """Fill per-token fields that come from another model, or from the whole step's statistics. Default: none."""
        return groups

    def reward(self, groups: list[Group]) -> list[Group]:
        """Fill `reward` of every graded sample. Default: unchanged."""
        return groups

    def credit(self, groups: list[Group]) -> list[Group]:
        """Fill `advantage` and `weight` of every sample of one optimizer step; weights hold the normalisation."""
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
    """Base of method configurations: remembers the class it configures."""

    method: ClassVar[type[Method]]
