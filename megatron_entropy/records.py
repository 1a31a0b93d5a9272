"""Records of a training step, filled from left to right.

`Prompt -> Group[Sample]` (generate) `-> grade` (rewards) `-> logprob, entropy` (score) `-> reference_logprob`
(score_reference) `-> reward` `-> advantage, weight, kl_weight` (compute_advantages) `-> Batch` (packing) `-> update`.
`Sample` is frozen; each phase returns copies with more fields filled (`dataclasses.replace`). Nothing here imports
torch at run time, so that methods and configuration load quickly.

Shape letters used everywhere: `T` packed tokens of a micro-batch, `S` sequences in it, `n` tokens of one sample
(prompt and response), `G` samples of a group, `H` hidden size, `V` vocabulary.

Alignment: entry `t` of a per-token field of a `Sample` belongs to token `t` and to the distribution that produced it;
prompt positions hold 0. A `Batch` is shifted by one: entry `i` belongs to `targets[i]`, the token that the hidden state
at `i` predicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Prompt:
    """One question of the data set.

    `index`: its row number over all files of the set, which decides its seeds and order. `tokens`: the templated
    question. `answer`: the ground truth, or None. `target`: tokens of a worked solution with its end token, or None.
    `response_prefix`: tokens of a response that sampling continues (a CURE branch). `semantic_entropy`: nats, of the
    answers that a policy gave to the question (subcommand `semantic-entropy`), or None.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    answer: str | None = None
    target: tuple[int, ...] | None = None
    response_prefix: tuple[int, ...] = ()
    semantic_entropy: float | None = None


@dataclass(frozen=True)
class Grade:
    """Verdict of a verifier on one response: `correct`, or None with an `error` (`timeout`, `crash`, ...)."""

    correct: bool | None
    extracted: str | None = None
    error: str | None = None


class Alternatives(NamedTuple):
    """The k most probable tokens at every position of a response, best first, with their log-probs in nats.

    The distribution is that of `Sample.rollout_logprob`; tokens outside a top-p or top-k cut have -inf.
    """

    tokens: np.ndarray  # [response_length, k] int32
    logprobs: np.ndarray  # [response_length, k] float32


@dataclass(frozen=True)
class Sample:
    """One sequence: a prompt and its response.

    `tokens`: [n] int32. `prompt_length`: number of leading tokens that are never trained (for a CURE branch the
    response prefix is among them). `finish_reason`: `stop` or `length`. Per-token fields are float32 [n], or None until
    a phase has filled them. `text`: the generated tokens as text. `parent`: index within the group of the sample that
    this one branched from. The reference is the same model with other weights: the initial policy, or a teacher.
    """

    tokens: np.ndarray
    prompt_length: int
    finish_reason: str
    text: str
    policy_version: int = 0
    parent: int | None = None
    rollout_logprob: np.ndarray | None = None  # by the engine, at the rollout temperature, cut to top-p and top-k
    rollout_uncut_logprob: np.ndarray | None = None  # by the engine with `rollout.entropy`: before top-p and top-k
    rollout_entropy: np.ndarray | None = None  # by the engine with `rollout.entropy`: nats, full vocabulary
    rollout_temperature: float | None = None  # of `rollout_entropy`
    alternatives: Alternatives | None = None  # by the engine with `rollout.top_alternatives`
    grade: Grade | None = None
    logprob: np.ndarray | None = None  # by `score`: the policy before the update
    entropy: np.ndarray | None = None  # by `score`: nats, full vocabulary; with `rollout.entropy` the engine's
    reference_logprob: np.ndarray | None = None  # by `score_reference`, at `reference_temperature`
    reference_temperature: np.ndarray | None = None  # of each token; None: the temperature of the pass
    reward: float | None = None
    advantage: np.ndarray | None = None
    weight: np.ndarray | None = None  # by `compute_advantages`: weight of each token in the loss of the step
    kl_weight: np.ndarray | None = None  # by `compute_advantages`: coefficient of each token's KL penalty

    @property
    def response_length(self) -> int:
        """Number of generated tokens, the end token included."""
        return len(self.tokens) - self.prompt_length

    def response(self, field: str) -> np.ndarray:
        """Return the entries of a per-token field at response tokens: [response_length]."""
        values = getattr(self, field)
        assert values is not None, f"Sample.{field} is not filled yet"
        return values[self.prompt_length :]

    def constant(self, value: float) -> np.ndarray:
        """Return a per-token field that is `value` at response tokens and 0 at prompt tokens: [n] float32."""
        field = np.zeros(len(self.tokens), np.float32)
        field[self.prompt_length :] = value
        return field


@dataclass(frozen=True)
class Group:
    """All samples of one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    def with_samples(self, samples: Iterable[Sample]) -> Group:
        """Return the group with other samples."""
        return dataclasses.replace(self, samples=tuple(samples))


def samples_of(groups: Sequence[Group]) -> list[Sample]:
    """Return all samples of all groups, in order."""
    return [sample for group in groups for sample in group.samples]


def refill(groups: Sequence[Group], samples: Sequence[Sample]) -> list[Group]:
    """Return the groups with their samples replaced; `samples` in the order of `samples_of`."""
    assert len(samples) == sum(len(group.samples) for group in groups)
    following = iter(samples)
    return [group.with_samples([next(following) for _ in group.samples]) for group in groups]


def merge_trained(groups: Sequence[Group], trained: Sequence[Group]) -> list[Group]:
    """Return `groups` with every sample that a method kept for training as it stands in `trained`, which may lack some.

    Copies of a sample share its `tokens`.
    """
    copies = {id(sample.tokens): sample for sample in samples_of(trained)}
    return [group.with_samples(copies.get(id(sample.tokens), sample) for sample in group.samples) for group in groups]


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch of one rank; sequences lie end to end.

    A sequence of n tokens has n - 1 positions: position `i` reads `tokens[i]` and predicts `targets[i]`. `targets` is
    -100 where nothing is trained or scored. `boundaries`: start of each sequence, and the end of the last one, on the
    host `edges`. `order`: [S] index of each sequence in the packed list, -1 for padding. A loss is
    `(weight * per_token).sum()`.

    Under context parallelism these are the positions of each sequence that this rank holds (see `data.packing`), up to
    2 * cp - 1 positions of padding included; `positions` says which.
    """

    tokens: torch.Tensor  # [T] int64
    targets: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, in the sequence
    boundaries: torch.Tensor  # [S + 1] int32
    order: tuple[int, ...]
    weight: torch.Tensor  # [T] float32, like all fields below
    advantage: torch.Tensor | None = None
    logprob: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    rollout_logprob: torch.Tensor | None = None
    reference_logprob: torch.Tensor | None = None
    reference_temperature: torch.Tensor | None = None
    kl_weight: torch.Tensor | None = None
    edges: tuple[int, ...] = ()


@dataclass(frozen=True)
class HeadInputs:
    """Inputs of the output layer for one micro-batch: the logits are `hidden @ weight.T`, never built as a whole."""

    hidden: torch.Tensor  # [T, H], or [T/tp, H] with sequence_parallel
    weight: torch.Tensor  # [V/tp, H], this rank's rows
    targets: torch.Tensor  # [T] int64, -100: nothing to compute
    group: ProcessGroup | None  # tensor parallel ranks
    sequence_parallel: bool
    vocab_size: int  # without padding rows
    impl: str = "auto"  # of `entropy_kernels`
    main_grad: torch.Tensor | None = None  # [V/tp, H] fp32, Megatron's sum of the weight's gradients


TokenStatistics = Callable[[HeadInputs], Mapping[str, "torch.Tensor"]]
"""Computes per-token fields of `Sample`, by name, each [T] float32, in one forward pass without gradients."""


@dataclass(frozen=True)
class Metric:
    """A mean `total / count` whose parts add up over samples, micro-batches and ranks, equal under every layout.

    A loss function may fill in tensors without dimensions: the actor fetches those of all micro-batches at once.
    """

    total: float | torch.Tensor
    count: float | torch.Tensor = 1.0

    def __add__(self, other: Metric) -> Metric:
        return Metric(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean, NaN where `count` is 0."""
        return float(self.total) / float(self.count) if self.count else float("nan")
