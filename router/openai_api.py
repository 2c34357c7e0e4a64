"""The OpenAI-compatible HTTP API: chat and legacy completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from router.answer import Answers, Piece
from router.api_keys import CALLER
from router.http_door import HttpDoor
from router.metrics import CONTENT_TYPE, Api
from router.openai_document import ModelLimits, document_of
from router.openai_page import page_of
from router.openai_schema import ChatRequest, CommonRequest, CompletionRequest, parse
from router.openai_stream import (
    DONE,
    EVENT_ID_MARK,
    EVENT_INDEX_DIGITS_MAX,
    EventWriter,
    ReplyForm,
    error_body,
    whole_reply,
)
from router.request_body import DISCONNECTED, Bodies, BodyTooLarge, BodyTooSlow
from router.service import Ask, Service
from router.validation import CHOICES_MAX, SamplingFields, check_request_id, show
from tandem.errors import InvalidRequest, Overloaded, TandemError

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
IDEMPOTENCY_KEY = "idempotency-key"
RESUME_MS = "x-resume-ms"
LAST_EVENT_ID = "last-event-id"
_DESCRIPTION = "OpenAI-compatible API of a Tandem cluster."
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class _NoSuchPage(TandemError):
    """No such path, or not with this method."""

    code = "not_found"
    openai_type = "invalid_request_error"


def build_app(service: Service, *, open_pages: frozenset[str] = frozenset()) -> FastAPI:
    """The application; others may add routers and pages to it. Whatever is not one of `open_pages` asks for a key."""
    app = FastAPI(title="Tandem", description=_DESCRIPTION, version="1", openapi_url=None)
    app.add_middleware(HttpDoor, door=service.door, on_refused=service.metrics.refused, open_pages=open_pages)
    _add_completions(app, service)
    _add_models(app, service)
    _add_health(app, service)

    _add_documentation(app, service)

    @app.exception_handler(TandemError)
    async def on_error(request: Request, error: TandemError) -> Response:
        return _error_response(error, _valid_id(request))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        body = error_body(_NoSuchPage(f"{request.method} {request.url.path}: {error.detail}"))
        return Response(body, error.status_code, headers=error.headers, media_type="application/json")

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return _error_response(TandemError(f"internal error: {type(error).__name__}"), _valid_id(request))

    return app


def _add_documentation(app: FastAPI, service: Service) -> None:
    """Made once: anybody may open these pages, and a tenth of a second of work each time would hold up all answers."""
    limits = ModelLimits(
        id=service.model.id,
        vocab_size=service.limits.vocab_size,
        context_tokens=service.limits.context_tokens,
    )
    app.openapi = functools.cache(functools.partial(document_of, app, limits))  # type: ignore[method-assign]
    as_json = functools.cache(lambda: json.dumps(app.openapi()).encode())
    as_page = functools.cache(lambda: page_of(app.openapi()).encode())

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        """The schema for machines."""
        return Response(as_json(), media_type="application/json")

    # FastAPI's own pages load their script from a CDN.
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """The schema for people."""
        return HTMLResponse(as_page())


def _add_completions(app: FastAPI, service: Service) -> None:
    bodies = Bodies()

    @app.post("/v1/chat/completions", tags=["completions"])
    async def chat_completions(request: Request) -> Response:
        """Answers a chat; with `stream` as server-sent events."""
        with _Refusals(service, Api.CHAT):
            asked = parse(ChatRequest, await bodies.read(request))
            if request.headers.get(LAST_EVENT_ID):
                return await _resume(service, Api.CHAT, request)
            service.check_model(asked.model)
            fields = asked.fields()
            prompt = await service.encode_chat(asked.turns())
            return await _open(service, Api.CHAT, request, asked, [prompt], fields, asked.names())

    @app.post("/v1/completions", tags=["completions"])
    async def completions(request: Request) -> Response:
        """Continues one or several prompts, each a text or token ids."""
        with _Refusals(service, Api.COMPLETIONS):
            asked = parse(CompletionRequest, await bodies.read(request))
            if request.headers.get(LAST_EVENT_ID):
                return await _resume(service, Api.COMPLETIONS, request)
            service.check_model(asked.model)
            fields, prompts = asked.fields(), asked.prompts()
            if len(prompts) > CHOICES_MAX:
                raise InvalidRequest("prompt", f"has {len(prompts)} prompts, at most {CHOICES_MAX}")
            encoded = [await service.encode(each) if isinstance(each, str) else each for each in prompts]
            return await _open(service, Api.COMPLETIONS, request, asked, encoded, fields, {})


async def _open(
    service: Service,
    api: Api,
    request: Request,
    asked: CommonRequest,
    prompts: Sequence[Sequence[int]],
    fields: SamplingFields,
    names: dict[str, str],
) -> Response:
    own_id = request.headers.get(REQUEST_ID, "")
    request_id = check_request_id(own_id, REQUEST_ID) if own_id else ""
    n = 1 if asked.n is None else asked.n
    form = ReplyForm(
        model=service.model.id,
        created_s=int(time.time()),
        chat=api is Api.CHAT,
        logprobs=fields.logprobs is not None,
        token_ids=bool(asked.return_token_ids),
        include_usage=asked.include_usage,
        stream=bool(asked.stream),
    )
    ask = Ask(
        api=api,
        request_id=request_id,
        prompts=prompts,
        fields=fields,
        n=n,
        priority=asked.priority or 0,
        caller=CALLER.get(),
        cache_salt=asked.cache_salt or "",
        slo_class=asked.slo_class or "",
        ttft_target_ms=asked.ttft_target_ms or 0,
        tpot_target_ms=asked.tpot_target_ms or 0,
        idempotency_key=request.headers.get(IDEMPOTENCY_KEY, ""),
        resume_ms=_resume_ms(request.headers.get(RESUME_MS, "0")),
        form=asdict(form),
        names=names,
    )
    answers = await service.open(ask)
    # Of a repeated idempotency key: as it was answered before.
    return _Reply(service, answers, form if answers.form is None else ReplyForm.kept(answers.form))


async def _resume(service: Service, api: Api, request: Request) -> Response:
    """The rest of a stream, after the event that the client saw last."""
    last = request.headers[LAST_EVENT_ID]
    request_id, _, index = last.rpartition(EVENT_ID_MARK)
    if not request_id or not index.isascii() or not index.isdigit() or len(index) > EVENT_INDEX_DIGITS_MAX:
        raise InvalidRequest(LAST_EVENT_ID, f"is {show(last)}, must be the id of an event of a stream of this cluster")
    key = request.headers.get(IDEMPOTENCY_KEY, "")
    answers = await service.resume(request_id, int(index), CALLER.get(), key=key, api=api)
    assert answers.form is not None, "what can be resumed has its form"
    return _Reply(service, answers, ReplyForm.kept(answers.form))


def _resume_ms(value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise InvalidRequest(RESUME_MS, f"is {show(value)}, must be a whole number of milliseconds")
    return int(value)


class _Refusals:
    """Counts the errors that end a request before anything ran for it."""

    def __init__(self, service: Service, api: Api) -> None:
        self._service = service
        self._api = api

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TandemError):
            self._service.metrics.refused(self._api, error)


class _Reply(Response):
    """Sends the answers, streamed or whole, and cancels them everywhere when the client goes away.

    The status goes out with the first piece, so that an error before it still has a status of its own.
    """

    def __init__(self, service: Service, answers: Answers, form: ReplyForm) -> None:
        super().__init__()
        self._service = service
        self._answers = answers
        self._form = form
        self._write = self._write_stream if form.stream else self._write_whole
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes until the answers end or the client is gone."""
        reason = "the reply could not be sent"
        work = asyncio.create_task(self._guarded(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                reason = DISCONNECTED
                log.info("client disconnected request=%s", self._answers.request_id)
        finally:
            work.cancel()
            gone.cancel()
            self._answers.close(reason)
        results = await asyncio.gather(work, gone, return_exceptions=True)
        failed = results[0]
        if isinstance(failed, Exception) and not isinstance(failed, OSError):
            raise failed

    async def _guarded(self, send: Send) -> None:
        """Writes; an error becomes a reply of its own, or the last event of the stream."""
        try:
            await self._write(send)
        except TandemError as error:
            await self._send_error(send, error)
        except OSError:
            raise
        except Exception as error:
            await self._send_error(send, TandemError(f"internal error: {type(error).__name__}"))
            raise

    async def _send_error(self, send: Send, error: TandemError) -> None:
        if not self._begun:
            response = _error_response(error, self._answers.request_id)
            await send({"type": "http.response.start", "status": error.http_status, "headers": response.raw_headers})
            await send({"type": "http.response.body", "body": response.body})
            return
        await send({"type": "http.response.body", "body": EventWriter.error(error) + DONE})

    async def _write_stream(self, send: Send) -> None:
        writer = EventWriter(self._answers, self._form, self._service.tokenizer)
        async with aclosing(self._answers.pieces()) as pieces:
            async for number, piece in pieces:
                if not self._begun:
                    await self._begin(send, _STREAM_HEADERS)
                body = writer.piece(number, piece)
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        tail = writer.usage(self._answers) if self._form.include_usage else b""
        await send({"type": "http.response.body", "body": tail + DONE})

    async def _write_whole(self, send: Send) -> None:
        pieces: list[list[Piece]] = [[] for _ in self._answers.answers]
        async with aclosing(self._answers.pieces()) as coming:
            async for number, piece in coming:
                pieces[number].append(piece)
        body = whole_reply(self._form, self._service.tokenizer, self._answers, pieces)
        length = str(len(body)).encode()
        await self._begin(send, [(b"content-type", b"application/json"), (b"content-length", length)])
        await send({"type": "http.response.body", "body": body})

    async def _begin(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        named = [*headers, (REQUEST_ID.encode(), self._answers.request_id.encode())]
        await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": named})
        self._begun = True


async def _disconnected(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


def _valid_id(request: Request) -> str:
    """The id that the client gave, when it may be echoed."""
    own_id = request.headers.get(REQUEST_ID, "")
    try:
        return check_request_id(own_id) if own_id else ""
    except InvalidRequest:
        return ""


def _error_response(error: TandemError, request_id: str) -> Response:
    headers = {REQUEST_ID: request_id} if request_id else {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_ms / 1000)))
        headers["retry-after-ms"] = str(error.retry_after_ms)
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        headers["connection"] = "close"
    return Response(error_body(error), error.http_status, headers=headers, media_type="application/json")


def _add_models(app: FastAPI, service: Service) -> None:
    def card() -> dict[str, object]:
        model = service.model
        return {
            "id": model.id,
            "object": "model",
            "created": model.created_s,
            "owned_by": "tandem",
            "max_model_len": model.context_tokens,
        }

    @app.get("/v1/models", tags=["models"])
    async def models() -> Response:
        """The models served: one."""
        return JSONResponse({"object": "list", "data": [card()]})

    @app.get("/v1/models/{model_id:path}", tags=["models"])
    async def model(model_id: str) -> Response:
        """One model."""
        service.check_model(model_id)
        return JSONResponse(card())


def _add_health(app: FastAPI, service: Service) -> None:
    async def live() -> Response:
        """Whether this process answers."""
        return JSONResponse({"status": "ok"})

    async def ready() -> Response:
        """Whether requests can be served now; says why not."""
        reason = service.not_ready()
        if reason:
            return JSONResponse({"status": "not ready", "reason": reason}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "ok"})

    pages: dict[Callable[[], Awaitable[Response]], tuple[str, ...]] = {
        live: ("/live", "/livez", "/liveness"),
        ready: ("/ready", "/readyz", "/readiness", "/health", "/healthz"),
    }
    for page, paths in pages.items():
        for number, path in enumerate(paths):
            shown = number == 0 or path == "/health"
            app.add_api_route(path, page, methods=["GET"], tags=["health"], include_in_schema=shown)

    @app.get("/metrics", tags=["health"])
    async def metrics() -> Response:
        """The metrics of all routers for Prometheus."""
        return Response(await service.metrics.whole_page(), headers={"content-type": CONTENT_TYPE})
