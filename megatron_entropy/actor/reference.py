"""A second set of weights for the actor's model: the policy as a stage began, or a teacher that follows it.

Sharded as the actor's own. They are no second model: for a pass without gradients they take the place of the actor's
parameters, so that whatever scores the policy scores the reference too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Reference:
    """A copy of this rank's parameters.

    Args:
        parameters: of the actor, by name.
        moving: the copy will be moved; it is kept in fp32 then, where no step is too small to count (in bfloat16 a
            share below 1/256 of a weight would be lost).
        on_host: keep it in host memory between its passes.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, moving: bool, on_host: bool) -> None:
        self.moving = moving
        self._parameters = dict(parameters)
        self.weights = {
            name: parameter.detach().to(
                device="cpu" if on_host else parameter.device, dtype=torch.float32 if moving else None, copy=True
            )
            for name, parameter in self._parameters.items()
        }
        """fp32 where it moves, else of the parameters' type."""

    def move(self, share: float) -> None:
        """Become `(1 - share) * reference + share * actor`, elementwise, in fp32."""
        for name, parameter in self._parameters.items():
            weight = self.weights[name]
            weight.lerp_(parameter.detach().to(weight), share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model computes with the reference; no gradients, no collective."""
        own = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self.weights[name].to(own[name])
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]
