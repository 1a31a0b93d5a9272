"""The death of a vLLM engine's core where it is a process of its own, as on a GPU: noticed, and with its cause.

vLLM raises "see root cause above" then, and means the log. Ray writes the output of an engine and its processes to
files, which only the engine itself knows: it reads the cause there. A call during which the core is killed would wait
for ever in vLLM.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

from megatron_entropy.errors import EngineDied

Result = TypeVar("Result")

DEATH_SECONDS = 2.0
"""Seconds that a call may go on after the death of the core: it may still raise by itself."""
MAX_BYTES = 2**20
"""Bytes of an output file that are read, from its end."""

_CAUSE = re.compile(
    r"(?:^|\s)((?:[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)|CUDA error|Fatal Python error|terminate called .*): .+)$"
)
_POINTERS = ("see root cause", "see stack trace")
"""Parts of messages that only point to another message."""


class EngineLog:
    """What this process and its children have written to their output since the log was opened."""

    def __init__(self) -> None:
        self._starts = {descriptor: os.fstat(descriptor).st_size for descriptor in _output_files()}

    def last_error(self) -> str:
        """Return the last error that was written, in one line; the empty text if there is none."""
        found = ""
        for descriptor, start in self._starts.items():
            with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                file.seek(max(start, os.fstat(descriptor).st_size - MAX_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
            found = find_error(lines) or found
        return found

    def explain(self, error: BaseException) -> str:
        """Return the cause of vLLM's error: from the log if the error only points there, in one line."""
        text = " ".join(str(error).split())
        if not any(pointer in text.lower() for pointer in _POINTERS):
            return f"{type(error).__name__}: {text}"
        return self.last_error() or "vLLM's core is dead and its log names no error; it may have been killed"


class CoreCalls:
    """Calls vLLM's engine in a thread, so that the death of the core ends a call that waits for it."""

    def __init__(self, engine: Any, log: EngineLog) -> None:
        """Watch the core of an engine.

        Args:
            engine: vLLM's `LLMEngine`; a core in this process needs no watching.
            log: of the engine, opened before it was created.
        """
        self._log = log
        self._resources = getattr(engine.engine_core, "resources", None)
        self._thread = ThreadPoolExecutor(1, "vllm")

    def run(self, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Call a function of the engine.

        Raises:
            EngineDied: the core is dead, with the cause.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            if self._resources is None:
                return function(*arguments, **options)
            call = self._thread.submit(function, *arguments, **options)
            is_last_wait = False
            while not call.done() and not is_last_wait:
                is_last_wait = self._resources.engine_dead
                wait([call], DEATH_SECONDS)
            if not call.done():
                raise EngineDeadError
            return call.result()
        except EngineDeadError as error:
            raise EngineDied(self._log.explain(error)) from error


def find_error(lines: list[str]) -> str:
    """Return the last error among lines of a log; messages that only point to another one are skipped."""
    for line in reversed(lines):
        hit = _CAUSE.search(line.rstrip())
        if hit and not any(pointer in hit[1].lower() for pointer in _POINTERS):
            return hit[1]
    return ""


def _output_files() -> list[int]:
    """Standard output and error of this process, if they go to files that can be read again."""
    descriptors = []
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and os.access(f"/proc/self/fd/{descriptor}", os.R_OK):
                descriptors.append(descriptor)
    return descriptors
