"""The engine's end of a weight push: a vLLM weight-transfer engine that receives buckets over any link.

vLLM finds it in every worker process through the entry point `vllm.general_plugins` -> `register`, and mixes `Worker`
into its own worker class. Imported in engine processes only: it imports vLLM.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_entropy.errors import Fault
from megatron_entropy.weights.buckets import TensorMeta, checksum
from megatron_entropy.weights.links import LinkInfo
from megatron_entropy.weights.transport import Receiver

log = logging.getLogger(__name__)

BACKEND = "megatron_entropy"
READ_BACK_ROWS = 256


def register() -> None:
    """Make `weight_transfer_config={"backend": BACKEND}` known to vLLM in this process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, BucketTransferEngine)


@dataclass
class InitInfo(LinkInfo, WeightTransferInitInfo):
    """How to join, in the form vLLM asks for."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """What will arrive: name, type (`float32`, ...) and shape of each tensor, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def metadata(self) -> list[TensorMeta]:
        """The same as records."""
        return [
            TensorMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(self.names, self.dtype_names, self.shapes, strict=True)
        ]


class BucketTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives Hugging Face tensors in buckets and loads them layer by layer, on a CPU or a GPU.

    After an error the model holds neither the old nor the new weights; the next complete push repairs it.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._receiver: Receiver | None = None
        self._expected: set[str] = set()
        self.load_seconds = 0.0
        """What loading took in the last transfer."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the sender's group, leaving the one before."""
        self.shutdown()
        self._receiver = Receiver(init_info, init_info.rank_offset + self.parallel_config.rank)

    def start_weight_update(self) -> None:
        """Give layers their loadable form back: vLLM on a CPU repacks linear weights and experts after loading."""
        self._expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        if self.device.type == "cpu":
            # vLLM pads and packs experts only when it also makes their kernel. With a kernel left from before it would
            # take the tensors as they come for packed ones.
            for layer in self.model.modules():
                if isinstance(method := getattr(layer, "quant_method", None), FusedMoEMethodBase):
                    method.moe_kernel = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, but without synchronising an accelerator that is not there."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receive one transfer and load it.

        Raises:
            Fault: when the model has parameters that the transfer did not fill.
        """
        assert self._receiver is not None, "init_transfer_engine comes first"
        loaded: set[str] = set()
        self.load_seconds = 0.0

        def load(tensors: list[tuple[str, torch.Tensor]]) -> None:
            begin = time.monotonic()
            loaded.update(self._load(tensors))
            self.load_seconds += time.monotonic() - begin

        try:
            self._receiver.receive(update_info.metadata(), load)
            if missing := sorted(self._expected - loaded):
                raise Fault(f"the pushed weights lack {len(missing)} of the engine's parameters, first {missing[0]}")
        except BaseException:
            # Half-loaded layers would count what they have got twice in the next push, and be taken for complete
            # too early: bring them to an end now.
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def _load(self, tensors: list[tuple[str, torch.Tensor]]) -> set[str]:
        model: Any = self.model
        names = model.load_weights(tensors)
        return self._expected if names is None else names

    def finish_weight_update(self) -> None:
        """Bring the layers into the form that inference uses."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            # A tied head loads nothing itself, so the reload passes it over; on a CPU it would go on computing with
            # its packed copy of the old embeddings.
            for layer in self.model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


class Worker:
    """What vLLM's workers can do beside their own: methods for `collective_rpc`."""

    weight_transfer_engine: BucketTransferEngine
    _weight_update_active: bool

    def attempt(self, method: str, arguments: tuple) -> tuple[Any, Fault | None]:
        """What a method of the worker returns, and the `Fault` it has raised instead.

        vLLM would keep an error's text only, and leave the answers of the other workers for the next call to find.
        """
        try:
            return getattr(self, method)(*arguments), None
        except Fault as fault:
            return None, fault
        except Exception as error:
            log.exception("%s failed", method)
            return None, Fault(f"{method}: {type(error).__name__}: {error}")

    def begin_weight_update(self) -> None:
        """As vLLM's `start_weight_update`, also when an update before was broken off."""
        worker: Any = self
        if worker._weight_update_active:
            worker.finish_weight_update()
        worker.start_weight_update()

    def load_seconds(self) -> float:
        """What loading took in the last update, beside receiving."""
        return self.weight_transfer_engine.load_seconds

    def weight_checksums(self) -> dict[str, int]:
        """CRC-32 of every tensor that this worker computes with, under vLLM's name for it.

        vLLM packs the weights of linear layers on a CPU and keeps no other copy. They are read back through the layer
        itself: its answer to the unit vectors is exactly its weights (the sign of a zero apart). For experts on a CPU
        it is the checksum of what they are packed into, zeros to fill up included.
        """
        model: torch.nn.Module = self.get_model()  # type: ignore[attr-defined]
        sums = {}
        for path, layer in model.named_modules():
            for name, parameter in layer.named_parameters(recurse=False):
                packed = name == "weight" and isinstance(layer, LinearBase | ParallelLMHead)
                tensor = _read_back(layer) if packed else parameter
                sums[f"{path}.{name}"] = checksum(tensor + torch.zeros((), dtype=tensor.dtype))  # -0 becomes 0
        return sums


@torch.inference_mode()
def _read_back(layer: Any) -> torch.Tensor:
    """The weight [outputs, inputs] that a layer multiplies with."""
    width = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
    columns = []
    for first in range(0, width, READ_BACK_ROWS):
        units = layer.weight.new_zeros(min(READ_BACK_ROWS, width - first), width)
        units[:, first : first + len(units)].fill_diagonal_(1)
        columns.append(layer.quant_method.apply(layer, units, None))
    return torch.cat(columns).t()
