"""Run a function on several CPU ranks of this machine, for tests and tools."""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.queues
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_entropy.distributed.memory import use_one_heap
from megatron_entropy.distributed.process_groups import destroy_process_group

T = TypeVar("T")


def run_on_ranks(function: Callable[..., T], ranks: int, *args: object, timeout_s: float = 600.0) -> list[T]:
    """Call `function(*args)` on CPU ranks of this machine, connected over gloo, and return the results by rank.

    Ranks fork from one server process that has imported the libraries, so the second and later calls start them in well
    under a second.

    Args:
        function: a top-level function; it, its arguments and its result must be picklable.
        ranks: number of ranks.
        timeout_s: seconds until the call fails.
    Raises:
        RuntimeError: with the traceback of the first rank that failed, the exit code of one that died, or the ranks
            that were too slow; all ranks are stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_entropy.actor.actor", "megatron_entropy.weights.source"])
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        processes = [
            context.Process(target=_rank_main, args=(function, rank, ranks, folder, queue, args))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            results = _collect(queue, processes, timeout_s)
            for process in processes:
                process.join(timeout=30)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(queue: multiprocessing.queues.SimpleQueue, processes: list, timeout_s: float) -> list:
    """Results by rank, as they arrive in the queue."""
    ranks = len(processes)
    results: dict[int, object] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < ranks:
        if not queue.empty():
            rank, failure, result = queue.get()
            if failure:
                raise RuntimeError(f"rank {rank} of {ranks} failed:\n{failure}")
            results[rank] = result
        elif dead := [i for i, p in enumerate(processes) if i not in results and p.exitcode not in (None, 0)]:
            raise RuntimeError(f"rank {dead[0]} of {ranks} died with exit code {processes[dead[0]].exitcode}")
        elif time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(set(range(ranks)) - set(results))} did not finish in {timeout_s} s")
        else:
            time.sleep(0.01)
    return [results[rank] for rank in range(ranks)]


def _rank_main(
    function: Callable, rank: int, ranks: int, folder: str, queue: multiprocessing.queues.SimpleQueue, args: tuple
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    use_one_heap()  # as a rank of `megatron-entropy train` does
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
        destroy_process_group()
