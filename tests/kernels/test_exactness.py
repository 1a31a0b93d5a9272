"""Proves the chunked implementation equals the definition: values, gradients, awkward inputs.

Everything is compared with impl="reference" in float64, or by gradcheck in float64. It does not
cover sharding (test_vocab_parallel) or the Triton kernels (test_triton).
"""

from __future__ import annotations

import pytest
import torch
from cases import EVERYTHING, assert_stats_close, operands, relative, run

import entropy_kernels as ek

# One column, fewer columns than a tile, a tile less one, prime sizes over several tiles.
SIZES = [(1, 8, 1), (3, 5, 7), (7, 130, 63), (13, 33, 257)]
SMALL = {"row_chunk": 4, "vocab_tile": 64}


@pytest.mark.parametrize(("tokens", "hidden_size", "vocab"), SIZES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equals_reference_in_float64(tokens: int, hidden_size: int, vocab: int, softcap: float | None) -> None:
    inputs = operands(tokens, hidden_size, vocab, torch.float64)
    options = EVERYTHING | {
        "top_k": min(3, vocab),
        "temperature": torch.linspace(0.3, 2.0, tokens, dtype=torch.float64),
        "teacher_temperature": torch.linspace(2.0, 0.5, tokens, dtype=torch.float64),
        "softcap": softcap,
    }
    got = run(*inputs, **options, **SMALL)
    expected = run(*inputs, **options, impl="reference")
    assert_stats_close(got[0], expected[0], 1e-11)
    assert relative(got[1], expected[1]) < 1e-11
    assert relative(got[2], expected[2]) < 1e-11


def test_gradcheck() -> None:
    hidden, weight, target = operands(4, 6, 11, torch.float64)
    target[1] = -100
    hidden.requires_grad_()
    weight.requires_grad_()

    def outputs(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stats = ek.token_stats(h, w, target, temperature=0.7, varentropy=True, top_k=2, vocab_size=9 + 2, **SMALL)
        return stats.logprob, stats.entropy, stats.varentropy, stats.topk_logprobs

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


@pytest.mark.parametrize("cut", [1, 17, 39])
def test_merge_of_any_split_is_the_whole(cut: int) -> None:
    hidden, weight, target = operands(5, 8, 40, torch.float64)
    logits = hidden @ weight.t()
    options = {"varentropy": True, "teacher_temperature": 0.4, "top_k": 3}
    whole = ek.token_stats_from_logits(logits, target, vocab_tile=40, **options)
    parts = ek.token_stats_from_logits(logits, target, vocab_tile=cut, **options)
    assert_stats_close(whole, parts, 1e-12)
