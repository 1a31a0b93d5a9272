"""Emulated FP8: every linear layer rounds its operands to 8 bits and back, in plain PyTorch, on any device.

Shows what a recipe of Transformer Engine does to the numbers; it saves neither time nor memory. Per linear layer

    y  = Q(x) Q(w)^T        dx = Q(dy) Q(w)        dw = Q(dy)^T Q(x)

with products summed in fp32 and stored in the layer's type, which is what a GPU does but for the order of the sums and
the width of its accumulator. `quantize_head` does the same for the head where the configuration asks for it. Nothing
else is quantised: no norm, attention, router, embedding or residual.

| recipe | x and dy | w | scale |
|---|---|---|---|
| `current` | tensor | tensor | fp32, of the largest magnitude now |
| `delayed` | tensor | tensor | fp32, of the largest magnitude of past micro-batches; 1 in the first |
| `blockwise` | 128 values along the summed dimension | 128 x 128 | power of two |
| `blockwise_fp32` | the same | the same | fp32 |
| `mxfp8` | 32 values along the summed dimension | the same | power of two, rounded up |

Blocks lie along the dimension that the product sums over, so x, dy and, for `mxfp8`, w are quantised a second time for
the other product. Tensor parallelism follows Transformer Engine 2.20. `current`: what sequence parallelism splits (x of
a column-parallel layer, dy of a row-parallel one) has one scale for all ranks; a sharded weight, what is sharded along
its width, and each context parallel rank's tokens have one of their own, so numbers depend on the layout. `delayed`:
largest magnitudes are reduced over tensor, data and context parallel ranks. Blocks need nothing while shards are whole
blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_entropy.actor.fp8_quantizers import (
    E4M3,
    E5M2,
    Quantized,
    ScaleFormat,
    Unquantized,
    largest_magnitude,
    quantize_blocks,
    quantize_scaled,
    quantize_tensor,
)
from megatron_entropy.config.fp8 import AMAX_HISTORY, Fp8Config

log = logging.getLogger(__name__)

INPUT, WEIGHT, GRADIENT = range(3)
"""The operands of a linear layer, the columns of its scaling state."""


@dataclass(frozen=True)
class Scaling:
    """How a recipe scales.

    `block`: values of a block; 0: one scale for the tensor. `weight_block`: rows and columns of a weight's block; None:
    like other operands. `gradient`: 8-bit type of dy where the configuration leaves it to the recipe. `weight_margin`:
    at least 1; the scales of weights are divided by it, which rounds the same weights otherwise.
    """

    gradient: torch.dtype
    block: int = 0
    weight_block: tuple[int, int] | None = None
    scale_format: ScaleFormat = "fp32"
    is_delayed: bool = False
    weight_margin: float = 1.0


SCALINGS = {
    "current": Scaling(E5M2),
    "delayed": Scaling(E5M2, is_delayed=True),
    "blockwise": Scaling(E4M3, 128, (128, 128), "power_of_two"),
    "blockwise_fp32": Scaling(E4M3, 128, (128, 128)),
    "mxfp8": Scaling(E4M3, 32, None, "e8m0"),
}
"""Emulated recipes by name."""

Operand = Quantized | Unquantized


class LinearEmulation(torch.nn.Module):
    """The product of one linear layer with quantised operands.

    `scale` [3] and `amax_history` [history, 3] exist for delayed scaling and are part of checkpoints; row 0 of the
    history collects the present micro-batch.
    """

    scale: Tensor
    amax_history: Tensor

    def __init__(
        self, scaling: Scaling | None, gradient: torch.dtype | None = None, *, history: int = AMAX_HISTORY
    ) -> None:
        """Create the emulation of one layer.

        Args:
            scaling: None: operands keep their type, and only the sums are in fp32.
            gradient: 8-bit type of dy; None: the recipe's.
            history: micro-batches whose largest magnitudes delayed scaling remembers.
        """
        super().__init__()
        self.scaling = scaling
        self.gradient = gradient or (scaling.gradient if scaling else None)
        if scaling and scaling.is_delayed:
            self.register_buffer("scale", torch.ones(3))
            self.register_buffer("amax_history", torch.zeros(history, 3))

    def linear(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any = None,
        **unused: Any,
    ) -> Tensor:
        """Compute what Megatron's `_forward_impl` of a parallel linear layer does; same arguments."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = _EmulatedProduct.apply(input, weight, self, torch.is_grad_enabled())
        return output if bias is None else output + bias

    def quantize(self, values: Tensor, operand: int) -> Operand:
        """Quantise a matrix [M, K] for a product that sums over K."""
        return self._quantize(values, operand, (1, self.scaling.block if self.scaling else 0))

    def quantize_transposed(self, values: Tensor, operand: int, quantized: Operand) -> Operand:
        """Quantise a matrix [M, K] for a product that sums over M.

        Args:
            quantized: the result of `quantize`, returned where it serves both products.
        """
        if self.scaling is None or not self.scaling.block or (operand == WEIGHT and self.scaling.weight_block):
            return quantized
        return self._quantize(values, operand, (self.scaling.block, 1))

    def _quantize(self, values: Tensor, operand: int, block: tuple[int, int]) -> Operand:
        if self.scaling is None:
            return Unquantized(values)
        dtype = self.gradient if operand == GRADIENT else E4M3
        assert dtype is not None
        margin = self.scaling.weight_margin if operand == WEIGHT else 1.0
        if self.scaling.is_delayed:
            row = self.amax_history[0]
            row[operand] = torch.maximum(row[operand], largest_magnitude(values)[0])
            return quantize_scaled(values, self.scale[operand].view(1) / margin, dtype)
        if not self.scaling.block:
            return quantize_tensor(values, dtype, amax=largest_magnitude(values) * margin)
        if operand == WEIGHT and self.scaling.weight_block:
            block = self.scaling.weight_block
        return quantize_blocks(values, dtype, block, self.scaling.scale_format, margin=margin)


class _EmulatedProduct(torch.autograd.Function):
    """`x @ w.T` with quantised operands; gradients pass the rounding unchanged (straight through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, emulation: LinearEmulation, train: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        quantized, quantized_weight = emulation.quantize(rows, INPUT), emulation.quantize(weight, WEIGHT)
        ctx.emulation, ctx.types = emulation, (x.dtype, weight.dtype)
        if train and ctx.needs_input_grad[0]:
            ctx.weight = emulation.quantize_transposed(weight, WEIGHT, quantized_weight)
        if train and ctx.needs_input_grad[1]:
            ctx.x = emulation.quantize_transposed(rows, INPUT, quantized)
        product = quantized.dequantize() @ quantized_weight.dequantize().T
        return product.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        emulation, (x_dtype, weight_dtype) = ctx.emulation, ctx.types
        rows = grad.reshape(-1, grad.shape[-1])
        quantized = emulation.quantize(rows, GRADIENT)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (quantized.dequantize() @ ctx.weight.dequantize()).to(x_dtype).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            transposed = emulation.quantize_transposed(rows, GRADIENT, quantized)
            grad_weight = (transposed.dequantize().T @ ctx.x.dequantize()).to(weight_dtype)
        return grad_x, grad_weight, None, None


def quantize_head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round the head's operands to E4M3 and back: one scale for each token, one for each vocabulary entry.

    Scales are powers of two, so a rounded operand is exact in bfloat16, and every head kernel computes with it what a
    product in FP8 with fp32 sums is. Gradients pass the rounding unchanged.

    Args:
        hidden: [T, H].
        weight: [V / tp, H].
    """
    return _RoundedRows.apply(hidden), _RoundedRows.apply(weight)


class _RoundedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        rounded = quantize_blocks(values, E4M3, (1, values.shape[1]), "power_of_two")
        return rounded.dequantize().to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def attach_configured(chunks: Sequence[Any], num_layers: int, config: Fp8Config) -> None:
    """Attach the emulation that `actor.fp8` describes, and log it on rank 0.

    Args:
        chunks: this rank's model chunks, of Megatron's local layers.
        num_layers: of the whole model.
    """
    is_fp32 = config.block_scales == "fp32"
    count = attach(
        chunks,
        f"{config.recipe}_fp32" if is_fp32 else config.recipe,
        num_layers=num_layers,
        gradient={"auto": None, "hybrid": E5M2, "e4m3": E4M3}[config.format],
        first_exact=config.first_layers_bf16,
        last_exact=config.last_layers_bf16,
    )
    if dist.get_rank() == 0:
        log.info(
            "FP8 is EMULATED (%s%s): %d linear layers of this rank%s round their operands to 8 bits and back; "
            "the numbers are those of FP8, the speed is not",
            config.recipe,
            ", fp32 scales" * is_fp32,
            count,
            " and the head" * config.head,
        )


def attach(
    chunks: Sequence[Any],
    recipe: str,
    *,
    num_layers: int,
    gradient: torch.dtype | None = None,
    first_exact: int = 0,
    last_exact: int = 0,
    history: int = AMAX_HISTORY,
    weight_margin: float = 1.0,
) -> int:
    """Let the linear layers of a model compute in emulated FP8; an earlier emulation is replaced.

    Args:
        chunks: this rank's model chunks, of Megatron's local layers.
        recipe: a key of `SCALINGS`, or `bfloat16`: operands keep their type, products are summed in fp32.
        num_layers: of the whole model.
        gradient: 8-bit type of gradients; None: the recipe's.
        first_exact, last_exact: numbers of first and last layers that are left as they are.
        history: see `LinearEmulation`.
        weight_margin: see `Scaling`.
    Returns:
        Number of emulated linear layers on this rank.
    """
    scaling = None if recipe == "bfloat16" else replace(SCALINGS[recipe], weight_margin=weight_margin)
    detach(chunks)
    count = 0
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if not first_exact < layer.layer_number <= num_layers - last_exact:
                continue
            for linear in _linears(layer):
                linear.fp8 = LinearEmulation(scaling, gradient, history=history).to(linear.weight.device)
                linear._forward_impl = linear.fp8.linear  # on the instance: it hides the method of the class
                count += 1
        if scaling and scaling.is_delayed:
            chunk.fp8_hook = chunk.decoder.register_forward_hook(_update_after_training)
    return count


def detach(chunks: Sequence[Any]) -> None:
    """Undo `attach`."""
    for chunk in chunks:
        if hasattr(chunk, "fp8_hook"):
            chunk.fp8_hook.remove()
            del chunk.fp8_hook
        for linear in _linears(chunk.decoder):
            if hasattr(linear, "fp8"):
                del linear.fp8, linear._forward_impl


def _linears(module: torch.nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, (ColumnParallelLinear, RowParallelLinear))]


def _update_after_training(decoder: torch.nn.Module, inputs: Any, output: Any) -> None:
    if decoder.training and torch.is_grad_enabled():
        update_scales(decoder)


@torch.no_grad()
def update_scales(decoder: torch.nn.Module) -> None:
    """Set the scales of delayed scaling from the largest magnitudes seen, and start a row of history; a collective.

    Runs after the forward pass of every training micro-batch. Passes without gradients add to row 0 of the history and
    leave scales alone, as in Transformer Engine. Gradients are scaled by micro-batches whose backward pass has ended.
    """
    for state in _share_latest(decoder):
        amax = state.amax_history.amax(dim=0)
        gradient = state.gradient
        assert gradient is not None
        largest = amax.new_tensor([torch.finfo(dtype).max for dtype in (E4M3, E4M3, gradient)])
        usable = (amax > 0) & amax.isfinite()
        state.scale.copy_((largest / amax).clamp(max=torch.finfo(torch.float32).max).where(usable, state.scale))
        state.amax_history.copy_(state.amax_history.roll(1, dims=0))
        state.amax_history[0] = 0


@torch.no_grad()
def share_history(chunks: Sequence[Any]) -> None:
    """Make the state of delayed scaling the same on all ranks that share it, for a checkpoint; a collective.

    Args:
        chunks: this rank's model chunks, with or without emulation.
    """
    for chunk in chunks:
        _share_latest(chunk.decoder)


def _share_latest(decoder: torch.nn.Module) -> list[LinearEmulation]:
    """Reduce row 0 of the histories over the ranks that Transformer Engine reduces over; returns their layers."""
    states = [m for m in decoder.modules() if isinstance(m, LinearEmulation) and m.scaling and m.scaling.is_delayed]
    if states:
        latest = torch.stack([state.amax_history[0] for state in states])
        dist.all_reduce(latest, dist.ReduceOp.MAX, group=parallel_state.get_amax_reduction_group(True))
        for state, row in zip(states, latest, strict=True):
            state.amax_history[0] = row
    return states
