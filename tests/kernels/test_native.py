"""Proves the compiled bfloat16 product equals the float64 product, for any shape and layout.

Skipped where the CPU lacks AVX512-BF16 or a C compiler; there the library widens instead, which
test_without_native shows to give the same statistics.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import operands, relative, run

from entropy_kernels import native


@pytest.fixture(params=["avx512_bf16", "amx_bf16"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The best instructions of this CPU up to these."""
    flags = native.cpu_flags()
    if request.param not in flags:
        pytest.skip(f"this CPU lacks {request.param}")
    if request.param == "avx512_bf16":
        monkeypatch.setattr(native, "cpu_flags", lambda: flags - {"amx_bf16"})
    native.kernel.cache_clear()
    if native.kernel() is None:
        pytest.skip("needs a C compiler")
    yield
    native.kernel.cache_clear()


# One element; less than a block; odd depth; full blocks of rows, columns and depth and some more of each.
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (5, 63, 9), (7, 65, 256), (13, 129, 611), (32, 64, 512), (77, 150, 1101)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_equals_float64(instructions: None, m: int, n: int, k: int, transposed: bool, add: bool) -> None:
    left = torch.randn(m, k + 3).bfloat16()[:, :k]
    right = torch.randn(n, k).bfloat16().t() if transposed else torch.randn(k, n).bfloat16()
    start = torch.randn(m, n + 5)
    out = start.clone()
    native.product(left, right, out[:, :n], add=add)
    expected = left.double() @ right.double() + (start[:, :n] if add else 0.0)
    # Products are exact in float32. Each of k additions rounds a sum of size sqrt(k) by up to 2^-24 of it: at random
    # they add up to k 2^-24, here doubled for the largest of many elements.
    assert (out[:, :n] - expected).abs().max() < (k + 10) * 2**-23
    assert torch.equal(out[:, n:], start[:, n:])


def test_without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = operands(9, 40, 150, torch.bfloat16)
    built = run(*inputs, row_chunk=4, vocab_tile=64)
    monkeypatch.setattr(native, "kernel", lambda: None)
    widened = run(*inputs, row_chunk=4, vocab_tile=64)
    assert relative(built[0].logprob, widened[0].logprob) < 1e-6
    assert relative(built[0].entropy, widened[0].entropy) < 1e-6
    # Without it the hidden gradient is summed from products rounded to bfloat16 (2^-9 each).
    assert relative(built[1], widened[1]) < 2e-2
    assert relative(built[2], widened[2]) < 1e-2
