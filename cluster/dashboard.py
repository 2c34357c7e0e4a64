"""The operators' dashboard over HTTP: its files, which anybody may read, its feed and its actions, for operators alone.

Who asks is told by the API key in the Authorization header, as everywhere: there is no cookie, no session and no secret
in an address. A page of another site gets nothing: see cluster/same_origin.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Receive, Scope, Send

from cluster.dashboard_feed import Feed, send_lines
from cluster.dashboard_source import Cluster
from cluster.same_origin import objection
from router.api_keys import CALLER
from router.door import Door
from router.metrics import Api, EdgeMetrics
from router.request_body import Bodies
from router.validation import REQUEST_ID_CHARACTERS_MAX, show
from tandem.errors import InvalidRequest, PermissionDenied, TandemError, Unavailable, error_of

log = logging.getLogger(__name__)

PAGE = "/dashboard"
FOLDER = Path(__file__).resolve().parent / "dashboard"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
ACTION_BYTES_MAX = 4096
FILES = {each.name: each for each in sorted(FOLDER.iterdir()) if each.suffix in KINDS}
OPEN_PAGES = frozenset({PAGE, *(f"{PAGE}/{name}" for name in FILES)})  # they hold nothing of any cluster
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

_Body = TypeVar("_Body", bound=BaseModel)


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class MigrateAsked(_Asked):
    """Move a running request; `to` empty: wherever the router thinks best."""

    request: str = Field(min_length=1, max_length=REQUEST_ID_CHARACTERS_MAX)
    to: str = Field(default="", max_length=128)


class DrainAsked(_Asked):
    """Empty a worker; `restart`: a fresh one takes its place."""

    worker: str = Field(min_length=1, max_length=128)
    restart: bool = False


class FlipAsked(_Asked):
    """Give a worker another role."""

    worker: str = Field(min_length=1, max_length=128)
    role: str = Field(min_length=1, max_length=32)


class ScaleAsked(_Asked):
    """Give pools these sizes, by role."""

    pools: dict[str, int] = Field(min_length=1, max_length=3)


class Dashboard:
    """Its pages. `names_allowed`: TLS shows who the router is, so that it may be reached by any name."""

    def __init__(
        self, cluster: Cluster, *, feed: Feed, door: Door, metrics: EdgeMetrics, names_allowed: bool = False
    ) -> None:
        self._cluster = cluster
        self.feed = feed
        self._door = door
        self._metrics = metrics
        self._names_allowed = names_allowed
        self._bodies = Bodies()

    def add_to(self, app: FastAPI) -> None:
        """Adds them to the router's application, which has its door before them."""
        files = {PAGE: FILES["index.html"], **{f"{PAGE}/{name}": path for name, path in FILES.items()}}
        for path, file in files.items():
            app.add_api_route(path, _file(file), methods=["GET"], include_in_schema=False)
        for path, method, answer, acts in (
            ("/feed", "GET", self._watch, False),
            ("/requests/{request_id}", "GET", self._explain, False),
            ("/migrate", "POST", self._migrate, True),
            ("/drain", "POST", self._drain, True),
            ("/flip", "POST", self._flip, True),
            ("/scale", "POST", self._scale, True),
        ):
            guarded = self._guarded(answer, acts=acts)
            app.add_api_route(f"{PAGE}{path}", guarded, methods=[method], include_in_schema=False)

    async def close(self) -> None:
        """Lets go of what its actions began, which goes on."""
        await self._cluster.close()

    def _guarded(
        self, answer: Callable[[Request], Awaitable[Response]], *, acts: bool
    ) -> Callable[[Request], Awaitable[Response]]:
        """Only for operators, and only from the dashboard's own page. Refusals are counted."""

        async def page(request: Request) -> Response:
            try:
                self._check(request, acts=acts)
                response = await answer(request)
            except grpc.aio.AioRpcError as error:
                raise _of_another_router(error) from None
            except TandemError as error:
                self._metrics.refused(Api.HTTP, error)
                raise
            response.headers.update({**HEADERS, "cache-control": "no-store"})
            return response

        return page

    def _check(self, request: Request, *, acts: bool) -> None:
        self._door.check_operator(CALLER.get())
        headers: dict[str, list[str]] = {}
        for name, value in request.headers.raw:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        names_allowed = self._names_allowed or self._door.ring is not None
        refused = objection(headers, acts=acts, names_allowed=names_allowed)
        if refused is not None:
            raise PermissionDenied(refused)

    async def _watch(self, request: Request) -> Response:
        client = "" if request.client is None else f"{request.client.host}:{request.client.port}"
        return _FeedResponse(self.feed, f"{CALLER.get().name or 'anybody'}@{client}")

    async def _explain(self, request: Request) -> Response:
        return JSONResponse(await self._cluster.explain(request.path_params["request_id"]))

    async def _migrate(self, request: Request) -> Response:
        asked = await self._read(request, MigrateAsked)
        by = CALLER.get().name
        log.info("dashboard key=%s moves request=%s to=%s", by or "-", show(asked.request), show(asked.to))
        return JSONResponse(await self._cluster.migrate(asked.request, asked.to, by))

    async def _drain(self, request: Request) -> Response:
        asked = await self._read(request, DrainAsked)
        task = await self._cluster.drain(asked.worker, restart=asked.restart, by=CALLER.get().name)
        return JSONResponse({"task": task.id}, 202)

    async def _flip(self, request: Request) -> Response:
        asked = await self._read(request, FlipAsked)
        task = await self._cluster.flip(asked.worker, asked.role, CALLER.get().name)
        return JSONResponse({"task": task.id}, 202)

    async def _scale(self, request: Request) -> Response:
        asked = await self._read(request, ScaleAsked)
        task = await self._cluster.scale(asked.pools, CALLER.get().name)
        return JSONResponse({"task": task.id}, 202)

    async def _read(self, request: Request, kind: type[_Body]) -> _Body:
        body = await self._bodies.read(request)
        if len(body) > ACTION_BYTES_MAX:
            raise InvalidRequest("body", f"has {len(body)} bytes, at most {ACTION_BYTES_MAX}")
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "body"
            raise InvalidRequest(name, first["msg"]) from None


class _FeedResponse(Response):
    """Frames, each a line of JSON, until the browser leaves or the feed says why not."""

    def __init__(self, feed: Feed, name: str) -> None:
        super().__init__(media_type="application/x-ndjson")
        del self.headers["content-length"]
        self._feed = feed
        self._watcher = feed.admit(name, CALLER.get())  # one too many is refused with a status of its own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends, and stops when the browser is gone or takes nothing any more."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            work = asyncio.create_task(self._write(send))
            gone = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                work.cancel()
                gone.cancel()
                results = await asyncio.gather(work, gone, return_exceptions=True)
            if isinstance(results[0], TimeoutError):
                log.info("dashboard watcher=%s is dropped: it takes nothing", self._watcher.name)
            elif isinstance(results[0], Exception) and not isinstance(results[0], OSError):
                raise results[0]
        finally:
            self._feed.leave(self._watcher)

    async def _write(self, send: Send) -> None:
        async def line(body: bytes) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": True})

        await send_lines(self._watcher, line)
        await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """A page that is one file, read once; a browser that has it already is told so."""
    body = path.read_bytes()
    tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
    headers = {**HEADERS, "etag": tag, "cache-control": "no-cache"}
    kind = f"{KINDS[path.suffix]}; charset=utf-8"

    async def page(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=kind)

    return page


def _of_another_router(error: grpc.aio.AioRpcError) -> TandemError:
    """What another router refused with, in its words."""
    trailers: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    codes = dict(trailers)
    if "tandem-code" not in codes:
        return Unavailable(f"the router that has it does not answer: {error.code().name} {error.details()}")
    return error_of(str(codes["tandem-code"]), error.details() or "")
