"""The bodies of test_triton: the Triton kernels equal the definition.

Run on a GPU as they are, or on a CPU with TRITON_INTERPRET=1, which executes the kernels in numpy;
that shows what they compute, not how fast. Not collected by name: test_triton starts it.
"""

from __future__ import annotations

import pytest
import torch
from cases import assert_stats_close, operands, relative, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEACHER = {"teacher_temperature": 1.6, "varentropy": True}
# One of everything; several tiles and splits in both directions; H not a multiple of the block.
SIZES = [(1, 16, 3), (21, 40, 200), (17, 72, 1100)]


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors where the kernels run."""
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize(("tokens", "hidden_size", "vocab"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_reference(tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype) -> None:
    inputs = on_device(*operands(tokens, hidden_size, vocab, dtype))
    temperature = torch.linspace(0.3, 2.0, tokens, device=DEVICE)
    options = TEACHER | {"temperature": temperature}
    got = run(*inputs, **options, impl="triton", vocab_tile=128)
    wide = [inputs[0].double(), inputs[1].double(), inputs[2]]
    expected = run(*wide, **options, impl="reference")
    # float32 sums at temperature 0.3 (logits of magnitude 30): 1e-4 on varentropy, less elsewhere.
    assert_stats_close(got[0], expected[0], 2e-4)
    assert_stats_close(*(type(s)(logprob=s.logprob, entropy=s.entropy) for s in (got[0], expected[0])), 2e-5)
    # bfloat16: the logit gradient and the result are rounded to 8 bits.
    limit = 1e-5 if dtype == torch.float32 else 1.5e-2
    assert relative(got[1], expected[1]) < limit
    assert relative(got[2], expected[2]) < limit


@pytest.mark.parametrize("save", ["recompute", "half"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("compact", [True, False])
def test_modes(save: str, softcap: float | None, compact: bool) -> None:
    hidden, weight, target = on_device(*operands(19, 24, 150))
    target[3:9] = -100
    options = {"softcap": softcap, "vocab_size": 141, "temperature": 0.8}
    target = torch.where(target >= 141, 0, target)
    got = run(hidden, weight, target, **options, impl="triton", save=save, compact=compact)
    expected = run(hidden.double(), weight.double(), target, **options, impl="reference")
    assert_stats_close(got[0], expected[0], 1e-5)
    # float16 of a shifted logit: an error of up to |d| 2^-11 in the exponent.
    limit = 1e-5 if save == "recompute" else 2e-3
    assert relative(got[1], expected[1]) < limit
    assert relative(got[2], expected[2]) < limit


def test_non_contiguous_rows() -> None:
    hidden, weight, target = on_device(*operands(10, 24, 50))
    strided = torch.empty(10, 48, device=DEVICE)[:, ::2].copy_(hidden)
    expected = run(hidden, weight, target, impl="triton")
    got = run(strided, weight.t().contiguous().t(), target, impl="triton")
    assert torch.equal(got[0].logprob, expected[0].logprob)
    assert torch.equal(got[2], expected[2])
