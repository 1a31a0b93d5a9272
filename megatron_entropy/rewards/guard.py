"""What the reward server does with every request before a route sees it: token, size of the body, count."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
"""An ASGI application and its arguments: scope, receive, send."""

OPEN_ROUTES = ("/health",)
"""Routes that need no token: a load balancer has none."""
MAX_BODIES = 8
"""Bodies of the largest size that may be in memory at once."""
MAX_DISCARDED = 16
"""Bodies of the largest size that are read without being kept, so that a client that sends too much sees why."""


class Guard:
    """An ASGI application in front of another one.

    Args:
        app: gets what passes.
        token: that requests must bring as `Authorization: Bearer TOKEN`; empty: none.
        max_body: bytes of a request's body.
        on_response: called with the path and the status of every response.
    """

    def __init__(self, app: Application, *, token: str, max_body: int, on_response: Callable[[str, int], None]) -> None:
        self._app = app
        self._authorization = f"Bearer {token}".encode() if token else b""
        self._max_body = max_body
        self._on_response = on_response
        self._bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 401, 413 or 429."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, size = 500, 0

        async def counting_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def limited_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            self._bytes += len(message.get("body", b""))
            if size > self._max_body:
                await self._discard(message, receive)
                raise HTTPException(413, self._too_large())
            if self._bytes > MAX_BODIES * self._max_body:
                await self._discard(message, receive)
                raise HTTPException(429, "too many large requests at once", {"Retry-After": "1"})
            return message

        headers = dict(scope["headers"])
        try:
            if not self._is_authorized(scope["path"], headers):
                refusal = JSONResponse(
                    {"error": "the token is missing or wrong"}, 401, headers={"WWW-Authenticate": "Bearer"}
                )
                await refusal(scope, receive, counting_send)
            elif int(headers.get(b"content-length", b"0")) > self._max_body:
                await self._discard({"more_body": True}, receive)
                await JSONResponse({"error": self._too_large()}, 413)(scope, receive, counting_send)
            else:
                await self._app(scope, limited_receive, counting_send)
        finally:
            self._bytes -= size
            self._on_response(scope["path"], status)

    def _is_authorized(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if not self._authorization or path in OPEN_ROUTES:
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), self._authorization)

    def _too_large(self) -> str:
        return f"the body has more than {self._max_body} bytes; send fewer answers in one request"

    async def _discard(self, message: Message, receive: Receive) -> None:
        """Read the rest of a body: a client that is still sending would not see the response."""
        size = 0
        while message.get("more_body") and size < MAX_DISCARDED * self._max_body:
            message = await receive()
            size += len(message.get("body", b""))
