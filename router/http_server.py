"""Runs an HTTP application on uvicorn inside a running event loop, from a bound port to a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl

import uvicorn
from fastapi import FastAPI

from router.http_connection import HttpConnection, HttpLimits

_START_TIMEOUT_S = 20.0
_HANDSHAKE_TIMEOUT_S = 10.0  # of TLS


class _Server(uvicorn.Server):
    """uvicorn without signal handlers, which are the process's, and with a bound on the TLS handshake."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens on `sockets`. uvicorn has no setting for the handshake: a client that says nothing has a minute."""
        config, loop = self.config, asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            return config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self.server_state, app_state={}, _loop=loop
            )

        timeout_s = _HANDSHAKE_TIMEOUT_S if config.ssl is not None else None
        self.servers = [
            await loop.create_server(
                connection, sock=each, ssl=config.ssl, backlog=config.backlog, ssl_handshake_timeout=timeout_s
            )
            for each in sockets or ()
        ]
        self.started = True

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


async def serve_http(
    app: FastAPI,
    *,
    listener: socket.socket,
    grace_s: float = 5.0,
    limits: HttpLimits | None = None,
    tls: ssl.SSLContext | None = None,
) -> HttpServer:
    """Starts serving `app` to who comes to `listener`, over TLS with `tls`.

    `grace_s` bounds how long a stop waits for running replies.

    Raises TimeoutError when the server did not start.
    """
    host, port = listener.getsockname()[:2]
    limits = limits or HttpLimits()
    config = uvicorn.Config(
        app,
        http=functools.partial(HttpConnection, limits=limits),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        log_level="error",  # it warns of each request that is none: strangers may send what they like, and fill no log
        access_log=False,
        lifespan="off",
        timeout_keep_alive=limits.idle_timeout_s,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        ssl_context_factory=None if tls is None else lambda config, default: tls,
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
