"""What each FP8 recipe needs; nothing is imported, so that a command line can list them.

The requirements are those that Transformer Engine checks itself, deep inside the first forward pass (2.20.2:
`common/recipe`, `pytorch/quantization.py`, `pytorch/utils.py`, `pytorch/tensor`). Here they are facts that a
configuration can be compared with before anything is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass


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
