"""Proves what the options do to results and what bad arguments raise.

Main-grad accumulation, save budgets and every ValueError; numbers are covered elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import combine, operands, relative, run

import entropy_kernels as ek

TILES = {"row_chunk": 4, "vocab_tile": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_accumulates(dtype: torch.dtype) -> None:
    hidden, weight, target = operands(9, 12, 50, dtype)
    expected = run(hidden, weight, target, **TILES)[2].double()
    weight.requires_grad_()
    main_grad = torch.ones(50, 12)
    for _ in range(2):
        stats = ek.token_stats(hidden, weight, target, main_grad=main_grad, **TILES)
        combine(stats).backward()
    assert weight.grad is None
    # bfloat16: `expected` was rounded once to 8 bits, the buffer never.
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative((main_grad - 1) / 2, expected) < limit


def test_main_grad_follows_megatrons_protocol() -> None:
    hidden, weight, target = operands(9, 12, 50)
    weight.requires_grad_()
    weight.grad_added_to_main_grad = False
    main_grad = torch.zeros(50, 12)
    stats = ek.token_stats(hidden, weight, target, main_grad=main_grad, **TILES)
    stats.logprob.sum().backward()
    assert weight.grad_added_to_main_grad and not weight.grad.any() and main_grad.any()


def test_frozen_weight_or_hidden() -> None:
    hidden, weight, target = operands(9, 12, 50)
    expected = run(hidden, weight, target, entropy=False, **TILES)
    for index, leaf in enumerate((hidden, weight)):
        leaf.requires_grad_()
        combine(ek.token_stats(hidden, weight, target, entropy=False, **TILES)).backward()
        assert relative(leaf.grad, expected[1 + index]) < 1e-6
        leaf.requires_grad_(False)


def test_auto_saves_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    from entropy_kernels import chunked

    seen = []
    original = chunked._allocate_saved
    monkeypatch.setattr(chunked, "_allocate_saved", lambda *a: seen.append(1) or original(*a))
    hidden, weight, target = operands(8, 12, 50, torch.bfloat16)
    weight.requires_grad_()
    ek.token_stats(hidden, weight, target, save="auto", save_budget=2 * 8 * 50)
    assert len(seen) == 1
    ek.token_stats(hidden, weight, target, save="auto", save_budget=2 * 8 * 50 - 1)
    ek.token_stats(hidden.float(), weight.float(), target, save="auto")
    with torch.no_grad():
        ek.token_stats(hidden, weight, target, save="half")
    assert len(seen) == 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden": torch.zeros(2, 3, 4)}, "hidden must be 2-D"),
    ({"hidden": torch.zeros(5, 13)}, "weight has 12 columns but hidden has 13"),
    ({"hidden": torch.zeros(5, 12, dtype=torch.int32)}, "hidden has dtype torch.int32"),
    ({"weight": torch.zeros(50, 12, dtype=torch.bfloat16)}, "weight has dtype torch.bfloat16"),
    ({"weight": torch.zeros(0, 12)}, "weight has no vocabulary rows"),
    ({"target": torch.zeros(4, dtype=torch.long)}, r"target must have shape \(5,\), got \(4,\)"),
    ({"target": torch.zeros(5)}, "target must be int64"),
    ({"target": torch.tensor([0, 1, 50, 3, 4])}, r"target\[2\] is 50: outside .* of 50"),
    ({"target": torch.tensor([0, 1, 49, 3, 4]), "vocab_size": 49}, "outside .* of 49"),
    ({"target": torch.tensor([0, -1, 4, 3, 4])}, r"target\[1\] is -1"),
    ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
    ({"temperature": torch.tensor([1.0, 1, -2, 1, 1])}, r"temperature\[2\] is -2.0"),
    ({"temperature": torch.ones(4)}, r"temperature must have shape \(5,\)"),
    ({"teacher_temperature": -1.0}, "teacher_temperature must be"),
    ({"vocab_size": 51}, r"vocab_size is 51, but 1 shard\(s\) of 50 rows hold 50"),
    ({"top_k": 51}, "top_k is 51"),
    ({"softcap": 0.0}, "softcap must be > 0"),
    ({"impl": "cuda"}, "impl is 'cuda'; known: auto"),
    ({"impl": "triton"}, "impl is 'triton', but hidden is on cpu"),
    ({"save": "exp"}, "save is 'exp'; known: recompute"),
    ({"row_chunk": 0}, "row_chunk must be at least 1"),
    ({"main_grad": torch.zeros(49, 12)}, r"main_grad has shape \(49, 12\)"),
    ({"main_grad": torch.zeros(50, 12).half()}, "main_grad must be torch.float32"),
    ({"main_grad": torch.zeros(50, 12), "impl": "reference"}, "main_grad is not supported"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    hidden, weight, target = operands(5, 12, 50)
    arguments = {"hidden": hidden, "weight": weight, "target": target} | change
    positional = [arguments.pop(name) for name in ("hidden", "weight", "target")]
    with pytest.raises(ValueError, match=message):
        ek.token_stats(*positional, **arguments)


def test_import_needs_neither_triton_nor_the_trainer() -> None:
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys; sys.modules['triton'] = None; import entropy_kernels, torch\n"
        "assert not [m for m in sys.modules if m.startswith('megatron')]\n"
        "t = torch.ones(2, 3); entropy_kernels.token_stats(t, t, torch.tensor([0, 1]))"
    )
    root = Path(ek.__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
