"""How members of one cluster show each other that they are members: join token, protocol version, certificates.

The token is compared in constant time, so that nobody finds it byte by byte. It goes over the wire as it is: between
machines TLS keeps listeners from it.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from tandem.tls import Tls

if TYPE_CHECKING:
    from typing import Any

    _Context = grpc.aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1  # of all services inside the cluster; raised when an older member would misunderstand
TOKEN_KEY = "tandem-join-token"
VERSION_KEY = "tandem-protocol"
LOG_PERIOD_S = 1.0  # strangers may knock as fast as they like, and fill no log

Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterAccess:
    """What a member shows and asks for. An empty token is one as any other: all must have the same."""

    token: str = field(default="", repr=False)
    tls: Tls | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """To send with every call inside the cluster."""
        return ((TOKEN_KEY, self.token), (VERSION_KEY, str(PROTOCOL_VERSION)))

    def dial(
        self,
        target: str,
        options: Sequence[tuple[str, str | int]] = (),
        interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    ) -> grpc.aio.Channel:
        """A channel to another member."""
        if self.tls is None:
            return grpc.aio.insecure_channel(target, options=tuple(options), interceptors=interceptors)
        options = (*options, *self.tls.channel_options)
        return grpc.aio.secure_channel(target, self.tls.channel_credentials, options=options, interceptors=interceptors)

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """Binds a server that only members may call, by certificate too where there is TLS; returns the port."""
        if self.tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self.tls.server_credentials(self.tls.ca))

    def objection(self, metadata: Metadata) -> tuple[grpc.StatusCode, str] | None:
        """Why the caller is no member, or None."""
        shown = dict(metadata)
        token, version = shown.get(TOKEN_KEY), shown.get(VERSION_KEY)
        if token is None:
            return grpc.StatusCode.UNAUTHENTICATED, f"{TOKEN_KEY}: is missing; only members of this cluster may call"
        if not hmac.compare_digest(str(token).encode(errors="replace"), self.token.encode()):
            return grpc.StatusCode.UNAUTHENTICATED, f"{TOKEN_KEY}: is not the one of this cluster"
        if version != str(PROTOCOL_VERSION):
            told = "is missing" if version is None else f"is {str(version)[:20]!r}"
            return grpc.StatusCode.FAILED_PRECONDITION, f"{VERSION_KEY}: {told}, this member speaks {PROTOCOL_VERSION}"
        return None


class MembersOnly(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # it is none at run time
    """Lets only members of the cluster call, whatever they call.

    `on_refused` hears of each call that is refused.
    """

    def __init__(self, access: ClusterAccess, *, on_refused: Callable[[], None] = lambda: None) -> None:
        self._access = access
        self._on_refused = on_refused
        self._logged_s = float("-inf")
        self._num_silent = 0

    @staticmethod
    def shows_token(metadata: Metadata) -> bool:
        """Whether the caller says that it is a member, true or not."""
        return any(key == TOKEN_KEY for key, _ in metadata)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Hands the call on, or puts a handler in its place that refuses it."""
        objection = self._access.objection(handler_call_details.invocation_metadata or ())
        if objection is not None:
            self._note(handler_call_details.method, objection[1])
            return refusing(*objection)
        return await continuation(handler_call_details)

    def _note(self, method: str, reason: str) -> None:
        self._on_refused()
        now_s = time.monotonic()
        if now_s - self._logged_s < LOG_PERIOD_S:
            self._num_silent += 1
            return
        log.warning("%s refused: %s (%d more since the last such line)", method, reason, self._num_silent)
        self._logged_s, self._num_silent = now_s, 0


def refusing(status: grpc.StatusCode, reason: str, details: Sequence[tuple[str, str]] = ()) -> _Handler:
    """A handler that ends every call with this status, before it reads what the caller sends."""

    async def refuse(requests: object, context: _Context) -> None:
        await context.abort(status, reason, tuple(details))

    return grpc.stream_stream_rpc_method_handler(refuse)
