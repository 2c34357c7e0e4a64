"""The worker's word with the registry: it registers, sends heartbeats, and registers again when the router is new."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from tandem import wire
from tandem.cluster_access import ClusterAccess
from tandem.messages import WorkerInfo
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
RETRY_S = 0.2
# Not understood, no member of this cluster, or of another version: asking again changes nothing.
_FOR_GOOD = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
)


class RegistrationOver(RuntimeError):
    """The worker is not wanted any more, or nobody is there to want it; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What a heartbeat says. `progress` rises whenever the engine gets anywhere."""

    progress: int
    runnable: bool
    agent_pid: int
    refused: int = 0  # calls and messages of strangers, so far


class Registration:
    """One worker at the registry of its router, over the router's restarts. Used on one event loop."""

    def __init__(self, *, registry: str, info: WorkerInfo, gone_s: float, access: ClusterAccess | None = None) -> None:
        self._info = info
        self._gone_s = gone_s
        self._access = access or ClusterAccess()
        self._channel = self._access.dial(
            registry, [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
        )
        self._stub = worker_pb2_grpc.RegistryStub(self._channel)  # type: ignore[no-untyped-call]
        self.incarnation = 0
        self.heartbeat_ms = 1000

    async def register(self) -> None:
        """Joins. Raises RegistrationOver when it is refused, or when no registry answers for `gone_s`."""
        request = wire.encode_worker_info(self._info)
        request.incarnation = self.incarnation
        last_s = time.monotonic()
        while True:
            try:
                reply = await self._stub.Register(request, timeout=CALL_TIMEOUT_S, metadata=self._access.metadata)
            except grpc.aio.AioRpcError as error:
                self._silent(last_s, error)
                await asyncio.sleep(RETRY_S)
                continue
            if reply.refused:
                raise RegistrationOver(f"the registry refused: {reply.refused}")
            self.incarnation, self.heartbeat_ms = reply.incarnation, reply.heartbeat_ms
            return

    async def beat(self, pulse: Callable[[], Pulse]) -> None:
        """Sends heartbeats until it raises RegistrationOver."""
        heard_s = time.monotonic()
        while True:
            began_s = time.monotonic()
            now = pulse()
            request = pb.HeartbeatRequest(
                worker_id=self._info.worker_id,
                incarnation=self.incarnation,
                steps=now.progress,
                runnable=now.runnable,
                agent_pid=now.agent_pid,
                refused=now.refused,
            )
            try:
                reply = await self._stub.Heartbeat(request, timeout=CALL_TIMEOUT_S, metadata=self._access.metadata)
                heard_s = time.monotonic()
            except grpc.aio.AioRpcError as error:
                self._silent(heard_s, error)
                await asyncio.sleep(RETRY_S)
                continue
            if reply.leave:
                raise RegistrationOver("the registry asked the worker to leave")
            if not reply.known:
                log.warning("the registry does not know incarnation %d: registering again", self.incarnation)
                await self.register()
                continue
            await asyncio.sleep(max(0.0, self.heartbeat_ms / 1000 - (time.monotonic() - began_s)))

    async def close(self) -> None:
        """Hangs up."""
        await self._channel.close(None)

    def _silent(self, heard_s: float, error: grpc.aio.AioRpcError) -> None:
        if error.code() in _FOR_GOOD:
            raise RegistrationOver(f"the registry refused: {error.details()}") from None
        silent_s = time.monotonic() - heard_s
        if silent_s > self._gone_s:
            raise RegistrationOver(f"no registry for {silent_s:.0f} s: {error.details()}") from None
