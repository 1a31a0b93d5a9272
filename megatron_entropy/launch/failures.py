"""Say why a rank ended, in one line that is printed once, and find the failure that caused the others."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
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
    from megatron_entropy.distributed.peers import Peers

LAUNCHER_VARIABLE = "MEGATRON_ENTROPY_LAUNCHER"
"""Environment variable of ranks that our launcher started: its pid. It prints their failures."""

OBEYED = 128 + signal.SIGTERM
"""Exit code of a rank that has obeyed a stop signal: its step is done and saved."""

STOPPED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a rank that ended on a stop signal."""

CAUSE_TIMEOUT = 5.0
"""Seconds that a rank waits for the reason why another one ended."""

CONNECTION_ERROR = re.compile(r"gloo/|NCCL (communicator|error)|nccl(Remote|System)Error|store->|TCPStore")
"""What messages of torch's process groups and store contain when another rank does not answer."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""OS errors that are faults, not bugs: disk full, quota reached, read-only disk, limit on a file's size."""


@dataclass(frozen=True)
class RankFailure:
    """Why a rank ended.

    `kind`: `user` (a `UserError`), `fault` (a `Fault`), `bug` (any other exception), `death` (a signal, or an exit
    without a report) or `lost` (the connection to another rank broke, most often because that one had ended). `time`:
    seconds since the epoch. `details`: the traceback of a bug. `quiet`: other ranks print it.
    """

    rank: int
    kind: Literal["user", "fault", "bug", "death", "lost"]
    message: str
    exit_code: int
    time: float
    details: str = ""
    quiet: bool = False


def describe(error: BaseException, *, rank: int, node: str = "") -> RankFailure:
    """Turn an exception of a rank into a failure with a one-line message.

    Args:
        node: name of the rank's machine, where a run has several.
    """
    message = " ".join(str(error).split())
    if isinstance(error, UserError):
        return RankFailure(rank, "user", message, 2, time.time())
    where = f"rank {rank} on {node}" if node else f"rank {rank}"
    if CONNECTION_ERROR.search(message) and not isinstance(error, UserError | Fault):
        message = f"{where}: the connection to another rank broke: {_reason(message)}"
        return RankFailure(rank, "lost", message, 1, time.time())
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        message += "; make room (checkpoint.keep, log.rollouts_every) or repair the disk, then continue with --resume"
        return RankFailure(rank, "fault", f"{where}: {message}", 1, time.time())
    if isinstance(error, Fault):
        return RankFailure(rank, "fault", f"{where}: {message}", 1, time.time())
    details = "".join(traceback.format_exception(error))
    return RankFailure(rank, "bug", f"{where}: {type(error).__name__}: {message}", 1, time.time(), details)


def _reason(message: str) -> str:
    """An error message of gloo or NCCL without source positions and guesses of the cause."""
    return re.sub(r"\[[^\]\s]*\.(cc|cpp|h):\d+\] ", "", message).split(". This is typically")[0][:300]


def report_failure(error: BaseException, *, rank: int, peers: Peers | None = None) -> int:
    """Report why this rank ends: to our launcher, or under plain torchrun on standard error.

    A rank that only lost the connection to another one, or finds what another one has reported, reports that one's
    failure. The first rank that failed prints it, and so does rank 0 on another machine. All is also written to
    torchrun's error file, from which torchrun shows the first failure with its traceback.

    Args:
        peers: of this rank, once it has met the others.

    Returns:
        The exit code of the rank: 2 for a user's mistake, else 1.
    """
    several = peers is not None and len(set(peers.nodes)) > 1
    failure = describe(error, rank=rank, node=peers.node if peers is not None and several else "")
    failure = _agree_with_peers(failure, peers)
    return write_report(failure, rank=rank)


def _agree_with_peers(failure: RankFailure, peers: Peers | None) -> RankFailure:
    """Return the failure that the others know already, or let them know this one."""
    if peers is None:
        return failure
    if peers.culprit is not None:
        return dataclasses.replace(failure, rank=peers.culprit, quiet=is_quiet(peers, peers.culprit))
    found = peers.failure(CAUSE_TIMEOUT) if failure.kind == "lost" else None
    first = RankFailure(**(found or peers.post_failure(asdict(failure))))
    if first.rank != failure.rank and (found or _text(first) == _text(failure)):
        return dataclasses.replace(first, details="", quiet=is_quiet(peers, first.rank))
    return failure


def is_quiet(peers: Peers, culprit: int) -> bool:
    """Whether this rank prints nothing about the failure of rank `culprit`; rank 0 does, unless both are one node."""
    return peers.rank != culprit and (peers.rank != 0 or peers.nodes[culprit] == peers.node)


def _text(failure: RankFailure) -> str:
    """The message without the rank."""
    return re.sub(r"^rank \d+( on [^:]+)?: ", "", failure.message)


def write_report(failure: RankFailure, *, rank: int) -> int:
    """Write a failure to torchrun's error file, and print it unless our launcher does; returns the exit code."""
    is_left = _leave_for_agent(failure)
    if not is_left:
        print(failure.details, end="", file=sys.stderr)
    if not (is_left and LAUNCHER_VARIABLE in os.environ) and not failure.quiet:
        print(f"error: {failure.message}", file=sys.stderr, flush=True)
    return failure.exit_code if failure.exit_code > 0 else 1


def _leave_for_agent(failure: RankFailure) -> bool:
    """Write a failure to torchrun's error file; False where there is none, or no room for it."""
    if not (target := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        return False
    extra = {"py_callstack": failure.details, "timestamp": str(int(failure.time))}
    message = {"message": failure.details or failure.message, "extraInfo": extra}
    try:
        Path(target).write_text(json.dumps({"message": message, "megatron_entropy": asdict(failure)}))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(target)  # torchrun fails on half a file
        return False
    return True


def first_failure(failures: Sequence[RankFailure]) -> RankFailure:
    """Return the failure that caused the others.

    Our own error classes come first, then the earliest one wins; a death counts one second earlier than the agent
    noticed it. Ranks that lost another one come late, and last those that the agent stopped because of another failure.
    """

    def order(failure: RankFailure) -> tuple[int, float]:
        death = failure.kind == "death"
        if death and failure.exit_code in STOPPED:
            return 4, failure.time
        return {"user": 0, "fault": 1, "lost": 3}.get(failure.kind, 2), failure.time - death

    return min(failures, key=order)
