"""Bytes of a peer that are no message end their call with INVALID_ARGUMENT: grpc itself says UNKNOWN, a bug's code."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

_Parse = Callable[[bytes], Any]


class NoMessage(ValueError):
    """What came on a stream is no message of its method."""


class ParsedRequests(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """For every method of a server: its requests are parsed here, under the eyes of who can refuse them by name."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's own handler behind a parser."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        method = handler_call_details.method.rpartition("/")[2]
        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        kind = next(each for each in kinds if getattr(handler, each) is not None)
        behaviour = getattr(handler, kind)
        parsed = _streamed if handler.request_streaming else _single
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            _same_kind(behaviour, parsed(handler.request_deserializer, method), method),
            response_serializer=handler.response_serializer,
        )


_Read = Callable[[Any], Any]


def _single(parse: _Parse, method: str) -> _Read:
    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            raise NoMessage(f"message: {len(data)} bytes that are no request of {method}: {error}") from None

    return read


def _streamed(parse: _Parse, method: str) -> _Read:
    read_one = _single(parse, method)

    async def read(messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in messages:
            yield read_one(data)

    return read


def _same_kind(behaviour: Callable[..., Any], read: _Read, method: str) -> Callable[..., Any]:
    """grpc looks at what kind of function a handler is."""

    async def generator(data: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for answer in behaviour(read(data), context):
                yield answer
        except NoMessage as error:
            await _refuse(context, error)

    async def coroutine(data: Any, context: Any) -> Any:
        try:
            return await behaviour(read(data), context)
        except NoMessage as error:
            await _refuse(context, error)

    return generator if inspect.isasyncgenfunction(behaviour) else coroutine


async def _refuse(context: Any, error: NoMessage) -> NoReturn:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    raise AssertionError("abort raises")
