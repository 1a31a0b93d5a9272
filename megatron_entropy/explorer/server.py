"""Answers the explorer's page: routes over `RunReader`s. Needs the extra `eval`.

Only GET, only files of the page and of the run folders, only for a browser that names this machine (a page elsewhere
that resolves its own name to 127.0.0.1 is refused), and a content security policy that lets the page load nothing from
elsewhere and run no script of a response.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple

import uvicorn
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response

from megatron_entropy.explorer import explain
from megatron_entropy.explorer.index import Filter, Kind, NotFoundError, RunReader, question_digest
from megatron_entropy.monitor.dump_rows import DumpRow, cut_of, describe_tokens, token_texts

STATIC = Path(__file__).with_name("static")
SCRIPTS = ("core.js", "plots.js", "overview.js", "rollouts.js", "sample.js")
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
HOSTS = {"127.0.0.1", "localhost", "[::1]"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
SNIPPET = 240
"""Characters of a question or response in the list."""


def describe_runs(runs: Sequence[RunReader]) -> list[dict[str, Any]]:
    """Return name, path and stages of the runs."""
    return [
        {
            "name": run.root.name,
            "path": str(run.root),
            "stages": [
                {
                    "name": str(stage.get("name", "train")),
                    "method": str(method["name"]) if isinstance(method := stage.get("method"), dict) else "",
                    "steps": stage.get("steps") if isinstance(stage.get("steps"), int) else None,
                }
                for stage in run.stages()
            ],
        }
        for run in runs
    ]


def describe_rows(
    run: RunReader, kind: Kind, stage: str, step: int, wanted: Filter, start: int, count: int
) -> dict[str, Any]:
    """Return a page of rows of a dump, with the row to continue from and the number of damaged lines so far."""
    index = run.index(kind, stage, step)
    page = index.find(wanted, start, count)
    rows = [
        _summary(number, row, index.entries[number].group)
        for number, row in zip(page.rows, index.read(page.rows), strict=True)
    ]
    return {
        "rows": rows,
        "next": page.next,
        "indexed": len(index.entries),
        "complete": index.complete,
        "damaged": index.damaged,
    }


def _summary(number: int, row: DumpRow, group: int) -> dict[str, Any]:
    scalars = row.model_dump(
        include={"prompt", "sample", "correct", "extracted", "answer", "error", "reward", "advantage", "entropy",
                 "length", "finish_reason", "parent", "cut", "trained"}
    )  # fmt: skip
    return {
        **scalars,
        "line": number,
        "group": group,
        "verdict": row.verdict,
        "question": row.question[:SNIPPET],
        "digest": question_digest(row.question),
        "response": row.response[:SNIPPET],
    }


def describe_sample(run: RunReader, kind: Kind, stage: str, step: int, line: int) -> dict[str, Any]:
    """Return a response with its tokens, its group, and what decided about it."""
    index = run.index(kind, stage, step)
    lines = index.group_of(line)
    rows = index.read(lines)
    group = {row.sample if row.sample is not None else place: row for place, row in enumerate(rows)}
    row = rows[lines.index(line)]
    number = next(number for number, other in group.items() if other is row)
    parent = group.get(row.parent) if row.parent is not None else None
    settings = next((entry for entry in run.stages() if entry.get("name") == stage), {})
    parts = explain.reward_parts(row, settings)
    members = [
        {
            **_summary(lines[place], other, 0),
            "sample": own,
            "first": next(iter(token_texts(other.pieces[:3])), "") if other.pieces else "",
            "first_logprob": other.rollout_logprobs[0] if other.rollout_logprobs else None,
            "cut_token": cut_of(other, group[other.parent]) if other.parent in group else None,
        }
        for place, (own, other) in enumerate(group.items())
    ]
    return {
        **_summary(line, row, index.entries[line].group),
        "sample": number,
        "question": row.question,
        "response": row.response,
        "semantic_entropy": row.semantic_entropy,
        "kl_weight": row.kl_weight,
        "policy_version": row.policy_version,
        "tokens": describe_tokens(row),
        "prefix": _head(describe_tokens(parent), row.cut) if parent is not None and row.cut else None,
        "parts": parts,
        "sentences": explain.sentences(row, number, group, parts),
        "clusters": explain.clusters(rows),
        "members": members,
    }


def _head(tokens: dict[str, Any], count: int) -> dict[str, Any]:
    return {name: values[:count] for name, values in tokens.items() if name != "untrained"}


class Answer(Response):
    """JSON in ASCII, so that lone surrogates of a damaged text pass through."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See `Response`."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Place(NamedTuple):
    """The dump that a request names."""

    run: int
    kind: Kind
    stage: str
    step: int


def _place(run: int, kind: Kind, stage: str, step: Annotated[int, Query(ge=0, lt=10**11)]) -> Place:
    return Place(run, kind, stage, step)


def create_app(runs: Sequence[RunReader]) -> FastAPI:
    """Return the web application over one or two runs."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, default_response_class=Answer)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        host = request.headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in HOSTS:
            response: Response = Answer({"error": "this name of the server is not allowed; use localhost"}, 403)
        elif request.method not in ("GET", "HEAD"):
            response = Answer({"error": "only GET"}, 405)
        else:
            response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(NotFoundError)
    @app.exception_handler(OSError)
    @app.exception_handler(404)
    async def missing(request: Request, error: Exception) -> Answer:
        return Answer({"error": str(error)}, 404)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Answer:
        return Answer({"error": f"{error.errors()[0]['loc'][-1]}: {error.errors()[0]['msg']}"}, 422)

    def reader(run: int) -> RunReader:
        if not 0 <= run < len(runs):
            raise NotFoundError(f"no run {run}")
        return runs[run]

    @app.get("/")
    def page() -> Response:
        return static("index.html")

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in {"index.html", "style.css", *SCRIPTS}:
            raise NotFoundError(f"no file {name[:64]}")
        return Response((STATIC / name).read_bytes(), media_type=TYPES[Path(name).suffix])

    @app.get("/api/runs")
    def list_runs() -> Answer:
        return Answer(describe_runs(runs))

    @app.get("/api/metrics")
    def metrics(run: int, offset: Annotated[int, Query(ge=0, lt=2**62)] = 0, file: int = 0) -> Answer:
        return Answer(reader(run).metrics(offset, file))

    @app.get("/api/dumps")
    def dumps(run: int) -> Answer:
        return Answer(reader(run).dumps())

    @app.get("/api/rows")
    def rows(
        place: Annotated[Place, Depends(_place)],
        wanted: Annotated[Filter, Depends()],
        start: Annotated[int, Query(ge=0, lt=2**62)] = 0,
        count: Annotated[int, Query(ge=1, le=500)] = 50,
    ) -> Answer:
        return Answer(describe_rows(reader(place.run), place.kind, place.stage, place.step, wanted, start, count))

    @app.get("/api/sample")
    def sample(place: Annotated[Place, Depends(_place)], line: Annotated[int, Query(ge=0, lt=2**62)]) -> Answer:
        return Answer(describe_sample(reader(place.run), place.kind, place.stage, place.step, line))

    return app


def serve(runs: Sequence[RunReader], listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        listener: a bound socket.
    """
    config = uvicorn.Config(
        create_app(runs),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )

    def ignore(number: int, frame: FrameType | None) -> None:
        """uvicorn raises the signal again once it has stopped; a stop on request is not an error."""

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ignore)
    uvicorn.Server(config).run(sockets=[listener])
