"""Megatron's pipeline schedules over packed micro-batches: pack samples, run the model, collect the results.

Every rank runs the schedule; only the last pipeline stage gets hidden states and computes something from them. Its
first tensor-parallel rank speaks for the pipeline (`is_output_rank`), once per data-parallel and context-parallel rank:
context-parallel ranks run the same micro-batches, each on its part of every sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_entropy.actor.layers import PackedAttention, describe_sequences
from megatron_entropy.config.fp8 import token_multiple
from megatron_entropy.config.schema import ActorConfig
from megatron_entropy.data.packing import pack, packed_length, plan_microbatches
from megatron_entropy.distributed import cpu
from megatron_entropy.records import Batch, Metric, Sample

MicrobatchFunction = Callable[[Batch, GPTModel, Tensor], tuple[Tensor, dict[str, Any]]]
"""From a micro-batch, the last model chunk and hidden states [1, T, H] to the loss (scalar) and a result to collect."""


def pack_samples(samples: Sequence[Sample], config: ActorConfig) -> list[Batch]:
    """Pack this rank's part of its data-parallel replica's samples into micro-batches.

    Args:
        samples: the same list on every rank.
    Returns:
        As many micro-batches on every rank; at least one.
    """
    layout = config.parallel
    microbatches = plan_microbatches(
        [packed_length(sample, layout.cp) for sample in samples],
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        ranks=parallel_state.get_data_parallel_world_size(),
        multiple=layout.pp if layout.vpp > 1 else 1,
    )
    local = microbatches[parallel_state.get_data_parallel_rank()]
    multiple = token_multiple(config.fp8, split=layout.tp if layout.sequence_parallel else 1)
    cp_rank = parallel_state.get_context_parallel_rank()
    return [
        pack(samples, indices, multiple=multiple, cp_rank=cp_rank, cp=layout.cp, device=cpu.device())
        for indices in local
    ]


def run_schedule(
    chunks: Sequence[DistributedDataParallel | GPTModel],
    batches: Sequence[Batch],
    function: MicrobatchFunction,
    *,
    train: bool,
    seq_length: int,
) -> list[dict[str, Any]]:
    """Run the model over micro-batches with Megatron's pipeline schedule; a collective.

    Args:
        chunks: this rank's model chunks, one per virtual pipeline stage.
        function: called on the last pipeline stage after each micro-batch's forward pass.
        train: also run the backward pass of the sum of the losses.
        seq_length: tokens of a full micro-batch.
    Returns:
        On the last pipeline stage one result of `function` per micro-batch, in their order; elsewhere nothing.
    """

    def loss_function(batch: Batch, chunk: GPTModel, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        loss, result = function(batch, chunk, hidden)
        return loss, torch.tensor(0, dtype=torch.int, device=loss.device), result

    def forward_step(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Callable]:
        batch = next(iterator)
        hidden = chunk(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            attention_mask=None,
            packed_seq_params=describe_sequences(
                batch.boundaries, batch.edges, buckets=plain, cp_rank=cp_rank, cp=cp_size
            ),
        )
        return hidden, partial(loss_function, batch, getattr(chunk, "module", chunk))

    cp_rank = parallel_state.get_context_parallel_rank()
    cp_size = parallel_state.get_context_parallel_world_size()
    plain = any(isinstance(module, PackedAttention) for chunk in chunks for module in chunk.modules())
    for chunk in chunks:
        chunk.train(train)
    iterators = [iter(batches) for _ in chunks]
    models: Any = list(chunks)
    with torch.set_grad_enabled(train):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=models if len(models) > 1 else models[0],
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=1,
            forward_only=not train,
        )


def is_output_rank() -> bool:
    """Whether this rank reports for its tokens: the last stage's first tensor-parallel rank."""
    is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return is_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0


def fetch_numbers(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace the tensors without dimensions in the results by numbers, with one copy from the device.

    Args:
        results: of `run_schedule`; dictionaries and metrics in them are searched.
    """
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor) and value.ndim == 0:
            found.append(value.detach().double())

    def visit(value: Any, function: Callable[[Any], Any]) -> Any:
        if isinstance(value, dict):
            return {key: visit(item, function) for key, item in value.items()}
        if isinstance(value, Metric):
            return Metric(function(value.total), function(value.count))
        return function(value)

    for result in results:
        visit(result, collect)
    numbers = iter(torch.stack(found).tolist() if found else [])

    def replace(value: Any) -> Any:
        return next(numbers) if isinstance(value, Tensor) and value.ndim == 0 else value

    return [visit(result, replace) for result in results]


def gather_results(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of all data-parallel and context-parallel ranks' micro-batches, on every rank; a collective."""
    per_rank: list[list[dict]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(per_rank, results if is_output_rank() else [])
    return [result for rank_results in per_rank for result in rank_results]


def fill_samples(
    samples: Sequence[Sample], batches: Sequence[Batch], results: Sequence[Mapping[str, Tensor]]
) -> list[Sample]:
    """Copy per-token results of all ranks into the samples; a collective.

    Args:
        samples, batches, results: see `collect_fields`; the fields are those of `Sample`.
    Returns:
        On every rank the samples with these fields filled.
    """
    fields = collect_fields(samples, batches, results)
    return [dataclasses.replace(sample, **values) for sample, values in zip(samples, fields, strict=True)]


def collect_fields(
    samples: Sequence[Sample], batches: Sequence[Batch], results: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Any]]:
    """Collect per-token results of all ranks by sample; a collective.

    Args:
        samples: the same list on every rank.
        batches: this rank's micro-batches of them.
        results: on the last pipeline stage, for each micro-batch [T] per field; all with the same fields.
    Returns:
        On every rank for each sample [n] float32 per field; positions that predict no response token hold 0.
    """
    # Only the last stage knows the fields.
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, list(results[0]) if results else [])
    fields = next(found for found in names if found)
    starts = np.cumsum([0, *(len(sample.tokens) for sample in samples)])
    table = torch.zeros(len(fields), int(starts[-1]))
    if is_output_rank():
        for batch, result in zip(batches, results, strict=True):
            columns = torch.stack([result[field] for field in fields]).float().cpu()
            positions = batch.positions.cpu()
            for index, a, b in zip(batch.order, batch.edges, batch.edges[1:], strict=False):
                if index >= 0:
                    sample = table[:, starts[index] + 1 : starts[index + 1]]
                    own = positions[a:b]
                    is_token = own < sample.shape[1]  # else padding
                    sample[:, own[is_token]] = columns[:, a:b][:, is_token]
    # Each entry comes from one rank, the others hold 0: the sum is exact.
    dist.all_reduce(table)
    collected = []
    for first, end in zip(starts, starts[1:], strict=False):
        columns = table[:, first:end].numpy()
        collected.append({field: column.copy() for field, column in zip(fields, columns, strict=True)})
    return collected
