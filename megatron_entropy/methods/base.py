"""Base class of methods: the hooks that the trainer calls, and what the hooks can use.

One training step calls the hooks in this order:

1. `generate` returns groups of samples: responses of the current policy, or solutions of the data set.
2. The trainer fills `logprob` and `entropy` of every sample, as `scores` declares.
3. `score_reference` fills the log-probabilities of the reference.
4. `reward` fills the reward of every sample.
5. The trainer splits the groups into `batch.updates` mini-batches. For each of them `compute_advantages` fills the
   advantage and the weight of every token, and then `loss` is called for every micro-batch of one optimizer step.

`select` is called once, before the first step. A method that remembers something between steps implements `state` and
`restore`. `explain` says what it did, for the report. The trainer seeds the global random generators before every step;
`distributed.seeds.derive_seed` makes seeds for a method's own draws.

Every rank calls every hook with the same records, so a hook is plain sequential code. A method imports records and
objectives; ranks, engines and models are behind `Rollouts`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast

from megatron_entropy.config.schema import Config, MethodConfig
from megatron_entropy.errors import CheckpointError, ConfigError
from megatron_entropy.monitor.history import StageHistory
from megatron_entropy.records import Batch, Group, Metric, Prompt, TokenStatistics

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_kernels import TokenStats

log = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT", bound="MethodSettings")


class MethodSettings(MethodConfig):
    """Base class of every method's settings.

    `method`: the class that they configure. A settings class with two bases must state every default that both bases
    have: pydantic takes that of the first base, even where it only inherits it.
    """

    method: ClassVar[type[Method[Any]]]


class Rollouts(Protocol):
    """What hooks can use: prompts, graded responses, and scores by the policy and by the reference."""

    def take_prompts(self, count: int) -> list[Prompt]:
        """Return the next prompts of the training data."""
        ...

    def sample(self, prompts: Sequence[Prompt], num_samples: int, *, grade_prefix: bool = False) -> list[Group]:
        """Sample `num_samples` graded responses to each prompt from the current policy.

        A response continues `Prompt.response_prefix`, if there is one.

        Args:
            grade_prefix: the verifier sees the response prefix too, not only the generated tokens.
        """
        ...

    def score(self, groups: Sequence[Group], *, logprob: bool = True, entropy: bool = True) -> list[Group]:
        """Fill `logprob` and `entropy` of the policy at the rollout temperature, those of them that are requested.

        Samples that have them keep them, so nothing is computed twice. With `rollout.entropy` the entropies are those
        that the engine recorded; the actor computes only what is missing.
        """
        ...

    def score_reference(
        self,
        groups: Sequence[Group],
        *,
        temperature: float | None = None,
        statistics: TokenStatistics | None = None,
    ) -> list[Group]:
        """Fill `reference_logprob` by the reference, without gradients.

        Args:
            temperature: of the reference's distribution. None: the rollout temperature (1 without rollouts).
            statistics: computes other fields instead.
        """
        ...

    def update_ema(self, alpha: float) -> None:
        """Move the reference towards the policy: `(1 - alpha) * reference + alpha * policy`."""
        ...

    def token_text(self, token: int) -> str:
        """Return the text of one token; empty for end tokens."""
        ...


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning on rank 0, once in a process, although a method is built several times there."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", message)


class Method(Generic[ConfigT]):
    """A training method; a subclass overrides the hooks in which it differs.

    `config`: the configuration of the stage. `settings`: the method's own settings in it.

    `uses_rollouts`: responses come from the engines. `scores`: what the actor computes for every response before
    `reward` (`logprob`, `entropy`, or nothing). `takes_rollout_entropy`: with `rollout.entropy` the engine's entropies
    serve instead of the actor's. `reference`: the weights behind `score_reference`: the `initial` policy
    of the stage (with LoRA the base model), a copy that follows the policy (`ema`, see `Rollouts.update_ema`), or the
    `policy` itself. `divergence`: a full-vocabulary divergence between reference and policy, which `loss` finds in its
    statistics as `kl_forward` (expectation under the reference) or `kl_reverse` (under the policy).
    """

    uses_rollouts: ClassVar[bool] = True
    scores: ClassVar[frozenset[str]] = frozenset({"logprob", "entropy"})
    takes_rollout_entropy: ClassVar[bool] = True
    reference: Literal["none", "initial", "ema", "policy"] = "none"
    divergence: Literal["none", "forward", "reverse"] = "none"

    def __init__(self, config: Config) -> None:
        """Check the settings; a subclass adds checks against the rest of the configuration.

        Raises:
            ConfigError: a setting without effect, or settings that do not fit each other or the configuration.
        """
        self.config = config
        self.settings = cast(ConfigT, config.method)
        self._metrics: dict[str, Metric] = {}
        for key, reason in self.settings.unused_keys().items():
            if key in self.settings.model_fields_set:
                raise ConfigError(f"method.{key} has no effect with {reason}: remove it")

    def select(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts of the data set that the stage trains on; called once. Default: all."""
        return list(prompts)

    def generate(self, rollouts: Rollouts) -> list[Group]:
        """Return the groups of a step."""
        raise NotImplementedError

    def score_reference(self, groups: list[Group], rollouts: Rollouts) -> list[Group]:
        """Fill the per-token fields of the reference. Default: `reference_logprob`, if there is a reference."""
        return rollouts.score_reference(groups) if self.reference != "none" else groups

    def reward(self, groups: list[Group]) -> list[Group]:
        """Fill `reward` of every graded sample. Default: unchanged."""
        return groups

    def compute_advantages(self, groups: list[Group]) -> list[Group]:
        """Fill `advantage` and `weight` of every sample of one optimizer step.

        Weights contain the normalization: the loss of the step is the sum of `weight * loss` over all tokens. A method
        that selects tokens selects them here, among all tokens of the step. So the selection does not depend on the
        layout of ranks and micro-batches.
        """
        raise NotImplementedError

    def loss(self, stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        """Return the loss of every token of a micro-batch before weights, [T], and metrics."""
        raise NotImplementedError

    @classmethod
    def explain(cls, history: StageHistory) -> list[str]:
        """Say in one or two sentences what the method did in a stage, by its metrics and dumps; for the report."""
        return []

    def state(self) -> dict[str, Any]:
        """Return what the method remembers between steps, for a checkpoint: small, JSON types. Default: nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back a `state`; called before the first step of a resumed stage.

        Raises:
            CheckpointError: the state of another method.
        """
        if state:
            raise CheckpointError(
                f"the checkpoint holds the state of another method ({', '.join(state)}), which {type(self).__name__} "
                "does not have; resume with the method.name that the stage began with"
            )

    def count(self, name: str, total: float, of: float = 1.0) -> None:
        """Add to a metric of the step, the mean `total / of`; hooks may call it."""
        self._metrics[name] = self._metrics.get(name, Metric(0.0, 0.0)) + Metric(total, of)

    def pop_metrics(self) -> dict[str, Metric]:
        """Return the counted metrics since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics
