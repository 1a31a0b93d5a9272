"""Proves `distillation` and its gradients against autograd of the definition in float64.

Both directions, temperatures per token, 1, 2 and 4 gloo ranks, padding, ignored rows, 16-bit
inputs, teachers of another hidden size and type, bad arguments. It does not cover CUDA; test_triton
runs it with the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import IMPL, RANKS, WIDE, distillation, limit, operands, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels import reference

DIRECTIONS = ("forward", "reverse")
A = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=WIDE)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def problem(tokens: int = 8, vocab: int = 70, dtype: torch.dtype = WIDE, seed: int = 0) -> Inputs:
    """hidden, weight, teacher's hidden and weight (of another size), target with one ignored row."""
    hidden, weight, target = operands(tokens, 12, vocab, dtype, seed)
    teacher_hidden, teacher_weight, _ = operands(tokens, 9, vocab, dtype, seed + 1)
    target[tokens // 3] = -100
    return hidden, weight, teacher_hidden, teacher_weight, target


def exact(inputs: Inputs, direction: str, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences and gradients by the definition."""
    hidden, weight, teacher_hidden, teacher_weight, target = inputs
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    teacher = teacher_hidden.double() @ teacher_weight.double().t()
    temperatures = [options.get(name, 1.0) for name in ("temperature", "teacher_temperature")]
    value = reference.distillation(hidden @ weight.t(), teacher, *temperatures, direction)
    value = value * (target != -100)
    return value.detach(), *torch.autograd.grad((value * upstream).sum(), (hidden, weight))


def upstream_of(tokens: int) -> Tensor:
    values = torch.randn(tokens, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    values[1] = 0.0
    return values


def temperatures(tokens: int, dtype: torch.dtype = WIDE) -> dict[str, Tensor]:
    return {
        "temperature": torch.linspace(0.6, 2.0, tokens, dtype=dtype),
        "teacher_temperature": torch.linspace(1.5, 0.8, tokens, dtype=dtype),
    }


def sharded(rank: int, group: Any, inputs: Inputs, padding: int, options: dict) -> dict[str, Tensor]:
    """One rank's divergences and gradients."""
    tp = torch.distributed.get_world_size(group)
    hidden, weight, teacher_hidden, teacher_weight, target = inputs
    vocab = weight.shape[0]
    rows = -(-vocab // tp) + padding
    shards = []
    for whole in (weight, teacher_weight):
        padded = torch.full((rows * tp, whole.shape[1]), 5.0, dtype=whole.dtype)
        padded[:vocab] = whole
        shards.append(padded[rank * rows : (rank + 1) * rows].clone())
    if options.get("sequence_parallel"):
        hidden, teacher_hidden = hidden.chunk(tp)[rank], teacher_hidden.chunk(tp)[rank]
    hidden = hidden.clone().requires_grad_()
    shards[0].requires_grad_()
    value = distillation(hidden, shards[0], teacher_hidden, shards[1], target, group=group, vocab_size=vocab, **options)
    (value * upstream_of(target.shape[0]).to(value)).sum().backward()
    return {"value": value.detach(), "hidden": hidden.grad, "weight": shards[0].grad}


@pytest.mark.parametrize("tp", RANKS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("vocab", "padding"), [(3, 5), (1203, 2)])
def test_equals_autograd(
    ranks: Any, tp: int, direction: str, sequence_parallel: bool, vocab: int, padding: int
) -> None:
    inputs = problem(vocab=vocab)
    options = {"direction": direction, "row_chunk": 3, **temperatures(8)}
    value, grad_hidden, grad_weight = exact(inputs, direction, upstream_of(8), **temperatures(8))
    results = ranks.run(sharded, tp, inputs, padding, options | {"sequence_parallel": sequence_parallel})
    for result in results:
        assert torch.equal(result["value"], results[0]["value"]), "the same bits on every rank"
        assert relative(result["value"], value) < limit(1e-12, 1e-5)
    parts = [r["hidden"] for r in results]
    for part in [torch.cat(parts)] if sequence_parallel else parts:
        assert relative(part, grad_hidden) < limit(1e-11, 1e-5)
    weight = torch.cat([r["weight"] for r in results])
    assert relative(weight[:vocab], grad_weight) < limit(1e-11, 1e-5)
    assert not weight[vocab:].any(), "padded rows must have no gradient"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
def test_low_precision(direction: str, dtype: torch.dtype, allowed: float) -> None:
    inputs = problem(tokens=16, vocab=1100, dtype=dtype)
    value, grad_hidden, grad_weight = exact(inputs, direction, upstream_of(16), teacher_temperature=1.3)
    hidden, weight = (x.requires_grad_() for x in inputs[:2])
    got = distillation(hidden, weight, *inputs[2:], teacher_temperature=1.3, direction=direction)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.detach().double(), value, rtol=0, atol=1e-5)
    (got * upstream_of(16).float()).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert relative(hidden.grad, grad_hidden) < allowed
    assert relative(weight.grad, grad_weight) < allowed


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_teacher_of_another_type(direction: str) -> None:
    inputs = problem(dtype=torch.float32)
    other = torch.bfloat16 if IMPL == "triton" else torch.float64
    mixed = (*inputs[:2], inputs[2].to(other), inputs[3].to(other), inputs[4])
    expected = exact(mixed, direction, upstream_of(8))[0]
    torch.testing.assert_close(distillation(*mixed, direction=direction).double(), expected, rtol=0, atol=1e-5)


def test_worked_vector() -> None:
    """KL(p || q) of vector A with its teacher softened to 1.438572."""
    one = torch.ones(1, 1, dtype=WIDE)
    got = distillation(one, A.t(), one, A.t(), torch.tensor([0]), teacher_temperature=1.438572, direction="reverse")
    assert got.item() == pytest.approx(0.032291, abs=1e-6)


@settings(max_examples=5 if IMPL == "triton" else 30, deadline=None)
@given(
    vocab=st.integers(1, 1500),
    row_chunk=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    direction=st.sampled_from(DIRECTIONS),
)
def test_properties(vocab: int, row_chunk: int, seed: int, direction: str) -> None:
    """Never negative, indifferent to the row chunk, zero with zero gradient for the same model."""
    inputs = problem(vocab=vocab, dtype=torch.float32, seed=seed)
    whole = distillation(*inputs, direction=direction)
    parts = distillation(*inputs, direction=direction, row_chunk=row_chunk)
    assert (whole >= 0).all()
    torch.testing.assert_close(whole, parts, rtol=0, atol=2e-5)
    hidden = inputs[0].clone().requires_grad_()
    same = distillation(hidden, inputs[1], inputs[0], inputs[1], inputs[4], direction=direction)
    same.sum().backward()
    assert same.max() < 2e-6
    assert hidden.grad.abs().max() < 1e-5


def test_guided_teacher_enters() -> None:
    """Temperatures per token from the guided teacher, with 0 where the row is ignored."""
    inputs = problem(dtype=torch.float32, vocab=600)
    guided = ek.guided_teacher(*inputs[2:])
    assert guided.temperature[8 // 3] == 0
    chosen = torch.where(inputs[4] == -100, 1.0, guided.temperature)
    got = distillation(*inputs, teacher_temperature=guided.temperature)
    expected = exact(inputs, "forward", upstream_of(8), teacher_temperature=chosen.double())[0]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_ignored_rows_and_zero_gradients() -> None:
    inputs = problem(dtype=torch.float32)
    for index in (0, 2):
        inputs[index][8 // 3] = torch.nan
    hidden, weight = (x.requires_grad_() for x in inputs[:2])
    value = distillation(hidden, weight, *inputs[2:])
    assert value[8 // 3] == 0
    value.sum().backward()
    assert not hidden.grad[8 // 3].any() and torch.isfinite(weight.grad).all()
    nothing = distillation(hidden, weight, *inputs[2:4], torch.full_like(inputs[4], -100))
    grads = torch.autograd.grad(nothing.sum(), (hidden, weight))
    assert not nothing.any() and not grads[0].any() and not grads[1].any()
    empty = distillation(hidden[:0], weight, inputs[2][:0], inputs[3], inputs[4][:0])
    assert empty.shape == (0,)


def test_teacher_is_a_constant() -> None:
    inputs = problem(dtype=torch.float32)
    teacher = [x.requires_grad_() for x in inputs[2:4]]
    weight = inputs[1].requires_grad_()
    distillation(inputs[0], weight, *teacher, inputs[4]).sum().backward()
    assert teacher[0].grad is None and teacher[1].grad is None and weight.grad is not None
    assert not distillation(inputs[0], inputs[1].detach(), *teacher, inputs[4]).requires_grad


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden": torch.zeros(8, 13)}, "weight has 12 columns but hidden has 13"),
    ({"teacher_hidden": torch.zeros(7, 9)}, "teacher_hidden has 7 rows but hidden has 8"),
    ({"teacher_hidden": torch.zeros(8, 10)}, "teacher_weight has 9 columns but teacher_hidden has 10"),
    ({"teacher_weight": torch.zeros(71, 9)}, "teacher_weight has 71 rows but weight has 70"),
    ({"teacher_weight": torch.zeros(70, 9).half()}, "teacher_weight has dtype torch.float16"),
    ({"teacher_hidden": torch.zeros(8)}, "teacher_hidden must be 2-D"),
    ({"target": torch.zeros(4, dtype=torch.long)}, r"target must have shape \(8,\), got \(4,\)"),
    ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
    ({"teacher_temperature": torch.zeros(8)}, r"teacher_temperature\[0\] is 0.0"),
    ({"impl": "fast"}, "impl is 'fast'; known: chunked, triton, auto"),
    ({"direction": "both"}, "direction is 'both'; known: forward, reverse"),
    ({"row_chunk": 0}, "row_chunk must be at least 1 or None, got 0"),
    ({"vocab_size": 71}, r"vocab_size is 71, but 1 shard\(s\) of 70 rows hold 70"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "target")
    arguments: dict[str, Any] = dict(zip(names, problem(dtype=torch.float32), strict=True)) | change
    positional = [arguments.pop(name) for name in names]
    with pytest.raises(ValueError, match=message):
        distillation(*positional, **arguments)
