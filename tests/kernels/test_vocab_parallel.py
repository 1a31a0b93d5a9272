"""Proves a call sharded over 1, 2 or 4 gloo ranks equals the unsharded call (2 for Triton).

Values and every gradient, with padded rows (also a whole shard of them), sequence parallelism on
and off, every statistic. Outputs are the same bits on every rank. It does not cover NCCL, and
for Triton it runs in the interpreter only: gloo ranks hold their tensors on the CPU.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from cases import EVERYTHING, RANKS, TILES, WIDE, chunked_only, combine, limit, operands, relative, run, token_stats

OPTIONS = EVERYTHING | TILES


def sharded(rank: int, group: Any, sequence_parallel: bool, case: dict, options: dict) -> dict[str, Any]:
    """One rank's part of the call in `case`; returns its outputs and gradients."""
    tp = torch.distributed.get_world_size(group)
    hidden, weight, target = case["inputs"]
    rows = -(-weight.shape[0] // tp) + case["padding"]
    padded = torch.full((rows * tp, weight.shape[1]), 3.0, dtype=weight.dtype)
    padded[: weight.shape[0]] = weight
    shard = padded[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    if sequence_parallel:
        hidden = hidden.chunk(tp)[rank]
    hidden = hidden.clone().requires_grad_()
    stats = token_stats(
        hidden,
        shard,
        target,
        group=group,
        sequence_parallel=sequence_parallel,
        vocab_size=weight.shape[0],
        **options,
    )
    combine(stats).backward()
    values = {f.name: getattr(stats, f.name) for f in fields(stats)}
    values = {k: None if v is None else v.detach() for k, v in values.items()}
    return {"values": values, "hidden": hidden.grad, "weight": shard.grad}


def compare(results: list[dict], expected: tuple, sequence_parallel: bool, allowed: float) -> None:
    """Every rank's outputs and gradients against the unsharded call."""
    stats, grad_hidden, grad_weight = expected
    for name, value in results[0]["values"].items():
        other = getattr(stats, name)
        assert (value is None) == (other is None), name
        if value is None:
            continue
        assert relative(value, other) < allowed, name
        for result in results[1:]:
            assert torch.equal(result["values"][name], value), f"{name} differs between ranks"
    parts = [r["hidden"] for r in results]
    for part in [torch.cat(parts)] if sequence_parallel else parts:
        assert relative(part, grad_hidden) < allowed
    weight = torch.cat([r["weight"] for r in results])
    assert relative(weight[: grad_weight.shape[0]], grad_weight) < allowed
    assert not weight[grad_weight.shape[0] :].any(), "padded rows must have no gradient"


# V=37 leaves padding on the last rank at tp 2 and 4; V=5 with padding 3 leaves whole shards of it.
@pytest.mark.parametrize("tp", RANKS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("vocab", "padding"), [(37, 0), (5, 3), (64, 0)])
def test_equals_unsharded(ranks: Any, tp: int, sequence_parallel: bool, vocab: int, padding: int) -> None:
    hidden, weight, target = operands(8, 10, vocab, WIDE)
    target[2] = -100
    rows = -(-vocab // tp) + padding
    target[3], target[4] = min(rows, vocab - 1), min(rows, vocab) - 1
    target[5], target[6] = vocab - 1, 0
    options = OPTIONS | {"temperature": torch.linspace(0.3, 2.0, 8, dtype=WIDE)}
    expected = run(hidden, weight, target, **options)
    case = {"inputs": (hidden, weight, target), "padding": padding}
    results = ranks.run(sharded, tp, sequence_parallel, case, options)
    # Only the order of sums differs.
    compare(results, expected, sequence_parallel, limit(float64=1e-11, float32=2e-5))


@pytest.mark.parametrize("tp", RANKS[-2:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_low_precision(ranks: Any, tp: int, dtype: torch.dtype, sequence_parallel: bool) -> None:
    inputs = operands(8, 32, 70, dtype)
    expected = run(*inputs, **TILES)
    results = ranks.run(sharded, tp, sequence_parallel, {"inputs": inputs, "padding": 0}, TILES)
    # bfloat16 gradients are rounded to 8 bits at the end (2^-8), from sums in another order.
    compare(results, expected, sequence_parallel, 1e-5 if dtype == torch.float32 else 8e-3)


@chunked_only("about the reference")
@pytest.mark.parametrize("tp", [1, 2])
def test_reference_is_parallel_too(ranks: Any, tp: int) -> None:
    inputs = operands(6, 9, 21, torch.float64)
    options = EVERYTHING | {"impl": "reference"}
    expected = run(*inputs, **options)
    for sequence_parallel in (False, True):
        case = {"inputs": inputs, "padding": 1}
        results = ranks.run(sharded, tp, sequence_parallel, case, options)
        compare(results, expected, sequence_parallel, 1e-11)


def counted(rank: int, group: Any, sequence_parallel: bool) -> tuple[list[str], list[str]]:
    """Names of the collectives of a forward and of its backward."""
    import torch.distributed as dist

    calls: list[str] = []
    originals = {}
    for name in ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "all_gather"):
        originals[name] = original = getattr(dist, name)
        setattr(dist, name, lambda *a, n=name, f=original, **k: (calls.append(n), f(*a, **k))[1])
    try:
        hidden, weight, target = operands(8, 10, 40)
        shard = weight.chunk(2)[rank].clone().requires_grad_()
        hidden = (hidden.chunk(2)[rank] if sequence_parallel else hidden).requires_grad_()
        options = {"sequence_parallel": sequence_parallel, **OPTIONS}
        loss = combine(token_stats(hidden, shard, target, group=group, **options))
        forward, calls[:] = list(calls), []
        loss.backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return forward, calls


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_one_statistics_collective(ranks: Any, sequence_parallel: bool) -> None:
    for forward, backward in ranks.run(counted, 2, sequence_parallel):
        gathers = 2 if sequence_parallel else 1
        assert forward == ["all_gather_into_tensor"] * gathers, "statistics, and hidden with SP"
        # gloo has no reduce-scatter of its own, so there SP reduces and slices.
        assert backward == ["all_reduce"]


def mismatched(rank: int, group: Any) -> str:
    """The message of a call whose ranks hold shards of different sizes."""
    hidden, weight, target = operands(4, 10, 20 + rank)
    with pytest.raises(ValueError) as caught:
        token_stats(hidden, weight, target, group=group, validate=True)
    return str(caught.value)


def test_group_that_does_not_match_the_shards(ranks: Any) -> None:
    for message in ranks.run(mismatched, 2):
        assert message == "group: its ranks hold shards of different sizes [20, 21]"
