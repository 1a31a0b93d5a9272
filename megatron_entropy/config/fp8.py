"""FP8 matrix products of the actor: the table `actor.fp8`; `fp8_recipes` has what each recipe needs."""

from __future__ import annotations

from typing import Literal

from megatron_entropy.config.fp8_recipes import AMAX_HISTORY, RECIPES
from megatron_entropy.config.types import NonNegativeInt, Section

__all__ = ["AMAX_HISTORY", "RECIPES", "Fp8Config", "token_multiple"]


class Fp8Config(Section):
    """FP8 matrix products in the linear layers (Transformer Engine).

    Weights keep their type unless `parameters` is set, gradients and optimizer always, and so does the head, which
    turns hidden states into log-probabilities and entropies, unless `head` is set.
    """

    recipe: Literal["", "current", "delayed", "blockwise", "mxfp8", "nvfp4"] = ""
    """How tensors are scaled into FP8's range. `current`: one scale a tensor, from its largest value now. `delayed`:
    from its largest values of past steps. `blockwise`: one scale for 128 values, for 128 x 128 weights. `mxfp8`: one
    for 32 values (Blackwell). `nvfp4`: four bits with a scale for 16 values (Blackwell). Empty: no FP8."""
    format: Literal["auto", "hybrid", "e4m3"] = "auto"
    """`hybrid`: E4M3 forward, E5M2 for gradients, which has more range and less precision. `auto`: hybrid for `current`
    and `delayed`, e4m3 for the others."""
    first_layers_bf16: NonNegativeInt = 0
    """Number of first layers that stay in bfloat16."""
    last_layers_bf16: NonNegativeInt = 0
    """Number of last layers that stay in bfloat16."""
    parameters: bool = False
    """Store the weights of these layers in FP8, and gather them in FP8 at half the traffic. The distributed optimizer
    keeps the fp32 weights that they are rounded from. `current` and `blockwise` only."""
    block_scales: Literal["power_of_two", "fp32"] = "power_of_two"
    """Scales of `blockwise`. `fp32` emulated only: Transformer Engine reads the environment variable
    `NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1`."""
    head: bool = False
    """Round the head's operands to E4M3 as well, with a power of two as the scale of each token and of each vocabulary
    entry; gradients are those of the rounded operands. Emulated only."""
    emulate: bool = False
    """Round to FP8 and back in plain PyTorch, on any device without Transformer Engine: shows what a recipe does to the
    numbers, saves nothing. Log, metrics and report say "emulated"."""

    @property
    def label(self) -> str:
        """For logs and pages, such as `FP8 current, emulated`; empty without FP8."""
        return f"FP8 {self.recipe}{' + head' * self.head}{', emulated' * self.emulate}" if self.recipe else ""


def token_multiple(fp8: Fp8Config, *, split: int) -> int:
    """Multiple that the tokens of a pack are padded to.

    Args:
        split: ranks that sequence parallelism splits a pack over, 1 without it.
    """
    return split * (RECIPES[fp8.recipe].tokens if fp8.recipe else 1)


EMULATED = ("current", "delayed", "blockwise", "mxfp8")
"""Recipes that can be emulated."""

STORED = ("current", "blockwise")
"""Recipes whose FP8 weights can be stored."""

EMULATED_NAMES = ("current", "delayed", "blockwise", "blockwise_fp32", "mxfp8")
"""The same by the name of their scales: `blockwise_fp32` is `blockwise` with `block_scales="fp32"`."""
