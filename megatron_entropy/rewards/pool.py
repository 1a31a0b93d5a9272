"""Grading in worker processes, on `pebble.ProcessPool`, so that a verifier may hang or crash.

- A response whose verifier hangs, crashes or raises gets `Grade(correct=None, error=...)`. Its worker is replaced and
  all other responses are graded.
- A worker may also be killed from outside (by the out-of-memory killer) while it grades a harmless response. So a
  response counts as a crash only when a second worker has died on it.
- Workers are fresh interpreters (spawn). They import the verifier, but neither torch nor the caller's main script.
  The first `grade` starts them.
- Grading ends when its budget of time is used up. The responses without a grade then get the error `budget`.

`RewardPool` is what a run uses; `GradingQueue` (grading_queue.py) grades single answers for a server.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as GradeTimeout
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Self

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from megatron_entropy.errors import ConfigError, Fault
from megatron_entropy.records import Grade
from megatron_entropy.rewards import worker
from megatron_entropy.rewards.registry import INLINE, VERIFIERS, load_verifier
from megatron_entropy.rewards.worker import Task

logger = logging.getLogger(__name__)
BUDGET_RESPONSES = 1000  # a call with more responses gets proportionally more time
CHECK_SECONDS = 5.0  # limit of `check_verifier` for its response
START_SECONDS = 300.0  # limit for a worker to import its verifiers
MAX_BREAKDOWNS = 5  # of the whole pool in a row, without a new grade; then the first response without one is the cause
UNUSABLE = ("timeout", "crash", "TypeError: the verifier returned", "NameError", "ImportError", "ModuleNotFoundError")
"""Beginnings of errors that show a verifier to be unusable."""


class WorkerPool:
    """Processes that grade tasks by the verifiers they have imported.

    Args:
        verifiers: names, see `load_verifier`.
        workers: number of processes.
        timeout: seconds for one response.

    `lost_workers`: number of processes that were killed or died so far, each of which was replaced.
    """

    def __init__(self, verifiers: Sequence[str], *, workers: int, timeout: float) -> None:
        assert workers > 0 and timeout > 0, (workers, timeout)
        self.verifiers = tuple(verifiers)
        self.workers = workers
        self.timeout = timeout
        self.lost_workers = 0
        self._pool: ProcessPool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers, unless they run.

        Raises:
            Fault: they cannot be started.
        """
        self._running_pool()

    def close(self) -> None:
        """Stop the workers immediately; the next task starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def grade_tasks(self, tasks: Sequence[Task], seconds: float) -> list[Grade]:
        """Grade tasks within `seconds`, to which the start of the workers is not counted.

        Returns:
            The grades in the order of the tasks, see `RewardPool.grade`.

        Raises:
            Fault: the workers cannot be started.
        """
        if not tasks:
            return []
        grades: dict[int, Grade] = {}
        suspects: set[int] = set()
        breakdowns = 0
        self._running_pool()
        deadline = time.monotonic() + min(seconds, threading.TIMEOUT_MAX)
        while len(grades) < len(tasks):
            before = len(grades)
            self._attempt(tasks, grades, suspects, deadline)
            if time.monotonic() >= deadline:
                break
            breakdowns = breakdowns + 1 if len(grades) == before else 0
            if breakdowns == MAX_BREAKDOWNS:
                first = next(index for index in range(len(tasks)) if index not in grades)
                grades[first] = Grade(None, error="crash")
                breakdowns = 0
        if len(grades) < len(tasks):
            self.close()
        return [grades.get(index, Grade(None, error="budget")) for index in range(len(tasks))]

    def _attempt(self, tasks: Sequence[Task], grades: dict[int, Grade], suspects: set[int], deadline: float) -> None:
        """Grade the tasks that have no grade yet, until all are graded, the pool breaks down, or the deadline.

        A response whose worker dies becomes a suspect and is graded again in the next attempt; if its worker dies
        again, it gets `crash`. pebble stops its pool when it cannot tell which response a dead worker was grading.
        The tasks without a grade then go to a new pool.

        Args:
            tasks: all tasks of the call.
            grades: by index of the task; filled here.
            suspects: indices of tasks whose worker has died once; filled here.
            deadline: a time of `time.monotonic`.
        """
        pool = self._running_pool()
        futures = {}
        try:
            for index, task in enumerate(tasks):
                if index not in grades:
                    futures[index] = pool.schedule(worker.grade_task, args=task, timeout=self.timeout)
            is_broken = False
        except RuntimeError:  # the pool broke down while tasks were being scheduled
            is_broken = True
        for index, future in futures.items():
            try:
                error = future.exception(max(0.0, deadline - time.monotonic()))
            except GradeTimeout:  # the deadline; a response that takes too long returns its error
                continue
            grade = _result(future, error)
            self.lost_workers += isinstance(error, GradeTimeout | ProcessExpired)
            if grade is None:
                is_broken = True
            elif isinstance(error, ProcessExpired) and index not in suspects:
                suspects.add(index)
            else:
                grades[index] = grade
        if is_broken:
            self.lost_workers += 1
            self.close()

    def _running_pool(self) -> ProcessPool:
        """A pool whose first worker is prepared; started twice at most, as a worker may be killed meanwhile."""
        if self._pool is not None and not self._pool.active:  # a worker died between two calls
            self.lost_workers += 1
            self.close()
        for attempt in range(2):
            if self._pool is not None:
                break
            self._pool = pool = ProcessPool(
                max_workers=self.workers,
                initializer=worker.prepare,
                initargs=(self.verifiers,),
                context=worker.WorkerContext(),
            )
            try:
                pool.schedule(worker.ready).result(START_SECONDS)
            except (GradeTimeout, BrokenProcessPool, ProcessExpired) as error:
                self.close()
                if attempt:
                    names = ", ".join(map(repr, self.verifiers))
                    raise Fault(
                        f"the reward workers cannot load the verifier {names}: importing it in a fresh "
                        f"`{sys.executable}` fails or takes more than {START_SECONDS:.0f} s"
                    ) from error
        assert self._pool is not None
        return self._pool


class RewardPool(WorkerPool):
    """Grades responses with one verifier, in worker processes if the verifier may hang or crash.

    The string verifiers (`registry.INLINE`) run in the caller's process, which is much faster. The other ones and
    external verifiers run in workers. Use the pool as a context manager, or call `close`.

    Args:
        verifier: see `load_verifier`.
        workers: number of processes.
        timeout: seconds for one response.
        budget: seconds for one call of `grade` with up to `BUDGET_RESPONSES` responses, without the start of the
            workers.

    Raises:
        ConfigError: an unknown verifier.
    """

    def __init__(self, *, verifier: str, workers: int = 2, timeout: float = 10.0, budget: float = 60.0) -> None:
        assert budget > 0, budget
        super().__init__([verifier], workers=workers, timeout=timeout)
        self.verifier = verifier
        self.budget = budget
        self._function = load_verifier(verifier)

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (response, ground truth) pairs.

        Returns:
            The grades in the order of the pairs. `error` is `timeout`, `crash` (the process died or ran out of
            memory), `budget` (the call had no time left), or what the verifier raised (`ValueError: message`).

        Raises:
            Fault: the workers cannot be started.
        """
        if self.verifier in INLINE:
            return [worker.call_verifier(self._function, response, answer) for response, answer in pairs]
        seconds = scale_budget(self.budget, len(pairs))
        grades = self.grade_tasks([(self.verifier, response, answer) for response, answer in pairs], seconds)
        if skipped := sum(grade.error == "budget" for grade in grades):
            logger.warning(
                "%d of %d responses were not graded within %g s and count as errors (reward/error_budget): raise "
                "reward.budget or reward.workers, or lower reward.timeout",
                skipped,
                len(pairs),
                seconds,
            )
        return grades


def scale_budget(budget: float, num_responses: int) -> float:
    """Seconds for one call: `budget` for up to `BUDGET_RESPONSES` responses, proportionally more for more."""
    return budget * max(1.0, num_responses / BUDGET_RESPONSES)


def check_verifier(name: str, answer: str = "1") -> None:
    """Load a verifier and grade one trivial response; one from outside the package runs in a worker.

    Args:
        answer: the ground truth for a verifier from outside, best one of the data. It may raise on a ground truth that
            it cannot read.

    Raises:
        ConfigError: the verifier is unknown, cannot be imported or called, does not end, kills its process or returns
            neither a Grade nor a bool.
    """
    if name in VERIFIERS:
        error = worker.call_verifier(load_verifier(name), "1", "1").error or ""
    else:
        try:
            with RewardPool(verifier=name, workers=1, timeout=CHECK_SECONDS) as pool:
                error = pool.grade([("1", answer)])[0].error or ""
        except Fault as fault:
            raise ConfigError(f"reward.verifier: {fault}") from fault
    if error.startswith(UNUSABLE):
        raise ConfigError(f"reward.verifier: {name!r} cannot grade the response '1' ({error}); correct the function")


def _result(future: ProcessFuture, error: BaseException | None) -> Grade | None:
    """The grade of one response, or None if the whole pool broke down before it had one."""
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        return None
    return Grade(None, error="timeout" if isinstance(error, GradeTimeout) else "crash")
