"""From a configuration file to running ranks: checks that need no torch, the run folder's policy, torchrun.

`megatron-entropy train` runs torchrun's agent in its own process, so that Ctrl-C and `kill` reach the ranks as a
request to stop after the step (torchrun alone kills them after 30 seconds), and so that a failure ends in the one
line of the rank that failed first. Under plain torchrun the ranks use `resolve`, `prepare_run_folder` and
`report_failure` themselves. Importing this module imports no torch.
"""

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
from typing import TYPE_CHECKING, Literal

from megatron_entropy.errors import Fault, UserError

if TYPE_CHECKING:
    pass


LAUNCHER_VARIABLE = "MEGATRON_ENTROPY_LAUNCHER"
"""Set for ranks whose failures the launcher prints."""

STOPPED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a rank that ended because it was asked to."""

DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""Errors of the operating system that are no bug of ours: no room, quota, read-only, limit on a file's size."""


@dataclass(frozen=True)
class RankFailure:
    """Why a rank ended: `user` (a `UserError`), `fault` (a `Fault`), `bug` (anything else) or `death` (a signal).

    `time`: seconds since the epoch. `details`: the traceback of a bug.
    """

    rank: int
    kind: Literal["user", "fault", "bug", "death"]
    message: str
    exit_code: int
    time: float
    details: str = ""


def describe(error: BaseException, *, rank: int) -> RankFailure:
    """What `error` means to the user of the run."""
    message = " ".join(str(error).split())
    if isinstance(error, UserError):
        return RankFailure(rank, "user", message, 2, time.time())
    if isinstance(error, OSError) and error.errno in DISK_REFUSES:
        message += "; make room (checkpoint.keep, log.rollouts_every) or mend the disk, and go on with --resume"
        return RankFailure(rank, "fault", f"rank {rank}: {message}", 1, time.time())
    if isinstance(error, Fault):
        return RankFailure(rank, "fault", f"rank {rank}: {message}", 1, time.time())
    details = "".join(traceback.format_exception(error))
    return RankFailure(rank, "bug", f"rank {rank}: {type(error).__name__}: {message}", 1, time.time(), details)


def report_failure(error: BaseException, *, rank: int) -> int:
    """Say why this rank ends, where it is read once: to our launcher, or under plain torchrun on standard error.

    Under plain torchrun a user's mistake, which all ranks find, is printed by rank 0 only; anything else by the rank
    it happened on, in one line. Either way it is left in torchrun's error file too, from which torchrun shows the
    first failure with its traceback.

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
    """The one that explains the others.

    Our own errors come first, since a rank that loses its neighbour reports a broken connection, not one of ours;
    then by time, where a death counts as a second earlier than the agent noticed it; last the ranks that the agent
    ended because of another.
    """

    def order(failure: RankFailure) -> tuple[int, float]:
        death = failure.kind == "death"
        if death and failure.exit_code in STOPPED:
            return 3, failure.time
        return {"user": 0, "fault": 1}.get(failure.kind, 2), failure.time - death

    return min(failures, key=order)
