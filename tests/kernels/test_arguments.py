"""Proves what bad arguments raise, when logits are saved, and that the library stands alone."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import operands

import entropy_kernels as ek
from entropy_kernels import chunked, prepare


def test_auto_saves_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = chunked.Saved.allocate

    def spy(*arguments: Any) -> chunked.Saved | None:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(chunked.Saved, "allocate", spy)
    hidden, weight, target = operands(8, 12, 50, torch.bfloat16)
    weight.requires_grad_()
    ek.token_stats(hidden, weight, target, save="auto", save_budget=2 * 8 * 50)
    ek.token_stats(hidden, weight, target, save="auto", save_budget=2 * 8 * 50 - 1)
    ek.token_stats(hidden.float(), weight.float(), target, save="auto")
    with torch.no_grad():
        ek.token_stats(hidden, weight, target, save="half")
    assert [saved is not None for saved in seen] == [True, False, False, False]


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
    ({"skip_mass": 1.0}, r"skip_mass must lie in \[0, 1\), got 1.0"),
    ({"skip_mass": 0.1, "compact": False}, "skip_mass is 0.1: .* needs compact=True"),
    ({"skip_mass": 0.1, "impl": "reference"}, "skip_mass is not supported by impl='reference'"),
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


# What Triton cannot serve: refused when it is asked for, left to the tiles in torch when it is not.
@pytest.mark.parametrize(
    ("change", "obstacle"),
    [({"skip_mass": 0.1}, "skip_mass is 0.1"), ({"top_k": 2}, "top_k is 2"), ({"dtype": torch.float64}, "float64")],
)
def test_triton_says_what_it_cannot_serve(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], obstacle: str
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = dict(change)
    inputs = operands(5, 12, 50, options.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=f"impl is 'triton', but .*{obstacle}"):
        ek.token_stats(*inputs, impl="triton", **options)
    defaults = {name: p.default for name, p in inspect.signature(ek.token_stats).parameters.items()}
    on_gpu = SimpleNamespace(is_cuda=True, dtype=inputs[0].dtype)
    assert prepare.engine(prepare.Settings.of(defaults | options, from_logits=False), on_gpu) is chunked


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
