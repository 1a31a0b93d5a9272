"""Proves the contract at its edges: odd sizes, extreme logits, ignored rows, repeated use.

Tiles are smaller than the problem. Given logits go through both front doors, as they are and as a
product of hidden states and weight rows. Sharded edges are in test_vocab_parallel.
"""

from __future__ import annotations

import pytest
import torch
from cases import (
    DIFFERENTIABLE,
    DOORS,
    EVERYTHING,
    TILES,
    WIDE,
    assert_stats_close,
    chunked_only,
    combine,
    factors,
    limit,
    operands,
    relative,
    run,
    run_exact,
    stats_of,
    token_stats,
)

import entropy_kernels as ek


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_any_number_of_tokens(tokens: int) -> None:
    inputs = operands(tokens, 12, 50)
    got = run(*inputs, **EVERYTHING, **TILES)
    expected = run_exact(*inputs, **EVERYTHING)
    assert_stats_close(got[0], expected[0], 2e-5)
    assert relative(got[1], expected[1]) < 1e-5 and relative(got[2], expected[2]) < 1e-5


@pytest.mark.parametrize("save", ["recompute", "half"])
def test_ignored_rows_cost_nothing_and_change_nothing(save: str) -> None:
    hidden, weight, target = operands(11, 12, 50)
    keep = torch.tensor([0, 3, 4, 9])
    masked = torch.full_like(target, -100)
    masked[keep] = target[keep]
    hidden[1] = torch.nan
    got = run(hidden, weight, masked, **EVERYTHING, **TILES, save=save)
    for name in DIFFERENTIABLE:
        values = getattr(got[0], name)
        assert values is None or not values[[1, 2, 5, 6, 7, 8, 10]].any(), name
    assert not got[1][[1, 2, 5, 6, 7, 8, 10]].any()
    assert torch.isfinite(got[2]).all()
    alone = token_stats(hidden[keep], weight, target[keep], **EVERYTHING, **TILES)
    assert torch.equal(got[0].entropy[keep], alone.entropy)


def test_all_rows_ignored() -> None:
    hidden, weight, target = operands(5, 12, 50)
    stats, grad_hidden, grad_weight = run(hidden, weight, target.fill_(7), ignore_index=7)
    assert not stats.logprob.any() and not grad_hidden.any() and not grad_weight.any()


@pytest.mark.parametrize("save", ["recompute", "half"])
@pytest.mark.parametrize("compact", [True, False])
def test_rows_without_gradient_are_dropped_exactly(save: str, compact: bool) -> None:
    hidden, weight, target = operands(9, 12, 50)
    target[7] = -100
    coefficient = torch.tensor([0.0, 1, 0, 0, 2, 0, -1, 3, 0])

    def gradients(**options: object) -> tuple[torch.Tensor, ...]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        stats = token_stats(h, w, target, **options)
        return torch.autograd.grad((stats.logprob * coefficient).sum(), (h, w))

    got = gradients(**TILES, save=save, compact=compact)
    expected = gradients(impl="reference")
    # half: the exponent is off by up to |logit - maximum| 2^-11.
    allowed = 1e-5 if save == "recompute" else 3e-3
    assert relative(got[0], expected[0]) < allowed and relative(got[1], expected[1]) < allowed
    assert not got[0][coefficient == 0].any()


def test_all_logits_far_below_zero() -> None:
    hidden = torch.ones(3, 4, dtype=torch.bfloat16)
    weight = torch.full((40, 4), -50.0, dtype=torch.bfloat16)
    stats = token_stats(hidden, weight, torch.tensor([0, 20, 39]), **TILES)
    uniform = torch.log(torch.tensor(40.0))
    torch.testing.assert_close(stats.logprob, -uniform.expand(3))
    torch.testing.assert_close(stats.entropy, uniform.expand(3))


@pytest.mark.parametrize("door", DOORS)
def test_minus_infinity_inside_the_vocabulary(door: str) -> None:
    logits = operands(6, 50, 6)[0]
    logits[:, 3::4] = -torch.inf
    logits[2, :] = -torch.inf
    logits[2, 17] = 1.0
    target = torch.tensor([0, 1, 17, 4, 5, 6])
    options = {"varentropy": True, "teacher_temperature": 1.7}
    got, expected = logits.clone().requires_grad_(), logits.double().requires_grad_()
    a = stats_of(got, target, door, **options, **TILES)
    b = stats_of(expected, target, "logits", **options, impl="reference")
    assert_stats_close(a, b, 2e-5)
    combine(a).backward()
    combine(b).backward()
    assert relative(got.grad, expected.grad) < 1e-5


def test_minus_infinity_leaves_the_hidden_gradient_finite() -> None:
    logits = operands(6, 50, 6)[0]
    logits[:, 3::4] = -torch.inf
    inputs = (*factors(logits), torch.tensor([0, 1, 2, 4, 5, 6]))
    got, expected = run(*inputs, varentropy=True, **TILES), run_exact(*inputs, varentropy=True)
    assert relative(got[1], expected[1]) < 1e-5


@pytest.mark.parametrize("door", DOORS)
def test_row_of_only_minus_infinity_is_reported(door: str) -> None:
    logits = torch.zeros(2, 20)
    logits[0] = -torch.inf
    stats = stats_of(logits, torch.tensor([3, 3]), door, **TILES)
    assert stats.logprob.isnan().tolist() == [True, False]
    assert stats.entropy.isnan().tolist() == [True, False]


@pytest.mark.parametrize("door", DOORS)
def test_tiny_entropy_keeps_its_digits(door: str) -> None:
    logits = torch.zeros(1, 64)
    logits[0, 5] = 21.0
    target = torch.tensor([5])
    expected = stats_of(logits.double(), target, "logits", impl="reference").entropy.item()
    assert 5e-7 < expected < 2e-6
    # The other tokens have 5e-8 together, which float32 loses from s = 1 + 5e-8; the entropy is in
    # the first moment.
    assert abs(stats_of(logits, target, door, **TILES).entropy.item() - expected) < 1e-7


@pytest.mark.parametrize("door", DOORS)
def test_shift_of_all_logits_changes_nothing(door: str) -> None:
    logits = torch.randint(-8, 8, (5, 40)).float()
    target = torch.arange(5)
    a = stats_of(logits, target, door, **TILES)
    b = stats_of(logits + 128, target, door, **TILES)
    assert torch.equal(a.entropy, b.entropy) and torch.equal(a.logprob, b.logprob)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["logprob", "entropy", "varentropy", "kl_forward", "kl_reverse"])
def test_logit_gradient_sums_to_zero(name: str, door: str) -> None:
    logits = (3 * torch.randn(6, 70, dtype=WIDE)).requires_grad_()
    options = {"temperature": 0.7, "teacher_temperature": 1.3, "varentropy": True}
    stats = stats_of(logits, torch.arange(6), door, **options, **TILES)
    getattr(stats, name).sum().backward()
    assert logits.grad.abs().max() > 1e-3
    # Rounding of 70 terms, of size up to 10 where they hold squares.
    assert logits.grad.sum(dim=1).abs().max() < limit(float64=1e-14, float32=1e-5)


@pytest.mark.parametrize("door", DOORS)
def test_reverse_kl_to_the_tempered_self_is_an_entropy_bonus(door: str) -> None:
    logits = torch.randn(6, 70, dtype=WIDE).requires_grad_()
    stats = stats_of(logits, torch.arange(6), door, teacher_temperature=1.6, **TILES)
    kl = torch.autograd.grad(stats.kl_reverse.sum(), logits, retain_graph=True)[0]
    entropy = torch.autograd.grad(stats.entropy.sum(), logits)[0]
    gap = (kl + (1 - 1 / 1.6) * entropy).abs().max()
    assert entropy.abs().max() > 1e-2 and gap < limit(float64=1e-15, float32=1e-7)


@chunked_only("Triton has no from-logits form")
def test_logits_are_not_modified() -> None:
    logits = torch.randn(6, 70, requires_grad=True)
    before = logits.detach().clone()
    stats = ek.token_stats_from_logits(logits, torch.arange(6), softcap=4.0, **TILES)
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert torch.equal(logits.detach(), before)


def test_non_contiguous_inputs() -> None:
    hidden, weight, target = operands(7, 12, 50)
    expected = run(hidden, weight, target, **TILES)
    strided_hidden = torch.empty(7, 24)[:, ::2].copy_(hidden)
    strided_weight = weight.t().contiguous().t()
    strided_target = torch.stack([target, target], dim=1)[:, 0]
    h, w = strided_hidden.requires_grad_(), strided_weight.requires_grad_()
    stats = token_stats(h, w, strided_target, **TILES)
    assert_stats_close(stats, expected[0], 2e-6)
    grads = torch.autograd.grad(combine(stats), (h, w))
    assert relative(grads[0], expected[1]) < 1e-5 and relative(grads[1], expected[2]) < 1e-5


@pytest.mark.parametrize("save", ["recompute", "half"])
def test_used_twice_and_repeated_bitwise(save: str) -> None:
    hidden, weight, target = operands(9, 12, 50, torch.bfloat16)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    first = token_stats(hidden, weight, target, save=save, **TILES)
    second = token_stats(hidden, weight, target, temperature=0.5, save=save, **TILES)
    loss = combine(first) + combine(second)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    fresh = run(hidden, weight, target, save=save, **TILES)
    repeat = run(hidden, weight, target, save=save, **TILES)
    assert torch.equal(fresh[0].entropy, repeat[0].entropy)
    assert torch.equal(fresh[1], repeat[1]) and torch.equal(fresh[2], repeat[2])
