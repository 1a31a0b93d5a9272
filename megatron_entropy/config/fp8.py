"""FP8 matrix products of the actor: the table `actor.fp8` and what each recipe needs.

The requirements are those that Transformer Engine checks itself, deep inside the first forward pass (2.20.2:
`common/recipe`, `pytorch/quantization.py`, `pytorch/utils.py`, `pytorch/tensor`). Here they are facts that a
configuration can be compared with before anything is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_entropy.config.types import NonNegativeInt, Section


class Fp8Config(Section):
    """FP8 matrix products in the linear layers (Transformer Engine). Optimizer and gradients keep their precision."""

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
    head: Literal["bfloat16", "fp8"] = "bfloat16"
    """Precision of the head, which turns hidden states into log-probabilities and entropies. `fp8` exists only
    emulated: the kernels of the head compute in bfloat16."""
    params: bool = False
    """Keep the weights themselves in FP8 and gather them in FP8 between data parallel ranks, which saves memory and
    communication; needs `actor.parallel.distributed_optimizer`."""
    emulate: bool = False
    """Round to FP8 and back in plain PyTorch, on any device without Transformer Engine: shows what a recipe does to the
    numbers, saves nothing."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe needs.

    Attributes:
        megatron: megatron-core's name of it.
        tokens: tokens of a pack on one rank, after the split of sequence parallelism, are a multiple of this.
        width: inputs and outputs of every linear layer on one rank are multiples of this.
        first_capability: first CUDA compute capability that computes it.
        end_capability: first capability above it that does not.
        format: FP8 format where `format="auto"`.
        cuda: first CUDA version of torch.
        transformer_engine: first version that has it.
    """

    megatron: str
    tokens: int
    width: int
    first_capability: tuple[int, int]
    end_capability: tuple[int, int]
    format: str
    cuda: tuple[int, int] = (12, 1)
    transformer_engine: str = "2.9"


AMAX_HISTORY = 1024
"""Past largest values that `delayed` takes the scale from, Transformer Engine's default."""

ANY = (99, 0)
"""No upper bound of the compute capability."""

RECIPES = {
    "current": Recipe("tensorwise", 16, 16, (8, 9), ANY, "hybrid"),
    "delayed": Recipe("delayed", 16, 16, (8, 9), ANY, "hybrid"),
    "blockwise": Recipe("blockwise", 128, 16, (9, 0), ANY, "e4m3", cuda=(12, 9)),
    "mxfp8": Recipe("mxfp8", 32, 32, (10, 0), (12, 0), "e4m3"),
    "nvfp4": Recipe("nvfp4", 128, 16, (10, 0), ANY, "e4m3"),
}
"""Requirements by recipe. The forward product needs 8 tokens a rank, the weight gradient 16: it sums over tokens."""


def token_multiple(fp8: Fp8Config, *, split: int) -> int:
    """Multiple that the tokens of a pack are padded to.

    Args:
        split: ranks that sequence parallelism splits a pack over, 1 without it.
    """
    return split * (RECIPES[fp8.recipe].tokens if fp8.recipe else 1)
