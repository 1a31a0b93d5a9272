"""What a rollout engine is asked and what it answers; no torch and no vLLM here.

An engine holds one copy of the model and samples from it. Whatever it answers is a function of the request and of the
weights alone: each request carries its seed, so neither the other requests of its batch, nor the engine that serves
it, nor a restart in between changes a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np


@dataclass(frozen=True)
class Request:
    """One sequence to be continued.

    `key`: the caller's name for it, unlike every other of the same call. `tokens`: what is given. `max_tokens`: most
    tokens to generate, the end token included. `temperature` > 0, `top_p` in (0, 1].
    """

    key: tuple[int, ...]
    tokens: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """What a request was continued with.

    `tokens`: int32 [r], the end token included. `logprobs`: float32 [r] nats, of each token under
    softmax(logits / temperature); with `top_p` below 1 that distribution is cut to the nucleus and renormalised.
    `finish`: `stop` after an end token, `length` when `max_tokens` ended it.
    """

    key: tuple[int, ...]
    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Progress:
    """What an engine reports while it generates: at least one report a second, so that silence means it hangs."""

    completions: list[Completion] = field(default_factory=list)


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is built from, beside `RolloutConfig`.

    `model_folder`: Hugging Face folder with a `config.json`; its weights are not read, they come by a push.
    `max_model_len`: most tokens of a sequence, given and generated. `eos_ids`: tokens that end a response.
    `dtype`: `float32` or `bfloat16`. `device`: `cpu` or `cuda`. `threads`: of an engine on a CPU; 0: half of this
    machine's cores, shared out among the engines.
    """

    model_folder: str
    max_model_len: int
    eos_ids: tuple[int, ...]
    dtype: str = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0


class Engine(Protocol):
    """One model that samples, and takes new weights through vLLM's weight-transfer methods."""

    def ready(self) -> int:
        """Return the process id once the engine can be used."""
        ...

    def generate_stream(self, requests: Sequence[Request]) -> Iterator[Progress]:
        """Answer all requests, each as soon as it is finished.

        Raises:
            RuntimeError: when no weights have been pushed since the engine was made.
        """
        ...

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join a transfer group."""
        ...

    def start_weight_update(self) -> None:
        """Make the model ready to take weights."""
        ...

    def update_weights(self, update_info: dict[str, Any]) -> float:
        """Receive the weights; blocks until they are all there. Returns the seconds spent loading them."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the received weights to use."""
        ...

    def sleep(self) -> None:
        """Free the GPU, weights included; nothing on a CPU."""
        ...

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take memory for a part back; after the weights a push must follow. Nothing on a CPU."""
        ...
