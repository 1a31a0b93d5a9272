"""Process groups: initialise the ranks, arrange them for model parallelism, and broadcast decisions of rank 0."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_entropy.config.schema import ParallelConfig
from megatron_entropy.distributed import cpu, loopback, network
from megatron_entropy.distributed.seeds import seed_generators
from megatron_entropy.errors import Fault, UserError

T = TypeVar("T")


def init_process_group(timeout: float = 3600.0, *, store: dist.Store | None = None) -> None:
    """Connect the ranks that torchrun started: NCCL and gloo on GPUs, gloo alone otherwise.

    Outside torchrun the process becomes the only rank.

    Args:
        timeout: seconds that a collective may take.
        store: where the ranks meet; by default torchrun's.
    Raises:
        Fault: the ranks cannot connect to one another.
    """
    loopback.activate()
    if not torch.cuda.is_available():
        backend = "gloo"
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    limit = datetime.timedelta(seconds=timeout)
    if store is None:
        dist.init_process_group(backend, timeout=limit)
        _connect_nccl()
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = dist.PrefixStore("default", store)
    try:
        dist.init_process_group(backend, timeout=limit, store=own, rank=rank, world_size=world_size)
        _connect_nccl()
    except (RuntimeError, dist.DistError) as error:
        reason = " ".join(str(error).split())
        interface = os.environ.get(network.GLOO, "chosen by its host name")
        raise Fault(
            f"the ranks cannot connect to one another over {network.host_name()}'s interface {interface} ({reason}); "
            f"name another one with {network.GLOO} and {network.NCCL}, or open the ports between the nodes"
        ) from None


def _connect_nccl() -> None:
    """Make NCCL's communicator of all ranks: a batch of sends between some of them must not be its first call."""
    if torch.cuda.is_available():
        dist.all_reduce(torch.zeros(1, device="cuda"))


def init_model_parallel(layout: ParallelConfig, seed: int) -> None:
    """Create Megatron's tensor, context, data, pipeline and expert parallel groups, and seed all generators.

    It may be called again with another layout of the same number of ranks.
    """
    cpu.activate()
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        _destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    seed_generators(seed)


def _destroy_model_parallel() -> None:
    """Destroy Megatron's groups, with their threads and communicators; Megatron itself only forgets most of them."""
    from megatron.core import parallel_state

    groups = dict.fromkeys(group for group in vars(parallel_state).values() if isinstance(group, dist.ProcessGroup))
    barrier()  # until no other rank uses them
    for group in groups:
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def rank() -> int:
    """Return this process's rank; 0 outside torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast_object(value: T | None) -> T:
    """Broadcast an object from rank 0; the values of other ranks are ignored."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value  # type: ignore[return-value]
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def run_on_rank_zero(function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank.

    Raises:
        UserError, Fault: on every rank, when the function raised one.
    """
    outcome: tuple[T | None, BaseException | None] | None = None
    if rank() == 0:
        try:
            outcome = (function(), None)
        except (UserError, Fault) as error:
            outcome = (None, error)
    result, error = broadcast_object(outcome)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def largest(value: float) -> float:
    """Return the largest of all ranks' values; a collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    number = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return float(number)


def gather_objects(value: T) -> list[T]:
    """Gather an object of every rank, in the order of the ranks; a collective."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank has called this."""
    if dist.is_initialized():
        dist.barrier()


def is_single_machine() -> bool:
    """Whether all ranks can map one another's memory: the same kernel, the same container; a collective."""
    machines = gather_objects(network.machine_id())
    return all(machine == machines[0] for machine in machines)


def destroy_process_group(*, failed: bool = False) -> None:
    """Destroy all process groups.

    Args:
        failed: this rank leaves alone. On GPUs the groups stay as they are then: NCCL would wait for operations that
            the other ranks never join.
    """
    if dist.is_initialized() and not (failed and torch.cuda.is_available()):
        dist.destroy_process_group()
