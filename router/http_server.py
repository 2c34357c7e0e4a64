"""Runs an HTTP application on uvicorn inside a running event loop, from a bound port to a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket

import uvicorn
from fastapi import FastAPI

from router.http_connection import HttpConnection, HttpLimits

_START_TIMEOUT_S = 20.0
_BACKLOG = 1024
# A client that vanished without a word is given up after 50 s: when nothing is on its way to it, by probes that it does
# not answer (20 s + 3 * 10 s); when something is, by the time that this stays unacknowledged. The second also ends a
# client that reads nothing for so long.
_VANISHED_MS = 50_000
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _VANISHED_MS),
)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: signals are the process's, not a server's."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Leaves the signals alone."""
        yield


class HttpServer:
    """A running HTTP server. `port` is the one really bound."""

    def __init__(self, server: _Server, task: asyncio.Task[None], host: str, port: int) -> None:
        self._server = server
        self._task = task
        self.host = host
        self.port = port

    async def stop(self) -> None:
        """Stops taking requests, lets running replies end within the grace given at the start, and returns."""
        self._server.should_exit = True
        await self._task


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections for `serve_http`, of one process or of several; port 0 takes a free one.

    Raises OSError when the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, or asyncio does not switch off Nagle: a reply of two writes would take 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for level, option, value in _KEEPALIVE:  # connections inherit them
            bound.setsockopt(level, option, value)
        bound.bind((host, port))
        bound.listen(_BACKLOG)
    except OSError:
        bound.close()
        raise
    return bound


async def serve_http(
    app: FastAPI, *, listener: socket.socket, grace_s: float = 5.0, limits: HttpLimits | None = None
) -> HttpServer:
    """Starts serving `app` to who comes to `listener`. `grace_s` bounds how long a stop waits for running replies.

    Raises TimeoutError when the server did not start.
    """
    host, port = listener.getsockname()[:2]
    limits = limits or HttpLimits()
    config = uvicorn.Config(
        app,
        http=functools.partial(HttpConnection, limits=limits),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=limits.idle_timeout_s,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    deadline = asyncio.get_running_loop().time() + _START_TIMEOUT_S
    while not server.started:
        if task.done():
            task.result()
            raise OSError("the HTTP server ended while it started")
        if asyncio.get_running_loop().time() > deadline:
            task.cancel()
            raise TimeoutError(f"the HTTP server did not start within {_START_TIMEOUT_S} s")
        await asyncio.sleep(0.005)
    return HttpServer(server, task, host, port)
