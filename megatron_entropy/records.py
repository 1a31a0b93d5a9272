"""The nouns of a training step, filled from left to right.

`Prompt -> Group[Sample]` (generate) `-> grade` (rewards) `-> logprob, entropy` (score) `-> reference_logprob`
(teacher) `-> reward` `-> advantage, weight, kl_weight` (credit) `-> Batch` (packing) `-> update`. `Sample` is frozen;
a stage returns copies with one more field (`dataclasses.replace`). Nothing here imports torch at run time, so that
methods and configuration load in a moment.

Shape letters used everywhere: `T` packed tokens of a micro-batch, `S` sequences in it, `n` tokens of one sample
(prompt and response), `H` hidden size, `V` vocabulary.

Alignment: entry `t` of a per-token field of a `Sample` belongs to token `t` itself and to the distribution that
produced it; prompt positions hold 0. A `Batch` is shifted by one: entry `i` belongs to `targets[i]`, the token that
the hidden state at `i` predicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prompt:
    """One question of the data set.

    `index`: its row number over all files of the set, the identity used for seeds and order. `tokens`: the templated
    question. `answer`: the ground truth, or None. `target`: tokens of a worked solution with its end token, or None.
    `given`: tokens of the answer that are given too, from which it is continued (a CURE branch). `semantic_entropy`:
    nats, of the answers a policy gave to it (`tools/semantic_entropy.py`), or None.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    answer: str | None = None
    target: tuple[int, ...] | None = None
    given: tuple[int, ...] = ()
    semantic_entropy: float | None = None


@dataclass(frozen=True)
class Grade:
    """What a verifier said of one answer: `correct`, or `error` (`timeout`, `crash`, ...) when it could not say."""

    correct: bool | None
    extracted: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Sample:
    """One sequence: a prompt and its response.

    `tokens`: [n] int32. `prompt_length`: tokens before this index are given, never trained (for a CURE branch the
    re-used prefix is among them). `finish`: `stop` or `length`. Per-token fields are float32 [n] or None while no
    stage has filled them. `text`: of the generated tokens. `parent`: index within the group of the sample this one
    branched from. The reference is another set of weights of the same model: the policy as it began, or a teacher.
    """

    tokens: np.ndarray
    prompt_length: int
    finish_reason: str
    text: str
    policy_version: int = 0
    parent: int | None = None
    rollout_logprob: np.ndarray | None = None  # by the engine, at the rollout temperature
    grade: Grade | None = None
    logprob: np.ndarray | None = None  # by `score`: the policy before the update
    entropy: np.ndarray | None = None  # by `score`, nats, full vocabulary
    reference_logprob: np.ndarray | None = None  # by `teacher`: under the reference, at `reference_temperature`
    reference_temperature: np.ndarray | None = None  # of each token; None: that of the pass
    reward: float | None = None
    advantage: np.ndarray | None = None
    weight: np.ndarray | None = None  # by `credit`: the share of each token in the step's loss
    kl_weight: np.ndarray | None = None  # by `credit`: the coefficient of each token's divergence penalty

    @property
    def response_length(self) -> int:
        """Number of generated tokens, the end token included."""
        return len(self.tokens) - self.prompt_length

    def response(self, field: str) -> np.ndarray:
        """The entries of a per-token field that belong to response tokens: [response_length]."""
        values = getattr(self, field)
        assert values is not None, f"no stage has filled Sample.{field} yet"
        return values[self.prompt_length :]

    def constant(self, value: float) -> np.ndarray:
        """A per-token field that is `value` on response tokens and 0 on given ones: [n] float32."""
        field = np.zeros(len(self.tokens), np.float32)
        field[self.prompt_length :] = value
        return field


@dataclass(frozen=True)
class Group:
    """All samples of one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    def with_samples(self, samples: Iterable[Sample]) -> Group:
        """The same group with other samples."""
        return dataclasses.replace(self, samples=tuple(samples))


def samples_of(groups: Sequence[Group]) -> list[Sample]:
    """All samples of all groups, in order."""
    return [sample for group in groups for sample in group.samples]


def refill(groups: Sequence[Group], samples: Sequence[Sample]) -> list[Group]:
    """The groups with other samples in the places of theirs; `samples` as `samples_of` lists them."""
    assert len(samples) == sum(len(group.samples) for group in groups)
    following = iter(samples)
    return [group.with_samples([next(following) for _ in group.samples]) for group in groups]


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch on one data-parallel rank; sequences lie end to end.

    A sequence of n tokens takes n - 1 places: place `i` reads `tokens[i]` and predicts `targets[i]`. `targets` is -100
    where nothing is trained or scored. `boundaries`: [S + 1] int32, where sequences start and end. `order`: [S] index
    of each sequence in the list that was packed, -1 for padding. A loss is `(weight * per_token).sum()`.
    """

    tokens: torch.Tensor  # [T] int64
    targets: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    boundaries: torch.Tensor  # [S + 1] int32
    order: tuple[int, ...]
    weight: torch.Tensor  # [T] float32; as all fields below
    advantage: torch.Tensor | None = None
    logprob: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    rollout_logprob: torch.Tensor | None = None
    reference_logprob: torch.Tensor | None = None
    reference_temperature: torch.Tensor | None = None
    kl_weight: torch.Tensor | None = None


@dataclass(frozen=True)
class GuidedTemperature:
    """A temperature for every token, from the entropy of the reference's own distribution there.

    CurioSFT's entropy-guided temperature selection with the constants of its release (dp_actor.py,
    compute_tau_from_logits); the rule is written in `entropy_kernels.guided_teacher`. `bounds`: bottom_k_mask and top_k_mask
    temperature. `top`: entropies of the search are those of so many largest logits. The target entropy is the present
    one plus `amplitude * sigmoid(slope * (entropy - pivot))`. Where the full entropy is at most `floor` nats the bottom_k_mask
    temperature is taken.
    """

    bounds: tuple[float, float] = (1.1, 1.5)
    top: int = 512
    pivot: float = 1.2
    slope: float = 2.0
    amplitude: float = 0.5
    floor: float = 0.03
    iterations: int = 20


@dataclass(frozen=True)
class Metric:
    """A mean in the making: `total / count` once all parts are added up, equal under every layout."""

    total: float
    count: float = 1.0

    def __add__(self, other: Metric) -> Metric:
        return Metric(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean, or NaN of nothing."""
        return self.total / self.count if self.count else float("nan")
