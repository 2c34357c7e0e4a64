"""The worker's word with the registries of all routers: it registers, sends heartbeats, and registers with new ones."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
import grpc.aio

from cluster.standing import Standing
from tandem import wire
from tandem.cluster_access import ClusterAccess
from tandem.messages import WorkerInfo
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
RETRY_S = 0.2
LOOK_MS = 7_000  # a call that nobody answers, the wait after it, and what a busy machine makes of both
# Not understood, no member of this cluster, or of another version.
_REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
)
REFUSED_S = 1.0  # until a registry that has refused is asked again: its router may be another one by then
DIALLED_S = 2.0  # a router that has not dialled by then may be another one, which does not know the worker


class RegistrationOver(RuntimeError):
    """The worker is not wanted any more, or nobody is there to want it; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What a heartbeat says. `progress` rises whenever the engine gets anywhere."""

    progress: int
    runnable: bool
    agent_pid: int
    refused: int = 0  # calls and messages of strangers, so far
    damaged: int = 0  # frames that arrived and did not check, so far


class Registrations:
    """One worker at the registries of all routers, by the routers' names, over their restarts. On one event loop.

    Raises RegistrationOver, from `register` or `beat`, when the worker's standing with them is over.
    """

    def __init__(
        self,
        *,
        registries: Mapping[str, str],
        info: WorkerInfo,
        incarnation: int,
        gone_s: float,
        access: ClusterAccess | None = None,
    ) -> None:
        access = access or ClusterAccess()
        self._standing = Standing(
            registries=tuple(registries), began_ms=_now_ms(), gone_ms=round(gone_s * 1000), look_ms=LOOK_MS
        )  # fmt: skip
        self._each = [_Registration(name, address, info, incarnation, access) for name, address in registries.items()]

    async def register(self) -> None:
        """Returns once one of the registries has taken the worker in."""
        tasks = [asyncio.create_task(each.join(self._standing)) for each in self._each]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _end(tasks)

    async def beat(self, pulse: Callable[[], Pulse]) -> None:
        """Sends heartbeats, to each registry once its router has dialled the worker, until it raises."""
        tasks = [asyncio.create_task(each.beat(self._standing, pulse)) for each in self._each]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _end(tasks)

    def dialled(self, router: str) -> None:
        """A router's stream stands."""
        for each in self._each:
            if each.name == router:
                each.dialled.set()

    async def close(self) -> None:
        """Hangs up."""
        for each in self._each:
            await each.close()


class _Registration:
    """One worker at one registry."""

    def __init__(self, name: str, address: str, info: WorkerInfo, incarnation: int, access: ClusterAccess) -> None:
        self.name = name
        self._access = access
        self.dialled = asyncio.Event()
        self._request = wire.encode_worker_info(info)
        self._request.incarnation = incarnation
        self._heartbeat_s = 1.0
        self._channel = access.dial(
            address, [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
        )
        self._stub = worker_pb2_grpc.RegistryStub(self._channel)  # type: ignore[no-untyped-call]

    async def join(self, standing: Standing) -> None:
        """Returns once this registry has taken the worker in."""
        while True:
            pause_s = RETRY_S
            try:
                reply = await self._stub.Register(self._request, timeout=CALL_TIMEOUT_S, metadata=self._access.metadata)
            except grpc.aio.AioRpcError as error:
                self._silent(standing, error)
            else:
                if not reply.refused:
                    self._heartbeat_s = reply.heartbeat_ms / 1000
                    standing.accepted(_now_ms(), self.name)
                    return
                standing.refused(_now_ms(), self.name, reply.refused)
                pause_s = REFUSED_S
            _check(standing)
            await asyncio.sleep(pause_s)

    async def beat(self, standing: Standing, pulse: Callable[[], Pulse]) -> None:
        """Joins, again when that is needed, and sends heartbeats."""
        await self.join(standing)
        while not self.dialled.is_set():
            try:
                await asyncio.wait_for(self.dialled.wait(), DIALLED_S)
            except TimeoutError:
                await self.join(standing)
        while True:
            began_s = time.monotonic()
            now = pulse()
            request = pb.HeartbeatRequest(
                worker_id=self._request.worker_id,
                incarnation=self._request.incarnation,
                steps=now.progress,
                runnable=now.runnable,
                agent_pid=now.agent_pid,
                refused=now.refused,
                damaged=now.damaged,
            )
            try:
                reply = await self._stub.Heartbeat(request, timeout=CALL_TIMEOUT_S, metadata=self._access.metadata)
            except grpc.aio.AioRpcError as error:
                self._silent(standing, error)
                _check(standing)
                await asyncio.sleep(RETRY_S)
                continue
            if reply.leave:
                standing.leave(self.name)
                _check(standing)
            if not reply.known:
                log.warning("%s does not know this incarnation: registering again", self.name)
                await self.join(standing)
                continue
            standing.accepted(_now_ms(), self.name)
            await asyncio.sleep(max(0.0, self._heartbeat_s - (time.monotonic() - began_s)))

    async def close(self) -> None:
        """Hangs up."""
        await self._channel.close(None)

    def _silent(self, standing: Standing, error: grpc.aio.AioRpcError) -> None:
        if error.code() in _REFUSALS:
            standing.refused(_now_ms(), self.name, str(error.details()))


def _check(standing: Standing) -> None:
    reason = standing.over(_now_ms())
    if reason:
        raise RegistrationOver(reason)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
