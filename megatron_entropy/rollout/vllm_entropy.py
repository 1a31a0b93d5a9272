"""Entropy of every sampled token, recorded by a logits processor inside vLLM's sampler (V1 model runner: CPUs).

vLLM calls it on the whole batch after temperature and penalties, before top-p and top-k. It returns the logits
unchanged, so the sampled tokens are the same with and without it. Its log stays on the device; the engine reads it a
few times a second (`Worker.read_entropy`). The V2 model runner has another interface: `rollout/vllm_entropy_v2.py`.

Read from vLLM 0.32: v1/sample/sampler.py (order of the steps), v1/sample/logits_processor/interface.py and
v1/worker/gpu_input_batch.py (batch updates). Only engine processes import this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from megatron_entropy.rollout.entropy import ROW, Recorded

NO_ROW = -1
FLOOR = -1e4
"""Stands for a logit of -inf relative to the largest: its probability is 0, and 0 * FLOOR is a number."""
CHUNK = {"cpu": 2**16, "cuda": 2**25}
"""Logits of one pass: on a CPU they and their exponentials stay in the L2 cache, on a GPU they bound the memory."""


class EntropyLog:
    """What this worker has recorded since the last `read`, step by step, on its device."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def append(self, rows: Tensor, positions: Tensor, values: Tensor) -> None:
        """Add a step; the tensors are those of `Recorded`."""
        self._steps.append((rows, positions, values))

    def read(self) -> Recorded:
        """Return what was recorded, and forget it."""
        steps, self._steps = self._steps, []
        if not steps:
            empty = torch.empty(0, dtype=torch.int64)
            return Recorded(empty.numpy(), empty.numpy(), torch.empty(0, 2).numpy())
        return Recorded(*(torch.cat(column).cpu().numpy() for column in zip(*steps, strict=True)))


LOG = EntropyLog()
"""The log of this worker; a process has one worker."""


def sampling_statistics(logits: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Compute the entropy of each row's distribution and the log-prob of its most probable token: [n, 2] float32 nats.

    Args:
        logits: [n, V] float32; a logit may be -inf.
        temperature: [n] > 0; None: the logits are already divided by it.
    """
    if logits.device.type != "cpu":
        return _statistics(logits, temperature, with_floor=True)
    values = _statistics(logits, temperature, with_floor=False)  # the floor is a sixth of the time, and seldom needed
    return _statistics(logits, temperature, with_floor=True) if bool(values.isnan().any()) else values


def _statistics(logits: Tensor, temperature: Tensor | None, *, with_floor: bool) -> Tensor:
    num_rows, vocabulary = logits.shape
    step = max(1, min(num_rows, CHUNK[logits.device.type] // vocabulary))
    buffers = logits.new_empty(2, step, vocabulary)
    largest = logits.amax(1, keepdim=True)
    total, weighted = logits.new_empty(2, num_rows)
    for first in range(0, num_rows, step):
        rows = slice(first, first + step)
        shifted, weights = buffers[:, : num_rows - first]
        torch.sub(logits[rows], largest[rows], out=shifted)
        if temperature is not None:
            shifted /= temperature[rows, None]
        if with_floor:
            shifted.clamp_(min=FLOOR)
        torch.exp(shifted, out=weights)
        total[rows] = weights.sum(1)
        is_single = len(weights) == 1  # torch.dot takes half the time
        weighted[rows] = torch.dot(weights[0], shifted[0]) if is_single else torch.linalg.vecdot(weights, shifted)
    log_total = total.log()
    return torch.stack([log_total - weighted / total, -log_total], 1)


def refuse_speculation(vllm_config: VllmConfig) -> None:
    """Raise a ValueError if tokens are drafted: a position then has several distributions."""
    if vllm_config.speculative_config is not None:
        raise ValueError("rollout.entropy=true does not go with speculative decoding; switch one of them off")


def row_of(params: SamplingParams) -> int:
    """Return the row of a request, `NO_ROW` if it was not numbered."""
    return (params.extra_args or {}).get(ROW, NO_ROW)


class EntropyProcessor(LogitsProcessor):
    """Records the entropy of each row's distribution; worker 0 does it for all, since every worker has all logits."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        refuse_speculation(vllm_config)
        self._is_recorder = vllm_config.parallel_config.rank == 0
        self._slots: dict[int, tuple[int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """Always: vLLM then calls `apply` after the division by the temperature."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests through the slots of the batch.

        An added or moved request may take the slot of a finished one that is not among the removed ones.
        """
        if batch_update is None:
            return
        for slot in batch_update.removed:
            self._slots.pop(slot, None)
        for slot, params, _, output_tokens in batch_update.added:
            self._slots[slot] = (row_of(params), output_tokens)
        for source, target, direction in batch_update.moved:
            replaced = self._slots.pop(target, None)
            self._slots[target] = self._slots.pop(source)
            if direction is MoveDirectionality.SWAP and replaced is not None:
                self._slots[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Record the entropy of each row of logits / temperature [n, V] and return them unchanged.

        vLLM keeps the list of a request's output tokens up to date, so its length is the position of the next token.
        """
        if self._is_recorder:
            requests: Any = [self._slots[slot] for slot in range(len(logits))]
            rows = torch.tensor([row for row, _ in requests])
            positions = torch.tensor([len(output_tokens) for _, output_tokens in requests])
            LOG.append(rows, positions, sampling_statistics(logits))
        return logits
