"""Proves what `skip_mass` leaves out, reports and costs; the chunked implementation's alone.

Sharded tiles are compared with the unsharded ones on two gloo ranks. Speed is the benchmark's
business (`--peaked`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE, EVERYTHING, TILES, combine, factors, operands, relative, run, token_stats

from entropy_kernels.tiles import HiddenTiles

WIDTH = TILES["vocab_tile"]
TEMPERATURES = {"temperature": torch.linspace(0.3, 2.0, 12).double(), "teacher_temperature": 1.3}


def peaked() -> tuple[torch.Tensor, torch.Tensor]:
    """logits [12, 200] in float64 of standard deviation 12, and targets."""
    logits, _, target = operands(12, 200, 200, torch.float64, scale=12.0)
    return logits, target


def alive_columns(logits: torch.Tensor, ids: torch.Tensor, temperatures: list, skip_mass: float) -> torch.Tensor:
    """[T, V] bool by the definition: columns of tiles that hold enough, or one of ids [T, K]."""
    tiles = torch.arange(logits.shape[1]) // WIDTH
    alive = tiles == -1
    for temperature in temperatures:
        p = torch.softmax(logits / temperature, dim=1)
        masses = torch.zeros(logits.shape[0], int(tiles[-1]) + 1).double().index_add(1, tiles, p)
        alive = alive | (masses >= skip_mass)[:, tiles]
    return alive | (tiles[None, :, None] == (ids // WIDTH)[:, None, :]).any(dim=2)


def logit_gradient(logits: torch.Tensor, target: torch.Tensor, name: str | None, **options: Any) -> tuple:
    """Statistics, and the gradient of the logits of one output (None: of all with random weights)."""
    logits = logits.clone().requires_grad_()
    stats = token_stats(*factors(logits), target, **options, **TILES)
    total = combine(stats) if name is None else getattr(stats, name).sum()
    return stats, torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("save", ["recompute", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_skip_is_bitwise_off(save: str, dtype: torch.dtype) -> None:
    hidden, weight, target = operands(11, 12, 50, dtype)
    target[4] = -100
    off = run(hidden, weight, target, **EVERYTHING, **TILES, save=save)
    on = run(hidden, weight, target, **EVERYTHING, **TILES, save=save, skip_mass=1e-30)
    assert off[0].skipped_mass is None and torch.equal(on[0].skipped_mass, torch.zeros(11))
    assert torch.equal(on[0].entropy, off[0].entropy)
    assert torch.equal(on[1], off[1]) and torch.equal(on[2], off[2])


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("teacher", [None, 1.3])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_leaves_out_exactly_the_light_tiles(top_k: int, teacher: float | None, softcap: float | None) -> None:
    logits, target = peaked()
    options = TEMPERATURES | {"teacher_temperature": teacher, "top_k": top_k, "varentropy": True, "softcap": softcap}
    exact = logit_gradient(logits, target, None, **options)
    got = logit_gradient(logits, target, None, **options, skip_mass=0.01)
    temperatures = [options["temperature"][:, None]] + [t for t in (teacher,) if t is not None]
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    ids = target[:, None] if not top_k else torch.cat([target[:, None], exact[0].topk_ids], dim=1)
    alive = alive_columns(capped, ids, temperatures, 0.01)
    assert 0.3 < 1 - alive.double().mean() < 0.95
    torch.testing.assert_close(got[1], exact[1] * alive, rtol=0, atol=1e-12)
    left_out = [(torch.softmax(capped / t, dim=1) * ~alive).sum(dim=1) for t in temperatures]
    torch.testing.assert_close(got[0].skipped_mass, torch.stack(left_out).amax(0), rtol=0, atol=1e-12)
    assert not got[0].skipped_mass.requires_grad


@pytest.mark.parametrize("name", DIFFERENTIABLE[:-1])
@pytest.mark.parametrize("skip_mass", [1e-4, 0.05])
def test_error_is_bounded_by_the_skipped_mass(name: str, skip_mass: float) -> None:
    logits, target = peaked()
    options = TEMPERATURES | {"varentropy": True}
    exact = logit_gradient(logits, target, name, **options)
    stats, got = logit_gradient(logits, target, name, **options, skip_mass=skip_mass)
    beta, teacher_beta, mass = 1 / TEMPERATURES["temperature"], 1 / 1.3, stats.skipped_mass
    surprise = torch.where(mass > 0, torch.log(200 / mass), 0.0)
    bound = {
        "logprob": beta,
        "entropy": beta * (stats.entropy + surprise),
        "varentropy": beta * ((stats.entropy + surprise + 1) ** 2 - 1 + stats.varentropy),
        "teacher_logprob": teacher_beta,
        "teacher_entropy": teacher_beta * (stats.teacher_entropy + surprise),
        "kl_forward": 2 * beta,
        "kl_reverse": (beta - teacher_beta).abs() * (stats.entropy + surprise),
    }[name] * mass
    error = (got - exact[1]).abs().sum(dim=1)
    assert error.max() > 1e-6 and (error <= bound + 1e-12).all()


def test_rows_without_gradient_keep_their_tiles_apart() -> None:
    logits, target = peaked()
    target[3] = -100
    every = logit_gradient(logits, target, "entropy", **TEMPERATURES, skip_mass=0.01)[1]
    coefficient = torch.tensor([0.0, 1, 0, 5, 2, 0, -1, 3, 0, 1, 1, 2]).double()
    leaf = logits.clone().requires_grad_()
    stats = token_stats(*factors(leaf), target, **TEMPERATURES, **TILES, skip_mass=0.01)
    (stats.entropy * coefficient).sum().backward()
    torch.testing.assert_close(leaf.grad, every * coefficient[:, None], rtol=0, atol=1e-12)


def test_tile_of_an_unlikely_target_stays() -> None:
    logits, _ = peaked()
    target = logits.argmin(dim=1)
    stats, gradient = logit_gradient(logits, target, "logprob", skip_mass=0.5)
    assert stats.logprob.max() < -10
    torch.testing.assert_close(gradient.gather(1, target[:, None])[:, 0], 1 - stats.logprob.exp())


@pytest.mark.parametrize("save", ["recompute", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_chunk", [4, 64])
def test_peaked_rows_cost_few_products(
    monkeypatch: pytest.MonkeyPatch, save: str, dtype: torch.dtype, row_chunk: int
) -> None:
    hidden, weight, target = operands(16, 256, 640, dtype, scale=0.1)
    # Targets in two tiles of forty, with logits 16 above those of the other tokens.
    target %= 2 * WIDTH
    hidden += 4 * weight[target]
    target[3] = -100
    computed = []
    original = HiddenTiles.write

    def spy(self: HiddenTiles, rows: Any, gradient: torch.Tensor, *rest: Any) -> None:
        computed.append(gradient.shape[0])
        original(self, rows, gradient, *rest)

    options = {"row_chunk": row_chunk, "vocab_tile": WIDTH, "save": save, "entropy": False}
    exact = run(hidden, weight, target, **options)
    monkeypatch.setattr(HiddenTiles, "write", spy)
    got = run(hidden, weight, target, **options, skip_mass=1e-3)
    assert 15 <= sum(computed) <= 2 * 15 and computed.count(0) >= 38
    mass = got[0].skipped_mass
    assert 0 < mass.max() < 2e-3 and mass[3] == 0
    # Upstream gradients below 4; 1e-2 of a gradient for its rounding to bfloat16.
    for index, row_bound in ((1, mass[:, None] * weight.abs().max()), (2, mass @ hidden.abs().float())):
        error, allowed = (got[index] - exact[index]).abs(), 4 * row_bound + 1e-2 * exact[index].abs()
        assert (error <= allowed + 1e-6).all()
    main_grad = torch.zeros(640, 256)
    run_into = weight.clone().requires_grad_()
    combine(token_stats(hidden, run_into, target, **options, skip_mass=1e-3, main_grad=main_grad)).backward()
    assert relative(main_grad, got[2]) < (1e-6 if dtype == torch.float32 else 1e-2)


def sharded(rank: int, group: Any, inputs: tuple, options: dict) -> tuple:
    """One of two ranks' outputs and gradients."""
    hidden, weight, target = inputs
    hidden, shard = hidden.clone().requires_grad_(), weight.chunk(2)[rank].clone().requires_grad_()
    stats = token_stats(hidden, shard, target, group=group, **options)
    combine(stats).backward()
    return stats.entropy.detach(), stats.skipped_mass, hidden.grad, shard.grad


def test_two_ranks_skip_what_one_does(ranks: Any) -> None:
    logits, target = peaked()
    target[3] = -100
    # 192 columns: both shards are whole tiles.
    hidden, weight = factors(logits[:, : 12 * WIDTH])
    inputs = (hidden, weight.contiguous(), target.clamp(max=12 * WIDTH - 1))
    options = EVERYTHING | TILES | TEMPERATURES | {"skip_mass": 0.01}
    stats, grad_hidden, grad_weight = run(*inputs, **options)
    first, second = ranks.run(sharded, 2, inputs, options)
    assert stats.skipped_mass.max() > 1e-3
    torch.testing.assert_close(first[0], stats.entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(first[2], grad_hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([first[3], second[3]]), grad_weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first[1] + second[1], stats.skipped_mass, rtol=0, atol=1e-12)
