"""The interface of a rollout engine: requests, completions, weights. Imports neither torch nor vLLM.

An engine is one copy of the model that generates. A completion is a function of the request and the weights alone: each
request has its own seed, so neither the other requests of its batch, nor the choice of the engine, nor a restart
changes a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from megatron_entropy.records import Alternatives


@dataclass(frozen=True)
class Request:
    """One sequence to be continued.

    `key`: the caller's identifier, unique within a call. `tokens`: the prompt. `max_tokens`: maximal number of
    generated tokens, the end token included. `temperature` > 0, `top_p` in (0, 1], `top_k` 0: all tokens,
    `repetition_penalty` > 0.
    """

    key: tuple[int, ...]
    tokens: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Completion:
    """The generated continuation of a request.

    `tokens`: int32 [r], the end token included. `logprobs`: float32 [r] nats, of each token under
    softmax(logits / temperature), after the repetition penalty and cut to the tokens of `top_p` and `top_k`.
    `finish_reason`: `stop` after an end token, `length` after `max_tokens` tokens.

    With `rollout.entropy`, of the same distribution before `top_p` and `top_k`, over the full vocabulary: `entropy`,
    float32 [r] nats, and `uncut_logprobs`, float32 [r] nats. Otherwise None.

    `alternatives`: with `rollout.top_alternatives`, of the distribution of `logprobs`; recordings leave them out.
    """

    key: tuple[int, ...]
    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: Literal["stop", "length"]
    entropy: np.ndarray | None = None
    uncut_logprobs: np.ndarray | None = None
    alternatives: Alternatives | None = None


@dataclass(frozen=True)
class GenerationUpdate:
    """Completions that finished since the last update; an engine that sends none for a long time hangs."""

    completions: list[Completion] = field(default_factory=list)


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is built from, besides `RolloutConfig`.

    `model_folder`: Hugging Face folder with a `config.json`; its weights are not read, the trainer sends them.
    `max_model_len`: maximal length of a sequence, prompt and response. `eos_ids`: tokens that end a response.
    `dtype`: `float32` or `bfloat16`. `device`: `cpu` or `cuda`. `threads`: per engine on a CPU; 0: half of this
    machine's cores, divided by the number of engines.
    """

    model_folder: str
    max_model_len: int
    eos_ids: tuple[int, ...]
    dtype: str = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0


class Engine(Protocol):
    """One copy of the model that generates, and receives weights through vLLM's weight-transfer methods."""

    def ready(self) -> int:
        """Return the process id once the engine can be used."""
        ...

    def generate_stream(self, requests: Sequence[Request]) -> Iterator[GenerationUpdate]:
        """Answer all requests, each as soon as it is finished; yields an update at least once a second.

        Raises:
            RuntimeError: when the engine has received no weights.
        """
        ...

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join a transfer group."""
        ...

    def start_weight_update(self) -> None:
        """Prepare the model for new weights."""
        ...

    def update_weights(self, update_info: dict[str, Any]) -> float:
        """Receive all weights; returns the seconds spent loading them into the model."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Use the received weights from now on."""
        ...

    def sleep(self) -> None:
        """Free the GPU memory, weights included; nothing on a CPU."""
        ...

    def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        """Allocate memory of one kind again; the weights must then be synced. Nothing on a CPU."""
        ...
