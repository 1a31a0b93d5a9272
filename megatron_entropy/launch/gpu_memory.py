"""Whether weights fit on a GPU, before anything is allocated. Activations and optimizer state are not estimated."""

from __future__ import annotations

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import Config
from megatron_entropy.errors import ConfigError

GIGABYTE = 1e9
BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}
"""Bytes of a weight on a GPU, by `dtype`."""


def check_gpu_memory(config: Config, arch: ModelArchitecture, total_gb: float) -> None:
    """Compare the weights of engine and trainer with a GPU's memory.

    Args:
        total_gb: of the smallest GPU.
    Raises:
        ConfigError: an engine's weights do not fit into its share, or both sides' not on one GPU during a weight sync.
    """
    rollout, layout = config.rollout, config.actor.parallel
    parameters = arch.num_parameters / GIGABYTE
    engine = parameters * BYTES[rollout.dtype] / rollout.tensor_parallel
    trainer = parameters * BYTES[config.actor.dtype] / (layout.tp * layout.pp)
    share = rollout.gpu_memory_utilization * total_gb
    if engine > share:
        raise ConfigError(
            f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization} gives an engine {share:.1f} GB of a GPU, "
            f"and its weights take {engine:.1f} GB; raise it, or rollout.tensor_parallel"
        )
    if rollout.colocate and engine + trainer > total_gb:
        raise ConfigError(
            f"rollout.colocate=true: during a weight sync a GPU of {total_gb:.1f} GB holds {trainer:.1f} GB of the "
            f"trainer's weights and {engine:.1f} GB of the engine's; raise actor.parallel.tp or rollout.tensor_parallel"
        )
