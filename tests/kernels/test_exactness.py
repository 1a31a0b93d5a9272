"""Proves the implementation equals the definition: values and gradients of every statistic and mode.

Everything is compared with impl="reference" in float64, or by gradcheck in float64. It does not
cover sharding (test_vocab_parallel).
"""

from __future__ import annotations

import pytest
import torch
from cases import (
    DOORS,
    EVERYTHING,
    TILES,
    WIDE,
    assert_stats_close,
    chunked_only,
    limit,
    operands,
    relative,
    run,
    run_exact,
    stats_of,
    token_stats,
)

# One column, fewer columns than a tile, a tile less one, prime sizes over several tiles and splits.
SIZES = [(1, 8, 1), (3, 5, 7), (7, 130, 15), (13, 33, 257)]


@pytest.mark.parametrize(("tokens", "hidden_size", "vocab"), SIZES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equals_reference(tokens: int, hidden_size: int, vocab: int, softcap: float | None) -> None:
    inputs = operands(tokens, hidden_size, vocab, WIDE)
    options = EVERYTHING | {
        "temperature": torch.linspace(0.3, 2.0, tokens, dtype=WIDE),
        "teacher_temperature": torch.linspace(2.0, 0.5, tokens, dtype=WIDE),
        "softcap": softcap,
    }
    if "top_k" in options:
        options["top_k"] = min(3, vocab)
    got = run(*inputs, **options, **TILES)
    expected = run_exact(*inputs, **options)
    # float32: a logit over a temperature of 0.3 reaches 30, with an error of 2e-6 and more.
    assert_stats_close(got[0], expected[0], limit(float64=1e-11, float32=2e-5))
    assert relative(got[1], expected[1]) < limit(float64=1e-11, float32=1e-5)
    assert relative(got[2], expected[2]) < limit(float64=1e-11, float32=1e-5)


@pytest.mark.parametrize("save", ["recompute", "half"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("compact", [True, False])
def test_every_mode_equals_reference(save: str, softcap: float | None, compact: bool) -> None:
    hidden, weight, target = operands(19, 24, 150)
    target = target.clamp(max=140)
    target[3:9] = -100
    options = {"softcap": softcap, "vocab_size": 141, "temperature": 0.8, "save": save, "compact": compact}
    got = run(hidden, weight, target, **options, **TILES)
    expected = run_exact(hidden, weight, target, **options)
    assert_stats_close(got[0], expected[0], 1e-5)
    # float16 of a shifted logit: an error of up to |d| 2^-11 in the exponent.
    allowed = 1e-5 if save == "recompute" else 2e-3
    assert relative(got[1], expected[1]) < allowed and relative(got[2], expected[2]) < allowed


@chunked_only("gradcheck needs float64, which Triton does not serve")
def test_gradcheck() -> None:
    hidden, weight, target = operands(4, 6, 11, torch.float64)
    target[1] = -100
    hidden.requires_grad_()
    weight.requires_grad_()

    def outputs(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stats = token_stats(h, w, target, temperature=0.7, varentropy=True, top_k=2, **TILES | {"vocab_tile": 4})
        return stats.logprob, stats.entropy, stats.varentropy, stats.topk_logprobs

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("cut", [1, 17, 39])
def test_merge_of_any_split_is_the_whole(cut: int, door: str) -> None:
    logits = operands(5, 40, 5, WIDE)[0]
    target = torch.tensor([0, 16, 17, 38, 39])
    options = EVERYTHING | {"teacher_temperature": 0.4}
    whole = stats_of(logits, target, door, vocab_tile=40, **options)
    parts = stats_of(logits, target, door, vocab_tile=cut, **options)
    assert_stats_close(whole, parts, limit(float64=1e-12, float32=1e-5))
