"""Single answers graded concurrently, for a server: a bounded queue in front of worker processes.

Every worker belongs to a thread of its own, a `WorkerPool` of one process. So an answer that kills its worker cannot
disturb another one, and the promises of `WorkerPool` hold for each answer: a hang or crash is an error of this answer
only, and a worker killed from outside costs no grade.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from megatron_entropy.errors import Fault
from megatron_entropy.records import Grade
from megatron_entropy.rewards.pool import WorkerPool
from megatron_entropy.rewards.worker import Task

logger = logging.getLogger(__name__)
SLACK_SECONDS = 60.0  # beyond the time limits of an answer and its repetition: for the start of a new worker
RESTART_SECONDS = 5.0  # wait after workers could not be started


class QueueFull(Exception):
    """The queue has no room for the answers now."""


class QueueStopped(Exception):
    """The queue takes no more answers."""


class GradingQueue:
    """Grades tasks in worker processes, the oldest first; every method may be called from any thread.

    Args:
        verifiers: names that tasks may use.
        workers: number of processes.
        timeout: seconds for one answer.
        capacity: number of answers that may wait for a worker.
        on_grade: called with the task, its grade, and the seconds since it was submitted.
        on_lost_worker: called when a worker was killed or died.
    """

    def __init__(
        self,
        verifiers: Sequence[str],
        *,
        workers: int,
        timeout: float,
        capacity: int,
        on_grade: Callable[[Task, Grade, float], None] = lambda task, grade, seconds: None,
        on_lost_worker: Callable[[], None] = lambda: None,
    ) -> None:
        self.verifiers = tuple(verifiers)
        self.timeout = timeout
        self.capacity = capacity
        self._on_grade = on_grade
        self._on_lost_worker = on_lost_worker
        self._waiting: deque[tuple[Task, Future[Grade], float]] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._generation = 0
        self._is_stopped = False
        self.restart(workers)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return len(self._threads)

    @property
    def is_running(self) -> bool:
        """Whether answers are taken."""
        return not self._is_stopped

    @property
    def length(self) -> int:
        """Number of answers that wait for a worker."""
        return len(self._waiting)

    def restart(self, workers: int) -> None:
        """Replace the workers; each finishes its answer first, the waiting answers go to the new ones.

        Raises:
            QueueStopped: after `stop`.
        """
        with self._changed:
            if self._is_stopped:
                raise QueueStopped
            self._generation += 1
            arguments = (self._generation,)
            threads = [threading.Thread(target=self._work, args=arguments, daemon=True) for _ in range(workers)]
            self._threads = threads
            self._changed.notify_all()
        for thread in threads:
            thread.start()

    def submit(self, tasks: Sequence[Task]) -> list[Future[Grade]]:
        """Put tasks into the queue, all or none; a cancelled future is not graded.

        Returns:
            The grade of each task. A future raises `Fault` if its worker cannot be started, `QueueStopped` if the
            queue was stopped first.

        Raises:
            QueueFull: there is no room for all of them.
            QueueStopped: after `stop`.
        """
        futures: list[Future[Grade]] = [Future() for _ in tasks]
        now = time.monotonic()
        with self._changed:
            if self._is_stopped:
                raise QueueStopped
            if len(self._waiting) + len(tasks) > self.capacity:
                self._waiting = deque(entry for entry in self._waiting if not entry[1].cancelled())
            if len(self._waiting) + len(tasks) > self.capacity:
                raise QueueFull
            self._waiting.extend((task, future, now) for task, future in zip(tasks, futures, strict=True))
            self._changed.notify(len(tasks))
        return futures

    def stop(self) -> None:
        """Take no more answers and give up the waiting ones; those that workers have begun are finished."""
        with self._changed:
            self._is_stopped = True
            self._generation += 1
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for _, future, _ in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(QueueStopped())

    def join(self, seconds: float) -> None:
        """Wait after `stop` until the workers have ended, at most `seconds`."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _next(self, generation: int) -> tuple[Task, Future[Grade], float] | None:
        """Wait for the oldest task; None after a restart or stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._generation != generation)
            return self._waiting.popleft() if self._generation == generation else None

    def _work(self, generation: int) -> None:
        """Grade one task after the other with one worker, until a restart or stop."""
        with WorkerPool(self.verifiers, workers=1, timeout=self.timeout) as pool:
            self._start(pool)
            while (entry := self._next(generation)) is not None:
                task, future, submitted = entry
                if not future.set_running_or_notify_cancel():
                    continue
                lost_before = pool.lost_workers
                try:
                    (grade,) = pool.grade_tasks([task], 2 * self.timeout + SLACK_SECONDS)
                except Fault as fault:
                    future.set_exception(fault)
                    time.sleep(RESTART_SECONDS)
                    continue
                for _ in range(pool.lost_workers - lost_before):
                    self._on_lost_worker()
                self._on_grade(task, grade, time.monotonic() - submitted)
                future.set_result(grade)

    def _start(self, pool: WorkerPool) -> None:
        """Start the worker before its first answer comes."""
        try:
            pool.start()
        except Fault as fault:
            logger.error("%s", fault)
