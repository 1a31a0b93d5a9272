"""Say why a rank ended, in one line that is printed once, and find the failure that caused the others."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_entropy.errors import Fault, UserError

LAUNCHER_VARIABLE = "MEGATRON_ENTROPY_LAUNCHER"
"""Environment variable of ranks that our launcher started: its pid. It prints their failures."""

STOPPED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a rank that ended on a stop signal."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""OS errors that are faults, not bugs: disk full, quota reached, read-only disk, limit on a file's size."""


@dataclass(frozen=True)
class RankFailure:
    """Why a rank ended.

    `kind`: `user` (a `UserError`), `fault` (a `Fault`), `bug` (any other exception) or `death` (a signal, or an exit
    without a report). `time`: seconds since the epoch. `details`: the traceback of a bug.
    """

    rank: int
    kind: Literal["user", "fault", "bug", "death"]
    message: str
    exit_code: int
    time: float
    details: str = ""


def describe(error: BaseException, *, rank: int) -> RankFailure:
    """Turn an exception of a rank into a failure with a one-line message."""
    message = " ".join(str(error).split())
    if isinstance(error, UserError):
        return RankFailure(rank, "user", message, 2, time.time())
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        message += "; make room (checkpoint.keep, log.rollouts_every) or repair the disk, then continue with --resume"
        return RankFailure(rank, "fault", f"rank {rank}: {message}", 1, time.time())
    if isinstance(error, Fault):
        return RankFailure(rank, "fault", f"rank {rank}: {message}", 1, time.time())
    details = "".join(traceback.format_exception(error))
    return RankFailure(rank, "bug", f"rank {rank}: {type(error).__name__}: {message}", 1, time.time(), details)


def report_failure(error: BaseException, *, rank: int) -> int:
    """Report why this rank ends: to our launcher, or under plain torchrun on standard error.

    Under plain torchrun only rank 0 prints a user's mistake, because every rank finds it; any other failure is printed
    by the rank it happened on. Both are also written to torchrun's error file, from which torchrun shows the first
    failure with its traceback.

    Returns:
        The exit code of the rank: 2 for a user's mistake, else 1.
    """
    failure = describe(error, rank=rank)
    if target := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": failure.details, "timestamp": str(int(failure.time))}
        message = {"message": failure.details or failure.message, "extraInfo": extra}
        Path(target).write_text(json.dumps({"message": message, "megatron_entropy": asdict(failure)}))
        by_launcher = LAUNCHER_VARIABLE in os.environ
    else:
        by_launcher = False
        print(failure.details, end="", file=sys.stderr)
    if not by_launcher and (rank == 0 or failure.kind != "user"):
        print(f"error: {failure.message}", file=sys.stderr, flush=True)
    return failure.exit_code


def first_failure(failures: Sequence[RankFailure]) -> RankFailure:
    """Return the failure that caused the others.

    Our own error classes come first, because a rank that loses another rank reports a broken connection instead. Then
    the earliest one wins; a death counts one second earlier than the agent noticed it. Ranks that the agent stopped
    because of another failure come last.
    """

    def order(failure: RankFailure) -> tuple[int, float]:
        death = failure.kind == "death"
        if death and failure.exit_code in STOPPED:
            return 3, failure.time
        return {"user": 0, "fault": 1}.get(failure.kind, 2), failure.time - death

    return min(failures, key=order)
