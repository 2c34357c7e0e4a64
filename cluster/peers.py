"""The other routers of the cluster, as one of them asks them for what it does not have itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import grpc
import grpc.aio

from tandem.cluster_access import ClusterAccess
from tandem.errors import Unavailable
from tandem.v1 import admin_pb2 as pb
from tandem.v1 import admin_pb2_grpc

log = logging.getLogger(__name__)

ANSWER_S = 1.0  # a router that does not answer within this is left out, by name
OPTIONS = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]


class Peers:
    """Stubs for the routers but this one, by name. All methods on one event loop."""

    def __init__(self, me: str, internal: Mapping[str, str], access: ClusterAccess | None = None) -> None:
        self.me = me
        self._access = access or ClusterAccess()
        self.internal = dict(internal)
        self._channels = {
            name: self._access.dial(address, OPTIONS)
            for name, address in internal.items()
            if name != me
        }  # fmt: skip

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """To send with every call of a stub."""
        return self._access.metadata

    def stub(self, router: str) -> admin_pb2_grpc.AdminStub:
        """The operators' service of another router."""
        return admin_pb2_grpc.AdminStub(self._channels[router])  # type: ignore[no-untyped-call]

    async def statuses(self, asked: pb.StatusRequest) -> dict[str, pb.StatusResponse | None]:
        """What each of the others has; None for one that does not answer in time."""
        request = pb.StatusRequest()
        request.CopyFrom(asked)
        request.local = True
        answers = await asyncio.gather(*(self._status(name, request) for name in self._channels))
        return dict(zip(self._channels, answers, strict=True))

    async def _status(self, name: str, request: pb.StatusRequest) -> pb.StatusResponse | None:
        try:
            answer: pb.StatusResponse = await self.stub(name).Status(request, timeout=ANSWER_S, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            log.debug("%s does not tell its status: %s %s", name, error.code().name, error.details())
            return None
        return answer

    async def cancel(self, request_id: str, only: str | None) -> bool:
        """Ends a request at whichever of the others has it; False when none has it.

        `only`: if it is this owner's; None: whosesoever it is. Raises Unavailable when it is not known whether one has
        it, because one of them does not answer.
        """
        answers = await asyncio.gather(*(self._cancel(name, request_id, only) for name in self._channels))
        if not any(answers):
            check_all_answered(dict(zip(self._channels, answers, strict=True)))
        return any(answers)

    async def _cancel(self, name: str, request_id: str, only: str | None) -> bool | None:
        try:
            request = pb.CancelHereRequest(request_id=request_id, owner=only)
            answer: pb.CancelHereResponse = await self.stub(name).CancelHere(
                request, timeout=ANSWER_S, metadata=self.metadata
            )
        except grpc.aio.AioRpcError as error:
            log.debug("%s does not answer a cancellation: %s %s", name, error.code().name, error.details())
            return None
        return answer.found

    async def metrics(self) -> list[str]:
        """The metrics of each; an empty page of one that does not answer in time."""
        return list(await asyncio.gather(*(self._metrics(name) for name in self._channels)))

    async def _metrics(self, name: str) -> str:
        try:
            answer: pb.MetricsHereResponse = await self.stub(name).MetricsHere(
                pb.MetricsHereRequest(), timeout=ANSWER_S, metadata=self.metadata
            )
        except grpc.aio.AioRpcError as error:
            log.debug("%s does not tell its metrics: %s %s", name, error.code().name, error.details())
            return ""
        return answer.page

    async def close(self) -> None:
        """Hangs up."""
        await asyncio.gather(*(channel.close(None) for channel in self._channels.values()))


def check_all_answered(answers: Mapping[str, object | None]) -> None:
    """Raises Unavailable, naming the routers that did not answer, so that nobody takes their silence for a no."""
    silent = [name for name, answer in answers.items() if answer is None]
    if silent:
        raise Unavailable(
            f"no other router has the request, and {', '.join(silent)} did not answer within {ANSWER_S:g} s"
        )
