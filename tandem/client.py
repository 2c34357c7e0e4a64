"""The public client of a Tandem cluster over gRPC, synchronous and asynchronous; errors come back as tandem.errors."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

import grpc
import grpc.aio

from tandem.errors import ERRORS, InvalidRequest, TandemError, error_of
from tandem.request import FinishReason
from tandem.resuming import Attach, Resuming
from tandem.tls import Tls, load_tls
from tandem.v1 import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from tandem.v1.inference_pb2 import GenerateRequest, GenerateResponse, TokenizeRequest

DEFAULT_TARGET = "localhost:50051"
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
RESUME_S = 30.0

# A prompt: a text, token ids, or the messages of a chat, each with `role` and `content`.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

CANCEL_TIMEOUT_S = 2.0

_Metadata = tuple[tuple[str, str], ...]

_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own: several clients may come to several routers
    ("grpc.keepalive_time_ms", 10_000),  # a router that stands still is noticed
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
]


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn; ranges and defaults are those of SamplingParams in proto/tandem/v1/inference.proto."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    logit_bias: Mapping[int, float]


class RequestOptions(SamplingOptions, total=False):
    """What else may be asked of a request, see GenerateRequest in proto/tandem/v1/inference.proto.

    A request with targets is refused with Overloaded rather than served late, as its class (`interactive`, `sheddable`
    or `batch`) says. `cache_salt` sets its prefixes apart from those of other requests.
    """

    slo_class: str
    ttft_target_ms: int
    tpot_target_ms: int
    cache_salt: str


_OWN_OPTIONS = RequestOptions.__annotations__.keys() - SamplingOptions.__annotations__.keys()  # not of sampling


class SecurityOptions(TypedDict, total=False):
    """What a cluster may ask for. `tls`, `ca`, `cert` or `key` makes the client speak TLS.

    `api_key` is shown with every call. `ca` is a PEM file of the authority that signed the router's certificate, `tls`
    alone trusts those of the system. `cert` and `key` are PEM files of the client's own, where the router wants one.
    `tls_name` is what the router's certificate is made out to, where that is not the address that is dialled.
    TlsError is raised when one of the files cannot be used.
    """

    api_key: str
    tls: bool
    ca: str | Path
    cert: str | Path
    key: str | Path
    tls_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request that ended."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """A token with its logarithmic probability."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """The token chosen, and the likeliest ones at its place."""

    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one message of a stream adds. `finish`, `stop_reason` and `usage` come with the last."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None
    stop_reason: str
    usage: Usage | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason
    stop_reason: str
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that the cluster serves."""

    id: str
    context_tokens: int
    created_s: int
    dtype: str
    exact: bool
    vocab_size: int


class Client:
    """Talks to a cluster from ordinary code; safe to share among threads. Close it, or use it in a `with`."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = 600.0,
        resume_s: float = RESUME_S,
        **security: Unpack[SecurityOptions],
    ) -> None:
        """`target` is host:port of the routers' gRPC; `timeout_s` bounds each call.

        A stream that breaks is resumed, for up to `resume_s` seconds each time, and the request goes on meanwhile: with
        routers that share a store whichever of them is there, else the one that has it. 0: a break is the end.
        """
        tls, self._metadata = _secured(security)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        else:
            options = [*_OPTIONS, *tls.channel_options]
            self._channel = grpc.secure_channel(target, tls.channel_credentials, options=options)
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        self._resume_s = resume_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets the connection go; running streams end with Cancelled."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """The whole answer. Raises TandemError."""
        return _joined(list(self.stream(prompt, model=model, request_id=request_id, priority=priority, **options)))

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        **options: Unpack[RequestOptions],
    ) -> Iterator[Chunk]:
        """The answer as it comes; leaving the iteration cancels the request. Raises TandemError."""
        request = _request(prompt, model, request_id, priority, options, self._resume_s)
        resuming = Resuming(resume_s=self._resume_s)
        call: Any = None
        try:
            while not resuming.finished:
                call = _next(self._stub, resuming, request, self._timeout_s, self._metadata)
                try:
                    for response in call:
                        if _is_news(resuming, response):
                            yield _chunk(response)
                    _check_finished(resuming)
                except grpc.RpcError as error:
                    time.sleep(resuming.failed(time.monotonic(), _translated(error), said=_is_said(error)))
        except TandemError:
            raise
        except BaseException:  # the reader leaves, and the request would wait for it
            if request.resume_ms and not resuming.finished and (resuming.num_tokens or not request_id):
                with suppress(grpc.RpcError, ValueError):  # ValueError: the client is closed already
                    self._stub.Cancel(_cancel(request), timeout=CANCEL_TIMEOUT_S, metadata=self._metadata)
            raise
        finally:
            if call is not None:
                call.cancel()

    def cancel(self, request_id: str) -> bool:
        """Ends a request everywhere; False when it is not known."""
        return bool(self._call(self._stub.Cancel, inference_pb2.CancelRequest(request_id=request_id)).found)

    def tokenize(self, prompt: str | Sequence[Mapping[str, str]], *, model: str = "") -> tuple[int, ...]:
        """The ids that the prompt has on the cluster."""
        return tuple(self._call(self._stub.Tokenize, _tokenize_request(prompt, model)).ids)

    def models(self) -> list[ModelInfo]:
        """What is served."""
        return _models(self._call(self._stub.ListModels, inference_pb2.ListModelsRequest()))

    def _call(self, method: Any, request: object) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _translated(error) from None


class AsyncClient:
    """Talks to a cluster from an event loop. Close it, or use it in an `async with`."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = 600.0,
        resume_s: float = RESUME_S,
        **security: Unpack[SecurityOptions],
    ) -> None:
        """`target` is host:port of the routers' gRPC; `timeout_s` bounds each call.

        A stream that breaks is resumed, for up to `resume_s` seconds each time, and the request goes on meanwhile: with
        routers that share a store whichever of them is there, else the one that has it. 0: a break is the end.
        """
        tls, self._metadata = _secured(security)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        else:
            options = [*_OPTIONS, *tls.channel_options]
            self._channel = grpc.aio.secure_channel(target, tls.channel_credentials, options=options)
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        self._resume_s = resume_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Lets the connection go; running streams end with Cancelled."""
        await self._channel.close(None)

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """The whole answer. Raises TandemError."""
        stream = self.stream(prompt, model=model, request_id=request_id, priority=priority, **options)
        return _joined([each async for each in stream])

    async def stream(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        **options: Unpack[RequestOptions],
    ) -> AsyncIterator[Chunk]:
        """The answer as it comes; closing the iterator cancels the request. Raises TandemError."""
        request = _request(prompt, model, request_id, priority, options, self._resume_s)
        resuming = Resuming(resume_s=self._resume_s)
        call: Any = None
        try:
            while not resuming.finished:
                call = _next(self._stub, resuming, request, self._timeout_s, self._metadata)
                try:
                    async for response in call:
                        if _is_news(resuming, response):
                            yield _chunk(response)
                    _check_finished(resuming)
                except grpc.RpcError as error:
                    await asyncio.sleep(resuming.failed(time.monotonic(), _translated(error), said=_is_said(error)))
        except TandemError:
            raise
        except BaseException:  # the reader leaves, and the request would wait for it
            if request.resume_ms and not resuming.finished and (resuming.num_tokens or not request_id):
                with suppress(grpc.RpcError, grpc.aio.UsageError):  # the latter: the client is closed already
                    await self._stub.Cancel(_cancel(request), timeout=CANCEL_TIMEOUT_S, metadata=self._metadata)
            raise
        finally:
            if call is not None:
                call.cancel()

    async def cancel(self, request_id: str) -> bool:
        """Ends a request everywhere; False when it is not known."""
        return bool((await self._call(self._stub.Cancel, inference_pb2.CancelRequest(request_id=request_id))).found)

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]], *, model: str = "") -> tuple[int, ...]:
        """The ids that the prompt has on the cluster."""
        return tuple((await self._call(self._stub.Tokenize, _tokenize_request(prompt, model))).ids)

    async def models(self) -> list[ModelInfo]:
        """What is served."""
        return _models(await self._call(self._stub.ListModels, inference_pb2.ListModelsRequest()))

    async def _call(self, method: Any, request: object) -> Any:
        try:
            return await method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _translated(error) from None


def _request(
    prompt: Prompt, model: str, request_id: str, priority: int, options: RequestOptions, resume_s: float
) -> GenerateRequest:
    """The request; with `resume_s` it has a name and a key of its own, to be found and sent again by."""
    try:
        # protobuf's own errors name neither the field nor the value well, but say what type it wants.
        own: Any = {name: value for name, value in options.items() if name in _OWN_OPTIONS}
        sampling: Any = {name: value for name, value in options.items() if name not in _OWN_OPTIONS}
        params = inference_pb2.SamplingParams(**sampling)
        request = inference_pb2.GenerateRequest(
            model=model, request_id=request_id, priority=priority, sampling=params, return_token_ids=True, **own
        )
        if resume_s:
            request.request_id = request_id or f"req-{uuid.uuid4().hex}"
            request.idempotency_key = uuid.uuid4().hex
            request.resume_ms = round(resume_s * 1000)
        if isinstance(prompt, str):
            request.text = prompt
        elif _is_chat(prompt):
            request.chat.CopyFrom(_chat(prompt))
        else:
            request.tokens.ids.extend(prompt)  # type: ignore[arg-type]
            request.tokens.SetInParent()
    except (TypeError, ValueError) as error:
        raise InvalidRequest("request", f"has a field of a wrong type or range: {error}") from None
    return request


def _secured(security: SecurityOptions) -> tuple[Tls | None, _Metadata]:
    """The certificates, and the metadata that goes with every call."""
    api_key = security.get("api_key", "")
    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    files = {name: Path(security[name]) for name in ("ca", "cert", "key") if security.get(name)}
    if not files and not security.get("tls", False):
        return None, metadata
    name = security.get("tls_name", "")
    return load_tls(ca=files.get("ca"), cert=files.get("cert"), key=files.get("key"), name=name), metadata


def _next(stub: Any, resuming: Resuming, request: GenerateRequest, timeout_s: float, metadata: _Metadata) -> Any:
    """The call that goes on with the stream."""
    match resuming.next_call():
        case Attach(from_index=index):
            asked = inference_pb2.AttachRequest(
                request_id=request.request_id, from_index=index, idempotency_key=request.idempotency_key
            )
            return stub.Attach(asked, timeout=timeout_s, metadata=metadata)
        case _:
            return stub.Generate(request, timeout=timeout_s, metadata=metadata)


def _is_news(resuming: Resuming, response: GenerateResponse) -> bool:
    num_tokens, finished = len(response.token_ids), bool(response.finish)
    return resuming.heard(response.index, num_tokens, finished=finished)


def _check_finished(resuming: Resuming) -> None:
    """A call that ends well has ended the stream."""
    if not resuming.finished:
        raise TandemError("the stream ended without a finish")


def _cancel(request: GenerateRequest) -> inference_pb2.CancelRequest:
    return inference_pb2.CancelRequest(request_id=request.request_id)


def _tokenize_request(prompt: str | Sequence[Mapping[str, str]], model: str) -> TokenizeRequest:
    if isinstance(prompt, str):
        return inference_pb2.TokenizeRequest(model=model, text=prompt)
    return inference_pb2.TokenizeRequest(model=model, chat=_chat(prompt))


def _is_chat(prompt: Sequence[object]) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _chat(messages: Sequence[Any]) -> inference_pb2.ChatPrompt:
    try:
        turns = [inference_pb2.ChatMessage(role=each["role"], content=each["content"]) for each in messages]
    except (KeyError, TypeError) as error:
        raise InvalidRequest("messages", f"each needs the texts 'role' and 'content': {error}") from None
    return inference_pb2.ChatPrompt(messages=turns)


def _chunk(response: GenerateResponse) -> Chunk:
    usage = response.usage
    return Chunk(
        request_id=response.request_id,
        index=response.index,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(
            TokenLogprobs(chosen=_logprob(each.chosen), top=tuple(map(_logprob, each.top)))
            for each in response.logprobs
        ),
        finish=FinishReason(response.finish) if response.finish else None,
        stop_reason=response.stop_reason,
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        )
        if response.HasField("usage")
        else None,
    )


def _logprob(each: inference_pb2.TokenLogprob) -> Logprob:
    return Logprob(token_id=each.token_id, logprob=each.logprob, text=each.text)


def _joined(chunks: Sequence[Chunk]) -> Completion:
    last = chunks[-1] if chunks else None
    if last is None or last.finish is None or last.usage is None:
        raise TandemError("the stream ended without a finish")
    return Completion(
        request_id=last.request_id,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(each for chunk in chunks for each in chunk.token_ids),
        logprobs=tuple(each for chunk in chunks for each in chunk.logprobs),
        finish=last.finish,
        stop_reason=last.stop_reason,
        usage=last.usage,
    )


def _models(response: inference_pb2.ListModelsResponse) -> list[ModelInfo]:
    return [
        ModelInfo(
            id=model.id,
            context_tokens=model.context_tokens,
            created_s=model.created_s,
            dtype=model.dtype,
            exact=model.exact,
            vocab_size=model.vocab_size,
        )
        for model in response.models
    ]


def _translated(error: grpc.RpcError) -> TandemError:
    """The error of our tree that a call ended with: by its code in the trailing metadata, else by its status."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), "an error of a call has its status"
    message = error.details() or ""
    # The two kinds of calls have metadata of different types, both of pairs.
    metadata: Any = error.trailing_metadata() or ()
    told = {key: value for key, value in metadata if isinstance(value, str)}
    after = told.get("retry-after-ms", "")
    return error_of(
        told.get("tandem-code", ""),
        message,
        field=told.get("tandem-field", "request"),
        retry_after_ms=int(after) if after.isdigit() else 1000,
        kind=_by_status(error.code().name),
    )


def _is_said(error: grpc.RpcError) -> bool:
    """Whether a router ended the call, and not the connection."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), "an error of a call has its status"
    metadata: Any = error.trailing_metadata() or ()
    return any(key == "tandem-code" for key, _ in metadata)


def _by_status(status: str) -> type[TandemError]:
    return next((kind for kind in ERRORS.values() if kind.grpc_status == status), TandemError)
