"""Weights that are stored in FP8: loaded without loss for the optimizer, read as bfloat16, gathered and rounded again.

Such a parameter is a tensor of Transformer Engine that looks like bfloat16. Writing to it rounds. The distributed
optimizer holds its fp32 weights and rounds the parameter from them after every update. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


def dequantize(weight: Tensor) -> Tensor:
    """Return the values of a parameter stored in FP8 as a new bfloat16 tensor, any other tensor itself."""
    return weight.detach().dequantize() if fp8_utils.is_float8tensor(weight) else weight


class DequantizedShards(Mapping[str, Tensor]):
    """A rank's parameters as plain tensors; those stored in FP8 are computed at every read and not kept."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        return dequantize(self._parameters[name])

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


class WeightLoader:
    """Sets parameters to loaded values, and the optimizer's fp32 weights with them.

    For a parameter stored in FP8 these are the values before rounding.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        """Load for the parameters of this optimizer."""
        self._optimizer = optimizer
        self._exact: set[int] = set()

    @torch.no_grad()
    def copy(self, parameter: Tensor, values: Tensor) -> None:
        """Set a parameter; `finish` comes after the last one.

        Args:
            values: of the parameter's shape, any floating type and device.
        """
        parameter.copy_(values.to(parameter.dtype))  # an update rounds its fp32 weights to bfloat16 first, too
        if fp8_utils.is_float8tensor(parameter):
            self._set_main(parameter, values)
            self._exact.add(id(parameter))

    @torch.no_grad()
    def finish(self, parameters: Iterable[Tensor]) -> None:
        """Copy all other parameters to the optimizer's fp32 weights.

        Args:
            parameters: all of the model's on this rank.
        """
        if not self._exact:
            self._optimizer.reload_model_params()
            return
        for parameter in parameters:
            if id(parameter) not in self._exact:
                self._set_main(parameter, dequantize(parameter))
        self._exact.clear()

    def _set_main(self, parameter: Tensor, values: Tensor) -> None:
        main: Tensor | None = getattr(parameter, "main_param", None)
        if main is None:  # another rank's, or the parameter is fp32 itself
            return
        owner = next(o for o in _distributed_optimizers(self._optimizer) if parameter in o.model_param_gbuf_map)
        owned = owner._get_model_param_range_map(parameter)["param"]
        main.copy_(values.reshape(-1)[owned.start : owned.end])


def gather(chunks: Sequence[DistributedDataParallel]) -> None:
    """Complete the weights on every rank from the shards that the optimizer has written; a collective."""
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)
        stored = [weight for weight in chunk.module.parameters() if fp8_utils.is_float8tensor(weight)]
        # The backward pass reads a transposed copy. megatron-core renews it itself unless gathers are overlapped: then
        # it does so at the end of a gather in flight, and after this one none is.
        if stored and chunk.ddp_config.overlap_param_gather:
            fp8_utils.post_all_gather_processing(stored)


def cast_main_weights(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Round all weights from the optimizer's fp32 weights, as after an update; a collective."""
    for single in _distributed_optimizers(optimizer):
        single._copy_main_params_to_model_params()
    gather(chunks)


def _distributed_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
