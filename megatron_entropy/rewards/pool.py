"""Grading in worker processes that may be killed, on `pebble.ProcessPool`.

An answer that hangs, crashes or raises costs itself a `Grade(correct=None, error=...)` and nothing else: the worker is
replaced and the answers behind it are graded. A worker that is killed costs nothing at all: an answer counts as a crash
when a second worker has died of it. Workers are fresh interpreters (spawn) that import the verifier and
nothing of the caller: neither torch nor the script that was started. The first `grade` starts them.
"""

from __future__ import annotations

import importlib.machinery
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import TimeoutError as AnswerTimeout
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from types import TracebackType

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from megatron_entropy.errors import ConfigError, Fault
from megatron_entropy.records import Grade
from megatron_entropy.rewards.registry import INLINE, Verifier, load_verifier

START_SECONDS = 300.0  # a worker that has not imported its verifier by then never will
BREAKS = 5  # times in a row a pool may break down before its first answer is held to be the cause
ERROR_LENGTH = 120  # characters of an error message kept in a grade


class RewardPool:
    """Grades answers with one verifier, in `workers` processes where the verifier may hang or crash.

    The string verifiers (`registry.INLINE`) run in the caller, which is far faster and as safe; `math_verify` and the
    user's own run in workers. Use as a context manager, or call `close`.

    Args:
        verifier: a name of `registry.VERIFIERS`, or `package.module:function`.
        workers: number of processes.
        timeout: seconds one answer may take.
        memory_gib: memory one worker may take on top of what it holds after its imports; more is a crash.

    Raises:
        ConfigError: an unknown verifier, or a number out of range.
    """

    def __init__(
        self,
        *,
        verifier: str,
        workers: int = 2,
        timeout: float = 10.0,
        memory_gib: float = 4.0,
    ) -> None:
        for name, value in (("workers", workers), ("timeout", timeout), ("memory_gib", memory_gib)):
            if value <= 0:
                raise ConfigError(f"rewards.{name} must be positive, got {value}")
        self.verifier = verifier
        self.workers = workers
        self.timeout = timeout
        self.memory_gib = memory_gib
        self._inline = load_verifier(verifier)
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
        """Stop the workers, at once; a later `grade` starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (response, ground truth) pairs; the grades come in the order of the pairs.

        Errors a grade can carry: `timeout`; `crash` (the process died, or ran out of memory); `SomeError: message`.

        Raises:
            Fault: the workers cannot be started.
        """
        if self.verifier in INLINE:
            return [_grade(self._inline, response, answer) for response, answer in pairs]
        grades: dict[int, Grade] = {}
        suspects: set[int] = set()
        breaks = 0
        while len(grades) < len(pairs):
            before = len(grades)
            self._attempt(pairs, grades, suspects)
            breaks = breaks + 1 if len(grades) == before else 0
            if breaks == BREAKS:
                first = next(index for index in range(len(pairs)) if index not in grades)
                grades[first] = Grade(None, error="crash")
                breaks = 0
        return [grades[index] for index in range(len(pairs))]

    def _attempt(self, pairs: Sequence[tuple[str, str]], grades: dict[int, Grade], suspects: set[int]) -> None:
        """Grade what has no grade yet, until done or until the pool as a whole breaks down.

        An answer whose worker died becomes a suspect and is left for the next attempt; a suspect gets its `crash`.
        pebble gives up on its pool when it cannot tell which answer a dead worker was at; nobody's answer is
        lost by that, as the ones without a grade are handed to the next pool.
        """
        pool = self._started()
        futures = {}
        try:
            for index, pair in enumerate(pairs):
                if index not in grades:
                    futures[index] = pool.schedule(_work, args=pair, timeout=self.timeout)
            broken = False
        except RuntimeError:  # it broke down meanwhile
            broken = True
        for index, future in futures.items():
            grade = _outcome(future)
            if grade is None:
                broken = True
            elif isinstance(future.exception(), ProcessExpired) and index not in suspects:
                suspects.add(index)
            else:
                grades[index] = grade
        if broken:
            self.close()

    def _started(self) -> ProcessPool:
        """A pool with a worker that has loaded the verifier; tried twice, as a worker may be killed while it loads."""
        if self._pool is not None and not self._pool.active:  # a worker died between two calls
            self.close()
        for attempt in range(2):
            if self._pool is not None:
                break
            self._pool = pool = ProcessPool(
                max_workers=self.workers,
                initializer=_prepare_worker,
                initargs=(self.verifier, self.memory_gib),
                context=_WorkerContext(),
            )
            try:
                pool.schedule(_ready).result(START_SECONDS)
            except (AnswerTimeout, BrokenProcessPool, ProcessExpired) as error:
                self.close()
                if attempt:
                    raise Fault(
                        f"the reward workers cannot load the verifier {self.verifier!r}: importing it in a fresh "
                        f"`{sys.executable}` fails or takes more than {START_SECONDS:.0f} s"
                    ) from error
        assert self._pool is not None
        return self._pool


def _outcome(future: ProcessFuture) -> Grade | None:
    """The grade of one answer, or None where the whole pool broke down before it had one."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        return None
    return Grade(None, error="timeout" if isinstance(error, AnswerTimeout) else "crash")


def _grade(verifier: Verifier, response: str, answer: str) -> Grade:
    """Call a verifier, turning what it raises into a grade."""
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
    return grade


_worker_verifier: Verifier | None = None


def _prepare_worker(verifier: str, memory_gib: float) -> None:
    """Runs first in every worker: import the verifier, bound the memory."""
    global _worker_verifier
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for compiled code to end
    _worker_verifier = load_verifier(verifier)
    if verifier == "math_verify":
        _worker_verifier("$1$", "1")  # its imports and caches count as start, not as the first answer
    _bound_memory(memory_gib)


def _bound_memory(gib: float) -> None:
    """Turn runaway memory into a MemoryError of this worker, before the machine's killer picks a victim."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = in_use + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def _ready() -> None:
    """The first task of a pool: done once a worker has been prepared."""


def _work(response: str, answer: str) -> Grade:
    """One answer, in a worker."""
    assert _worker_verifier is not None, "a worker takes no answers before it is prepared"
    try:
        return _grade(_worker_verifier, response, answer)
    except BaseException:  # SystemExit and its kin must not reach the caller
        return Grade(None, error="crash")


_starting = threading.Lock()


class _WorkerProcess(SpawnProcess):
    """A spawned process that does not run the caller's main script a second time.

    `multiprocessing` imports the parent's `__main__` in every child, which for a trainer means torch and seconds for
    each worker, and for a script without its guard an endless chain. A main module named `__main__` is left alone
    (`multiprocessing.spawn._fixup_main_from_name`), so it carries that name while the child is started.
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
