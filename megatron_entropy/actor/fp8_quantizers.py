"""Cast tensors to 8-bit floats in plain PyTorch, on any device, with the scales of Transformer Engine's recipes.

A tensor has one scale, or one for each block. A scale maps the largest magnitude of what it covers to the largest
number of the format. Payloads and scales of `quantize_tensor` are those of Transformer Engine 2.20's Python reference
(`CurrentScalingQuantizerRef`), bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
"""Formats: 4 bits of exponent and 3 of mantissa (largest number 448), 5 and 2 (57344)."""

ScaleFormat = Literal["fp32", "power_of_two", "e8m0"]
"""`fp32`: any number. `power_of_two`: rounded down to one. `e8m0`: the eight exponent bits of the OCP microscaling
formats; rounded down too, but from another rounding of the quotient."""


@dataclass(frozen=True)
class Quantized:
    """A matrix in 8 bits.

    `payload`: [M, K] in an 8-bit type. `inverse_scale`: fp32, what payloads are multiplied with: [1], or one for each
    block, [ceil(M / rows), ceil(K / columns)]. `block`: rows and columns of a block; None: one scale.
    """

    payload: Tensor
    inverse_scale: Tensor
    block: tuple[int, int] | None = None

    def dequantize(self) -> Tensor:
        """Return the values that the payload stands for: [M, K] fp32."""
        wide = self.payload.float()
        if self.block is None:
            return wide * self.inverse_scale
        rows, columns = wide.shape
        tiles = _tiles(wide, self.block) * self.inverse_scale[:, None, :, None]
        return tiles.flatten(0, 1).flatten(1, 2)[:rows, :columns]


@dataclass(frozen=True)
class Unquantized:
    """A matrix that keeps its type, where a `Quantized` is expected; products are computed in fp32 all the same."""

    values: Tensor

    def dequantize(self) -> Tensor:
        """Return the values in fp32: [M, K]."""
        return self.values.float()


def largest_magnitude(values: Tensor) -> Tensor:
    """Return the largest magnitude of a tensor: [1] fp32; 0 for a tensor without elements."""
    return values.abs().amax().float().view(1) if values.numel() else values.new_zeros(1, dtype=torch.float32)


def scale_of(amax: Tensor, dtype: torch.dtype, *, source: torch.dtype, power_of_two: bool = False) -> Tensor:
    """Return the scale that maps a largest magnitude to the largest number of an 8-bit type.

    Args:
        amax: largest magnitudes, fp32; 0 has scale 1, infinity 0.
        dtype: the 8-bit type.
        source: type of the values. Its largest number is the scale of magnitudes whose scale would overflow.
        power_of_two: round the scale down to a power of two.
    """
    scale = torch.div(torch.finfo(dtype).max, amax)  # `/` would multiply by the reciprocal
    scale = scale.where(scale != torch.inf, torch.finfo(source).max)
    if power_of_two:
        exponent = torch.frexp(scale)[1] - 1  # frexp's mantissa is in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent).where(amax != torch.inf, 0.0)
    return scale.where(amax != 0, 1.0)


def e8m0_exponent(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the biased exponent e of the inverse scale 2^(e - 127) of a microscaling block: int32, 0 to 255.

    Args:
        amax: largest magnitudes of blocks, fp32. amax / largest number of `dtype` is rounded up to a power of two.
    """
    quotient = amax * torch.tensor(1 / torch.finfo(dtype).max, dtype=torch.float32)
    bits = quotient.view(torch.int32)
    exponent, mantissa = bits >> 23 & 0xFF, bits & 0x7FFFFF
    rounds_up = (mantissa > 0) & (exponent < 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = (exponent + rounds_up).where(quotient != torch.inf, 0xFE)
    return exponent.where(~quotient.isnan(), 0xFF)


def quantize_scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantized:
    """Quantize with a given scale; what exceeds the format becomes its largest number.

    Args:
        values: [M, K].
        scale: [1] fp32.
    """
    return Quantized(_cast(values.float() * scale, dtype), scale.reciprocal())


def quantize_tensor(
    values: Tensor, dtype: torch.dtype, *, amax: Tensor | None = None, power_of_two: bool = False
) -> Quantized:
    """Quantize with one scale for the tensor.

    Args:
        values: [M, K].
        amax: [1] fp32, the largest magnitude to scale by; None: that of `values`.
    """
    amax = largest_magnitude(values) if amax is None else amax
    return quantize_scaled(values, scale_of(amax, dtype, source=values.dtype, power_of_two=power_of_two), dtype)


def quantize_blocks(
    values: Tensor, dtype: torch.dtype, block: tuple[int, int], scale_format: ScaleFormat, *, margin: float = 1.0
) -> Quantized:
    """Quantize with a scale for each block; incomplete blocks at the ends have scales of their own.

    Args:
        values: [M, K].
        block: rows and columns of a block: (1, n) are n consecutive values of a row, (n, 1) of a column.
        margin: at least 1; a block's largest magnitude becomes the largest number of `dtype` divided by this.
    """
    rows, columns = values.shape
    tiles = _tiles(values.float(), block)
    amax = tiles.abs().amax(dim=(1, 3)) * margin
    if scale_format == "e8m0":
        exponent = e8m0_exponent(amax, dtype)
        inverse = torch.ldexp(torch.ones_like(amax), exponent - 127)
        scale = torch.ldexp(torch.ones_like(amax), 127 - exponent).where(exponent != 0, 1.0)
    else:
        scale = scale_of(amax, dtype, source=values.dtype, power_of_two=scale_format == "power_of_two")
        inverse = scale.reciprocal()
    payload = _cast(tiles * scale[:, None, :, None], dtype)
    return Quantized(payload.flatten(0, 1).flatten(1, 2)[:rows, :columns], inverse, block)


def _cast(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return scaled.clamp(-largest, largest).to(dtype)


def _tiles(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Return [M / rows, rows, K / columns, columns], filled up with zeros."""
    (rows, columns), (height, width) = values.shape, block
    values = functional.pad(values, (0, -columns % width, 0, -rows % height))
    return values.view(values.shape[0] // height, height, values.shape[1] // width, width)
