"""The actor's memory moved to the host and back, for engines that share its GPUs.

It works on storages, not tensors: a storage is copied to pinned host memory and resized to zero, so that every view of
it (parameters in Megatron's flat buffers, optimizer shards of them) is valid again when it comes back. Gradients are
dropped: an update begins by setting them to zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


class HostCopy:
    """Storages that are either on their device or on the host; what is on the host already stays there."""

    def __init__(self) -> None:
        self._offloaded: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []

    def offload(self, kept: Iterable[Tensor], scratch: Iterable[Tensor]) -> None:
        """Free the storages of some tensors.

        Args:
            kept: their bytes are copied to the host first.
            scratch: their bytes are dropped; they come back as zeros.
        """
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
                self._offloaded.append((storage, storage.nbytes(), host))
        for storage, _, _ in self._offloaded:
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Restore all offloaded storages."""
        while self._offloaded:
            storage, size, host = self._offloaded[-1]
            storage.resize_(size)
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            flat.zero_() if host is None else flat.copy_(host)
            self._offloaded.pop()


def actor_memory(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, reference: Iterable[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The tensors an actor holds.

    Args:
        chunks: model chunks of this rank.
        reference: weights of the reference; those on the host stay where they are.
    Returns:
        Weights; optimizer state and reference without views of weights; gradients.
    """
    modules: list[Any] = list(chunks)
    # Megatron's flat buffers, of dense parameters and of experts.
    buffers = [buffer for chunk in modules for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = [tensor for chunk in modules for tensor in (*chunk.module.parameters(), *chunk.module.buffers())]
    weights += [buffer.param_data for buffer in buffers if buffer.param_data is not None]
    state = [weight for weight in reference if weight.device.type != "cpu"]
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = single.optimizer
        state += [parameter for group in inner.param_groups for parameter in group["params"]]
        state += [value for values in inner.state.values() for value in values.values() if isinstance(value, Tensor)]
    of_weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
    state = [tensor for tensor in state if tensor.untyped_storage().data_ptr() not in of_weights]
    return weights, state, [buffer.grad_data for buffer in buffers]
