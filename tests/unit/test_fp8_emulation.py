"""Emulated FP8: payloads and scales of every recipe, and the three products of a linear layer.

`RECORDED` is what `CurrentScalingQuantizerRef` of Transformer Engine 2.20.2 gives for `VALUES`; `make test-te` asks the
class itself. Blocks are compared with each block quantised alone, and scales that are not recorded with the definition
of their format. Layouts are in `tests/distributed/test_fp8_layouts.py`.
"""

import math
from dataclasses import replace

import pytest
import torch

from megatron_entropy.actor import fp8_emulation as emulation
from megatron_entropy.actor.fp8_quantizers import E4M3, E5M2, e8m0_exponent, quantize_blocks, quantize_tensor

VALUES = [[0.0, -0.0, 1.0, -3.7, 448.0, 0.0625], [0.001953125, 0.0017, -0.00098, 17.25, -261.3, 5.5e-5]]
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
RECORDED = (
    ("e4m3", "float32", False, "008038c77e1801018159f800", "0x1.5eb8520000000p+0"),
    ("e4m3", "bfloat16", False, "008038c77e1801018159f800", "0x1.5db6da0000000p+0"),
    ("e4m3", "float32", True, "008034c37a1401018055f400", "0x1.0000000000000p+0"),
    ("e4m3", "bfloat16", True, "008034c37a1401018055f400", "0x1.0000000000000p+0"),
    ("e5m2", "float32", False, "008058df7b483433b068f81f", "0x1.5eb8520000000p-7"),
    ("e5m2", "bfloat16", False, "008058df7b483433b068f81f", "0x1.5db6da0000000p-7"),
    ("e5m2", "float32", True, "008056dd79463231ae66f61d", "0x1.0000000000000p-7"),
    ("e5m2", "bfloat16", True, "008056dd79463231ae66f61d", "0x1.0000000000000p-7"),
)
"""Format, type of the values, power-of-two scale, payload, inverse scale; `VALUES` times 0.73 or 1.37."""


@pytest.mark.parametrize(("name", "source", "power_of_two", "payload", "inverse"), RECORDED)
def test_one_scale_for_a_tensor_is_transformer_engines_bit_for_bit(name, source, power_of_two, payload, inverse):
    dtype = getattr(torch, source)
    values = (torch.tensor(VALUES, dtype=dtype) * (0.73 if power_of_two else 1.37)).to(dtype)
    found = quantize_tensor(values, FORMATS[name], power_of_two=power_of_two)
    assert found.payload.view(torch.uint8).numpy().tobytes().hex() == payload
    assert float(found.inverse_scale) == float.fromhex(inverse)


def test_edges_of_the_range_have_transformer_engines_scales():
    def scale(largest, dtype=torch.float32):
        found = quantize_tensor(torch.tensor([[largest, 0.0]], dtype=dtype), E4M3)
        return float(found.inverse_scale), found.dequantize().tolist()

    assert scale(0.0) == (1.0, [[0.0, 0.0]])
    assert scale(1e-45)[0] == pytest.approx(1 / torch.finfo(torch.float32).max)  # 448 / 1e-45 overflows
    assert scale(2.0**-24, torch.float16)[0] == pytest.approx(2.0**-24 / 448)
    assert scale(math.inf)[0] == math.inf
    assert quantize_tensor(torch.zeros(0, 8), E4M3).payload.shape == (0, 8)


@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128), (1, 32), (32, 1)])
@pytest.mark.parametrize("scale_format", ["fp32", "power_of_two", "e8m0"])
def test_a_block_is_quantised_as_if_it_were_alone(block, scale_format):
    values = torch.randn(150, 200, generator=torch.Generator().manual_seed(0))
    values = values * torch.logspace(-6, 3, 200)
    found = quantize_blocks(values, E4M3, block, scale_format)
    dequantized = found.dequantize()
    for row in range(0, 150, max(block[0], 50)):
        for column in range(0, 200, max(block[1], 40)):
            row_0, column_0 = row // block[0] * block[0], column // block[1] * block[1]
            part = (slice(row_0, row_0 + block[0]), slice(column_0, column_0 + block[1]))
            alone = quantize_tensor(values[part], E4M3, power_of_two=scale_format == "power_of_two")
            inverse = found.inverse_scale[row_0 // block[0], column_0 // block[1]]
            if scale_format == "e8m0":
                exact = float(values[part].abs().max()) / 448
                assert float(inverse) == 2.0 ** math.ceil(math.log2(exact)) >= exact
            else:
                assert torch.equal(found.payload[part].view(torch.uint8), alone.payload.view(torch.uint8))
                assert torch.equal(inverse, alone.inverse_scale[0])
            error = (dequantized[part] - values[part]).abs()
            assert (error <= values[part].abs() / 16 + inverse * 2.0**-10).all()  # half of a step


def test_microscaling_exponents_round_up():
    """Largest magnitude / 448, rounded up to a power of two; exact powers, zero, infinity and NaN are not."""
    amax = torch.tensor([448.0, 449.0, 896.0, 0.0, math.inf, math.nan])
    assert e8m0_exponent(amax, E4M3).tolist() == [127, 128, 128, 0, 254, 255]


def product(recipe, x, weight, grad, *, gradient=None):
    """Output and both gradients of one emulated layer."""
    scaling = None if recipe == "bfloat16" else emulation.SCALINGS[recipe]
    layer = emulation.LinearEmulation(scaling, gradient, history=4)
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = layer.linear(x, weight, allreduce_dgrad=False, sequence_parallel=False)
    output.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return output.detach(), x.grad, weight.grad


def make_operands(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sizes = ((160, 1, 192), (256, 192), (160, 1, 256))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("recipe", emulation.SCALINGS)
def test_the_three_products_use_operands_quantised_along_the_summed_dimension(recipe):
    """Against the definition, written with `quantize_*` and matrix products; delayed scaling starts with scale 1."""
    x, weight, grad = make_operands()
    scaling = emulation.SCALINGS[recipe]

    def rounded(values, dtype, *, sums_over_rows=False, is_weight=False):
        if recipe == "delayed":
            return values.clamp(-448, 448).to(dtype).float()
        if not scaling.block:
            return quantize_tensor(values, dtype).dequantize()
        block = (scaling.block, 1) if sums_over_rows else (1, scaling.block)
        if is_weight and scaling.weight_block:
            block = scaling.weight_block
        return quantize_blocks(values, dtype, block, scaling.scale_format).dequantize()

    output, grad_x, grad_weight = product(recipe, x, weight, grad)
    x, grad, kind = x[:, 0], grad[:, 0], scaling.gradient
    expected = rounded(x, E4M3) @ rounded(weight, E4M3, is_weight=True).T
    expected_x = rounded(grad, kind) @ rounded(weight, E4M3, sums_over_rows=True, is_weight=True)
    expected_weight = rounded(grad, kind, sums_over_rows=True).T @ rounded(x, E4M3, sums_over_rows=True)
    for found, right, exact in (
        (output[:, 0], expected, x @ weight.T),
        (grad_x[:, 0], expected_x, grad @ weight),
        (grad_weight, expected_weight, grad.T @ x),
    ):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)
        assert 0.005 < float((found - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("recipe", emulation.SCALINGS)
def test_a_margin_rounds_the_same_weights_otherwise(recipe):
    """Twice the scale is the same grid; another factor is another grid where scales are no powers of two."""
    generator = torch.Generator().manual_seed(2)
    values = 1 + torch.rand(64, 128, generator=generator)

    def rounded(margin, operand=emulation.WEIGHT):
        layer = emulation.LinearEmulation(replace(emulation.SCALINGS[recipe], weight_margin=margin))
        return layer.quantize(values, operand).dequantize()

    assert torch.equal(rounded(2.0), rounded(1.0))
    assert torch.equal(rounded(1.3, emulation.INPUT), rounded(1.0, emulation.INPUT))
    assert torch.equal(rounded(1.3), rounded(1.0)) == (recipe in ("blockwise", "mxfp8"))
    assert float((rounded(1.3) / values - 1).abs().max()) <= 2**-4


def test_the_heads_operands_have_a_scale_for_each_row_and_stay_exact_in_bfloat16():
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(rows, 48, generator=generator).bfloat16().requires_grad_() for rows in (5, 11))
    rounded = emulation.quantize_head(hidden, weight)
    for found, values in zip(rounded, (hidden, weight), strict=True):
        for row, exact in zip(found.detach(), values.detach(), strict=True):
            alone = quantize_blocks(exact[None], E4M3, (1, 48), "power_of_two").dequantize()[0]
            assert torch.equal(row.float(), alone) and not torch.equal(row, exact)
            assert float(((row - exact).abs() / exact.abs()).max()) <= 2**-4
    (rounded[0].float() @ rounded[1].float().T).sum().backward()
    torch.testing.assert_close(hidden.grad, rounded[1].float().sum(0).bfloat16().expand(5, -1))


def test_formats_types_and_the_recipe_without_quantisation():
    x, weight, grad = make_operands(torch.bfloat16)
    hybrid = product("mxfp8", x, weight, grad, gradient=E5M2)
    plain = product("mxfp8", x, weight, grad)
    assert torch.equal(hybrid[0], plain[0]) and not torch.equal(hybrid[1], plain[1])
    assert {values.dtype for values in plain} == {torch.bfloat16}
    output, grad_x, grad_weight = product("bfloat16", x, weight, grad)
    assert torch.equal(output, (x.float() @ weight.float().T).bfloat16())
    assert torch.equal(grad_x, (grad.float() @ weight.float()).bfloat16())
    assert torch.equal(grad_weight, (grad[:, 0].float().T @ x[:, 0].float()).bfloat16())


def test_a_frozen_weight_has_no_gradient_and_scoring_keeps_no_operands():
    x, weight, grad = make_operands()
    layer = emulation.LinearEmulation(emulation.SCALINGS["mxfp8"])
    x.requires_grad_()
    layer.linear(x, weight, allreduce_dgrad=False, sequence_parallel=False).backward(grad)
    assert weight.grad is None and x.grad is not None
    with torch.no_grad():
        assert layer.linear(x, weight, allreduce_dgrad=False, sequence_parallel=False).grad_fn is None
