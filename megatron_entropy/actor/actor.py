"""The model being trained, sharded over all ranks: `score` computes statistics of samples, `update` trains on them.

Both run Megatron's pipeline schedules over packed micro-batches. The last stage passes hidden states and the head's
weight shard to `entropy_kernels`, which computes per-token log-probability and full-vocabulary entropy without ever
holding the logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from entropy_kernels import TokenStats
from megatron_entropy.actor import fp8_emulation, fp8_weights, lora, schedules
from megatron_entropy.actor.divergence import ReferenceStates, compute_divergence, compute_states
from megatron_entropy.actor.model import (
    build_chunks,
    fuse_grad_accumulation,
    global_parameters,
    head_weight,
    set_router_losses,
)
from megatron_entropy.actor.offload import HostCopy, actor_memory
from megatron_entropy.actor.optimizer import build_optimizer, build_schedule
from megatron_entropy.actor.reference import Reference, ReferenceKind, build_reference
from megatron_entropy.actor.statistics import head_statistics
from megatron_entropy.config import speedups
from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import ActorConfig
from megatron_entropy.distributed import cpu
from megatron_entropy.errors import NonFiniteLossError
from megatron_entropy.records import Batch, HeadInputs, Metric, Sample, TokenStatistics

LossFunction = Callable[[TokenStats, Batch], tuple[Tensor, dict[str, Metric]]]
"""From token statistics and batch to the per-token loss [T] (before weights) and metrics of the micro-batch."""


class Actor:
    """One model, its optimizer, its learning-rate schedule and its reference on this rank.

    Every method that computes with the model is a collective.
    """

    def __init__(self, arch: ModelArchitecture, config: ActorConfig, *, total_updates: int, seed: int = 0) -> None:
        """Build this rank's shard of the model; `weights.source.load` or a checkpoint sets its weights.

        `loader.copy` is the `copy` of `weights.source.load`.

        Args:
            total_updates: optimizer steps of the whole stage, the length of the learning-rate schedule.
            seed: of the initial LoRA adapters.
        """
        self.arch = arch
        self.config = config
        chunks = build_chunks(arch, config)
        if config.lora.rank:
            lora.attach(chunks, arch, config, seed=seed)
        if config.fp8.emulate:
            fp8_emulation.attach_configured(chunks, arch.num_layers, config.fp8)
        settings = chunks[0].config
        used = speedups.resolve(config)
        self._gathers_late = used["overlap_param_gather"].is_active
        if used["fuse_grad_accumulation"].is_active:
            for chunk in chunks:
                fuse_grad_accumulation(chunk)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_grad_reduce=used["overlap_grad_reduce"].is_active,
            overlap_param_gather=self._gathers_late,
            fp8_param_gather=config.fp8.parameters,
        )
        self.chunks = [
            DistributedDataParallel(settings, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        settings.finalize_model_grads_func = _sum_gradients
        if ddp.overlap_grad_reduce:  # not before the last micro-batch
            contexts: Any = [chunk.no_sync for chunk in self.chunks]
            settings.no_sync_func = contexts if len(contexts) > 1 else contexts[0]
        self.optimizer: MegatronOptimizer = build_optimizer(config, self.chunks)
        self.loader = fp8_weights.WeightLoader(self.optimizer)
        self.schedule = build_schedule(config.optimizer, self.optimizer, total_updates)
        settings.grad_scale_func = self.optimizer.scale_loss
        self.reference: Reference | None = None
        self._host_copy = HostCopy()

    def named_shards(self) -> dict[str, Tensor]:
        """This rank's parameters by global name, without adapters: layers and experts are numbered over all ranks."""
        return {name: shard for name, shard in self._parameters().items() if not lora.is_adapter(name)}

    def adapter_shards(self) -> dict[str, Tensor]:
        """This rank's LoRA adapters, named as in `named_shards`; empty without LoRA."""
        return {name: shard for name, shard in self._parameters().items() if lora.is_adapter(name)}

    def merged_shards(self) -> Mapping[str, Tensor]:
        """The parameters of `named_shards`, when read with adapters merged in, and in bfloat16 if stored in FP8."""
        if self.config.fp8.parameters:
            return fp8_weights.DequantizedShards(self.named_shards())
        if not self.config.lora.rank:
            return self.named_shards()
        return lora.MergedShards(self.named_shards(), self.adapter_shards(), self.config.lora.scale)

    def _parameters(self) -> dict[str, Tensor]:
        return global_parameters([chunk.module for chunk in self.chunks], self.arch, self.config.parallel)

    def gather_weights(self) -> None:
        """Complete the weights on every rank after updates, before they are read; a collective.

        Only where `performance.overlap_param_gather` is active is there anything to do.
        """
        if self._gathers_late:
            fp8_weights.gather(self.chunks)

    def after_load(self) -> None:
        """Copy weights that were loaded into the model to the optimizer's fp32 weights.

        Those of FP8 weights that `loader.copy` has set stay: they are the values before rounding.
        """
        self.loader.finish(self._parameters().values())

    def offload(self, *, keep_weights: bool = False) -> None:
        """Free the GPU: weights and optimizer state move to host memory, gradients are dropped. No effect on a CPU.

        Args:
            keep_weights: the weights stay, for a weight sync.
        """
        if cpu.device().type != "cpu":
            held = self.reference.weights.values() if self.reference else ()
            weights, state, gradients = actor_memory(self.chunks, self.optimizer, held)
            self._host_copy.offload(state if keep_weights else [*weights, *state], gradients)

    def onload(self) -> None:
        """Move everything back to the GPU; no effect without `offload`."""
        self._host_copy.onload()

    def close(self) -> None:
        """Give up the model: `memory.release` frees what nobody else holds. No other method works afterwards.

        Megatron's gradient hooks and the optimizer hold one another through nodes of autograd, where Python's garbage
        collector does not see them: they are separated here.
        """
        settings: Any = self.chunks[0].config
        settings.grad_scale_func = settings.finalize_model_grads_func = settings.no_sync_func = None
        for chunk in self.chunks:
            chunk.grad_accs.clear()
        RotaryEmbedding.forward.cache_clear()  # of the class: it holds the module and, with it, a process group
        for name in ("chunks", "optimizer", "loader", "schedule", "reference"):
            delattr(self, name)

    def set_reference(self, kind: ReferenceKind, *, own_weights: bool = False) -> None:
        """Make the present weights the reference.

        Args:
            kind: how it changes during training, see `actor.reference`.
            own_weights: the weights now loaded are the reference's own, and the policy's will replace them. They are
                copied even where LoRA's base could serve.
        """
        self.reference = build_reference(
            kind,
            self._parameters(),
            self.chunks,
            on_host=self.config.reference_on_host,
            base_is_reference=bool(self.config.lora.rank) and not own_weights,
        )

    def score(self, samples: Sequence[Sample], statistics: TokenStatistics) -> list[Sample]:
        """Compute statistics of every response token under the current weights, without gradients.

        Args:
            samples: the same list on every rank.
            statistics: computes the fields on the last pipeline stage, such as `policy_statistics(...)`.
        Returns:
            On every rank the samples with these fields filled.
        """

        def compute(batch: Batch, chunk: GPTModel, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            fields = statistics(self._head_inputs(batch, chunk, hidden))
            return hidden.new_zeros(()), dict(fields)

        batches = schedules.pack_samples(samples, self.config)
        return schedules.fill_samples(samples, batches, self._run(batches, compute, train=False))

    def score_reference(self, samples: Sequence[Sample], statistics: TokenStatistics) -> list[Sample]:
        """Compute statistics as `score` does, under the reference."""
        assert self.reference is not None, "set_reference comes first"
        with self.reference.active():
            return self.score(samples, statistics)

    def update(
        self,
        samples: Sequence[Sample],
        loss: LossFunction,
        *,
        temperature: float,
        divergence: Literal["none", "forward", "reverse"] = "none",
    ) -> dict[str, Metric]:
        """Take one optimizer step on `sum over tokens of weight * loss`; `gather_weights` completes it.

        Args:
            samples: the same list on every rank, with `weight` filled.
            temperature: > 0; the distribution is softmax(logits / temperature).
            divergence: add the full-vocabulary divergence to the statistics, at the cost of another pass of the
                reference: `forward` is KL(reference || policy), `reverse` is KL(policy || reference).
        Returns:
            On every rank the method's metrics, `train/loss`, `train/grad_norm` and `train/lr` of the whole step.
        Raises:
            NonFiniteLossError: on every rank, before the optimizer step, naming the samples or the gradient norm.
        """
        batches = schedules.pack_samples(samples, self.config)
        states = None if divergence == "none" else self._reference_states(batches)

        def compute(batch: Batch, chunk: GPTModel, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            head = self._head_inputs(batch, chunk, hidden)
            stats = head_statistics(head, temperature=temperature, entropy=True)
            if divergence != "none" and states is not None:
                value = compute_divergence(head, batch, states, temperature=temperature, direction=divergence)
                stats = dataclasses.replace(stats, **{f"kl_{divergence}": value})
            per_token, metrics = loss(stats, batch)
            weighted = batch.weight * per_token
            total = weighted.sum()
            return total, {"loss": total.detach(), "weighted": weighted.detach(), "metrics": metrics}

        set_router_losses(self.chunks[0].config, self.config, sum(len(sample.tokens) - 1 for sample in samples))
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        local = schedules.fetch_numbers(self._run(batches, compute, train=True))
        for batch, result in zip(batches, local, strict=False):
            weighted = result.pop("weighted")
            result["bad"] = [] if np.isfinite(result["loss"]) else _nonfinite_samples(weighted, batch)
        results = schedules.gather_results(local)
        if bad := sorted({index for result in results for index in result["bad"]}):
            raise NonFiniteLossError(f"loss is not finite for sample(s) {', '.join(map(str, bad[:8]))} of the step")
        metrics = {"train/loss": Metric(sum(result["loss"] for result in results)), **self._optimizer_step()}
        for result in results:
            for name, metric in result["metrics"].items():
                metrics[name] = metrics.get(name, Metric(0.0, 0.0)) + metric
        return metrics

    def _optimizer_step(self) -> dict[str, Metric]:
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not np.isfinite(norm):
            raise NonFiniteLossError(f"gradient norm is {norm} although the loss is finite")
        metrics = {"train/grad_norm": Metric(norm), "train/lr": Metric(self.optimizer.param_groups[0]["lr"])}
        if self.config.fp8.emulate:
            metrics["train/fp8_emulated"] = Metric(1.0)
        self.optimizer.step()
        self.schedule.step(increment=1)
        return metrics

    def _reference_states(self, batches: list[Batch]) -> ReferenceStates:
        assert self.reference is not None, "set_reference comes first"
        with self.reference.active():
            limit = self.config.max_tokens_per_microbatch
            return compute_states(self.chunks, batches, self._head_operands, seq_length=limit)

    def _run(
        self, batches: list[Batch], function: schedules.MicrobatchFunction, *, train: bool
    ) -> list[dict[str, Any]]:
        return schedules.run_schedule(
            self.chunks, batches, function, train=train, seq_length=self.config.max_tokens_per_microbatch
        )

    def _head_inputs(self, batch: Batch, chunk: GPTModel, hidden: Tensor) -> HeadInputs:
        group: Any = parallel_state.get_tensor_model_parallel_group()  # annotated as if it could be a number
        states, weight = self._head_operands(chunk, hidden)
        return HeadInputs(
            hidden=states,
            weight=weight,
            targets=batch.targets,
            group=group,
            sequence_parallel=self.config.parallel.sequence_parallel,
            vocab_size=self.arch.vocab_size,
            impl=self.config.performance.head_kernels,
            main_grad=getattr(weight, "main_grad", None),  # a frozen or rounded weight has none
        )

    def _head_operands(self, chunk: GPTModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
        operands = hidden.squeeze(0), head_weight(chunk)
        return fp8_emulation.quantize_head(*operands) if self.config.fp8.head else operands


def _sum_gradients(model: list, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division by a token count: the weights contain it already."""
    finalize_model_grads(model, None, **kwargs)


def _nonfinite_samples(values: Tensor, batch: Batch) -> list[int]:
    """Indices of the samples with a value that is not finite."""
    finite = torch.isfinite(values).cpu()
    spans = zip(batch.order, batch.edges, batch.edges[1:], strict=False)
    return [index for index, a, b in spans if not bool(finite[a:b].all())]
