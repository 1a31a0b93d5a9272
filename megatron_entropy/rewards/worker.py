"""What runs in a worker process: it imports its verifiers once, limits its memory and grades task after task."""

from __future__ import annotations

import importlib.machinery
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.context import SpawnContext, SpawnProcess

from megatron_entropy.records import Grade
from megatron_entropy.rewards.registry import SYMBOLIC, Verifier, load_verifier

Task = tuple[str, str, str]
"""Name of a verifier, response, ground truth."""

ERROR_LENGTH = 120  # characters of an error message kept in a grade
MEMORY_GIB = 4.0  # memory that grading may add to what a worker uses after its imports

WARM_UP = (r"\boxed{(x-1)(x+1)}", "x^2-1")
"""A comparison of formulas: slow imports and caches are part of a worker's start, not of its first response."""

_verifiers: dict[str, Verifier] = {}


def prepare(verifiers: Sequence[str]) -> None:
    """Import the verifiers and limit the memory; every worker starts with this."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait until compiled code returns
    for name in verifiers:
        _verifiers[name] = load_verifier(name)
        if name in SYMBOLIC:
            call_verifier(_verifiers[name], *WARM_UP)
    _limit_memory(MEMORY_GIB)


def ready() -> None:
    """The first task of a pool; it returns when a worker is prepared."""


def grade_task(verifier: str, response: str, answer: str) -> Grade:
    """Grade one response by one of the verifiers that the worker has imported."""
    try:
        return call_verifier(_verifiers[verifier], response, answer)
    except BaseException:  # SystemExit and KeyboardInterrupt must not reach the caller
        return Grade(None, error="crash")


def call_verifier(verifier: Verifier, response: str, answer: str) -> Grade:
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


class WorkerContext(SpawnContext):
    """The spawn context whose processes do not import the caller's main script."""

    Process = _WorkerProcess
