"""Check that this machine computes the output layer as float64 does, before a run trains on its numbers.

A kernel that is wrong on a new GPU, or a defective device, returns numbers that look right. So every rank compares, on
its own device and with the kernels and the type that the run will use, the log-prob, the entropy and the divergence of
a small problem, and their gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entropy_kernels import distillation
from megatron_entropy.actor.statistics import head_statistics
from megatron_entropy.distributed import cpu, network, process_groups
from megatron_entropy.errors import Fault
from megatron_entropy.records import HeadInputs

TOKENS, VOCABULARY, PADDING = 130, 1027, 3
"""Rows and columns of the problem: two tiles of rows and an incomplete tile of columns, whose last ones are padding."""
TEMPERATURE = 0.7
VALUES, GRADIENTS = ("log-prob", "entropy", "divergence"), ("gradient of hidden states", "gradient of weight")
VALUE_TOLERANCE = 1e-3
"""Largest error of a value, in nats. Correct kernels are off by 1e-5: products of 16-bit numbers are exact in float32.
The tests ask for that; what is looked for here is a wrong result, and another order of sums must not end a run."""
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest error of a gradient, as the root mean square over that of the gradient. bfloat16 rounds by up to 4e-3."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadCase:
    """What the output layer of a stage computes with: type, implementation (of `entropy_kernels`), divergence."""

    dtype: torch.dtype
    hidden_size: int
    impl: str
    divergence: Literal["none", "forward", "reverse"]


def check_head(cases: Sequence[HeadCase]) -> float:
    """Check every case on this rank; a collective.

    Returns:
        The largest error of a value on any rank, in nats.
    Raises:
        Fault: on every rank, when one of them computes something wrong; the message names the ranks and the quantity.
    """
    problem, largest = "", 0.0
    for case in cases:
        try:
            errors = measure_errors(case)
        except Exception as error:  # a compiler of kernels has exceptions of its own
            log.exception("the output layer cannot be computed: %s", case)
            wrong = [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
        else:
            wrong = [f"{name} is off by {error:.2g}" for name, (error, limit) in errors.items() if not error <= limit]
            largest = max(largest, *(error for name, (error, _) in errors.items() if name in VALUES))
        if wrong and not problem:
            problem = f"{str(case.dtype).removeprefix('torch.')}: {', '.join(wrong)}"
            problem += "" if case.impl == "chunked" else '; actor.performance.head_kernels="chunked" avoids its kernels'
    device = cpu.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = process_groups.gather_objects(problem and f"{name} of {network.host_name()}, {problem}")
    if bad := [rank for rank, text in enumerate(found) if text]:
        ranks = f"rank {bad[0]}" if len(bad) == 1 else f"ranks {', '.join(map(str, bad))}"
        raise Fault(f"the output layer is computed wrongly on {ranks} ({found[bad[0]]})")
    return process_groups.largest(largest)


def measure_errors(case: HeadCase) -> dict[str, tuple[float, float]]:
    """Errors against float64 and what is allowed, by quantity: values in nats, gradients relative."""
    device = cpu.device()
    generator = torch.Generator().manual_seed(1)
    states, weight, other = (
        torch.randn(rows, case.hidden_size, generator=generator, device="cpu") for rows in (TOKENS, VOCABULARY, TOKENS)
    )
    weight *= 2 / case.hidden_size**0.5  # logits of standard deviation 2
    targets = torch.randint(VOCABULARY - PADDING, (TOKENS,), generator=generator, device="cpu").to(device)
    signs = torch.randn(3, TOKENS, generator=generator, device="cpu").to(device)
    operands = [tensor.to(device, case.dtype) for tensor in (states, weight, other)]
    main_grad = torch.zeros(VOCABULARY, case.hidden_size, device=device)  # as in training
    got = _compute(operands, targets, signs, case, case.impl, main_grad)
    exact = _compute([tensor.double() for tensor in operands], targets, signs.double(), case, "chunked", None)
    errors = {}
    for name, expected in exact.items():
        error = (got[name].double() - expected).abs()
        if name in VALUES:
            errors[name] = (float(error.max()), VALUE_TOLERANCE)
        else:
            relative = error.square().mean().sqrt() / expected.square().mean().sqrt()
            errors[name] = (float(relative), GRADIENT_TOLERANCE[case.dtype])
    return errors


def _compute(
    operands: Sequence[Tensor], targets: Tensor, signs: Tensor, case: HeadCase, impl: str, main_grad: Tensor | None
) -> dict[str, Tensor]:
    """Values of every token, and the gradients of their sums with `signs`."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in operands[:2])
    size = VOCABULARY - PADDING
    head = HeadInputs(hidden, weight, targets, None, False, size, impl, main_grad)
    stats = head_statistics(head, temperature=TEMPERATURE, entropy=True)
    values = [stats.logprob, stats.entropy]
    if case.divergence != "none":
        options = {"direction": case.divergence, "vocab_size": size, "impl": impl, "main_grad": main_grad}
        values.append(distillation(hidden, weight, operands[2], operands[1], targets, **options))
    total = torch.stack([(value * sign).sum() for value, sign in zip(values, signs, strict=False)]).sum()
    total.backward()
    gradients = (hidden.grad, weight.grad if main_grad is None else main_grad)
    named = (*zip(VALUES, values, strict=False), *zip(GRADIENTS, gradients, strict=True))
    return {name: tensor.detach() for name, tensor in named if tensor is not None}
