"""Where engines run: on GPUs that no trainer rank uses, and on the nodes that `rollout.nodes` names.

Ray knows nothing of the trainer's ranks, which torchrun has started, and would give their GPUs to engines. So rank 0
holds every GPU of the trainer in the joined cluster, each by an actor that does nothing. Ray is imported where it is
used, so that a launcher can count GPUs without it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.errors import ConfigError, Fault

HOLD_TIMEOUT = 120.0
"""Seconds until the actors that hold the trainer's GPUs have started."""
NODE_LABEL = "ray.io/node-id"
"""Ray's own label of every node."""


@dataclass(frozen=True)
class TrainerGpu:
    """The GPU of a trainer's rank: the name of its machine, and what `CUDA_VISIBLE_DEVICES` calls the GPU there."""

    node: str
    gpu: str


@dataclass
class Node:
    """A living node of a Ray cluster; `cpus` and `gpus` are those that are free."""

    ray_id: str
    name: str
    address: str
    cpus: float
    gpus: float


def name_of_gpu(index: int) -> str:
    """Return what `CUDA_VISIBLE_DEVICES` calls the GPU that torch numbers `index`; its number where that is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index].strip() if visible else str(index)


def gpus_beside_the_trainer(config: RolloutConfig) -> list[str]:
    """Return the GPUs of this machine that no trainer rank uses, for engines without a joined cluster.

    Raises:
        ConfigError: they are too few for the engines; the message says how many are missing.
    """
    import torch

    gpus = [name_of_gpu(index) for index in range(torch.cuda.device_count())]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, needed = gpus[ranks:], config.num_engines * config.tensor_parallel
    if len(free) < needed:
        beside = f" beside the trainer's {ranks}" if ranks else ""
        advice = " or actor.parallel, or set rollout.colocate=true" if ranks else ""
        raise ConfigError(
            f"rollout.num_engines={config.num_engines} engines with rollout.tensor_parallel={config.tensor_parallel} "
            f"need {needed} GPUs{beside}; this machine has {len(gpus)}, so {needed - len(free)} are missing; lower one "
            f"of them{advice}"
        )
    return free


def living_nodes() -> list[Node]:
    """Return the nodes of the joined cluster that are alive, and what is free on them."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    nodes = []
    for entry in ray.nodes():
        if entry["Alive"]:
            room = free.get(entry["NodeID"], {})
            name, address = entry["NodeManagerHostname"], entry["NodeManagerAddress"]
            nodes.append(Node(entry["NodeID"], name, address, room.get("CPU", 0), room.get("GPU", 0)))
    return nodes


def choose(nodes: Sequence[Node], names: Sequence[str]) -> list[Node]:
    """Return the nodes with these host names or addresses; all nodes for no names.

    Raises:
        ConfigError: one of the names is not in the cluster.
    """
    for name in names:
        if not any(name in (node.name, node.address) for node in nodes):
            found = ", ".join(f"{node.name} ({node.address})" for node in nodes)
            raise ConfigError(f"rollout.nodes: {name} is no node of the Ray cluster, which has {found}")
    return [node for node in nodes if not names or node.name in names or node.address in names]


def selector(names: Sequence[str]) -> dict[str, str] | None:
    """Return Ray's `label_selector` for an engine that may run on these nodes only; None for any node."""
    if not names:
        return None
    ids = [node.ray_id for node in choose(living_nodes(), names)]
    return {NODE_LABEL: ids[0] if len(ids) == 1 else f"in({', '.join(ids)})"}


def hold_gpus(nodes: Sequence[Node], trainer: Sequence[TrainerGpu]) -> list[Any]:
    """Hold the trainer's GPUs in Ray, so that it gives them to nobody else; lowers `gpus` of the nodes.

    Ray chooses the GPU of an actor. So every free GPU of the trainer's nodes is taken for a moment, and those that the
    trainer does not use are given back. GPUs that Ray does not have, or has given away, need not be held.

    Args:
        trainer: one GPU for each rank.
    Returns:
        The actors; a GPU is held until the last reference to its actor is gone.
    Raises:
        ConfigError: Ray and the trainer name the GPUs of a machine in two ways, so that they cannot be compared.
        Fault: the actors do not start.
    """
    import ray
    from ray.exceptions import RayError

    class Holder:  # in here, so that Ray sends it with its code: other nodes may not have this package on their path
        def gpu(self) -> str:
            return str(ray.get_gpu_ids()[0])

    held = []
    for node in nodes:
        used = {rank.gpu for rank in trainer if rank.node in (node.name, node.address)}
        if not used or node.gpus < 1:
            continue
        actor = ray.remote(Holder).options(  # type: ignore[attr-defined]
            num_cpus=0, num_gpus=1, max_restarts=0, label_selector={NODE_LABEL: node.ray_id}
        )
        holders = [actor.remote() for _ in range(int(node.gpus))]
        try:
            names = ray.get([holder.gpu.remote() for holder in holders], timeout=HOLD_TIMEOUT)
        except RayError as error:
            raise Fault(f"the trainer's GPUs on {node.name} cannot be held in the Ray cluster: {error}") from error
        if {name.isdigit() for name in names} != {name.isdigit() for name in used}:
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES on {node.name} names GPUs in two ways: {', '.join(sorted(used))} for the "
                f"trainer and {', '.join(sorted(names))} for Ray; use numbers, or UUIDs, for both"
            )
        for holder, name in zip(holders, names, strict=True):
            if name in used:
                held.append(holder)
                node.gpus -= 1
            else:
                ray.kill(cast(Any, holder))
    return held


def check_room(config: RolloutConfig, nodes: Sequence[Node], *, on_gpus: bool, num_held: int = 0) -> None:
    """See that a joined cluster has room for the engines now; Ray itself would wait for more nodes without a word.

    Args:
        nodes: that engines may use.
        num_held: GPUs that are held for the trainer, for the message.
    Raises:
        ConfigError: it has too few free CPUs or GPUs; the message says how many are missing.
    """
    size = config.tensor_parallel if on_gpus else 1
    fitting = sum(int(min(node.gpus // size, node.cpus) if on_gpus else node.cpus) for node in nodes)
    missing = config.num_engines - fitting
    if missing > 0:
        kind = "GPU" if on_gpus else "CPU"
        needs = f"1 CPU and {size} GPUs of one node" if on_gpus else "1 CPU"
        free = ", ".join(f"{node.name} {node.gpus if on_gpus else node.cpus:g}" for node in nodes)
        held = f" beside the trainer's {num_held}" if num_held else ""
        raise ConfigError(
            f"the Ray cluster has room for {fitting} of rollout.num_engines={config.num_engines} engines, each of "
            f"which needs {needs}: {missing * size} {kind}s are missing; free {kind}s{held}: {free or 'none'}; start "
            "more nodes with ray start --address, or lower rollout.num_engines"
        )
