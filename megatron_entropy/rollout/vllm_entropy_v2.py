"""Entropy of every sampled token, as `rollout/vllm_entropy.py`, for vLLM's V2 model runner: GPUs.

Not run yet: it is written after the source of vLLM 0.32 (v1/worker/gpu/sample/sampler.py, sample/penalties.py and
sample/logits_processor/interface.py), and tested with its records on a CPU only.

vLLM calls it after the penalties and before the division by the temperature. With batch-sharded sampling every worker
sees a part of the batch, so all workers record. Only engine processes import this file.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from megatron_entropy.rollout.vllm_entropy import LOG, NO_ROW, refuse_speculation, row_of, sampling_statistics


class EntropyProcessor(LogitsProcessor):
    """Records the entropy of each row's distribution; the state is by slot, since vLLM reorders rows every step."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor

        refuse_speculation(vllm_config)
        self._prompt_length = req_states.prompt_len
        self._row = UvaBackedTensor(req_states.max_num_reqs, torch.int32)
        self._temperature = UvaBackedTensor(req_states.max_num_reqs, torch.float32)
        self._row.np.fill(NO_ROW)
        self._temperature.np.fill(1.0)
        self._is_changed = True

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note row and temperature of the request in slot `req_idx`; True, otherwise vLLM may skip `apply`."""
        self._row.np[req_idx] = row_of(sampling_params)
        self._temperature.np[req_idx] = sampling_params.temperature
        self._is_changed = True
        return True

    def apply_staged_writes(self) -> None:
        """Copy what `add_request` noted to the device."""
        if self._is_changed:
            self._row.copy_to_uva()
            self._temperature.copy_to_uva()
            self._is_changed = False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Record the entropy of each row of logits [n, V], divided by its temperature; return them unchanged.

        `ctx.pos` is the position of the last token that was read, so the next one is sampled at `ctx.pos + 1`. Before
        the end of a prompt the position in the response is negative: `EntropyTable` drops such records.
        """
        slots = ctx.expanded_idx_mapping
        positions = ctx.pos + 1 - self._prompt_length.gpu[slots]
        LOG.append(self._row.gpu[slots], positions, sampling_statistics(logits, self._temperature.gpu[slots]))
        return logits
