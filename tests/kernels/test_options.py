"""Proves what the options about gradients do: main-grad accumulation, frozen inputs, entropy as a metric."""

from __future__ import annotations

import pytest
import torch
from cases import TILES, combine, operands, relative, run, token_stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_accumulates(dtype: torch.dtype) -> None:
    hidden, weight, target = operands(9, 12, 50, dtype)
    expected = run(hidden, weight, target, **TILES)[2].double()
    weight.requires_grad_()
    main_grad = torch.ones(50, 12)
    for _ in range(2):
        stats = token_stats(hidden, weight, target, main_grad=main_grad, **TILES)
        combine(stats).backward()
    assert weight.grad is None
    # bfloat16: `expected` was rounded once to 8 bits, the buffer never.
    assert relative((main_grad - 1) / 2, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_main_grad_follows_megatrons_protocol() -> None:
    hidden, weight, target = operands(9, 12, 50)
    weight.requires_grad_()
    weight.grad_added_to_main_grad = False
    main_grad = torch.zeros(50, 12)
    stats = token_stats(hidden, weight, target, main_grad=main_grad, **TILES)
    stats.logprob.sum().backward()
    assert weight.grad_added_to_main_grad and not weight.grad.any() and main_grad.any()


def test_frozen_weight_or_hidden() -> None:
    hidden, weight, target = operands(9, 12, 50)
    expected = run(hidden, weight, target, entropy=False, **TILES)
    for index, leaf in enumerate((hidden, weight)):
        leaf.requires_grad_()
        combine(token_stats(hidden, weight, target, entropy=False, **TILES)).backward()
        assert relative(leaf.grad, expected[1 + index]) < 1e-6
        leaf.requires_grad_(False)


def test_entropy_without_gradient() -> None:
    inputs = operands(5, 12, 50)
    plain = run(*inputs, entropy=False, **TILES)
    metric = run(*inputs, entropy_grad=False, **TILES)
    assert plain[0].entropy is None and not metric[0].entropy.requires_grad
    assert relative(metric[1], plain[1]) < 1e-6 and relative(metric[2], plain[2]) < 1e-6
