"""Compute log-probs, entropies and top tokens of one batch in several precisions, one pass for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_entropy.actor import fp8_emulation, schedules
from megatron_entropy.actor.model import build_chunks, global_parameters, head_weight
from megatron_entropy.actor.statistics import head_statistics
from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import ActorConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.records import HeadInputs, Sample
from megatron_entropy.weights import source
from megatron_entropy.weights.hf_folder import TensorFolder

ROWS = 512
"""Rows of logits that exist at a time."""


@dataclass(frozen=True)
class Pass:
    """Results of one precision, an array over the response tokens of each sequence: nats, nats, token ids."""

    logprob: list[np.ndarray]
    entropy: list[np.ndarray]
    top_token: list[np.ndarray]


class Scorer:
    """A model in one process, without optimizer, whose linear layers compute in a precision of choice."""

    def __init__(
        self, folder: str, arch: ModelArchitecture, dtype: Literal["float32", "bfloat16"], *, max_tokens: int
    ) -> None:
        """Build the model and load its weights.

        Args:
            folder: a Hugging Face folder.
            dtype: of weights and activations.
            max_tokens: of a micro-batch.
        """
        self.config = ActorConfig(dtype=dtype, max_tokens_per_microbatch=max_tokens)
        self.arch = arch
        process_groups.init_model_parallel(self.config.parallel, seed=1)
        self.chunks = build_chunks(arch, self.config)
        local = global_parameters(self.chunks, arch, self.config.parallel)
        source.load(TensorFolder(folder), arch, self.config.parallel, local)

    def score(self, samples: Sequence[Sample], recipe: str, *, temperature: float) -> Pass:
        """Compute the batch.

        Args:
            recipe: of `fp8_emulation.SCALINGS`, `bfloat16` for products summed in fp32, or empty for the model's own
                products. The scales of `delayed` come from a pass over the same batch before.
            temperature: > 0; the distribution is softmax(logits / temperature).
        """
        fp8_emulation.detach(self.chunks)
        if recipe:
            fp8_emulation.attach(self.chunks, recipe, num_layers=self.arch.num_layers)
        if recipe == "delayed":
            self._run(samples, temperature)
            for chunk in self.chunks:
                fp8_emulation.update_scales(chunk.decoder)
        fields = self._run(samples, temperature)
        columns = {
            name: [values[name][sample.prompt_length :] for sample, values in zip(samples, fields, strict=True)]
            for name in ("logprob", "entropy", "top_token")
        }
        return Pass(columns["logprob"], columns["entropy"], [top.astype(np.int64) for top in columns["top_token"]])

    def _run(self, samples: Sequence[Sample], temperature: float) -> list[dict[str, Any]]:
        def compute(batch: Any, chunk: Any, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            head = HeadInputs(hidden.squeeze(0), head_weight(chunk), batch.targets, None, False, self.arch.vocab_size)
            stats = head_statistics(head, temperature=temperature, entropy=True)
            assert stats.entropy is not None
            found = {"logprob": stats.logprob, "entropy": stats.entropy, "top_token": _top_tokens(head)}
            return hidden.new_zeros(()), {name: values.float().cpu() for name, values in found.items()}

        batches = schedules.pack_samples(samples, self.config)
        limit = self.config.max_tokens_per_microbatch
        results = schedules.run_schedule(self.chunks, batches, compute, train=False, seq_length=limit)
        return schedules.collect_fields(samples, batches, results)


def _top_tokens(head: HeadInputs) -> Tensor:
    """The most probable token at every position [T]; ids are exact in fp32."""
    weight = head.weight[: head.vocab_size]
    return torch.cat([(rows @ weight.T).argmax(dim=-1) for rows in head.hidden.split(ROWS)])
