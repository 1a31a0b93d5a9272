"""Process groups: join the ranks, lay them out, share what rank 0 decides."""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.queues
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_entropy import cpu
from megatron_entropy.config import ParallelConfig
from megatron_entropy.errors import Fault, UserError

T = TypeVar("T")


def join(timeout_minutes: float = 60.0) -> None:
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


def lay_out(layout: ParallelConfig, seed: int) -> None:
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


def seed_generators(seed: int) -> None:
    """Seed every generator a rank has; all ranks alike, but for Megatron's, which differ by place as they must."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def rank() -> int:
    """This process's rank, 0 outside torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(value: T | None) -> T:
    """The value of rank 0 on every rank; what other ranks pass is ignored."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value  # type: ignore[return-value]
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def on_first_rank(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its answer on every rank; an error it raises is raised on every rank."""
    outcome: tuple[T | None, BaseException | None] | None = None
    if rank() == 0:
        try:
            outcome = (function(), None)
        except (UserError, Fault) as error:
            outcome = (None, error)
    answer, error = share(outcome)
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def meet() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def on_one_machine() -> bool:
    """Whether all ranks can map one another's memory: the same kernel, the same container."""
    here = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid"))
    if not dist.is_initialized():
        return True
    everywhere = [here] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return len(set(everywhere)) == 1


def leave() -> None:
    """Dissolve all groups."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_on_ranks(function: Callable[..., T], ranks: int, *args: object, timeout_s: float = 600.0) -> list[T]:
    """Call `function(*args)` on so many CPU ranks of this machine, joined over gloo, and return their answers.

    Ranks fork from one server process that has imported the libraries already, so starting them takes well under a
    second from the second call on.

    Args:
        function: a top-level function; it, its arguments and answers must be picklable.
    Raises:
        RuntimeError: with the traceback of the first rank that failed; all others are stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_entropy.actor.actor", "megatron_entropy.resharding.source"])
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        processes = [
            context.Process(target=_rank_main, args=(function, rank, ranks, folder, queue, args))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            answers = _collect(queue, processes, ranks, timeout_s)
            for process in processes:
                process.join(timeout=30)
            return answers
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(queue: multiprocessing.queues.SimpleQueue, processes: list, ranks: int, timeout_s: float) -> list:
    answers: dict[int, object] = {}
    deadline = time.monotonic() + timeout_s
    while len(answers) < ranks:
        if not queue.empty():
            rank, failure, answer = queue.get()
            if failure:
                raise RuntimeError(f"rank {rank} of {ranks} failed:\n{failure}")
            answers[rank] = answer
        elif dead := [p for i, p in enumerate(processes) if i not in answers and p.exitcode not in (None, 0)]:
            raise RuntimeError(f"a rank died with exit code {dead[0].exitcode}")
        elif time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(set(range(ranks)) - set(answers))} did not answer in {timeout_s} s")
        else:
            time.sleep(0.01)
    return [answers[rank] for rank in range(ranks)]


def _rank_main(
    function: Callable, rank: int, ranks: int, folder: str, queue: multiprocessing.queues.SimpleQueue, args: tuple
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(minutes=5),
        )
        queue.put((rank, None, function(*args)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
    finally:
        leave()
