"""Entropies of a call's requests, collected from the engine's workers while it samples. Imports no vLLM.

The workers' logits processors (`rollout/vllm_entropy.py`) tag what they record with the request's row in the call and
the token's position in the response. The batch slots of vLLM, which it reuses and moves, do not matter here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

ROW = "entropy_row"
"""Key of a request's row in vLLM's `SamplingParams.extra_args`."""


class Recorded(NamedTuple):
    """What one worker has recorded since it was last asked, about N tokens.

    `rows`, `positions`: int [N], of the request in its call and of the token in the response. `values`: float32 [N, 2]
    nats, of the distribution that the token was sampled from before top-p and top-k: its entropy, and the log-prob of
    its most probable token.
    """

    rows: np.ndarray
    positions: np.ndarray
    values: np.ndarray


class EntropyTable:
    """What was recorded for the requests of one call: [requests, max_tokens]; untouched pages take no memory."""

    def __init__(self, num_requests: int, max_tokens: int) -> None:
        self._values = np.zeros((num_requests, max_tokens, 2), np.float32)
        self._is_known = np.zeros((num_requests, max_tokens), bool)

    def add(self, recorded: Iterable[Recorded]) -> None:
        """Enter records. Those of no request, of prompt tokens and after the last token are dropped.

        vLLM samples after a partly read prompt, and once more after an end token that it has not seen yet.
        """
        num_requests, max_tokens = self._is_known.shape
        for rows, positions, values in recorded:
            kept = (rows >= 0) & (rows < num_requests) & (positions >= 0) & (positions < max_tokens)
            self._values[rows[kept], positions[kept]] = values[kept]
            self._is_known[rows[kept], positions[kept]] = True

    def response(self, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the entropies of a response, and the log-probs of the most probable tokens: float32 [length] each.

        Raises:
            RuntimeError: when a token was sampled without a record.
        """
        if missing := length - int(self._is_known[row, :length].sum()):
            raise RuntimeError(f"vLLM sampled {missing} of {length} tokens of request {row} without recording entropy")
        entropy, top_logprob = self._values[row, :length].T
        return entropy.copy(), top_logprob.copy()


def uncut_logprobs(cut: np.ndarray, cut_top: np.ndarray, top: np.ndarray) -> np.ndarray:
    """Return the log-probs of tokens before top-p and top-k: [r] nats.

    A cut keeps the most probable token and adds one number to the log-probs of all kept tokens. That token's log-probs
    before and after the cut give this number.

    Args:
        cut: [r], of the sampled tokens after the cut.
        cut_top: [r], of the most probable tokens after the cut.
        top: [r], of the most probable tokens before the cut.
    """
    return cut + (top - cut_top)
