"""Training on a CPU: what `dtype = "auto"` is, and that RMSNorm keeps its input only, at no change of a bit."""

import dataclasses

import pytest
import torch

from megatron_entropy.actor import dtypes
from megatron_entropy.actor.layers import _Normalise, _normalise
from megatron_entropy.config.architecture import ModelArchitecture


def architecture(width: int) -> ModelArchitecture:
    values = dict.fromkeys((field.name for field in dataclasses.fields(ModelArchitecture)), 1)
    return ModelArchitecture(**(values | {"hidden_size": width}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "multiplies", "name", "reason"),
    [
        (512, True, "bfloat16", "this processor multiplies it"),
        (511, True, "float32", "narrower than 512"),
        (512, False, "float32", "neither AMX-BF16 nor AVX512-BF16"),
    ],
)
def test_auto_is_bfloat16_where_a_cpu_multiplies_it_and_the_model_is_wide(monkeypatch, width, multiplies, name, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dtypes.cpu, "multiplies_bfloat16", lambda: multiplies)
    chosen, why = dtypes.choose_dtype(architecture(width))
    assert chosen == name == dtypes.resolve_name("auto", architecture(width)) and reason in why
    assert dtypes.resolve_dtype("float32", architecture(width)) is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_keeps_its_input_only(dtype):
    torch.manual_seed(0)
    hidden, gradient = torch.randn(50, 64, dtype=dtype, requires_grad=True), torch.randn(50, 64, dtype=dtype)
    weight = torch.randn(64, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        output = _Normalise.apply(hidden, weight, 1e-5)
    assert sorted(kept) == [64, 50 * 64]
    expected = _normalise(hidden, weight, 1e-5)
    assert torch.equal(output, expected)
    of_hidden, of_weight = torch.autograd.grad(expected, (hidden, weight), gradient)
    assert all(map(torch.equal, torch.autograd.grad(output, (hidden, weight), gradient), (of_hidden, of_weight)))
    frozen = _Normalise.apply(hidden, weight.detach(), 1e-5)  # as under LoRA
    assert torch.equal(torch.autograd.grad(frozen, hidden, gradient)[0], of_hidden)
