"""The door of the HTTP API: nobody reaches a page without a good API key, but for health and the documentation."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from router.api_keys import CALLER
from router.door import Door
from router.metrics import Api
from router.openai_stream import error_body
from router.stages import ARRIVED
from router.trace_context import HEADER, TRACE, trace_of
from tandem.errors import TandemError, Unauthenticated

HEALTH_PAGES = ("/live", "/livez", "/liveness", "/ready", "/readyz", "/readiness", "/health", "/healthz")
OPEN_PAGES = frozenset({*HEALTH_PAGES, "/docs", "/openapi.json"})  # by their exact path; whatever is added is closed

TRACEPARENT = HEADER.encode()
_APIS = {"/v1/chat/completions": Api.CHAT, "/v1/completions": Api.COMPLETIONS}


class HttpDoor:
    """Around the whole application. It judges the head alone, before anything of the body is read.

    `open_pages`: those of the application that hold nothing of the cluster, by their exact paths, too.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        door: Door,
        on_refused: Callable[[Api, TandemError], None],
        open_pages: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._open = OPEN_PAGES | open_pages
        self._door = door
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets the request in as its key's, or answers 401."""
        if scope["type"] != "http" or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        ARRIVED.set(time.monotonic())
        TRACE.set(trace_of([value.decode("latin-1") for name, value in scope["headers"] if name == TRACEPARENT]))
        shown = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        try:
            caller = self._door.enter(shown)
        except Unauthenticated as error:
            self._on_refused(_APIS.get(scope["path"], Api.HTTP), error)
            await _refuse(send, error)
            return
        CALLER.set(caller)  # of this request's task alone
        await self._app(scope, receive, send)


async def _refuse(send: Send, error: TandemError) -> None:
    body = error_body(error)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
