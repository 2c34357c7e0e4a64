"""The door of gRPC: Inference needs a good API key, Admin an operator's, Registry a join token, health nothing."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from router.api_keys import ANYBODY, CALLER
from router.door import Door
from router.metrics import Api
from router.stages import ARRIVED
from router.trace_context import HEADER, TRACE, trace_of
from tandem.cluster_access import MembersOnly, refusing
from tandem.errors import PermissionDenied, TandemError, Unauthenticated

if TYPE_CHECKING:
    from typing import Any

    _Handler = grpc.RpcMethodHandler[Any, Any]

ADMIN = "/tandem.v1.Admin/"
REGISTRY = "/tandem.v1.Registry/"
# By the beginning of the method's name; whatever is added is closed.
OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")


class GrpcDoor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # it is none at run time
    """Judges the call's metadata before anything of its message is read.

    With `members`, on an internal port, members of the cluster may call as they like; nobody else the registry.
    """

    def __init__(
        self, door: Door, *, on_refused: Callable[[Api, TandemError], None], members: MembersOnly | None = None
    ) -> None:
        self._door = door
        self._members = members
        self._on_refused = on_refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Lets the call in as its key's, or puts a handler in its place that refuses it."""
        method = handler_call_details.method
        if method.startswith(OPEN):
            return await continuation(handler_call_details)
        ARRIVED.set(time.monotonic())
        metadata = handler_call_details.invocation_metadata or ()
        TRACE.set(trace_of([str(value) for name, value in metadata if name == HEADER]))
        if self._members is not None and (method.startswith(REGISTRY) or self._members.shows_token(metadata)):
            CALLER.set(ANYBODY)
            return await self._members.intercept_service(continuation, handler_call_details)
        shown = [str(value) for name, value in metadata if name == "authorization"]
        try:
            caller = self._door.enter_operator(shown) if method.startswith(ADMIN) else self._door.enter(shown)
        except (Unauthenticated, PermissionDenied) as error:
            self._on_refused(Api.GRPC, error)
            status = getattr(grpc.StatusCode, error.grpc_status)
            return refusing(status, error.message, (("tandem-code", error.code),))
        CALLER.set(caller)  # of this call's task, which goes on to the handler
        return await continuation(handler_call_details)
