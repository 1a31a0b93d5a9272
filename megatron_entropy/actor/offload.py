"""The actor's memory moved to the host and back, for engines that share its GPUs.

Works on storages, not tensors: a storage is copied to pinned host memory and resized to nothing, so that every view of
it (parameters in Megatron's flat buffers, optimizer shards of them) is the same tensor again when it comes back.
Gradients are not kept: an update begins by setting them to zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_entropy.actor.actor import Actor


class HostCopy:
    """Storages that are either on their device or on the host; both calls may be repeated."""

    def __init__(self) -> None:
        self._away: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []

    def offload(self, kept: Iterable[Tensor], scratch: Iterable[Tensor]) -> None:
        """Free the storages of some tensors.

        Args:
            kept: their bytes are copied to the host first.
            scratch: their bytes are lost; they come back as zeros.
        """
        if self._away:
            return
        seen: set[int] = set()
        for tensors, keep in ((kept, True), (scratch, False)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.nbytes() == 0 or storage.data_ptr() in seen:
                    continue
                seen.add(storage.data_ptr())
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                host = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=tensor.is_cuda) if keep else None
                if host is not None:
                    host.copy_(flat)
                self._away.append((storage, storage.nbytes(), host))
        for storage, _, _ in self._away:
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Bring everything back."""
        while self._away:
            storage, size, host = self._away[-1]
            storage.resize_(size)
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            flat.zero_() if host is None else flat.copy_(host)
            self._away.pop()


def memory_of(actor: Actor) -> tuple[list[Tensor], list[Tensor]]:
    """What an actor holds: (weights and optimizer state, gradients)."""
    kept = [tensor for chunk in actor.chunks for tensor in (*chunk.module.parameters(), *chunk.module.buffers())]
    kept += [buffer.param_data for buffer in _buffers(actor) if buffer.param_data is not None]
    for optimizer in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        inner = optimizer.optimizer
        kept += [parameter for group in inner.param_groups for parameter in group["params"]]
        kept += [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    if actor.reference is not None:
        kept += [weight for weight in actor.reference.weights.values() if weight.device.type != "cpu"]
    gradients = [buffer.grad_data for buffer in _buffers(actor)]
    return kept, gradients


def _buffers(actor: Actor) -> Iterator[Any]:
    """Megatron's flat buffers, of dense parameters and of experts."""
    chunks: list[Any] = actor.chunks
    for chunk in chunks:
        yield from chunk.buffers
        yield from chunk.expert_parallel_buffers
