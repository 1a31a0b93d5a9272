"""The full-vocabulary divergence between policy and reference, from the hidden states of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from entropy_kernels import distillation
from megatron_entropy.actor.schedules import run_schedule
from megatron_entropy.records import Batch, HeadInputs


@dataclass(frozen=True)
class ReferenceStates:
    """What the reference's logits are computed from; empty on all pipeline stages but the last.

    `hidden`: [T, H] per micro-batch, by `Batch.order`. `weight`: the head's shard [V / tp, H].
    """

    hidden: dict[tuple[int, ...], Tensor]
    weight: Tensor | None


def compute_states(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[Batch],
    operands: Callable[[GPTModel, Tensor], tuple[Tensor, Tensor]],
    *,
    seq_length: int,
) -> ReferenceStates:
    """Run the model, while the reference is active, and keep its hidden states; a collective without gradients.

    Args:
        operands: from the last stage's chunk and its output to the head's hidden states and weight.
    """
    weights: list[Tensor] = []

    def keep(batch: Batch, chunk: GPTModel, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        states, weight = operands(chunk, hidden)
        weights[:] = [weight.detach()]
        return hidden.new_zeros(()), {"hidden": states.detach()}

    results = run_schedule(chunks, batches, keep, train=False, seq_length=seq_length)
    hidden = {batch.order: result["hidden"] for batch, result in zip(batches, results, strict=False)}
    return ReferenceStates(hidden, weights[0] if weights else None)


def compute_divergence(
    head: HeadInputs,
    batch: Batch,
    states: ReferenceStates,
    *,
    temperature: float,
    direction: Literal["forward", "reverse"],
) -> Tensor:
    """Divergence of every token's distributions: [T] nats, differentiable with respect to the policy.

    Args:
        head: of the policy.
        temperature: of the policy, and of the reference where `batch.reference_temperature` is not filled.
        direction: `forward` is KL(reference || policy), `reverse` is KL(policy || reference).
    """
    assert states.weight is not None, "only the last pipeline stage computes divergences"
    filled = batch.reference_temperature
    return distillation(
        head.hidden,
        head.weight,
        states.hidden[batch.order],
        states.weight,
        head.targets,
        temperature=temperature,
        teacher_temperature=temperature if filled is None else filled.where(filled > 0, 1.0),
        direction=direction,
        group=head.group,
        sequence_parallel=head.sequence_parallel,
        vocab_size=head.vocab_size,
        impl=head.impl,
        main_grad=head.main_grad,
    )
