"""The reference of a KL penalty or a distillation: other weights for the actor's model, by kind.

| kind      | class          | the reference is                                                              |
|-----------|----------------|-------------------------------------------------------------------------------|
| `initial` | `FrozenCopy`   | a copy of the weights the stage starts from, or of `model.reference`           |
| `initial` | `LoraBase`     | the same without a copy: LoRA's base never changes, adapters are switched off  |
| `ema`     | `EmaCopy`      | a moving average of the policy                                                 |
| `policy`  | `PolicyItself` | the policy's present weights                                                   |

A copy is sharded as the actor's weights are. It is no second model: for a pass without gradients its tensors replace
the data of the actor's parameters, so the code that scores the policy scores the reference too.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_entropy.actor import lora

ReferenceKind = Literal["none", "initial", "ema", "policy"]


class Reference(abc.ABC):
    """A reference of any kind.

    `weights`: its own tensors on this rank, by parameter name; empty when it uses the actor's. `in_checkpoint`: they
    change during training, so a checkpoint contains them.
    """

    weights: Mapping[str, Tensor] = {}
    in_checkpoint: bool = False

    @abc.abstractmethod
    def active(self) -> contextlib.AbstractContextManager[None]:
        """Let the model compute with the reference inside the context; no gradients, no collective."""

    def update_ema(self, alpha: float) -> None:
        """Move the reference towards the policy: `(1 - alpha) * reference + alpha * policy`.

        Args:
            alpha: in [0, 1].
        """
        raise TypeError(f'{type(self).__name__} is not a moving average; a method needs reference = "ema" for that')


class FrozenCopy(Reference):
    """A copy of this rank's parameters that does not change."""

    def __init__(
        self, parameters: Mapping[str, Tensor], *, on_host: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """Copy the parameters.

        Args:
            parameters: of the actor, by name.
            on_host: keep the copy in host memory; it is copied to the device for each pass.
            dtype: of the copy; None is each parameter's own.
        """
        self._parameters = dict(parameters)
        self.weights = {
            name: parameter.detach().to(device="cpu" if on_host else parameter.device, dtype=dtype, copy=True)
            for name, parameter in self._parameters.items()
        }

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Replace the data of the parameters inside the context."""
        policy = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self.weights[name].to(policy[name])
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = policy[name]


class EmaCopy(FrozenCopy):
    """A moving average of the policy, in fp32: in bfloat16 an update below 1/256 of a weight would be lost."""

    in_checkpoint = True

    def __init__(self, parameters: Mapping[str, Tensor], *, on_host: bool = False) -> None:
        """Start the average at the present parameters."""
        super().__init__(parameters, on_host=on_host, dtype=torch.float32)

    def update_ema(self, alpha: float) -> None:
        """Become `(1 - alpha) * reference + alpha * policy`, elementwise, in fp32."""
        for name, parameter in self._parameters.items():
            weight = self.weights[name]
            weight.lerp_(parameter.detach().to(weight), alpha)


class LoraBase(Reference):
    """The model below LoRA's adapters."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Use the adapters of these model chunks."""
        self._chunks = chunks

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Switch the adapters off inside the context."""
        return lora.disabled(self._chunks)


class PolicyItself(Reference):
    """The policy's weights at the time of the pass."""

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Change nothing."""
        return contextlib.nullcontext()


def needs_weights(kind: ReferenceKind) -> bool:
    """Whether a reference of this kind starts from weights that must be loaded before it is built."""
    return kind in ("initial", "ema")


def build_reference(
    kind: ReferenceKind,
    parameters: Mapping[str, Tensor],
    chunks: Sequence[torch.nn.Module],
    *,
    on_host: bool,
    base_is_reference: bool,
) -> Reference | None:
    """Build the reference of a kind from the actor's present weights; None for `none`.

    Args:
        parameters: of the actor, adapters included, by name.
        chunks: the actor's model chunks.
        on_host: keep copies in host memory.
        base_is_reference: the weights below LoRA's adapters are those of the reference.
    """
    if kind == "none":
        return None
    if kind == "policy":
        return PolicyItself()
    if kind == "ema":
        return EmaCopy(parameters, on_host=on_host)
    return LoraBase(chunks) if base_is_reference else FrozenCopy(parameters, on_host=on_host)
