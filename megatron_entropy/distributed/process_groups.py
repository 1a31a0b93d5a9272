"""Process groups: join the ranks, lay them out, share what rank 0 decides."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_entropy.config.schema import ParallelConfig
from megatron_entropy.distributed import cpu
from megatron_entropy.distributed.seeds import seed_generators
from megatron_entropy.errors import Fault, UserError

T = TypeVar("T")


def init_process_group(timeout_minutes: float = 60.0) -> None:
    """Join the ranks torchrun started: NCCL and gloo where there are GPUs, gloo alone otherwise.

    Outside torchrun the process becomes a world of its own.
    """
    if not torch.cuda.is_available():
        backend = "gloo"
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))


def init_model_parallel(layout: ParallelConfig, seed: int) -> None:
    """Arrange the ranks as tensor x context x data x pipeline parallel groups and experts' own, seed all generators.

    May be called again with another layout of the same number of ranks.
    """
    cpu.activate()
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    seed_generators(seed)


def rank() -> int:
    """This process's rank, 0 outside torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast_object(value: T | None) -> T:
    """The value of rank 0 on every rank; what other ranks pass is ignored."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value  # type: ignore[return-value]
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def run_on_rank_zero(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its answer on every rank; an error it raises is raised on every rank."""
    outcome: tuple[T | None, BaseException | None] | None = None
    if rank() == 0:
        try:
            outcome = (function(), None)
        except (UserError, Fault) as error:
            outcome = (None, error)
    answer, error = broadcast_object(outcome)
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def is_single_machine() -> bool:
    """Whether all ranks can map one another's memory: the same kernel, the same container."""
    here = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid"))
    if not dist.is_initialized():
        return True
    everywhere = [here] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return len(set(everywhere)) == 1


def destroy_process_group() -> None:
    """Dissolve all groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
