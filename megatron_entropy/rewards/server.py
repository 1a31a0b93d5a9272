"""The reward server: HTTP routes in front of a `GradingQueue`. Needs the extra `eval`.

`/grade` is this project's route: an answer that cannot be graded has `correct: null` and an error. The other routes
speak the protocol of CurioSFT's reward server (its release, `reward_function/reward_api.py`), whose clients need no
change: there a response without a grade has the score 0.0 and an error. Where this server differs: it has its own time
limit for each answer, a failing comparison is an error (the release counts it as wrong), and it refuses work when
its queue is full. Requests are JSON; nothing that comes from the network is unpickled or imported.
"""

from __future__ import annotations

import asyncio
import math
import os
import resource
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, BeforeValidator, Field

from megatron_entropy.errors import Fault
from megatron_entropy.records import Grade
from megatron_entropy.rewards.grading_queue import GradingQueue, QueueFull, QueueStopped
from megatron_entropy.rewards.guard import Guard
from megatron_entropy.rewards.worker import Task

PROTOCOL_VERSION = "2.0.0"
POOL_TYPE = "ProcessPool"
RETRY_SECONDS = "1"
MAX_WORKERS = max(64, 8 * len(os.sched_getaffinity(0)))  # that `/reinit_pool` starts
THINK_END = "</think>"
ROUTES = ("/grade", "/process_single", "/process_batch", "/health", "/pool_status", "/reinit_pool", "/metrics")


def _clean(text: object) -> object:
    """A text without lone surrogates, which JSON may have and UTF-8 has not; a number as text."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        return str(text)
    return text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else text


Text = Annotated[str, BeforeValidator(_clean)]


class Pair(BaseModel):
    """A response and its ground truth."""

    response: Text
    answer: Text


class GradeRequest(BaseModel):
    """Answers to grade; those that have no grade after `seconds` get the error `budget`."""

    verifier: str = "math_verify"
    pairs: list[Pair]
    seconds: float | None = Field(default=None, gt=0)


class Item(BaseModel):
    """An answer in CurioSFT's protocol; the time limit holds whatever `enable_timeout` says."""

    i: int | str = -1
    sequences_str: Text
    ground_truth: Text
    reward_impl_version: int = 0
    oat_grader: bool = False
    valid_response_length: int = 0
    enable_timeout: bool = True
    data_source: str | None = None
    extra_info: Any = None


class Batch(BaseModel):
    """Answers in CurioSFT's protocol."""

    items: list[Item] = []


class PoolRequest(BaseModel):
    """The new number of workers."""

    max_workers: int = Field(default=32, gt=0, le=MAX_WORKERS)


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    `verifiers`: that requests may name. `workers`: processes. `timeout`: seconds for one answer. `queue`: answers that
    may wait. `max_body`: bytes of a request. `token`: that requests must bring; empty: none.
    """

    verifiers: tuple[str, ...]
    workers: int = 2
    timeout: float = 10.0
    queue: int = 10_000
    max_body: int = 64 * 2**20
    token: str = ""


Kind = TypeVar("Kind", Counter, Gauge, Histogram)


class Metrics:
    """What `/metrics` shows, in Prometheus' text format."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._metric(Counter, "requests", "responses", "route", "status")
        self.answers = self._metric(Counter, "answers", "answers by verdict", "verifier", "verdict")
        self.seconds = self._metric(Histogram, "answer_seconds", "from the request to the grade of an answer")
        self.lost_workers = self._metric(Counter, "worker_restarts", "workers that were killed or died")
        self.queue = self._metric(Gauge, "queue_length", "answers that wait for a worker")
        self.workers = self._metric(Gauge, "workers", "worker processes")

    def _metric(self, kind: type[Kind], name: str, meaning: str, *labels: str) -> Kind:
        return kind(f"megatron_entropy_reward_{name}", meaning, labels, registry=self.registry)

    def count_response(self, path: str, status: int) -> None:
        """Count a response of a route; unknown paths are counted together."""
        self.requests.labels(path if path in ROUTES else "other", str(status)).inc()

    def count_grade(self, task: Task, grade: Grade, seconds: float) -> None:
        """Count an answer by its verdict: correct, wrong, timeout, crash, budget or error."""
        verdict = {True: "correct", False: "wrong", None: grade.error}[grade.correct]
        known = ("correct", "wrong", "timeout", "crash", "budget")
        self.answers.labels(task[0], verdict if verdict in known else "error").inc()
        self.seconds.observe(seconds)


class RewardServer:
    """The routes, their queue and their metrics. `app` is the ASGI application."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.queue = GradingQueue(
            settings.verifiers,
            workers=settings.workers,
            timeout=settings.timeout,
            capacity=settings.queue,
            on_grade=self.metrics.count_grade,
            on_lost_worker=self.metrics.lost_workers.inc,
        )
        self.metrics.queue.set_function(lambda: self.queue.length)
        self.metrics.workers.set_function(lambda: self.queue.workers)
        routes = FastAPI(title="megatron-entropy reward server", docs_url=None, redoc_url=None)
        routes.post("/grade")(self.grade)
        routes.post("/process_single")(self.process_single)
        routes.post("/process_batch")(self.process_batch)
        routes.post("/reinit_pool")(self.reinit_pool)
        routes.get("/health")(self.health)
        routes.get("/pool_status")(self.pool_status)
        routes.get("/metrics")(self.show_metrics)
        _answer_errors(routes)
        self.app = Guard(
            routes, token=settings.token, max_body=settings.max_body, on_response=self.metrics.count_response
        )

    async def grade(self, body: GradeRequest, request: Request) -> dict[str, Any]:
        """Grade answers with one verifier."""
        if body.verifier not in self.settings.verifiers:
            raise HTTPException(
                400,
                f"unknown verifier {body.verifier[:100]!r}; add it with serve-rewards --verifier, or use one of "
                + ", ".join(self.settings.verifiers),
            )
        tasks = [(body.verifier, pair.response, pair.answer) for pair in body.pairs]
        grades = await self._grade(tasks, request, body.seconds or math.inf)
        return {
            "grades": [
                {"correct": grade.correct, "extracted": _clean(grade.extracted), "error": _clean(grade.error)}
                for grade in grades
            ]
        }

    async def process_single(self, item: Item, request: Request) -> dict[str, Any]:
        """Score one answer (CurioSFT's protocol)."""
        return (await self._score([item], request))[0]

    async def process_batch(self, batch: Batch, request: Request) -> dict[str, Any]:
        """Score several answers (CurioSFT's protocol)."""
        if not batch.items:
            raise HTTPException(400, "No items provided")
        results = await self._score(batch.items, request)
        timeouts = sum(result["error"] == "timeout" for result in results)
        return {"results": results, "total_processed": len(results), "timeout_count": timeouts}

    async def health(self) -> dict[str, Any]:
        """Say that the server runs."""
        return {
            "status": "healthy",
            "timestamp": time.time(),
            "version": PROTOCOL_VERSION,
            "pool_type": POOL_TYPE,
        }

    async def pool_status(self) -> dict[str, Any]:
        """Describe the workers."""
        if not self.queue.is_running:
            return {"status": "not_initialized", "pool": None}
        return {
            "status": "active",
            "pool_type": POOL_TYPE,
            "max_workers": self.queue.workers,
            "queue_length": self.queue.length,
            "verifiers": self.settings.verifiers,
        }

    async def reinit_pool(self, body: PoolRequest | None = None) -> dict[str, Any]:
        """Replace the workers by others; answers in work are finished first."""
        workers = (body or PoolRequest()).max_workers
        self.queue.restart(workers)
        return {"status": "success", "message": f"Process pool reinitialized with {workers} workers"}

    async def show_metrics(self) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def _score(self, items: Sequence[Item], request: Request) -> list[dict[str, Any]]:
        """Grade items of CurioSFT's protocol; its version 1 needs the end of thinking, without it the score is 0."""
        tasks = {index: _task(item) for index, item in enumerate(items) if _is_complete(item)}
        grades = dict(zip(tasks, await self._grade(list(tasks.values()), request, math.inf), strict=True))
        return [_result(item, grades.get(index, Grade(False))) for index, item in enumerate(items)]

    async def _grade(self, tasks: Sequence[Task], request: Request, seconds: float) -> list[Grade]:
        """Grade tasks; gives up after `seconds`, or when the client is gone."""
        if len(tasks) > self.settings.queue:
            raise HTTPException(413, f"{len(tasks)} answers in one request are more than the queue holds")
        futures = [asyncio.wrap_future(future) for future in self.queue.submit(tasks)]
        waiting = set(futures)
        deadline = time.monotonic() + seconds
        while waiting:
            remaining = deadline - time.monotonic()
            _, waiting = await asyncio.wait(waiting, timeout=max(0.0, min(1.0, remaining)))
            if waiting and (remaining <= 0 or await request.is_disconnected()):
                for future in waiting:
                    future.cancel()
                break
        for error in [future.exception() for future in futures if future.done() and not future.cancelled()]:
            if error is not None:
                raise error
        return [Grade(None, error="budget") if future in waiting else future.result() for future in futures]


def _is_complete(item: Item) -> bool:
    """Whether the response is graded at all."""
    return not item.reward_impl_version or THINK_END in item.sequences_str


def _task(item: Item) -> Task:
    if item.oat_grader and not (item.data_source or "").startswith("codegen"):
        verifier = "curiosft_think" if item.reward_impl_version else "curiosft"
        return verifier, item.sequences_str, item.ground_truth
    text = item.sequences_str.rpartition(THINK_END)[2] if item.reward_impl_version else item.sequences_str
    return "math_verify", text, item.ground_truth  # which it wraps in `$`, as the release does


def _result(item: Item, grade: Grade) -> dict[str, Any]:
    """A result of CurioSFT's protocol."""
    return {
        "i": item.i,
        "score": float(grade.correct is True),
        "valid_response_length": item.valid_response_length,
        "error": _clean(grade.error),
        "extracted_answers": _clean(grade.extracted or ""),
    }


def _answer_errors(app: FastAPI) -> None:
    """Answer every expected exception by its status and `{"error": message}`."""

    def answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": message}, status, headers=headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> JSONResponse:
        return answer(429, "the queue is full; send the answers again later", {"Retry-After": RETRY_SECONDS})

    @app.exception_handler(QueueStopped)
    async def stopped(request: Request, error: QueueStopped) -> JSONResponse:
        return answer(503, "the server is stopping", {"Retry-After": RETRY_SECONDS})

    @app.exception_handler(Fault)
    async def no_pool(request: Request, error: Fault) -> JSONResponse:
        return answer(500, f"Process pool not initialized: {error}")


class _Uvicorn(uvicorn.Server):
    """A server that gives up waiting answers when it stops; the answers in work are finished."""

    queue: GradingQueue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.stop()
        await super().shutdown(sockets)


def serve(settings: ServerSettings, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; then finish the answers in work and stop.

    Args:
        settings: of the server.
        listener: a bound socket.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every connection needs a file; the usual limit is 1024
    server = RewardServer(settings)
    grace = settings.timeout + 5
    config = uvicorn.Config(
        server.app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=math.ceil(grace),
    )
    web = _Uvicorn(config)
    web.queue = server.queue

    def stop(number: int, frame: FrameType | None) -> None:
        web.should_exit = True

    # uvicorn raises the signal again once it has stopped; a stop on request is not an error.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        web.run(sockets=[listener])
    finally:
        server.queue.stop()
        server.queue.join(0.0 if web.force_exit else grace)
