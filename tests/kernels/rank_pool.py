"""A pool of gloo processes for the tests: functions are sent to ranks 0..tp-1, results come back."""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _worker(rank: int, size: int, port: int, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    groups = {tp: dist.new_group(list(range(tp))) for tp in (1, 2, 4) if tp <= size}
    while (job := inbox.get()) is not None:
        function, tp, arguments = job
        try:
            result = function(rank, groups[tp], *arguments)
            buffer = io.BytesIO()
            torch.save(result, buffer)
            outbox.put((rank, buffer.getvalue(), None))
        except Exception:
            outbox.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class RankPool:
    """`size` gloo processes; `run` executes one function on the first tp of them."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self.outbox = context.Queue()
        self.inboxes = [context.Queue() for _ in range(size)]
        port = _free_port()
        self.processes = [
            context.Process(target=_worker, args=(r, size, port, self.inboxes[r], self.outbox), daemon=True)
            for r in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, tp: int, *arguments: Any) -> list[Any]:
        """`function(rank, group, *arguments)` on ranks 0..tp-1; the results in rank order."""
        for inbox in self.inboxes[:tp]:
            inbox.put((function, tp, arguments))
        results: list[Any] = [None] * tp
        errors = []
        for _ in range(tp):
            rank, payload, error = self.outbox.get(timeout=120)
            if error is not None:
                errors.append(f"rank {rank}:\n{error}")
            else:
                results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
        assert not errors, "\n".join(errors)
        return results

    def close(self) -> None:
        """End the processes."""
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(timeout=20)
