"""Notices that a machine of the run no longer answers, while the ranks wait for it in a collective.

Every rank counts up in torchrun's store. Rank 0 watches all counters, the others watch that of rank 0 and whether the
store answers. So a lost machine is noticed however long a step takes. A short loss is a warning; the connections of the
collectives go on by themselves after it.
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_entropy.distributed.peers import FAILURE, Peers

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two signs of life."""
STOP_TIMEOUT = 5.0
"""Seconds that the threads may take to stop; one may wait for a lost machine."""
NOTICE_AFTER = 10.0
"""Seconds of silence that are worth a warning, and that go by after a stop signal until it is obeyed without the step.

The connection to the store may take some seconds longer to recover from a short loss than those of the collectives."""
FAILURE_GRACE = 15.0
"""Seconds that a rank may go on after another one has failed; its collective may break by itself, with a clean end."""


class Liveness:
    """Two daemon threads: one exchanges signs of life, the other judges them, because the first may have to wait.

    Args:
        lost_after: seconds of silence after which a rank counts as lost.
        end: called with the reason and the exit code when this rank cannot go on; does not return.
    """

    def __init__(self, peers: Peers, *, lost_after: float, end: Callable[[str, int], None]) -> None:
        self._peers = peers
        self._lost_after = lost_after
        self._end = end
        self._watched = range(1, peers.world_size) if peers.rank == 0 else range(1)
        self._heard = dict.fromkeys(self._watched, time.monotonic())
        self._counts: dict[int, bytes] = {}
        self._failed_since: float | None = None
        self._silent = ""
        self._stop_signal = 0
        self._signalled = 0.0
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start to watch; to be called in the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        # A signal handler of Python runs only when the main thread does, which may wait in a collective.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._threads = [
            threading.Thread(target=self._exchange_forever, daemon=True, name="signs-of-life"),
            threading.Thread(target=self._judge_forever, args=(reader,), daemon=True, name="liveness"),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop to watch; a thread inside the store must not meet the end of the interpreter."""
        self._stopped.set()
        signal.set_wakeup_fd(-1)
        for thread in self._threads:
            thread.join(STOP_TIMEOUT)

    def _exchange_forever(self) -> None:
        store: Any = None
        count = 0
        while not self._stopped.is_set():
            try:
                if store is None:
                    store = self._peers.store.clone()
                    store.set_timeout(datetime.timedelta(seconds=self._lost_after))
                count += 1
                self._exchange(store, count)
            except (RuntimeError, dist.DistError):
                store = None  # a reply that comes too late would be taken for the next one's
            self._stopped.wait(INTERVAL)

    def _exchange(self, store: Any, count: int) -> None:
        store.set(f"alive/{self._peers.rank}", str(count))
        for rank in self._watched:
            if store.check([f"alive/{rank}"]) and (counted := store.get(f"alive/{rank}")) != self._counts.get(rank):
                self._counts[rank], self._heard[rank] = counted, time.monotonic()
        if self._failed_since is None and store.check([FAILURE]):
            self._failed_since = time.monotonic()

    def _judge_forever(self, signals: int) -> None:
        while not self._stopped.wait(INTERVAL):
            if number := self._read_signal(signals):
                self._stop_signal, self._signalled = number, time.monotonic()
            self._judge(time.monotonic())

    def _judge(self, now: float) -> None:
        if self._failed_since is not None and now - self._failed_since > FAILURE_GRACE:
            self._end("another rank has failed", 1)
        rank = min(self._heard, key=self._heard.__getitem__)
        silence = now - self._heard[rank]
        name = f"rank {rank} on {self._peers.nodes[rank]}"
        if silence > self._lost_after:
            self._end(
                f"{name} has not answered {self._peers.node} for {silence:.0f} s (cluster.lost_after="
                f"{self._lost_after:g}); the machine or the network between them is down; continue with --resume",
                1,
            )
        if self._stop_signal and min(silence, now - self._signalled) > NOTICE_AFTER:
            name_of_signal = signal.Signals(self._stop_signal).name
            self._end(f"{name_of_signal} received while {name} does not answer; continue with --resume", 143)
        if silence > NOTICE_AFTER and not self._silent:
            self._silent = name
            log.warning(
                "%s has not answered %s for %.0f s; the run ends after %g s", name, self._peers.node, silence,
                self._lost_after,
            )  # fmt: skip
        elif silence < NOTICE_AFTER and self._silent:
            log.warning("%s answers again", self._silent)
            self._silent = ""

    @staticmethod
    def _read_signal(pipe: int) -> int:
        try:
            numbers = os.read(pipe, 64)
        except BlockingIOError:
            return 0
        return next((number for number in numbers if number in (signal.SIGTERM, signal.SIGINT)), 0)
