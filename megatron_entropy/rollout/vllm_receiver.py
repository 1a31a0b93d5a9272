"""The engine's end of a weight push: a vLLM weight-transfer engine that receives over gloo.

vLLM finds it in every worker process through the entry point `vllm.general_plugins` -> `register`. Imported in engine
processes only: it imports vLLM.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_entropy.errors import Fault
from megatron_entropy.transport import LinkInfo, Receiver, TensorMeta

BACKEND = "gloo"


def register() -> None:
    """Make `weight_transfer_config={"backend": "gloo"}` known to vLLM in this process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, GlooWeightTransferEngine)


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """`transport.LinkInfo`, field by field."""

    address: str
    port: int
    world_size: int
    rank_offset: int
    bucket_bytes: int
    checksum: bool
    timeout: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
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


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives Hugging Face tensors in buckets and loads them layer by layer, on a CPU or a GPU.

    After an error the model holds neither the old nor the new weights; the next complete push repairs it.
    """

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._receiver: Receiver | None = None
        self._expected: set[str] = set()

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the sender's group, leaving the one before."""
        self.shutdown()
        info = LinkInfo(**dataclasses.asdict(init_info))
        self._receiver = Receiver(info, info.rank_offset + self.parallel_config.rank)

    def start_weight_update(self) -> None:
        """Give layers their loadable form back: vLLM on a CPU repacks linear weights after loading."""
        self._expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, but without synchronising an accelerator that is not there."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive one transfer and load it.

        Raises:
            Fault: when the model has parameters that the transfer did not fill.
        """
        assert self._receiver is not None, "init_transfer_engine comes first"
        loaded: set[str] = set()
        try:
            self._receiver.receive(update_info.metadata(), lambda tensors: loaded.update(self._load(tensors)))
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
