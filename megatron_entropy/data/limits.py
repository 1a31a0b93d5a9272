"""Try a function in a child process first, where it may hang or fill the memory: for code of model folders."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

import psutil

CPU_SECONDS = 5
MEMORY_GIB = 4
_OUT_OF_MEMORY = 3


def exceeded_limit(function: Callable[[], object]) -> str | None:
    """Run a function in a copy of this process that may use `CPU_SECONDS` and `MEMORY_GIB` beyond what it has.

    What the function raises is ignored: it will raise it again when it is called without limits. Its copy of this
    process has no other threads, so it must not use libraries that have threads of their own.

    Returns:
        The limit that was exceeded, or None.
    """
    child = os.fork()
    if child == 0:
        _run(function)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == _OUT_OF_MEMORY:
        return f"{MEMORY_GIB} GiB of memory"
    return f"{CPU_SECONDS} s of CPU time" if code < 0 else None


def _run(function: Callable[[], object]) -> None:
    code = 0
    try:
        used = psutil.Process().memory_info().vms
        for kind, limit in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, CPU_SECONDS),  # the kernel ends the process, also within compiled code
            (resource.RLIMIT_AS, used + MEMORY_GIB * 2**30),
        ):
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        function()
    except BaseException as error:  # the caller meets all others again
        code = _OUT_OF_MEMORY if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError) else 0
    finally:
        os._exit(code)
