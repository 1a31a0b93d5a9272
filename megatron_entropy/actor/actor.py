"""The model being trained, spread over this world's ranks: `score` samples, `update` on samples.

Both run Megatron's own pipeline schedules over packed micro-batches. The last stage hands hidden states to
`entropy_kernels.token_stats`, which computes per-token log-probability and full-vocabulary entropy from the head's
weight shard without ever holding the logits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from entropy_kernels import TokenStats, distillation, guided_teacher, token_stats
from megatron_entropy.actor import lora
from megatron_entropy.actor.layers import describe_sequences
from megatron_entropy.actor.model import build_chunks, head_weight
from megatron_entropy.actor.offload import HostCopy, memory_of
from megatron_entropy.actor.optimizer import build_optimizer, build_schedule
from megatron_entropy.actor.reference import Reference
from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import ActorConfig
from megatron_entropy.data.packing import pack, plan
from megatron_entropy.distributed import cpu
from megatron_entropy.errors import NonFiniteLossError
from megatron_entropy.records import Batch, GuidedTemperature, Metric, Sample

LossFunction = Callable[[TokenStats, Batch], tuple[Tensor, dict[str, Metric]]]
"""From token statistics and batch to the per-token loss [T] (before weights) and metrics of the micro-batch."""

_EXPERT_NUMBER = re.compile(r"(\.local_experts\.|\.experts\.linear_fc[12]\.weight)(\d+)")
"""A rank's own number of an expert in a parameter's name: of the local layers, of Transformer Engine's grouped ones."""


class Actor:
    """One model, its optimizer and its learning-rate schedule on this rank; every method is a collective."""

    def __init__(self, arch: ModelArchitecture, config: ActorConfig, *, total_updates: int, seed: int = 0) -> None:
        """Build the rank's part of the model; weights are not set until `resharding.source.load` or a checkpoint.

        Args:
            total_updates: optimizer steps of the whole stage, the length of the learning-rate schedule.
            seed: what LoRA's adapters start from.
        """
        self.arch = arch
        self.config = config
        chunks = build_chunks(arch, config)
        if config.lora.rank:
            lora.attach(chunks, arch, config, seed=seed)
        settings = chunks[0].config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_grad_reduce=False,
        )
        self.chunks = [
            DistributedDataParallel(settings, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        settings.finalize_model_grads_func = _sum_gradients
        self.optimizer: MegatronOptimizer = build_optimizer(config, self.chunks)
        self.schedule = build_schedule(config.optimizer, self.optimizer, total_updates)
        settings.grad_scale_func = self.optimizer.scale_loss
        self.reference: Reference | None = None
        self._host_copy = HostCopy()

    def named_shards(self) -> dict[str, Tensor]:
        """This rank's parameters but adapters, by global name: layers count over all stages, experts over all ranks."""
        return {name: shard for name, shard in self._all_shards().items() if not lora.is_adapter(name)}

    def adapter_shards(self) -> dict[str, Tensor]:
        """This rank's parts of LoRA's adapters, as `named_shards`; empty without LoRA."""
        return {name: shard for name, shard in self._all_shards().items() if lora.is_adapter(name)}

    def merged_shards(self) -> Mapping[str, Tensor]:
        """What `named_shards` has, with adapters folded in when a weight is read."""
        if not self.config.lora.rank:
            return self.named_shards()
        return lora.MergedShards(self.named_shards(), self.adapter_shards(), self.config.lora.scale)

    def _all_shards(self) -> dict[str, Tensor]:
        shards: dict[str, Tensor] = {}
        first_expert = 0
        if self.arch.moe:
            here = self.arch.moe.num_experts // self.config.parallel.ep
            first_expert = here * parallel_state.get_expert_model_parallel_rank()

        def global_expert(hit: re.Match[str]) -> str:
            return f"{hit[1]}{int(hit[2]) + first_expert}"

        for chunk in self.chunks:
            module: Any = chunk.module
            numbers = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(module.decoder.layers)}
            for name, parameter in module.named_parameters():
                parts = name.split(".")
                if parts[:2] == ["decoder", "layers"]:
                    parts[2] = numbers[parts[2]]
                shards[_EXPERT_NUMBER.sub(global_expert, ".".join(parts))] = parameter
        return shards

    def after_load(self) -> None:
        """Let the optimizer take over weights that were written into the model."""
        self.optimizer.reload_model_params()

    def offload(self) -> None:
        """Free the GPU: weights and optimizer state go to host memory, gradients away. Nothing on a CPU."""
        if cpu.device().type != "cpu":
            self._host_copy.offload(*memory_of(self))

    def onload(self) -> None:
        """Undo `offload`, if it was called."""
        self._host_copy.onload()

    def keep_reference(self, *, moving: bool, own: bool = False) -> None:
        """Remember the present weights as the reference.

        Args:
            moving: it will be moved.
            own: copy them also where that could be spared, because LoRA leaves its base as it is.
        """
        if moving or own or not self.config.lora.rank:
            parameters = self.named_shards() | self.adapter_shards()
            self.reference = Reference(parameters, moving=moving, on_host=self.config.reference_on_host)

    def score(self, samples: Sequence[Sample], *, temperature: float, entropy: bool = True) -> list[Sample]:
        """Log-probability, and entropy, of every response token under the current weights.

        Args:
            samples: the same list on every rank.
            temperature: the distribution is softmax(logits / temperature).
        Returns:
            On every rank the samples with `logprob` (nats) and, if asked, `entropy` (nats, full vocabulary) filled.
        """

        def measure(batch: Batch, chunk: GPTModel, hidden: Tensor) -> list[Tensor]:
            stats = self._token_stats(batch, chunk, hidden, temperature=temperature, entropy=entropy)
            return [stats.logprob] + ([stats.entropy] if stats.entropy is not None else [])

        return self._fill(samples, ("logprob", "entropy") if entropy else ("logprob",), measure)

    def score_reference(
        self, samples: Sequence[Sample], *, temperature: float | GuidedTemperature, by_policy: bool = False
    ) -> list[Sample]:
        """Log-probability of every response token under the reference, without entropy and without gradient.

        Args:
            samples: the same list on every rank.
            temperature: one number, or the rule by which each token gets its own.
            by_policy: the current weights take the reference's place.
        Returns:
            On every rank the samples with `reference_logprob` (nats) and, guided, `reference_temperature` filled.
        """

        def measure(batch: Batch, chunk: GPTModel, hidden: Tensor) -> list[Tensor]:
            if not isinstance(temperature, GuidedTemperature):
                return [self._token_stats(batch, chunk, hidden, temperature=temperature, entropy=False).logprob]
            guided = guided_teacher(
                hidden.squeeze(0), head_weight(chunk), batch.targets, **dataclasses.asdict(temperature), **self._head()
            )
            return [guided.logprob, guided.temperature]

        guided = isinstance(temperature, GuidedTemperature)
        fields = ("reference_logprob", "reference_temperature") if guided else ("reference_logprob",)
        with self._as_reference(by_policy):
            return self._fill(samples, fields, measure)

    def update(
        self,
        samples: Sequence[Sample],
        loss: LossFunction,
        *,
        temperature: float,
        divergence: Literal["none", "forward", "reverse"] = "none",
        by_policy: bool = False,
    ) -> dict[str, Metric]:
        """One optimizer step on `sum over tokens of weight * loss`.

        Args:
            samples: the same list on every rank, with `weight` filled.
            temperature: the distribution is softmax(logits / temperature).
            divergence: put the full-vocabulary divergence from (`forward`: KL(reference || policy)) or to the reference
                into the statistics, which costs another pass of the reference.
            by_policy: the weights before the step take the reference's place in that.
        Returns:
            On every rank the method's metrics, `train/loss`, `train/grad_norm` and `train/lr` of the whole step.
        Raises:
            NonFiniteLossError: on every rank, before the optimizer step, naming samples (or the gradient norm).
        """
        batches = self._pack(samples)
        teacher = self._reference_states(batches, by_policy) if divergence != "none" else None

        def weigh(batch: Batch, chunk: GPTModel, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            stats = self._token_stats(batch, chunk, hidden, temperature=temperature, entropy=True)
            if teacher is not None and divergence != "none":
                value = self._divergence(batch, chunk, hidden, teacher, temperature, divergence)
                stats = dataclasses.replace(stats, **{f"kl_{divergence}": value})
            per_token, metrics = loss(stats, batch)
            weighted = batch.weight * per_token
            total = weighted.sum()
            bad = [] if torch.isfinite(total) else _sequences_with_nonfinite(weighted, batch)
            return total, {"loss": float(total.detach()), "bad": bad, "metrics": metrics}

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(batches, weigh, train=True)
        gathered = self._gather_results(results)
        if bad := sorted({index for result in gathered for index in result["bad"]}):
            raise NonFiniteLossError(f"loss is not finite for sample(s) {', '.join(map(str, bad[:8]))} of the step")
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not np.isfinite(norm):
            raise NonFiniteLossError(f"gradient norm is {norm} although the loss is finite")
        metrics = {
            "train/loss": Metric(sum(result["loss"] for result in gathered)),
            "train/grad_norm": Metric(norm),
            "train/lr": Metric(self.optimizer.param_groups[0]["lr"]),
        }
        self.optimizer.step()
        self.schedule.step(increment=1)
        for result in gathered:
            for name, metric in result["metrics"].items():
                metrics[name] = metrics.get(name, Metric(0.0, 0.0)) + metric
        return metrics

    def _head(self) -> dict[str, Any]:
        """How the head is split, as the kernels want to know it."""
        return {
            "group": parallel_state.get_tensor_model_parallel_group(),
            "sequence_parallel": self.config.parallel.sequence_parallel,
            "vocab_size": self.arch.vocab_size,
        }

    def _token_stats(
        self, batch: Batch, chunk: GPTModel, hidden: Tensor, *, temperature: float, entropy: bool
    ) -> TokenStats:
        return token_stats(
            hidden.squeeze(0),
            head_weight(chunk),
            batch.targets,
            temperature=temperature,
            entropy=entropy,
            **self._head(),
        )

    def _fill(
        self,
        samples: Sequence[Sample],
        fields: Sequence[str],
        measure: Callable[[Batch, GPTModel, Tensor], list[Tensor]],
    ) -> list[Sample]:
        """The samples with per-token fields filled by what `measure` computes of each micro-batch: [T] per field."""

        def collect(batch: Batch, chunk: GPTModel, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            columns = torch.stack(measure(batch, chunk, hidden))
            return columns.new_zeros(()), {"columns": columns.float().cpu()}

        batches = self._pack(samples)
        results = self._run(batches, collect, train=False)
        starts = np.cumsum([0, *(len(s.tokens) for s in samples)])
        table = torch.zeros(len(fields), int(starts[-1]))
        if self.is_output_rank:
            for batch, result in zip(batches, results, strict=True):
                edges = batch.boundaries.tolist()
                for index, a, b in zip(batch.order, edges, edges[1:], strict=False):
                    if index >= 0:
                        table[:, starts[index] + 1 : starts[index + 1]] = result["columns"][:, a:b]
        # Each entry comes from one rank, the others hold 0: the sum is exact.
        dist.all_reduce(table)
        filled = []
        for index, sample in enumerate(samples):
            columns = table[:, starts[index] : starts[index + 1]].numpy()
            values = {field: column.copy() for field, column in zip(fields, columns, strict=True)}
            filled.append(dataclasses.replace(sample, **values))
        return filled

    def _as_reference(self, by_policy: bool) -> contextlib.AbstractContextManager[None]:
        """Inside, the model is the reference."""
        if by_policy:
            return contextlib.nullcontext()
        if self.reference is not None:
            return self.reference.in_place()
        assert self.config.lora.rank, "no reference was kept"
        return lora.disabled(self)

    def _reference_states(self, batches: list[Batch], by_policy: bool) -> _Teacher:
        """What the reference's head gets and is, on the last stage."""
        heads: list[Tensor] = []

        def keep(batch: Batch, chunk: GPTModel, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            heads.append(head_weight(chunk).detach())
            return hidden.new_zeros(()), {"hidden": hidden.squeeze(0).detach()}

        with self._as_reference(by_policy):
            results = self._run(batches, keep, train=False)
        states = {batch.order: result["hidden"] for batch, result in zip(batches, results, strict=False)}
        return _Teacher(states, heads[0] if heads else None)

    def _divergence(
        self,
        batch: Batch,
        chunk: GPTModel,
        hidden: Tensor,
        teacher: _Teacher,
        temperature: float,
        direction: Literal["forward", "reverse"],
    ) -> Tensor:
        assert teacher.head is not None, "on the last stage"
        own = batch.reference_temperature
        return distillation(
            hidden.squeeze(0),
            head_weight(chunk),
            teacher.hidden[batch.order],
            teacher.head,
            batch.targets,
            temperature=temperature,
            teacher_temperature=temperature if own is None else own.where(own > 0, 1.0),
            direction=direction,
            **self._head(),
        )

    @property
    def _reports(self) -> bool:
        """Whether this rank speaks for its pipeline: the last stage's first tensor-parallel rank."""
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        return last and parallel_state.get_tensor_model_parallel_rank() == 0

    def _gather_results(self, results: list[dict]) -> list[dict]:
        everyone: list[list[dict]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, results if self.is_output_rank else [])
        return [result for rank_results in everyone for result in rank_results]

    def _pack(self, samples: Sequence[Sample]) -> list[Batch]:
        layout = self.config.parallel
        micro_batches = plan(
            [len(s.tokens) - 1 for s in samples],
            max_tokens_per_microbatch=self.config.max_tokens_per_microbatch,
            ranks=parallel_state.get_data_parallel_world_size(),
            multiple=layout.pp if layout.vpp > 1 else 1,
        )
        mine = micro_batches[parallel_state.get_data_parallel_rank()]
        multiple = layout.tp if layout.sequence_parallel else 1
        return [pack(samples, indices, multiple=multiple, device=cpu.device()) for indices in mine]

    def _run(
        self,
        batches: list[Batch],
        measure: Callable[[Batch, GPTModel, Tensor], tuple[Tensor, dict[str, Any]]],
        *,
        train: bool,
    ) -> list[dict[str, Any]]:
        """Drive the pipeline schedule; the last stage gets one result of `measure` per micro-batch."""

        def after_model(batch: Batch, chunk: GPTModel, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            total, result = measure(batch, chunk, hidden)
            return total, torch.tensor(0, dtype=torch.int, device=total.device), result

        def forward_step(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Callable]:
            batch = next(iterator)
            hidden = chunk(
                input_ids=batch.tokens[None],
                position_ids=batch.positions[None],
                attention_mask=None,
                packed_seq_params=describe_sequences(batch.boundaries),
            )
            return hidden, partial(after_model, batch, chunk.module)

        for chunk in self.chunks:
            chunk.train(train)
        iterators = [iter(batches) for _ in self.chunks]
        chunks: Any = self.chunks
        with torch.set_grad_enabled(train):
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(batches),
                seq_length=self.config.max_tokens_per_microbatch,
                micro_batch_size=1,
                forward_only=not train,
            )


class _Teacher(NamedTuple):
    """Of the reference: hidden states [T, H] by `Batch.order`, and its head's weight shard, where there is one."""

    hidden: dict[tuple[int, ...], Tensor]
    head: Tensor | None


def _sum_gradients(model: list, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division by a token count: the weights hold it already."""
    finalize_model_grads(model, None, **kwargs)


def _sequences_with_nonfinite(values: Tensor, batch: Batch) -> list[int]:
    edges = batch.boundaries.tolist()
    parts = zip(batch.order, edges, edges[1:], strict=False)
    return [index for index, a, b in parts if not bool(torch.isfinite(values[a:b]).all())]
