"""What all stages of a run share: the tokenizers and the rollout engines."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import Config
from megatron_entropy.data.tokenizer import Tokenizer, load_tokenizer
from megatron_entropy.distributed import cpu, network, process_groups
from megatron_entropy.distributed.dtypes import resolve_name
from megatron_entropy.methods import build_method
from megatron_entropy.rollout.engine import EngineSpec
from megatron_entropy.rollout.placement import TrainerGpu, name_of_gpu
from megatron_entropy.rollout.pool import EnginePool
from megatron_entropy.trainer.stop_signal import StopSignal

log = logging.getLogger(__name__)


class RunResources:
    """Loads the tokenizers, and has the engines from when a stage first needs them to the end of the `with` block.

    All stages use the same engines. They are built from the first stage's `rollout` and `model` settings; only the
    longest sequence is the maximum over the stages, and they record entropies if any stage wants them.

    Args:
        configs: of the stages, in order; the first one names the model.
        stop: its handlers are installed again when Ray has replaced them.
    Raises:
        UserError: a model folder or a tokenizer that cannot be read.
    """

    def __init__(self, configs: Sequence[Config], stop: StopSignal) -> None:
        self.arch = read_architecture(configs[0].model.path)
        self._configs = configs
        self._stop = stop
        paths = dict.fromkeys(map(self._tokenizer_path, configs))
        self._tokenizers = {path: load_tokenizer(path, vocab_size=self.arch.vocab_size) for path in paths}
        self._pool: EnginePool | None = None
        self._trainer: list[TrainerGpu] | None = None

    def __enter__(self) -> RunResources:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def tokenizer(self, config: Config) -> Tokenizer:
        """Return the tokenizer of a stage: its own, or that of the run's model, which every export keeps."""
        return self._tokenizers[self._tokenizer_path(config)]

    def _tokenizer_path(self, config: Config) -> str:
        return config.data.tokenizer or self._configs[0].model.path

    def start_engines(self) -> EnginePool | None:
        """Return the engines on rank 0 and None elsewhere; a collective. They may still be loading.

        Raises:
            UserError: on every rank, for engines that the machines have no room for.
            Fault: on every rank, when Ray or the engines cannot start.
        """
        if self._trainer is None:
            self._trainer = [gpu for gpu in process_groups.gather_objects(_own_gpu()) if gpu is not None]
        process_groups.run_on_rank_zero(self._start_engines)
        return self._pool

    def _start_engines(self) -> None:
        if self._pool is not None:
            return
        log.info("starting the rollout engines, which takes some seconds")
        records_entropy = any(config.rollout.entropy for config in self._configs)
        num_alternatives = max(config.rollout.top_alternatives for config in self._configs)
        settings = self._configs[0].rollout.model_copy(
            update={"entropy": records_entropy, "top_alternatives": num_alternatives}
        )
        assert self._trainer is not None
        self._pool = EnginePool(settings, self._spec(), trainer=self._trainer)
        self._stop.listen()  # Ray has replaced the signal handlers

    def _spec(self) -> EngineSpec:
        first = self._configs[0]
        return EngineSpec(
            model_folder=first.model.path,
            max_model_len=max(config.max_sequence_tokens for config in self._configs),
            eos_ids=self.tokenizer(first).eos_ids,
            dtype=resolve_name(first.rollout.dtype, self.arch),
            device="cuda" if cpu.device().type == "cuda" else "cpu",
        )


def needs_engines(config: Config) -> bool:
    """Whether a stage generates: to train or to evaluate."""
    return (build_method(config).uses_rollouts or bool(config.data.eval)) and not config.rollout.replay


def _own_gpu() -> TrainerGpu | None:
    device = cpu.device()
    return TrainerGpu(network.host_name(), name_of_gpu(device.index)) if device.type == "cuda" else None
