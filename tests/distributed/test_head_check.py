"""The check of the output layer at a run's start: passes on correct kernels, names the rank and the wrong quantity."""

import dataclasses

import pytest
import torch
from local_ranks import run_on_ranks

from entropy_kernels import token_stats
from megatron_entropy.actor import head_check
from megatron_entropy.actor.head_check import GRADIENTS, VALUES, HeadCase, check_head, measure_errors
from megatron_entropy.errors import Fault

pytestmark = pytest.mark.actor

CASE = HeadCase(torch.float32, 64, "auto", "none")


@pytest.mark.parametrize("divergence", ["none", "forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correct_kernels_pass_with_room(dtype, divergence):
    errors = measure_errors(HeadCase(dtype, 576, "auto", divergence))
    assert set(errors) == {*VALUES[: 2 + (divergence != "none")], *GRADIENTS}
    for name, (error, limit) in errors.items():
        assert error < limit / 5, name


def wrong(what: str):
    """`head_statistics` that is wrong in float32 only, as a kernel would be; float64 is the reference."""

    def compute(head, *, temperature, entropy):
        options = {"temperature": temperature, "vocab_size": head.vocab_size, "main_grad": head.main_grad}
        if head.hidden.dtype == torch.float64 or what == "nothing":
            return token_stats(head.hidden, head.weight, head.targets, **options)
        if what == "padding":
            options["vocab_size"] = head.weight.shape[0]
        if what == "weight":
            options["main_grad"] = torch.zeros_like(head.main_grad)  # the gradient goes elsewhere
        stats = token_stats(head.hidden, head.weight, head.targets, **options)
        if what == "entropy":
            stats = dataclasses.replace(stats, entropy=stats.entropy + 0.002 * (head.targets == head.targets[3]))
        if what == "nan":
            stats = dataclasses.replace(stats, logprob=stats.logprob / (head.targets != head.targets[3]))
        if what == "crash":
            raise ArithmeticError("no such\ninstruction")
        return stats

    return compute


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("entropy", "entropy is off by 0.002"),
        ("nan", "log-prob is off by (inf|nan)"),
        ("weight", "gradient of weight is off by 1"),
        ("padding", "log-prob is off by"),
        ("crash", "ArithmeticError: no such instruction"),
    ],
)
def test_a_wrong_kernel_is_named(monkeypatch, what, message):
    monkeypatch.setattr(head_check, "head_statistics", wrong(what))
    advice = 'actor.performance.head_kernels="chunked" avoids its kernels'
    with pytest.raises(
        Fault, match=rf"^the output layer is computed wrongly on rank 0 \(CPU of \S+, float32: .*{message}"
    ) as caught:
        check_head([CASE])
    assert advice in str(caught.value)
    with pytest.raises(Fault) as caught:
        check_head([dataclasses.replace(CASE, impl="chunked")])
    assert advice not in str(caught.value)


def check_with_a_wrong_rank() -> str:
    """What the check raises when rank 1 of 3 alone is wrong."""
    head_check.head_statistics = wrong("entropy" if torch.distributed.get_rank() == 1 else "nothing")
    try:
        check_head([CASE])
    except Fault as error:
        return str(error)
    return "nothing"


def test_every_rank_ends_when_one_is_wrong():
    found = run_on_ranks(check_with_a_wrong_rank, 3)
    assert len(set(found)) == 1
    assert found[0].startswith("the output layer is computed wrongly on rank 1 (")
