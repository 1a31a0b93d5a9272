"""The engine's side of a weight sync: a vLLM weight-transfer engine that receives buckets over any link.

Every vLLM worker process loads it through the entry point `vllm.general_plugins` -> `register`; `Worker` becomes a base
class of vLLM's own worker. Only engine processes import this file: it imports vLLM.
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

from megatron_entropy.distributed import loopback
from megatron_entropy.errors import Fault
from megatron_entropy.rollout.entropy import Recorded
from megatron_entropy.weights.buckets import TensorMeta, checksum
from megatron_entropy.weights.links import LinkInfo
from megatron_entropy.weights.transport import Receiver

log = logging.getLogger(__name__)

BACKEND = "megatron_entropy"
READ_BACK_ROWS = 256


def register() -> None:
    """Make `weight_transfer_config={"backend": BACKEND}` known to vLLM in this process; vLLM's stores use loopback."""
    loopback.activate()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, BucketTransferEngine)


@dataclass
class InitInfo(LinkInfo, WeightTransferInitInfo):
    """How to join the transfer group, in the form vLLM requires."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Name, type (`float32`, ...) and shape of each tensor of a transfer, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def metadata(self) -> list[TensorMeta]:
        """Return the same as one record per tensor."""
        return [
            TensorMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(self.names, self.dtype_names, self.shapes, strict=True)
        ]


class BucketTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives Hugging Face tensors in buckets and loads them layer by layer, on a CPU or a GPU.

    After an error the model has neither the old nor the new weights, until the next complete weight sync.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._receiver: Receiver | None = None
        self._expected: set[str] = set()
        self.load_seconds = 0.0
        """Seconds of the last transfer spent loading tensors into the model."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Leave the previous transfer group and join the sender's."""
        self.shutdown()
        self._receiver = Receiver(init_info, init_info.rank_offset + self.parallel_config.rank)

    def start_weight_update(self) -> None:
        """Restore the loadable form of the layers: on a CPU vLLM repacks linear weights and experts after loading."""
        names = {name for name, _ in self.model.named_parameters()}  # a tied head has none of its own
        initialize_layerwise_reload(self.model)
        # Those that are left: vLLM computes the scales of quantized layers itself from the loaded weights.
        self._expected = names & {name for name, _ in self.model.named_parameters()}
        if self.device.type == "cpu":
            # vLLM pads and packs experts only when it also creates their kernel. With the kernel of an earlier sync it
            # would treat the received tensors as packed ones.
            for layer in self.model.modules():
                if isinstance(method := getattr(layer, "quant_method", None), FusedMoEMethodBase):
                    method.moe_kernel = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights as the base class does, but synchronize the accelerator only if there is one."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receive one transfer and load it.

        Raises:
            Fault: when the transfer did not fill every parameter of the model.
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
                raise Fault(f"the synced weights lack {len(missing)} of the engine's parameters, first {missing[0]}")
        except BaseException:
            # Finalize half-loaded layers now. In the next sync they would count their tensors twice and seem
            # complete too early.
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def _load(self, tensors: list[tuple[str, torch.Tensor]]) -> set[str]:
        model: Any = self.model
        names = model.load_weights(tensors)
        return self._expected if names is None else names

    def finish_weight_update(self) -> None:
        """Convert the layers into the form that inference uses."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            # A tied head loads nothing itself, so the reload skips it; on a CPU it would keep computing with its
            # packed copy of the old embeddings.
            for layer in self.model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)

    @staticmethod
    def trainer_send_weights(*arguments: Any, **options: Any) -> None:
        """Refuse to send: vLLM before 0.29 requires the method, and here the trainer sends through `WeightSync`."""
        raise NotImplementedError("weights are sent by WeightSync")

    def shutdown(self) -> None:
        """Leave the transfer group."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


class Worker:
    """Additional methods of vLLM's workers, for `collective_rpc`."""

    weight_transfer_engine: BucketTransferEngine
    _weight_update_active: bool

    def attempt(self, method: str, arguments: tuple) -> tuple[Any, Fault | None]:
        """Call a method of the worker; returns its result, or the `Fault` it raised.

        vLLM itself would keep only the text of an error, and the next call would read the other workers' results.
        """
        try:
            return getattr(self, method)(*arguments), None
        except Fault as fault:
            return None, fault
        except Exception as error:
            log.exception("%s failed", method)
            return None, Fault(f"{method}: {type(error).__name__}: {error}")

    def begin_weight_update(self) -> None:
        """Call vLLM's `start_weight_update`, also after an update that was not finished."""
        worker: Any = self
        if worker._weight_update_active:
            worker.finish_weight_update()
        worker.start_weight_update()

    def read_entropy(self) -> Recorded:
        """Return what the logits processor has recorded since the last call."""
        from megatron_entropy.rollout.vllm_entropy import LOG

        return LOG.read()

    def load_seconds(self) -> float:
        """Return the seconds that loading took in the last update, without receiving."""
        return self.weight_transfer_engine.load_seconds

    def weight_checksums(self) -> dict[str, int]:
        """Compute the CRC-32 of every tensor that this worker uses, by vLLM's name of it.

        On a CPU vLLM packs the weights of linear layers and keeps no other copy. They are read back through the layer
        itself: its outputs for the unit vectors are exactly its weights (except for the sign of a zero). For experts
        on a CPU it is the checksum of the packed tensor, padding included.
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
    """Read the weight [outputs, inputs] of a layer from its outputs for the unit vectors."""
    width = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
    columns = []
    for first in range(0, width, READ_BACK_ROWS):
        units = layer.weight.new_zeros(min(READ_BACK_ROWS, width - first), width)
        units[:, first : first + len(units)].fill_diagonal_(1)
        columns.append(layer.quant_method.apply(layer, units, None))
    return torch.cat(columns).t()
