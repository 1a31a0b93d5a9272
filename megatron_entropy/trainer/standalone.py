"""Engines without a trainer: their weights come from a model folder. torch and Ray are imported when they start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import Config
from megatron_entropy.data.tokenizer import Tokenizer
from megatron_entropy.distributed import loopback
from megatron_entropy.distributed.scratch import scratch_folder
from megatron_entropy.rollout.engine import EngineSpec

if TYPE_CHECKING:
    import torch

    from megatron_entropy.trainer.rollout_service import RolloutService
    from megatron_entropy.weights.buckets import TensorMeta


@contextmanager
def open_service(config: Config, arch: ModelArchitecture, tokenizer: Tokenizer) -> Iterator[RolloutService]:
    """Start engines whose weights come from the model folder; stop them at the end of the `with` block.

    On one machine their sockets are on the loopback interface, and Ray's files in a private folder.
    """
    if not os.environ.get("RAY_ADDRESS"):  # engines of a joined cluster may be on other machines
        loopback.request()  # Ray reads it when it is imported
    import torch

    from megatron_entropy.distributed.dtypes import resolve_name
    from megatron_entropy.monitor.timer import StepTimer
    from megatron_entropy.rollout.pool import EnginePool
    from megatron_entropy.trainer.rollout_service import RolloutService
    from megatron_entropy.weights.sync import WeightSync

    loopback.activate()
    on_gpu = torch.cuda.is_available()
    dtype = resolve_name(config.rollout.dtype, arch)
    source = FolderSource(config.model.path, arch, getattr(torch, dtype))
    os.environ.setdefault("LOCAL_WORLD_SIZE", "0")  # reserve no GPU for a trainer
    spec = EngineSpec(
        model_folder=config.model.path,
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        eos_ids=tokenizer.eos_ids,
        dtype=dtype,
        device="cuda" if on_gpu else "cpu",
    )
    with scratch_folder():
        pool = EnginePool(config.rollout, spec)
        try:
            weight_sync = WeightSync(source, address=pool.address)
            service = RolloutService(
                config.rollout, actor=source, weight_sync=weight_sync, pool=pool, timer=StepTimer()
            )
            with closing(service):
                yield service
        finally:
            pool.shutdown()


class FolderSource:
    """A model folder's tensors as a source of weights, in one process."""

    def __init__(self, folder: str, arch: ModelArchitecture, dtype: torch.dtype) -> None:
        from megatron_entropy.weights import names
        from megatron_entropy.weights.buckets import TensorMeta
        from megatron_entropy.weights.hf_folder import TensorFolder

        self.gather_seconds = 0.0
        self._folder = TensorFolder(folder)
        self._metadata = [
            TensorMeta(name, dtype, shape)
            for entry in names.entries(arch)
            for name, shape in zip(entry.tensors, entry.shapes, strict=True)
        ]
        for meta in self._metadata:
            self._folder.check(meta.name, meta.shape)
        self._open: tuple[int, torch.Tensor] | None = None

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, type and full shape of every tensor."""
        return self._metadata

    def read(self, number: int, first: int, count: int, out: torch.Tensor | None, *, in_place: bool) -> None:
        """Write rows [first, first + count) of tensor `number` into `out`."""
        assert out is not None, "there is one rank"
        if self._open is None or self._open[0] != number:
            meta = self._metadata[number]
            self._open = number, self._folder.read(meta.name, meta.shape)
        out.copy_(self._open[1][first : first + count])

    def offload(self, *, keep_weights: bool = False) -> None:
        """Nothing: the weights stay in their files."""

    def onload(self) -> None:
        """Nothing: see `offload`."""
