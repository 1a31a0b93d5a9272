"""What `dtype = "auto"` is on a CPU."""

import dataclasses

import pytest
import torch

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.distributed import dtypes


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
