"""Proves the warp-specialised form of the forward kernel against the definition, and how one of the forms is chosen.

The numbers run for Triton only (test_triton.py): in its interpreter, which knows no warps, so that
it shows what the form computes; on a GPU of the Hopper generation the form itself. The choice is
tested with times that the test gives.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from cases import DEVICE, IMPL, assert_stats_close, operands, relative, run, run_exact

pytest.importorskip("triton")
from entropy_kernels import triton_choice, triton_engine  # noqa: E402

OPTIONS: list[dict[str, Any]] = [
    {"entropy": False},
    {"softcap": None},
    {"teacher_temperature": 1.7},
    {"varentropy": True},
]


@pytest.mark.skipif(IMPL != "triton", reason="about the Triton kernels")
@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9, reason="the form exists on Hopper only"
)
@pytest.mark.parametrize("options", OPTIONS)
def test_is_the_definition(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def choose(shape: tuple, plain: object, specialized: triton_engine.Blocks, launch: object) -> triton_engine.Blocks:
        taken.append(specialized)
        return specialized

    monkeypatch.setattr(triton_choice, "choose", choose)
    # 17 rows are two blocks of the interpreter's; 250 columns end in an edge tile with padding.
    hidden, weight, target = operands(17, 40, 300, torch.bfloat16)
    target = target.clamp(max=249)
    target[3], target[4], target[5] = -100, 249, 0
    options = options | {"temperature": torch.linspace(0.5, 2.0, 17), "vocab_size": 250}
    got, expected = run(hidden, weight, target, **options), run_exact(hidden, weight, target, **options)
    assert taken and all(block.specialized for block in taken)
    assert_stats_close(got[0], expected[0], 2e-5)
    # bfloat16 gradients are rounded to 8 bits.
    assert relative(got[1], expected[1]) < 8e-3 and relative(got[2], expected[2]) < 8e-3


def test_options_without_the_form() -> None:
    options = dict.fromkeys(("SAVE", "HAS_CAP", "SECOND", "TEACHER"), False)
    assert triton_engine.can_specialize(**options)
    for extra in ({"SAVE": True}, {"HAS_CAP": True}, {"SECOND": True, "TEACHER": True}):
        assert not triton_engine.can_specialize(**options | extra)


PLAIN, OTHER = triton_engine.WIDE, triton_engine.SPECIALIZED


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[bool, float]:
    """Milliseconds of either form on a device that the test invents."""
    times = {False: 2.0, True: 1.0}
    monkeypatch.delenv(triton_choice.VARIABLE, raising=False)
    monkeypatch.setattr(triton_choice, "chosen", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_choice, "_milliseconds", lambda call: times[bool(call().sum() > 1)])
    return times


def launched(form: triton_engine.Blocks) -> torch.Tensor:
    """Output that tells the form by less than the tolerance."""
    return torch.full((2,), 0.5002 if form.specialized else 0.5)


@pytest.mark.parametrize("faster", [False, True])
def test_the_faster_form_is_taken_once(faster: bool, device: dict, caplog: pytest.LogCaptureFixture) -> None:
    device[faster] = 0.5
    with caplog.at_level(logging.INFO):
        assert triton_choice.choose(("a",), PLAIN, OTHER, launched).specialized == faster
        device[not faster] = 0.1
        assert triton_choice.choose(("a",), PLAIN, OTHER, launched).specialized == faster
    assert len(caplog.messages) == 1 and f"taking {'specialized' if faster else 'plain'}" in caplog.messages[0]
    assert triton_choice.choose(("b",), PLAIN, OTHER, launched).specialized != faster


def test_a_form_that_disagrees_is_not_taken(device: dict, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(form: triton_engine.Blocks) -> torch.Tensor:
        return torch.full((2,), 0.6 if form.specialized else 0.5)

    assert triton_choice.choose(("a",), PLAIN, OTHER, wrong) is PLAIN
    assert "disagree" in caplog.text


def test_the_environment_decides(device: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, expected in (("0", PLAIN), ("1", OTHER)):
        monkeypatch.setenv(triton_choice.VARIABLE, setting)
        assert triton_choice.choose(("a",), PLAIN, OTHER, launched) is expected
    monkeypatch.setenv(triton_choice.VARIABLE, "yes")
    with pytest.raises(ValueError, match="ENTROPY_KERNELS_SPECIALIZED is 'yes'; known: auto, 0, 1"):
        triton_choice.choose(("a",), PLAIN, OTHER, launched)
