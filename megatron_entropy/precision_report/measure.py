"""Compute log-probs, entropies and top tokens of one batch in several precisions, one pass for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_entropy.actor import fp8_emulation, schedules
from megatron_entropy.actor.model import build_chunks, global_parameters, head_weight
from megatron_entropy.actor.statistics import head_statistics
from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.fp8 import Fp8Config
from megatron_entropy.config.schema import ActorConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.records import HeadInputs, Sample
from megatron_entropy.weights import source
from megatron_entropy.weights.hf_folder import TensorFolder

ROWS = 512
"""Rows of logits that exist at a time."""

PLAIN_LAYERS = Fp8Config(recipe="current", emulate=True)
"""Makes a model of Megatron's local layers, also beside Transformer Engine; only they can be emulated."""


@dataclass(frozen=True)
class Pass:
    """Results of one precision, an array over the response tokens of each sequence: nats, nats, token ids."""

    logprob: list[np.ndarray]
    entropy: list[np.ndarray]
    top_token: list[np.ndarray]


@dataclass(frozen=True)
class Measurement:
    """A pass beside the one it is compared with. `name`: of the row. `meaning`: what differs between the two."""

    name: str
    meaning: str
    found: Pass
    base: Pass


class Scorer:
    """A model in one process, without optimizer, whose linear layers compute in a precision of choice."""

    def __init__(
        self,
        folder: str,
        arch: ModelArchitecture,
        dtype: Literal["float32", "bfloat16"],
        *,
        max_tokens: int,
        fp8: Fp8Config = PLAIN_LAYERS,
    ) -> None:
        """Build the model and load its weights.

        Args:
            folder: a Hugging Face folder.
            dtype: of weights and activations.
            max_tokens: of a micro-batch.
            fp8: `PLAIN_LAYERS`, or what Transformer Engine computes in.
        """
        self.config = ActorConfig(dtype=dtype, max_tokens_per_microbatch=max_tokens, fp8=fp8)
        self.arch = arch
        process_groups.init_model_parallel(self.config.parallel, seed=1)
        self.chunks = build_chunks(arch, self.config)
        local = global_parameters(self.chunks, arch, self.config.parallel)
        source.load(TensorFolder(folder), arch, self.config.parallel, local)

    def score(
        self,
        samples: Sequence[Sample],
        *,
        temperature: float,
        recipe: str = "",
        weight_margin: float = 1.0,
        fp8_head: bool = False,
    ) -> Pass:
        """Compute the batch.

        Args:
            temperature: > 0; the distribution is softmax(logits / temperature).
            recipe: to emulate, of `fp8_emulation.SCALINGS`, or `bfloat16` for products summed in fp32; empty: the
                model's own products. The scales of `delayed` come from a pass over the same batch before.
            weight_margin: divides the scales of weights that the recipe chooses.
            fp8_head: emulate a head in FP8.
        """
        fp8_emulation.detach(self.chunks)
        if recipe:
            fp8_emulation.attach(self.chunks, recipe, num_layers=self.arch.num_layers, weight_margin=weight_margin)
        if recipe == "delayed":
            self._run(samples, temperature, fp8_head)
            for chunk in self.chunks:
                fp8_emulation.update_scales(chunk.decoder)
        fields = self._run(samples, temperature, fp8_head)
        columns = {
            name: [values[name][sample.prompt_length :] for sample, values in zip(samples, fields, strict=True)]
            for name in ("logprob", "entropy", "top_token")
        }
        return Pass(columns["logprob"], columns["entropy"], [top.astype(np.int64) for top in columns["top_token"]])

    def _run(self, samples: Sequence[Sample], temperature: float, fp8_head: bool) -> list[dict[str, Any]]:
        def compute(batch: Any, chunk: Any, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            operands = hidden.squeeze(0), head_weight(chunk)
            head = HeadInputs(
                *(fp8_emulation.quantize_head(*operands) if fp8_head else operands),
                batch.targets,
                group=None,
                sequence_parallel=False,
                vocab_size=self.arch.vocab_size,
                impl="chunked",  # the same on every GPU generation
            )
            stats = head_statistics(head, temperature=temperature, entropy=True)
            assert stats.entropy is not None
            found = {"logprob": stats.logprob, "entropy": stats.entropy, "top_token": _top_tokens(head)}
            return hidden.new_zeros(()), {name: values.float().cpu() for name, values in found.items()}

        batches = schedules.pack_samples(samples, self.config)
        limit = self.config.max_tokens_per_microbatch
        results = schedules.run_schedule(self.chunks, batches, compute, train=False, seq_length=limit)
        return schedules.collect_fields(samples, batches, results)


def measure(
    folder: str,
    arch: ModelArchitecture,
    samples: Sequence[Sample],
    *,
    emulated: Sequence[str],
    real: Sequence[str],
    weight_margins: Sequence[float] = (),
    temperature: float,
    max_tokens: int,
    progress: Callable[[str], None],
) -> Iterator[Measurement]:
    """Compute the batch in bf16, in both references of its noise, and in every recipe.

    Args:
        folder: a Hugging Face folder.
        samples: the batch.
        emulated: recipes of `fp8_emulation.SCALINGS`.
        real: recipes that Transformer Engine computes on this device; compared with its own bf16.
        weight_margins: further rows of every emulated recipe, see `Scorer.score`.
        temperature: see `Scorer.score`.
        max_tokens: of a micro-batch.
        progress: called with what comes next.
    """

    def scorer(dtype: Literal["float32", "bfloat16"], fp8: Fp8Config = PLAIN_LAYERS) -> Scorer:
        return Scorer(folder, arch, dtype, max_tokens=max_tokens, fp8=fp8)

    progress("bf16")
    model = scorer("bfloat16")
    base = model.score(samples, temperature=temperature)
    progress("bf16, sums in fp32")
    found = model.score(samples, temperature=temperature, recipe="bfloat16")
    yield Measurement(
        "bf16, sums in fp32", "noise floor: the order and width of sums in the linear layers", found, base
    )
    for recipe in emulated:
        progress(f"{recipe}, emulated")
        found = model.score(samples, temperature=temperature, recipe=recipe)
        yield Measurement(f"{recipe}, emulated", "operands of the linear layers in FP8, sums in fp32", found, base)
        for margin in weight_margins:
            name = f"{recipe}, emulated, weights / {margin:g}"
            progress(name)
            found = model.score(samples, temperature=temperature, recipe=recipe, weight_margin=margin)
            yield Measurement(
                name, "the row above with the scales of weights divided: another rounding of them", found, base
            )
    progress("head, emulated")
    found = model.score(samples, temperature=temperature, fp8_head=True)
    yield Measurement("head, emulated", "operands of the head alone in FP8, a scale for each row", found, base)
    del model
    progress("fp32")
    found = scorer("float32").score(samples, temperature=temperature)
    yield Measurement("fp32", "the same weights, everything else in fp32: what bf16 costs", found, base)
    if real:
        progress("bf16 by Transformer Engine")
        base = scorer("bfloat16", Fp8Config()).score(samples, temperature=temperature)
    for recipe in real:
        progress(f"{recipe}, real")
        found = scorer("bfloat16", Fp8Config.model_validate({"recipe": recipe})).score(samples, temperature=temperature)
        yield Measurement(f"{recipe}, real", "Transformer Engine in FP8 against its bf16", found, base)


def _top_tokens(head: HeadInputs) -> Tensor:
    """The most probable token at every position [T]; ids are exact in fp32."""
    weight = head.weight[: head.vocab_size]
    return torch.cat([(rows @ weight.T).argmax(dim=-1) for rows in head.hidden.split(ROWS)])
