"""One client's HTTP connection: uvicorn's protocol, with bounds on what uvicorn waits for and keeps without one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from router.openai_stream import error_body
from tandem.errors import InvalidRequest, TandemError, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What a client may take before its request is with the application, which bounds the body.

    `head_timeout_s` counts from the connection's begin, or from the first byte after a reply; between a reply and that
    byte uvicorn's own idle timer runs, for `idle_timeout_s`: longer than the 5 s to 60 s after which common clients and
    proxies close a connection, since a request that meets the server's close on its way is lost to its client.
    """

    head_timeout_s: float = 10.0
    idle_timeout_s: int = 75
    head_bytes_max: int = 64 * 1024
    connections_max: int = 4096


class HeadTooSlow(InvalidRequest):
    """The head did not come in time."""

    http_status = 408


class HeadTooLarge(InvalidRequest):
    """The head is larger than any request needs."""

    http_status = 431


class HttpConnection(HttpToolsProtocol):
    """Closes a connection whose head is late or too large, or that is one too many; takes one request at a time."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: HttpLimits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._in_body = False
        self._moved = False  # a head or a message ended in the bytes just parsed, or some of a body came
        self._head_bytes = 0
        self._tail_bytes = 0  # since a chunk: of its extensions, or of the fields after the last one
        self._drops_rest = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begins to wait for the first head, or refuses the connection."""
        super().connection_made(transport)
        most = self._limits.connections_max
        if len(self.connections) > most:
            self._refuse(Unavailable(f"connections: {most} are open, which is the limit; come again"))
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the wait."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses; then the head's size is checked and, while no request is under way, the clock started."""
        was_in_body, self._moved = self._in_body, False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if not self._moved:
            self._head_bytes += 0 if was_in_body else len(data)
            self._tail_bytes += len(data) if was_in_body else 0
        most = self._limits.head_bytes_max
        if self._tail_bytes > most:
            self.transport.abort()  # the reply may be under way
        elif self._head_bytes > most:
            self._refuse(HeadTooLarge("head", f"has {self._head_bytes} bytes or more, at most {most}"))
        elif not self._is_busy:
            self._start_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a field of the head. Those after a body come when the head has been judged: they are dropped."""
        if not self._in_body:
            super().on_header(name, value)

    def on_chunk_header(self) -> None:
        """The length of another chunk came."""
        self._moved, self._tail_bytes = True, 0

    def on_headers_complete(self) -> None:
        """Starts the request, unless another is under way.

        What a client sends ahead of its reply is dropped, and the connection closes after that reply: the client sends
        it again on another. Kept, it would need a bound, and uvicorn would not notice that the client of the request
        under way is gone, since it tells only the last one.
        """
        self._stop_timer()
        self._in_body, self._moved, self._head_bytes = True, True, 0
        running = self.cycle
        super().on_headers_complete()
        if self.pipeline:
            self.pipeline.clear()
            self.cycle = running
            self.cycle.keep_alive = False
            self._drops_rest = True
            self.flow.resume_reading()  # an end of the connection is only seen while it is read

    def on_body(self, body: bytes) -> None:
        """Hands the body on, if its request was taken."""
        self._moved, self._tail_bytes = True, 0
        if not self._drops_rest:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The next byte belongs to another head."""
        self._in_body, self._moved, self._tail_bytes = False, True, 0
        super().on_message_complete()

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._limits.head_timeout_s, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self._head_bytes and not self.transport.is_closing():
            self._refuse(HeadTooSlow("head", f"has not come in full within {self._limits.head_timeout_s:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: TandemError) -> None:
        """Closes with a reply, or in the middle of the one under way. A client still sending may see a reset."""
        if self._is_busy:
            self.transport.abort()
            return
        body = error_body(error)
        status = HTTPStatus(error.http_status)
        lines = (
            f"HTTP/1.1 {status.value} {status.phrase}", "content-type: application/json",
            f"content-length: {len(body)}", "connection: close", "", "",
        )  # fmt: skip
        self.transport.write("\r\n".join(lines).encode() + body)
        self.transport.close()
