"""Graders of a run: `RewardPool` on this machine, or a reward server that `reward.url` names.

The client uses `http.client` of the standard library, so that a base installation can grade remotely. It follows no
redirect and no proxy of the environment: the token goes to the named server only.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import urlsplit

from megatron_entropy.errors import ConfigError, Fault
from megatron_entropy.records import Grade
from megatron_entropy.rewards.pool import UNUSABLE, RewardPool, check_verifier, scale_budget

if TYPE_CHECKING:
    from megatron_entropy.config.schema import RewardConfig

logger = logging.getLogger(__name__)
TOKEN_VARIABLE = "MEGATRON_ENTROPY_REWARD_TOKEN"
"""Environment variable with the token of the server; no file of a run has it."""
CONNECTIONS = 16  # requests of one call at the same time
CHUNK_RESPONSES = 32  # responses in one request
CHUNK_CHARACTERS = 4 * 2**20  # of the responses in one request
MAX_REPLY = 64 * 2**20  # bytes of a reply that are read
REQUEST_SECONDS = 60.0  # a request takes as long as the budget, but at least this if time is left
REPLY_SLACK = 10.0  # seconds beyond the time limit that the server was given, for the transfer
CHECK_SECONDS, CONNECT_SECONDS = 5.0, 10.0
FAILURES = (OSError, http.client.HTTPException, ValueError)
"""What a request raises; ValueError: a host name or token that HTTP cannot carry."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two tries


class Grader(Protocol):
    """What grades the responses of a run."""

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (response, ground truth) pairs, in their order."""
        ...

    def close(self) -> None:
        """Give up processes and connections."""
        ...


def open_grader(config: RewardConfig, *, verifier: str = "", budget: float = 0.0) -> RewardPool | RemoteGrader:
    """Create the grader that `config` describes; it is a context manager.

    Args:
        config: `url` decides between a server and workers on this machine.
        verifier: another one than `config.verifier`.
        budget: seconds for one call, other than `config.budget`.

    Raises:
        ConfigError: an unknown verifier; that of a server is checked by `check_grader` and by the first `grade`.
    """
    verifier, seconds = verifier or config.verifier, budget or config.budget
    if config.url:
        return RemoteGrader(config.url, verifier=verifier, budget=seconds, patience=config.budget)
    return RewardPool(verifier=verifier, workers=config.workers, timeout=config.timeout, budget=seconds)


def check_grader(config: RewardConfig, answer: str = "1") -> None:
    """Grade one trivial response with the verifier of a run, here or on the server.

    Args:
        answer: as in `check_verifier`.

    Raises:
        ConfigError: the verifier cannot be used, or no reward server answers at `reward.url`.
    """
    if not config.url:
        check_verifier(config.verifier, answer)
        return
    grader = open_grader(config)
    assert isinstance(grader, RemoteGrader)
    try:
        grader.check_health()
        error = grader.grade([("1", answer)])[0].error or ""
    except Fault as fault:
        raise ConfigError(str(fault)) from None
    if error.startswith(UNUSABLE):
        raise ConfigError(
            f"reward.verifier: {config.verifier!r} cannot grade the response '1' on {config.url} ({error})"
        )


class _Unavailable(Exception):
    """The server did not answer, or not now; `seconds`: what it asks to wait."""

    def __init__(self, reason: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.seconds = seconds


class _TooLarge(Exception):
    """The server takes no request of this size."""


class RemoteGrader:
    """Grades responses on a reward server (`megatron-entropy serve-rewards`).

    Requests are repeated while the server is down, broken or full. What it has not graded in time counts as an error,
    never as wrong. A call without one successful request raises a `Fault`: a run must not go on without rewards.

    Args:
        url: of the server, `http://HOST:PORT`.
        verifier: a name that the server knows.
        budget: seconds for one call with up to 1,000 responses, as of `RewardPool`; may be infinite.
        patience: seconds without any success of the server after which a call gives up.
    """

    def __init__(self, url: str, *, verifier: str, budget: float, patience: float) -> None:
        self.url = url.rstrip("/")
        self.verifier = verifier
        self.budget = budget
        self.patience = patience
        self._connections: set[http.client.HTTPConnection] = set()
        self._is_closed = threading.Event()
        self._last_success = 0.0
        self._problem = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the requests in progress; the grader cannot be used afterwards."""
        self._is_closed.set()
        for connection in list(self._connections):
            if connection.sock is not None:
                try:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                except OSError:  # it has ended already
                    pass

    def check_health(self) -> None:
        """See that a reward server answers.

        Raises:
            Fault: it does not.
        """
        try:
            status, reply, _ = self._exchange("GET", "/health", None, CHECK_SECONDS)
        except FAILURES as error:
            raise self._unreachable(_reason(error)) from None
        if status != 200 or b'"status"' not in reply:
            raise self._unreachable(f"its /health answers with status {status}")

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (response, ground truth) pairs.

        Returns:
            The grades in the order of the pairs. `error` is as in `RewardPool.grade`, or `server`: the server failed
            and was not back in time.

        Raises:
            Fault: no request succeeded.
            ConfigError: it refuses the token or does not know the verifier.
        """
        grades: dict[int, Grade] = {}
        seconds = scale_budget(self.budget, len(pairs))
        self._last_success = started = time.monotonic()
        chunks = list(_chunks(pairs))
        with ThreadPoolExecutor(max(1, min(CONNECTIONS, len(chunks)))) as threads:
            try:
                jobs = [threads.submit(self._grade_chunk, pairs, chunk, grades, started + seconds) for chunk in chunks]
                for job in jobs:
                    job.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise
        missing = [index for index in range(len(pairs)) if index not in grades]
        if pairs and len(missing) == len(pairs):
            raise self._unreachable(f"{self._problem}, for {time.monotonic() - started:.0f} s")
        if missing:
            logger.warning(
                "%d of %d responses were not graded by reward.url=%s and count as errors (reward/error_server): %s",
                len(missing), len(pairs), self.url, self._problem,
            )  # fmt: skip
        if slow := sum(grade.error == "budget" for grade in grades.values()):
            logger.warning(
                "%d of %d responses were not graded within %g s and count as errors (reward/error_budget): raise "
                "reward.budget, or --workers of the reward server",
                slow, len(pairs), seconds,
            )  # fmt: skip
        return [grades.get(index, Grade(None, error="server")) for index in range(len(pairs))]

    def _grade_chunk(
        self, pairs: Sequence[tuple[str, str]], chunk: list[int], grades: dict[int, Grade], deadline: float
    ) -> None:
        """Grade the pairs of some indices into `grades`; without success in time, leave them out."""
        pause = FIRST_PAUSE
        while chunk and not self._is_closed.is_set():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                self._problem = self._problem or "it graded nothing in time"
                return
            seconds = min(remaining, max(self.budget if math.isfinite(self.budget) else 0.0, REQUEST_SECONDS))
            try:
                replies = self._request([pairs[index] for index in chunk], seconds)
            except _TooLarge as error:
                if len(chunk) == 1:
                    grades[chunk[0]] = Grade(None, error=f"server: {error}")
                    return
                half = len(chunk) // 2
                self._grade_chunk(pairs, chunk[:half], grades, deadline)
                chunk = chunk[half:]
            except _Unavailable as error:
                self._problem = str(error)
                wait = max(pause, error.seconds)
                now = time.monotonic()
                if now + wait > min(deadline, self._last_success + self.patience):
                    return
                self._is_closed.wait(wait)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._last_success = time.monotonic()
                grades.update(zip(chunk, replies, strict=True))
                chunk = [index for index in chunk if grades[index].error == "budget"]

    def _request(self, pairs: Sequence[tuple[str, str]], seconds: float) -> list[Grade]:
        """Let the server grade pairs in one request.

        Raises:
            _Unavailable: no answer, a failure of the server, or a full queue.
            _TooLarge: the request is too large for the server.
            ConfigError: the server refuses the token, or does not know the verifier.
            Fault: it is no reward server.
        """
        content = {
            "verifier": self.verifier,
            "pairs": [{"response": response, "answer": answer} for response, answer in pairs],
            "seconds": seconds,
        }
        body = json.dumps(content).encode()
        try:
            status, reply, retry_after = self._exchange("POST", "/grade", body, seconds + REPLY_SLACK)
        except FAILURES as error:
            raise _Unavailable(_reason(error)) from None
        if status == 200:
            return self._read(reply, len(pairs))
        message = _error_of(reply)
        if status == 413:
            raise _TooLarge(message)
        if status in (401, 403):
            raise ConfigError(
                f"reward.url={self.url}: the server refuses the token; set the environment variable {TOKEN_VARIABLE} "
                "to the token that the server was started with"
            )
        if status == 400:
            raise ConfigError(f"reward.url={self.url}: {message}")
        if status == 429 or status >= 500:
            raise _Unavailable(f"status {status}: {message}", retry_after)
        raise Fault(
            f"reward.url={self.url}: /grade answers with status {status}: {message}; is it a reward server of "
            "megatron-entropy? start one with `megatron-entropy serve-rewards`"
        )

    def _read(self, reply: bytes, count: int) -> list[Grade]:
        """The grades of a reply.

        Raises:
            Fault: they are not what a reward server sends.
        """
        try:
            rows = json.loads(reply)["grades"]
            grades = [Grade(row["correct"], row["extracted"], row["error"]) for row in rows]
        except (ValueError, LookupError, TypeError, RecursionError):
            grades = []
        if len(grades) != count or not all(map(_is_valid, grades)):
            raise Fault(
                f"reward.url={self.url}: the reply to /grade does not hold {count} grades; is it another server?"
            )
        return grades

    def _exchange(self, method: str, path: str, body: bytes | None, seconds: float) -> tuple[int, bytes, float]:
        """Send one request; raises `FAILURES`.

        Returns:
            Status and body of the reply, and the seconds that the server asks to wait.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN_VARIABLE, "").strip():
            headers["Authorization"] = f"Bearer {token}"
        self._connections.add(connection)
        try:
            connection.connect()
            connection.sock.settimeout(seconds)
            connection.request(method, parts.path + path, body, headers)
            response = connection.getresponse()
            retry_after = response.getheader("Retry-After", "")
            return response.status, response.read(MAX_REPLY), float(retry_after) if retry_after.isdigit() else 0.0
        finally:
            self._connections.discard(connection)
            connection.close()

    def _unreachable(self, reason: str) -> Fault:
        return Fault(
            f"reward.url={self.url}: the reward server grades nothing ({reason}); start it with `megatron-entropy "
            "serve-rewards`, or correct reward.url; a run continues with --resume"
        )


def _chunks(pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Indices of the pairs of each request."""
    chunks: list[list[int]] = []
    characters = 0
    for index, (response, answer) in enumerate(pairs):
        characters += len(response) + len(answer)
        if not chunks or len(chunks[-1]) == CHUNK_RESPONSES or characters > CHUNK_CHARACTERS:
            chunks.append([])
            characters = len(response) + len(answer)
        chunks[-1].append(index)
    return chunks


def _is_valid(grade: Any) -> bool:
    return (
        isinstance(grade.correct, bool | None)
        and isinstance(grade.extracted, str | None)
        and isinstance(grade.error, str | None)
    )


def _error_of(reply: bytes) -> str:
    """The message in a reply that refuses a request, on one line."""
    try:
        message = str(json.loads(reply)["error"])
    except (ValueError, LookupError, TypeError, RecursionError):
        message = reply[:200].decode("utf-8", "replace")
    return " ".join(message.split())[:500]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
