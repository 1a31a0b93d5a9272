"""Grading in worker processes, on `pebble.ProcessPool`, so that a verifier may hang or crash.

- A response whose verifier hangs, crashes or raises gets `Grade(correct=None, error=...)`. Its worker is replaced and
  all other responses are graded.
- A worker may also be killed from outside (by the out-of-memory killer) while it grades a harmless response. So a
  response counts as a crash only when a second worker has died on it.
- Workers are fresh interpreters (spawn). They import the verifier, but neither torch nor the caller's main script.
  The first `grade` starts them.
- Grading ends when its budget of time is used up. The responses without a grade then get the error `budget`.
"""

from __future__ import annotations

import importlib.machinery
import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as GradeTimeout
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from types import TracebackType

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from megatron_entropy.errors import ConfigError, Fault
from megatron_entropy.records import Grade
from megatron_entropy.rewards.registry import INLINE, VERIFIERS, Verifier, load_verifier

logger = logging.getLogger(__name__)
BUDGET_RESPONSES = 1000  # a call with more responses gets proportionally more time
CHECK_SECONDS = 5.0  # limit of `check_verifier` for its response
START_SECONDS = 300.0  # limit for a worker to import its verifier
MAX_BREAKDOWNS = 5  # of the whole pool in a row, without a new grade; then the first response without one is the cause
UNUSABLE = ("timeout", "crash", "TypeError: the verifier returned", "NameError", "ImportError", "ModuleNotFoundError")
ERROR_LENGTH = 120  # characters of an error message kept in a grade
MEMORY_GIB = 4.0  # memory that grading may add to what a worker uses after its imports


class RewardPool:
    """Grades responses with one verifier, in worker processes if the verifier may hang or crash.

    The string verifiers (`registry.INLINE`) run in the caller's process, which is much faster. `math_verify` and
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
        assert workers > 0 and timeout > 0 and budget > 0, (workers, timeout, budget)
        self.verifier = verifier
        self.workers = workers
        self.timeout = timeout
        self.budget = budget
        self._function = load_verifier(verifier)
        self._pool: ProcessPool | None = None

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers immediately; a later `grade` starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (response, ground truth) pairs.

        Returns:
            The grades in the order of the pairs. `error` is `timeout`, `crash` (the process died or ran out of
            memory), `budget` (the call had no time left), or what the verifier raised (`ValueError: message`).

        Raises:
            Fault: the workers cannot be started.
        """
        if self.verifier in INLINE:
            return [_grade(self._function, response, answer) for response, answer in pairs]
        if not pairs:
            return []
        grades: dict[int, Grade] = {}
        suspects: set[int] = set()
        breakdowns = 0
        self._running_pool()
        seconds = min(self.budget * max(1.0, len(pairs) / BUDGET_RESPONSES), threading.TIMEOUT_MAX)
        deadline = time.monotonic() + seconds
        while len(grades) < len(pairs):
            before = len(grades)
            self._attempt(pairs, grades, suspects, deadline)
            if time.monotonic() >= deadline:
                break
            breakdowns = breakdowns + 1 if len(grades) == before else 0
            if breakdowns == MAX_BREAKDOWNS:
                first = next(index for index in range(len(pairs)) if index not in grades)
                grades[first] = Grade(None, error="crash")
                breakdowns = 0
        if len(grades) < len(pairs):
            self.close()
            logger.warning(
                "%d of %d responses were not graded within %g s and count as errors (reward/error_budget): raise "
                "reward.budget or reward.workers, or lower reward.timeout",
                len(pairs) - len(grades),
                len(pairs),
                seconds,
            )
        return [grades.get(index, Grade(None, error="budget")) for index in range(len(pairs))]

    def _attempt(
        self, pairs: Sequence[tuple[str, str]], grades: dict[int, Grade], suspects: set[int], deadline: float
    ) -> None:
        """Grade the pairs that have no grade yet, until all are graded, the pool breaks down, or the deadline.

        A response whose worker dies becomes a suspect and is graded again in the next attempt; if its worker dies
        again, it gets `crash`. pebble stops its pool when it cannot tell which response a dead worker was grading.
        The pairs without a grade then go to a new pool.

        Args:
            pairs: all pairs of the call.
            grades: by index of the pair; filled here.
            suspects: indices of pairs whose worker has died once; filled here.
            deadline: a time of `time.monotonic`.
        """
        pool = self._running_pool()
        futures = {}
        try:
            for index, pair in enumerate(pairs):
                if index not in grades:
                    futures[index] = pool.schedule(_work, args=pair, timeout=self.timeout)
            is_broken = False
        except RuntimeError:  # the pool broke down while tasks were being scheduled
            is_broken = True
        for index, future in futures.items():
            try:
                error = future.exception(max(0.0, deadline - time.monotonic()))
            except GradeTimeout:  # the deadline; a response that takes too long returns its error
                continue
            grade = _result(future, error)
            if grade is None:
                is_broken = True
            elif isinstance(error, ProcessExpired) and index not in suspects:
                suspects.add(index)
            else:
                grades[index] = grade
        if is_broken:
            self.close()

    def _running_pool(self) -> ProcessPool:
        """A pool whose first worker has loaded the verifier; starts it twice, as a worker may be killed meanwhile."""
        if self._pool is not None and not self._pool.active:  # a worker died between two calls
            self.close()
        for attempt in range(2):
            if self._pool is not None:
                break
            self._pool = pool = ProcessPool(
                max_workers=self.workers,
                initializer=_prepare_worker,
                initargs=(self.verifier,),
                context=_WorkerContext(),
            )
            try:
                pool.schedule(_ready).result(START_SECONDS)
            except (GradeTimeout, BrokenProcessPool, ProcessExpired) as error:
                self.close()
                if attempt:
                    raise Fault(
                        f"the reward workers cannot load the verifier {self.verifier!r}: importing it in a fresh "
                        f"`{sys.executable}` fails or takes more than {START_SECONDS:.0f} s"
                    ) from error
        assert self._pool is not None
        return self._pool


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
        error = _grade(load_verifier(name), "1", "1").error or ""
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


def _grade(verifier: Verifier, response: str, answer: str) -> Grade:
    """Call a verifier; what it raises becomes the error of the grade."""
    try:
        grade = verifier(response, answer)
    except MemoryError:
        return Grade(None, error="crash")
    except Exception as error:
        message = " ".join(str(error).split())
        return Grade(None, error=f"{type(error).__name__}: {message}"[:ERROR_LENGTH])
    if isinstance(grade, bool):
        return Grade(grade)
    if not isinstance(grade, Grade):
        return Grade(None, error=f"TypeError: the verifier returned {type(grade).__name__}, not a Grade")
    if not (isinstance(grade.correct, bool | None) and isinstance(grade.extracted, str | None)):
        return Grade(
            None, error="TypeError: the verifier returned a Grade with wrong types (correct: bool, extracted: str)"
        )
    return grade


_worker_verifier: Verifier | None = None


def _prepare_worker(verifier: str) -> None:
    """Import the verifier and limit the memory; every worker starts with this."""
    global _worker_verifier
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait until compiled code returns
    _worker_verifier = load_verifier(verifier)
    if verifier == "math_verify":
        _worker_verifier("$1$", "1")  # its slow imports are part of the start, not of the first response
    _limit_memory(MEMORY_GIB)


def _limit_memory(gib: float) -> None:
    """Limit this process to `gib` more memory, so that a runaway verifier raises MemoryError (Linux only)."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = in_use + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def _ready() -> None:
    """The first task of a pool; it returns when a worker is prepared."""


def _work(response: str, answer: str) -> Grade:
    """Grade one response, in a worker."""
    assert _worker_verifier is not None, "_prepare_worker runs first"
    try:
        return _grade(_worker_verifier, response, answer)
    except BaseException:  # SystemExit and KeyboardInterrupt must not reach the caller
        return Grade(None, error="crash")


_starting = threading.Lock()


class _WorkerProcess(SpawnProcess):
    """A spawned process that does not import the caller's main script.

    `multiprocessing` imports the parent's `__main__` in every child. For a trainer that costs seconds of importing
    torch in each worker, and a script without a `__main__` guard starts itself again and again. A main module whose
    spec is named `__main__` is not imported (`multiprocessing.spawn._fixup_main_from_name`), so it gets such a spec
    while the child starts.
    """

    def start(self) -> None:
        main = sys.modules["__main__"]
        with _starting:
            spec = getattr(main, "__spec__", None)
            main.__spec__ = importlib.machinery.ModuleSpec("__main__", None)
            try:
                super().start()
            finally:
                main.__spec__ = spec


class _WorkerContext(SpawnContext):
    """The spawn context with `_WorkerProcess`."""

    Process = _WorkerProcess
