"""The gRPC API tandem.v1.Inference, with health and reflection; other services are added beside it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]  # it is set at run time
from grpc_reflection.v1alpha import reflection

from router.answer import Answers, Piece
from router.api_keys import CALLER
from router.chat import check_num_messages, check_role
from router.grpc_door import GrpcDoor
from router.metrics import Api
from router.service import Ask, Service
from router.tokenizer import Tokenizer
from router.validation import BODY_BYTES_MAX, SamplingFields
from tandem.cluster_access import MembersOnly
from tandem.errors import InvalidRequest, Overloaded, TandemError
from tandem.grpc_requests import ParsedRequests
from tandem.v1 import inference_pb2, inference_pb2_grpc

log = logging.getLogger(__name__)

INFERENCE = "tandem.v1.Inference"
_HEALTH_PERIOD_S = 0.2
_KEEPALIVE_S = 20.0  # a client that vanished is given up after twice this
_HANDSHAKE_TIMEOUT_S = 10.0
CONNECTIONS_MAX = 4096
# Calls that have come and that grpc.aio has not taken yet. It takes one after another, a few dozen a second while a
# thousand streams are written. gRPC itself ends some of them from 1,000 on, and those of 30 s, as a bare CANCELLED
# without a reason or a time to come again: nobody but admission should refuse, and nobody but the client give up.
CALLS_WAITING_MAX = 8192
_CALL_WAITS_S = 3600
_OPTIONS = [
    ("grpc.max_receive_message_length", BODY_BYTES_MAX),
    ("grpc.max_send_message_length", BODY_BYTES_MAX),
    ("grpc.keepalive_permit_without_calls", 1),  # of both ends
    ("grpc.http2.max_pings_without_data", 0),  # a request may wait long for its first token
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # sooner, a client's pings are an attack
    ("grpc.max_concurrent_streams", 1024),  # of one connection; the client's own library holds back the rest
    ("grpc.max_connection_idle_ms", 300_000),  # without a call: the client dials again when it has one
    ("grpc.server.max_pending_requests", CALLS_WAITING_MAX),
    ("grpc.server.max_pending_requests_hard_limit", CALLS_WAITING_MAX),
    ("grpc.server_max_unrequested_time_in_server", _CALL_WAITS_S),
]

if TYPE_CHECKING:
    from typing import Any

    # The stubs are generic, the classes are not.
    _Context = grpc.aio.ServicerContext[Any, Any]

# Adds a service to the server and returns its full name.
AddService = Callable[[grpc.aio.Server], str]
# Ends a request that another router may have; whether one had it. Raises TandemError when that is not known.
CancelElsewhere = Callable[[str, str | None], Awaitable[bool]]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """tandem.v1.Inference over the service that both APIs share."""

    def __init__(self, service: Service, cancel_elsewhere: CancelElsewhere | None = None) -> None:
        self._service = service
        self._cancel_elsewhere = cancel_elsewhere

    async def Generate(self, request: inference_pb2.GenerateRequest, context: _Context) -> None:
        """Streams one answer; when the client goes away it ends everywhere, or waits for the client to come back."""
        try:
            answers = await self._open(request)
        except TandemError as error:
            self._service.metrics.refused(Api.GRPC, error)
            await _abort(context, error)
        await self._write(answers, context, with_ids=request.return_token_ids)

    async def Attach(self, request: inference_pb2.AttachRequest, context: _Context) -> None:
        """Streams the rest of an answer, in the form that was asked for when it began."""
        try:
            answers = await self._service.resume(
                request.request_id, request.from_index, CALLER.get(), key=request.idempotency_key
            )
        except TandemError as error:
            self._service.metrics.refused(Api.GRPC, error)
            await _abort(context, error)
        assert answers.form is not None, "what can be resumed has its form"
        await self._write(answers, context, with_ids=bool(answers.form.get("token_ids")))

    async def _write(self, answers: Answers, context: _Context, *, with_ids: bool) -> None:
        try:
            async for piece in answers.answers[0]:
                await context.write(self._response(answers, piece, with_ids=with_ids))
        except TandemError as error:
            await _abort(context, error)
        except Exception as error:
            log.exception("request=%s failed", answers.request_id)
            await _abort(context, TandemError(f"internal error: {type(error).__name__}"))
        finally:
            answers.close("the client disconnected")

    async def Cancel(self, request: inference_pb2.CancelRequest, context: _Context) -> inference_pb2.CancelResponse:
        """Ends a request and all its answers, whichever router has it."""
        only = CALLER.get().only
        found = self._service.cancel(request.request_id, "cancelled by a client", only)
        if not found and self._cancel_elsewhere is not None:
            try:
                found = await self._cancel_elsewhere(request.request_id, only)
            except TandemError as error:
                await _abort(context, error)
        return inference_pb2.CancelResponse(found=found)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        """The ids that a prompt would have."""
        try:
            self._service.check_model(request.model)
            if request.WhichOneof("input") is None:
                raise InvalidRequest("input", "is missing; send text or chat")
            is_chat = request.WhichOneof("input") == "chat"
            ids = await (self._chat(request.chat) if is_chat else self._service.encode(request.text, "text"))
        except TandemError as error:
            await _abort(context, error)
        return inference_pb2.TokenizeResponse(ids=ids)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: _Context
    ) -> inference_pb2.ListModelsResponse:
        """The models served: one."""
        model = self._service.model
        card = inference_pb2.Model(
            id=model.id,
            context_tokens=model.context_tokens,
            created_s=model.created_s,
            dtype=model.dtype,
            exact=model.exact,
            vocab_size=self._service.tokenizer.vocab_size,
        )
        return inference_pb2.ListModelsResponse(models=[card])

    async def _open(self, request: inference_pb2.GenerateRequest) -> Answers:
        self._service.check_model(request.model)
        match request.WhichOneof("prompt"):
            case "text":
                prompt: Sequence[int] = await self._service.encode(request.text, "text")
            case "chat":
                prompt = await self._chat(request.chat)
            case "tokens":
                prompt = list(request.tokens.ids)
            case _:
                raise InvalidRequest("prompt", "is missing; send text, chat or tokens")
        fields = _fields(request.sampling)
        return await self._service.open(
            Ask(
                api=Api.GRPC,
                request_id=request.request_id,
                prompts=[prompt],
                fields=fields,
                priority=request.priority,
                caller=CALLER.get(),
                cache_salt=request.cache_salt,
                slo_class=request.slo_class,
                ttft_target_ms=request.ttft_target_ms,
                tpot_target_ms=request.tpot_target_ms,
                idempotency_key=request.idempotency_key,
                resume_ms=request.resume_ms,
                form={"token_ids": request.return_token_ids},
            )
        )

    async def _chat(self, chat: inference_pb2.ChatPrompt) -> tuple[int, ...]:
        check_num_messages(len(chat.messages))
        turns = [
            {"role": check_role(message.role, f"chat.messages.{number}.role"), "content": message.content}
            for number, message in enumerate(chat.messages)
        ]
        return await self._service.encode_chat(turns)

    def _response(self, answers: Answers, piece: Piece, *, with_ids: bool) -> inference_pb2.GenerateResponse:
        tokenizer = self._service.tokenizer
        response = inference_pb2.GenerateResponse(request_id=answers.request_id, index=piece.index, text=piece.text)
        if with_ids:
            response.token_ids.extend([token.token_id for token in piece.tokens])
        for token in piece.tokens if piece.offsets else ():
            if token.logprob is not None:
                entry = response.logprobs.add()
                entry.chosen.CopyFrom(_logprob(token.token_id, token.logprob, tokenizer))
                entry.top.extend([_logprob(each, logprob, tokenizer) for each, logprob in token.top])
        if piece.finish is not None:
            response.finish = piece.finish.value
            response.stop_reason = "" if piece.stop_reason is None else str(piece.stop_reason)
            response.usage.prompt_tokens = answers.num_prompt_tokens
            response.usage.completion_tokens = answers.num_tokens
            response.usage.cached_tokens = answers.num_cached_tokens
        return response


class GrpcServer:
    """The gRPC server of a router: Inference, health, reflection and what was added."""

    def __init__(self, server: grpc.aio.Server, health: health_aio.HealthServicer, service: Service) -> None:
        self.port = 0
        self._server = server
        self._health = health
        self._service = service
        self._follower: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
        """Serves on host:port, 0 takes a free one, over TLS with `credentials`; returns the port.

        Raises OSError when it cannot be bound.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"gRPC cannot bind {address}: {error}") from error
        await self._server.start()
        await self._set_health()
        self._follower = asyncio.create_task(self._follow_health(), name="grpc health")
        return self.port

    async def stop(self, grace_s: float = 5.0) -> None:
        """Says NOT_SERVING, takes no new calls, lets running ones end within the grace."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _follow_health(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_PERIOD_S)
            await self._set_health()

    async def _set_health(self) -> None:
        statuses = health_pb2.HealthCheckResponse
        status = statuses.NOT_SERVING if self._service.not_ready() else statuses.SERVING
        for name in ("", INFERENCE):
            await self._health.set(name, status)


def build_grpc_server(
    service: Service,
    *,
    extra: Sequence[AddService] = (),
    members: MembersOnly | None = None,
    cancel_elsewhere: CancelElsewhere | None = None,
    keepalive_s: float = _KEEPALIVE_S,
    handshake_timeout_s: float = _HANDSHAKE_TIMEOUT_S,
    connections_max: int = CONNECTIONS_MAX,
) -> GrpcServer:
    """The server, not started yet. `extra` add their services to it and are seen by reflection.

    Every call is judged by the service's door; `members` may call as they like, and they alone the registry.
    It shares its port: with other routers, and with whoever keeps the port while none of them serves.
    A client is pinged every `keepalive_s` and is gone when it does not answer within as long; a connection that has
    not said within `handshake_timeout_s` that it speaks HTTP/2 is closed; so is one that is one too many.
    """
    times = [
        ("grpc.keepalive_time_ms", round(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(keepalive_s * 1000)),
        ("grpc.http2.ping_timeout_ms", round(keepalive_s * 1000)),  # else a ping has a minute
        ("grpc.server_handshake_timeout_ms", round(handshake_timeout_s * 1000)),
        ("grpc.max_allowed_incoming_connections", connections_max),
    ]
    options = [*_OPTIONS, ("grpc.so_reuseport", 1), *times]
    guard = GrpcDoor(service.door, on_refused=service.metrics.refused, members=members)
    server = grpc.aio.server(options=options, interceptors=[guard, ParsedRequests()])
    inference_pb2_grpc.add_InferenceServicer_to_server(  # type: ignore[no-untyped-call]
        InferenceServicer(service, cancel_elsewhere), server
    )
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [INFERENCE, "grpc.health.v1.Health", *(add(server) for add in extra), reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)
    return GrpcServer(server, health, service)


async def _abort(context: _Context, error: TandemError) -> NoReturn:
    """Ends the call with the error's status; its code, field and time to wait are in the trailing metadata."""
    details: list[tuple[str, str]] = [("tandem-code", error.code)]
    if isinstance(error, InvalidRequest) and error.field.isascii():
        details.append(("tandem-field", error.field))
    if isinstance(error, Overloaded):
        details.append(("retry-after-ms", str(error.retry_after_ms)))
    await context.abort(getattr(grpc.StatusCode, error.grpc_status), error.message, tuple(details))
    raise AssertionError("abort raises")


def _fields(params: inference_pb2.SamplingParams) -> SamplingFields:
    def given(name: str) -> int | None:
        return getattr(params, name) if params.HasField(name) else None

    return SamplingFields(
        temperature=given("temperature"),
        top_k=given("top_k"),
        top_p=given("top_p"),
        min_p=given("min_p"),
        repetition_penalty=given("repetition_penalty"),
        presence_penalty=given("presence_penalty"),
        frequency_penalty=given("frequency_penalty"),
        seed=given("seed"),
        max_tokens=given("max_tokens"),
        min_tokens=params.min_tokens,
        stop=list(params.stop),
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        logprobs=given("logprobs"),
        logit_bias=dict(params.logit_bias),
    )


def _logprob(token_id: int, logprob: float, tokenizer: Tokenizer) -> inference_pb2.TokenLogprob:
    text = tokenizer.token_bytes(token_id).decode(errors="replace")
    return inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob, text=text)
