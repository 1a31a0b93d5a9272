"""Proves the contract at its edges: odd sizes, extreme logits, ignored rows, repeated use.

Every test runs for the chunked implementation with tiles smaller than the problem; sharded edges
are in test_vocab_parallel.
"""

from __future__ import annotations

import pytest
import torch
from cases import EVERYTHING, assert_stats_close, combine, operands, relative, run

import entropy_kernels as ek

TILES = {"row_chunk": 4, "vocab_tile": 16}


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_any_number_of_tokens(tokens: int) -> None:
    inputs = operands(tokens, 12, 50)
    got = run(*inputs, **EVERYTHING, **TILES)
    expected = run(*inputs, **EVERYTHING, impl="reference")
    assert got[0].topk_ids.shape == (tokens, 3)
    assert_stats_close(got[0], expected[0], 2e-5)
    assert relative(got[2], expected[2]) < 1e-5


@pytest.mark.parametrize("save", ["recompute", "half"])
def test_ignored_rows_cost_nothing_and_change_nothing(save: str) -> None:
    hidden, weight, target = operands(11, 12, 50)
    keep = torch.tensor([0, 3, 4, 9])
    masked = torch.full_like(target, -100)
    masked[keep] = target[keep]
    hidden[1] = torch.nan
    got = run(hidden, weight, masked, **EVERYTHING, **TILES, save=save)
    for name in ("logprob", "entropy", "kl_forward", "topk_logprobs"):
        rows = getattr(got[0], name)
        assert not rows[[1, 2, 5, 6, 7, 8, 10]].any()
    assert not got[1][[1, 2, 5, 6, 7, 8, 10]].any()
    assert torch.isfinite(got[2]).all()
    alone = ek.token_stats(hidden[keep], weight, target[keep], **EVERYTHING, **TILES)
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
        stats = ek.token_stats(h, w, target, **options)
        return torch.autograd.grad((stats.logprob * coefficient).sum(), (h, w))

    got = gradients(**TILES, save=save, compact=compact)
    expected = gradients(impl="reference")
    # half: the exponent is off by up to |logit - maximum| 2^-11.
    limit = 1e-5 if save == "recompute" else 3e-3
    assert relative(got[0], expected[0]) < limit and relative(got[1], expected[1]) < limit
    assert not got[0][coefficient == 0].any()


def test_all_logits_far_below_zero() -> None:
    hidden = torch.ones(3, 4, dtype=torch.bfloat16)
    weight = torch.full((40, 4), -50.0, dtype=torch.bfloat16)
    stats = ek.token_stats(hidden, weight, torch.tensor([0, 20, 39]), **TILES)
    uniform = torch.log(torch.tensor(40.0))
    torch.testing.assert_close(stats.logprob, -uniform.expand(3))
    torch.testing.assert_close(stats.entropy, uniform.expand(3))


def test_minus_infinity_inside_the_vocabulary() -> None:
    logits = operands(6, 8, 50)[0] @ torch.randn(8, 50)
    logits[:, 3::4] = -torch.inf
    logits[2, :] = -torch.inf
    logits[2, 17] = 1.0
    target = torch.tensor([0, 1, 17, 4, 5, 6])
    got, expected = logits.clone().requires_grad_(), logits.double().requires_grad_()
    a = ek.token_stats_from_logits(got, target, varentropy=True, **TILES)
    b = ek.token_stats_from_logits(expected, target, varentropy=True, impl="reference")
    assert_stats_close(a, b, 2e-5)
    combine(a).backward()
    combine(b).backward()
    assert torch.isfinite(got.grad).all()
    assert relative(got.grad, expected.grad) < 1e-5


def test_row_of_only_minus_infinity_is_reported() -> None:
    logits = torch.full((1, 20), -torch.inf)
    stats = ek.token_stats_from_logits(logits, torch.tensor([3]), **TILES)
    assert torch.isnan(stats.logprob).all() and torch.isnan(stats.entropy).all()


def test_tiny_entropy_keeps_its_digits() -> None:
    logits = torch.zeros(1, 64)
    logits[0, 5] = 18.5
    expected = ek.token_stats_from_logits(logits.double(), torch.tensor([5]), impl="reference")
    assert 5e-6 < expected.entropy.item() < 2e-5
    got = ek.token_stats_from_logits(logits, torch.tensor([5]), **TILES)
    # One float32 rounding of the sum 1 + 5e-7 is 6e-8.
    assert abs(got.entropy.item() - expected.entropy.item()) < 1.5e-7


def test_shift_of_all_logits_changes_nothing() -> None:
    logits = torch.randint(-8, 8, (5, 40)).float()
    target = torch.arange(5)
    a = ek.token_stats_from_logits(logits, target, **TILES)
    b = ek.token_stats_from_logits(logits + 128, target, **TILES)
    assert torch.equal(a.entropy, b.entropy) and torch.equal(a.logprob, b.logprob)


@pytest.mark.parametrize("name", ["logprob", "entropy", "varentropy", "kl_forward", "kl_reverse"])
def test_logit_gradient_sums_to_zero(name: str) -> None:
    logits = (3 * torch.randn(6, 70, dtype=torch.float64)).requires_grad_()
    stats = ek.token_stats_from_logits(
        logits, torch.arange(6), temperature=0.7, teacher_temperature=1.3, varentropy=True, **TILES
    )
    getattr(stats, name).sum().backward()
    assert logits.grad.abs().max() > 1e-3
    assert logits.grad.sum(dim=1).abs().max() < 1e-14


def test_reverse_kl_to_the_tempered_self_is_an_entropy_bonus() -> None:
    logits = torch.randn(6, 70, dtype=torch.float64).requires_grad_()
    stats = ek.token_stats_from_logits(logits, torch.arange(6), teacher_temperature=1.6, **TILES)
    kl = torch.autograd.grad(stats.kl_reverse.sum(), logits, retain_graph=True)[0]
    entropy = torch.autograd.grad(stats.entropy.sum(), logits)[0]
    torch.testing.assert_close(kl, -(1 - 1 / 1.6) * entropy, rtol=0, atol=1e-15)


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
    stats = ek.token_stats(h, w, strided_target, **TILES)
    assert_stats_close(stats, expected[0], 2e-6)
    grads = torch.autograd.grad(combine(stats), (h, w))
    assert relative(grads[0], expected[1]) < 1e-5 and relative(grads[1], expected[2]) < 1e-5


@pytest.mark.parametrize("save", ["recompute", "half"])
def test_used_twice_and_repeated_bitwise(save: str) -> None:
    hidden, weight, target = operands(9, 12, 50, torch.bfloat16)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    first = ek.token_stats(hidden, weight, target, save=save, **TILES)
    second = ek.token_stats(hidden, weight, target, temperature=0.5, save=save, **TILES)
    loss = combine(first) + combine(second)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    fresh = run(hidden, weight, target, save=save, **TILES)
    repeat = run(hidden, weight, target, save=save, **TILES)
    assert torch.equal(fresh[0].entropy, repeat[0].entropy)
    assert torch.equal(fresh[1], repeat[1]) and torch.equal(fresh[2], repeat[2])


def test_entropy_without_gradient() -> None:
    inputs = operands(5, 12, 50)
    plain = run(*inputs, entropy=False, **TILES)
    metric = run(*inputs, entropy_grad=False, **TILES)
    assert plain[0].entropy is None and not metric[0].entropy.requires_grad
    assert relative(metric[1], plain[1]) < 1e-6 and relative(metric[2], plain[2]) < 1e-6
