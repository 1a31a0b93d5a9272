"""Proves the guided teacher against its definition in float64, and the published rule's numbers.

The temperature rule on worked vectors; log-probs, temperatures and entropies from hidden states
over 1, 2 and 4 gloo ranks and any row chunk; padding, ignored rows, 16-bit inputs, bad arguments.
It does not cover CUDA; test_triton runs it with the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from cases import IMPL, RANKS, chunked_only, operands
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels import guided, reference

guided_teacher = functools.partial(ek.guided_teacher, impl=IMPL)
SEARCH = guided.Search((1.1, 1.5), 512, 1.2, 2.0, 0.5, 0.03, 20)
A = [2.0, 1.0, 0.0, -1.0]


def logits_of(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def whole_numbers(tokens: int, width: int, vocab: int, seed: int, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operands whose products are exact in every order of summation, with many ties.

    The first rows are nearly certain, or quite; rows further down are flatter.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-largest, largest + 1, (tokens, width), generator=generator).float() / 8
    weight = torch.randint(-8, 9, (vocab, width), generator=generator).float() / 8
    target = torch.randint(vocab, (tokens,), generator=generator)
    return hidden, weight, target


@pytest.mark.parametrize(
    ("entropy", "delta"), [(0, 0.041586), (0.3, 0.070926), (0.6, 0.115738), (1.8, 0.384262), (2.4, 0.458414)]
)
def test_added_entropy(entropy: float, delta: float) -> None:
    now = torch.tensor([entropy], dtype=torch.float64)
    assert SEARCH.goal(now).item() - entropy == pytest.approx(delta, abs=1e-6)


VECTORS = {
    "A": (A, 0.947537, 1.135729, 1.003944, 1.152640, 1.438572),
    "M": ([3, 2.5, 0, 0, 0, 0, 0, 0], 1.274155, 1.542659, 1.376856, 1.664379, 1.299646),
    "B": ([10, 0, 0, 0], 0.001498, 0.043199, 0.003410, 0.029167, 1.1),
    "K": ([4.5, 0, 0, 0], 0.177918, 0.235240, 0.244398, 0.529061, 1.1),
}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_vectors(name: str, dtype: torch.dtype) -> None:
    values, now, goal, low, high, temperature = VECTORS[name]
    logits = logits_of(*values).to(dtype)
    shifted = logits - logits.max()
    for at, expected in ((1.0, now), (1.1, low), (1.5, high)):
        assert guided.top_entropy(shifted, at).item() == pytest.approx(expected, abs=2e-6)
    entropy = guided.top_entropy(shifted, 1.0)
    assert SEARCH.goal(entropy).item() == pytest.approx(goal, abs=2e-6)
    assert ek.guided_temperature(logits, entropy).item() == pytest.approx(temperature, abs=3e-6)


def test_floor_is_a_rule_of_its_own() -> None:
    logits = logits_of(10, 0, 0, 0)
    assert ek.guided_temperature(logits).item() == 1.5, "the rule of entropies alone"
    assert ek.guided_temperature(logits, torch.tensor([0.03])).item() == pytest.approx(1.1)
    assert ek.guided_temperature(logits, torch.tensor([0.0301])).item() == 1.5


def test_vector_a_from_hidden_states() -> None:
    teacher = guided_teacher(torch.ones(1, 1), torch.tensor(A)[:, None], torch.tensor([0]))
    assert teacher.temperature.item() == pytest.approx(1.438572, abs=3e-6)
    assert teacher.logprob.item() == pytest.approx(-0.627154, abs=2e-6)
    assert teacher.entropy.item() == pytest.approx(0.947537, abs=2e-6)
    q = torch.softmax(torch.tensor(A) / teacher.temperature, dim=0)
    assert q.tolist() == pytest.approx([0.534110, 0.266525, 0.132998, 0.066367], abs=2e-6)
    gap = 0.5 * (-0.440190 - teacher.logprob.item()) ** 2
    assert gap == pytest.approx(0.017478, abs=1e-6)


def assert_is_reference(teacher: ek.GuidedTeacher, logits: Tensor, target: Tensor, **options: Any) -> None:
    """Temperatures within the bisection's float32 noise, the rest at the temperature that was found."""
    _, temperature, entropy = reference.guided(logits, target, **options)
    found = teacher.temperature.double()
    # The entropy is known to some 1e-6 nats; where it hardly grows with the temperature that is more.
    bottom_k_mask, top_k_mask = options.get("bounds", (1.1, 1.5))
    top = logits.topk(min(options.get("top", 512), logits.shape[1])).values
    growth = [guided.top_entropy(top - top[:, :1], found + step) for step in (-1e-3, 1e-3)]
    noise = 4e-6 / ((growth[1] - growth[0]) / 2e-3).clamp(min=1e-3)
    assert ((found - temperature).abs() <= noise.clamp(min=2e-6)).all()
    assert (found >= bottom_k_mask - 1e-6).all() and (found <= top_k_mask + 1e-6).all()
    torch.testing.assert_close(teacher.entropy.double(), entropy, rtol=0, atol=1e-5)
    expected = torch.log_softmax(logits / found[:, None], dim=1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(teacher.logprob.double(), expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("vocab", [5, 700, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_definition(vocab: int, dtype: torch.dtype) -> None:
    hidden, weight, target = operands(24, 64, vocab, dtype)
    hidden *= torch.linspace(0.05, 6, 24)[:, None].to(dtype)
    teacher = guided_teacher(hidden, weight, target)
    assert {v.dtype for v in (teacher.logprob, teacher.temperature, teacher.entropy)} == {torch.float32}
    assert_is_reference(teacher, hidden.double() @ weight.double().t(), target)
    if vocab > 5:
        kinds = torch.bucketize(teacher.temperature, torch.tensor([1.1000001, 1.4999999]))
        assert kinds.unique().numel() == 3, "bottom_k_mask, searched and top_k_mask must all occur"


@chunked_only("its statistics are float32")
def test_float64() -> None:
    hidden, weight, target = operands(12, 16, 900, torch.float64, scale=3.0)
    teacher = guided_teacher(hidden, weight, target, row_chunk=5)
    expected = reference.guided(hidden @ weight.t(), target)
    for got, want in zip((teacher.logprob, teacher.temperature, teacher.entropy), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@settings(max_examples=5 if IMPL == "triton" else 40, deadline=None)
@given(
    vocab=st.integers(1, 1500),
    top=st.integers(1, 600),
    scale=st.floats(0.1, 8.0),
    seed=st.integers(0, 10_000),
    row_chunk=st.integers(1, 12),
)
def test_properties(vocab: int, top: int, scale: float, seed: int, row_chunk: int) -> None:
    """Within bounds, the same for any row chunk, and the order of the logits is the teacher's."""
    hidden, weight, target = whole_numbers(9, 12, vocab, seed, max(1, round(8 * scale)))
    whole = guided_teacher(hidden, weight, target, top=top)
    parts = guided_teacher(hidden, weight, target, top=top, row_chunk=row_chunk)
    assert torch.equal(whole.temperature, parts.temperature)
    torch.testing.assert_close(whole.logprob, parts.logprob, rtol=0, atol=2e-6)
    logits = hidden.double() @ weight.double().t()
    assert_is_reference(whole, logits, target, top=top)
    other = torch.randint(vocab, target.shape, generator=torch.Generator().manual_seed(seed))
    again = guided_teacher(hidden, weight, other, top=top)
    assert torch.equal(again.temperature, whole.temperature), "the target has no say in the temperature"
    above = logits.gather(1, target[:, None]) >= logits.gather(1, other[:, None])
    assert torch.equal(whole.logprob >= again.logprob, above[:, 0])


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 700), top=st.integers(1, 300), seed=st.integers(0, 10_000), kinds=st.integers(1, 1000))
def test_selection_is_exact(width: int, top: int, seed: int, kinds: int) -> None:
    """The largest values with their multiplicity, whatever the ties."""
    values = torch.randint(kinds, (3, width * guided.FAN**3), generator=torch.Generator().manual_seed(seed)).float()
    found = guided._largest(guided._pyramid(values, top), top).sort(dim=1, descending=True).values
    expected = values.topk(min(top, values.shape[1]), dim=1).values
    assert torch.equal(found[:, : expected.shape[1]], expected)
    assert (found[:, expected.shape[1] :] == -torch.inf).all()


def test_ignored_rows_are_zero_and_not_computed() -> None:
    hidden, weight, target = operands(10, 16, 300)
    expected = guided_teacher(hidden, weight, target)
    masked = target.clone()
    masked[[0, 4, 9]] = -100
    hidden[[0, 4, 9]] = torch.nan
    teacher = guided_teacher(hidden, weight, masked)
    keep = masked != -100
    for name in ("logprob", "temperature", "entropy"):
        got = getattr(teacher, name)
        assert not got[~keep].any(), name
        torch.testing.assert_close(got[keep], getattr(expected, name)[keep], rtol=0, atol=5e-6)
    nothing = guided_teacher(hidden, weight, torch.full_like(target, -100))
    assert not torch.stack([nothing.logprob, nothing.temperature, nothing.entropy]).any()
    assert guided_teacher(hidden[:0], weight, target[:0]).logprob.shape == (0,)


def test_fixed_temperature() -> None:
    hidden, weight, target = operands(10, 16, 300)
    teacher = guided_teacher(hidden, weight, target, fixed=1.3)
    stats = ek.token_stats(hidden, weight, target, teacher_temperature=1.3)
    assert (teacher.temperature == 1.3).all()
    torch.testing.assert_close(teacher.logprob, stats.teacher_logprob, rtol=0, atol=1e-5)
    torch.testing.assert_close(teacher.entropy, stats.entropy, rtol=0, atol=1e-5)


def test_no_gradient() -> None:
    hidden, weight, target = operands(4, 16, 30)
    teacher = guided_teacher(hidden.requires_grad_(), weight.requires_grad_(), target)
    assert not (teacher.logprob.requires_grad or teacher.temperature.requires_grad or teacher.entropy.requires_grad)


def test_impossible_tokens() -> None:
    """A -inf logit (an overflowing product) is an impossible token, inside and outside the top."""
    hidden = torch.tensor([[1.0, 1e30]])
    weight = torch.tensor([[2.0, 0], [1.0, 0], [0.0, 0], [-1.0, 0], [0.0, -1e30]])
    teacher = guided_teacher(hidden, weight, torch.tensor([0]))
    assert teacher.temperature.item() == pytest.approx(1.438572, abs=3e-6)
    assert teacher.logprob.item() == pytest.approx(-0.627154, abs=2e-6)
    assert teacher.entropy.item() == pytest.approx(0.947537, abs=2e-6)
    assert guided_teacher(hidden, weight, torch.tensor([4])).logprob.item() == -math.inf


def sharded(rank: int, group: Any, inputs: tuple[Tensor, ...], padding: int, options: dict) -> ek.GuidedTeacher:
    """One rank's part of the call; padded rows would win every search."""
    tp = torch.distributed.get_world_size(group)
    hidden, weight, target = inputs
    rows = -(-weight.shape[0] // tp) + padding
    padded = torch.full((rows * tp, weight.shape[1]), 8.0, dtype=weight.dtype)
    padded[: weight.shape[0]] = weight
    if options.get("sequence_parallel"):
        hidden = hidden.chunk(tp)[rank]
    shard = padded[rank * rows : (rank + 1) * rows]
    return guided_teacher(hidden, shard, target, group=group, vocab_size=weight.shape[0], **options)


# V=3 with padding 5 leaves whole shards of padding; V=67 leaves fewer columns than `top` on a rank.
@pytest.mark.parametrize("tp", RANKS)
@pytest.mark.parametrize(("vocab", "padding"), [(3, 5), (67, 0), (1203, 2)])
@pytest.mark.parametrize("options", [{}, {"row_chunk": 3}, {"sequence_parallel": True, "top": 40}, {"fixed": 1.2}])
def test_same_on_every_layout(ranks: Any, tp: int, vocab: int, padding: int, options: dict) -> None:
    hidden, weight, target = whole_numbers(16, 12, vocab, seed=vocab, largest=20)
    target[3] = -100
    plain = {name: value for name, value in options.items() if name in ("top", "fixed")}
    expected = guided_teacher(hidden, weight, target, **plain)
    results = ranks.run(sharded, tp, (hidden, weight, target), padding, options)
    for result in results:
        # Products of whole eighths are exact, so the logits and with them the searches are the same bits.
        assert torch.equal(result.temperature, expected.temperature)
        for name in ("logprob", "entropy"):
            assert torch.equal(getattr(result, name), getattr(results[0], name)), name
            torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks_are_the_definition(ranks: Any, dtype: torch.dtype) -> None:
    hidden, weight, target = operands(20, 40, 2600, dtype)
    hidden *= torch.linspace(0.2, 5, 20)[:, None].to(dtype)
    for result in ranks.run(sharded, 2, (hidden, weight, target), 7, {"row_chunk": 7}):
        assert_is_reference(result, hidden.double() @ weight.double().t(), target)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden": torch.zeros(5, 13)}, "weight has 12 columns but hidden has 13"),
    ({"target": torch.zeros(4, dtype=torch.long)}, r"target must have shape \(5,\), got \(4,\)"),
    ({"target": torch.tensor([0, 1, 50, 3, 4])}, r"target\[2\] is 50: outside .* of 50"),
    ({"bounds": (1.5, 1.1)}, r"bounds must be two finite temperatures, .* got \(1.5, 1.1\)"),
    ({"bounds": (0.0, 1.1)}, r"bounds must be .* got \(0.0, 1.1\)"),
    ({"bounds": (1.0, float("nan"))}, r"bounds must be .* got \(1.0, nan\)"),
    ({"top": 0}, "top must be at least 1, got 0"),
    ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ({"pivot": float("nan")}, "pivot must be a finite number, got nan"),
    ({"slope": -1.0}, "slope must be a finite number >= 0, got -1.0"),
    ({"amplitude": float("inf")}, "amplitude must be a finite number >= 0, got inf"),
    ({"floor": float("inf")}, "floor must be a finite number, got inf"),
    ({"fixed": 0.0}, "fixed must be a finite number > 0, got 0.0"),
    ({"impl": "fast"}, "impl is 'fast'; known: chunked, triton, auto"),
    ({"row_chunk": 0}, "row_chunk must be at least 1 or None, got 0"),
    ({"vocab_size": 51}, r"vocab_size is 51, but 1 shard\(s\) of 50 rows hold 50"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    hidden, weight, target = operands(5, 12, 50)
    arguments = {"hidden": hidden, "weight": weight, "target": target} | change
    positional = [arguments.pop(name) for name in ("hidden", "weight", "target")]
    with pytest.raises(ValueError, match=message):
        guided_teacher(*positional, **arguments)


def test_bad_top_logits_are_named() -> None:
    with pytest.raises(ValueError, match="top_logits must be 2-D"):
        ek.guided_temperature(torch.zeros(3))
    with pytest.raises(ValueError, match=r"entropy must have shape \(2,\), got \(3,\)"):
        ek.guided_temperature(torch.zeros(2, 4), torch.zeros(3))
