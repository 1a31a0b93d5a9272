"""Proves what the options about gradients do: main-grad accumulation, frozen inputs, entropy as a metric."""

from __future__ import annotations

import pytest
import torch
from cases import TILES, combine, distillation, operands, relative, run, token_stats


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_main_grad_follows_megatrons_protocol(dtype: torch.dtype, tied: bool) -> None:
    """The hook is that of Megatron-Core's DistributedDataParallel. A tied weight is an embedding as well."""
    hidden, weight, target = operands(9, 12, 50, dtype)
    teacher = hidden.flip(0), weight.flip(0)
    ids = torch.tensor([3, 3, 7])

    def loss(main_grad: torch.Tensor | None) -> torch.Tensor:
        stats = token_stats(hidden, weight, target, main_grad=main_grad, **TILES)
        divergence = distillation(hidden, weight, *teacher, target, main_grad=main_grad)
        used = torch.nn.functional.embedding(ids, weight).float().sum() if tied else 0.0
        return combine(stats) + divergence.sum() + used

    weight.requires_grad_()
    (expected,) = torch.autograd.grad(loss(None), weight)
    main_grad, seen = torch.zeros(50, 12), []
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, tied

    def hook(*unused: object) -> None:
        assert weight.grad is not None, "Megatron demands one where it sums gradients meanwhile"
        seen.append(weight.grad.data_ptr() == main_grad.data_ptr())
        if not weight.grad_added_to_main_grad or weight.zero_out_wgrad:
            main_grad.add_(weight.grad)
        weight.grad = None

    accumulate = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulate.register_hook(hook)
    loss(main_grad).backward()
    assert len(seen) == 1 and weight.grad_added_to_main_grad
    assert relative(main_grad, expected.double()) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_a_gradient_that_main_grad_holds_takes_no_memory() -> None:
    hidden, weight, target = operands(9, 12, 50)
    main_grad = torch.zeros(50, 12)
    weight.requires_grad_().grad_added_to_main_grad = False
    combine(token_stats(hidden, weight, target, main_grad=main_grad, **TILES)).backward()
    assert weight.grad.data_ptr() == main_grad.data_ptr() and main_grad.any()


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
