"""Which router a command speaks to: the first that answers, so that one that hangs holds nobody up; and as whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from cluster.member_access import access_here, key_metadata
from cluster.run_file import NoCluster, RunFile
from tandem.tls import Tls
from tandem.v1 import admin_pb2_grpc

ANSWER_S = 3.0  # for a router to say that it speaks gRPC

_Metadata = tuple[tuple[str, str], ...]


class _Shows(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Sends the same metadata with every call."""

    def __init__(self, metadata: _Metadata) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """A call with one answer."""
        return continuation(details._replace(metadata=self._metadata), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """A call with several."""
        return continuation(details._replace(metadata=self._metadata), request)


@contextmanager
def admin(run: RunFile, *, answer_s: float = ANSWER_S) -> Iterator[admin_pb2_grpc.AdminStub]:
    """The operators' service of a router that is alive. Raises NoCluster when none is, SecretError, TlsError.

    With TANDEM_API_KEY over the public port, as that key's owner; else over an internal one, as a member of the
    cluster, with the join token that only its own user may read.
    """
    key = key_metadata()
    access = access_here(run, needs_token=not key)
    addresses = [run.grpc_address] if key else list(run.internal.values())
    metadata = key or access.metadata
    for address in addresses:
        with _dial(address, access.tls) as channel:
            if _answers(channel, answer_s):
                shown = grpc.intercept_channel(channel, _Shows(metadata))
                yield admin_pb2_grpc.AdminStub(shown)  # type: ignore[no-untyped-call]
                return
    raise NoCluster(f"no router of the cluster at port {run.port} answers within {answer_s:g} s")


def _dial(address: str, tls: Tls | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, tls.channel_credentials, options=tls.channel_options)


def _answers(channel: grpc.Channel, answer_s: float) -> bool:
    try:
        grpc.channel_ready_future(channel).result(timeout=answer_s)
    except grpc.FutureTimeoutError:
        return False
    return True
