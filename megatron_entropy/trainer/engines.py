"""The rollout engines of a run, shared by all of its stages."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import Config
from megatron_entropy.data.tokenizer import load_tokenizer
from megatron_entropy.distributed import cpu, network, process_groups
from megatron_entropy.distributed.dtypes import resolve_name
from megatron_entropy.rollout.engine import EngineSpec
from megatron_entropy.rollout.placement import TrainerGpu, name_of_gpu
from megatron_entropy.rollout.pool import EnginePool


class RunEngines:
    """Starts the engines when a stage first needs them and stops them at the end of the `with` block.

    All stages use the same engines. They are built from the first stage's `rollout` and `model` settings; only the
    longest sequence is the maximum over the stages, and they record entropies if any stage wants them.
    """

    def __init__(self, configs: Sequence[Config]) -> None:
        self._configs = configs
        self._pool: EnginePool | None = None
        self._trainer: list[TrainerGpu] | None = None

    def __enter__(self) -> RunEngines:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def start(self) -> EnginePool | None:
        """Return the engines on rank 0 and None elsewhere; a collective. They may still be loading."""
        if self._trainer is None:
            self._trainer = [gpu for gpu in process_groups.gather_objects(_own_gpu()) if gpu is not None]
        if process_groups.rank() == 0 and self._pool is None:
            records_entropy = any(config.rollout.entropy for config in self._configs)
            num_alternatives = max(config.rollout.top_alternatives for config in self._configs)
            settings = self._configs[0].rollout.model_copy(
                update={"entropy": records_entropy, "top_alternatives": num_alternatives}
            )
            self._pool = EnginePool(settings, self._spec(), trainer=self._trainer)
        return self._pool

    def _spec(self) -> EngineSpec:
        first = self._configs[0]
        arch = read_architecture(first.model.path)
        tokenizer = load_tokenizer(first.data.tokenizer or first.model.path, vocab_size=arch.vocab_size)
        return EngineSpec(
            model_folder=first.model.path,
            max_model_len=max(config.max_sequence_tokens for config in self._configs),
            eos_ids=tokenizer.eos_ids,
            dtype=resolve_name(first.rollout.dtype, arch),
            device="cuda" if cpu.device().type == "cuda" else "cpu",
        )


def _own_gpu() -> TrainerGpu | None:
    device = cpu.device()
    return TrainerGpu(network.host_name(), name_of_gpu(device.index)) if device.type == "cuda" else None
