"""The registry: workers register and send heartbeats here; what membership concludes is told to the router's driver."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import assert_never

import grpc.aio

from cluster.membership import (
    Action,
    Admitted,
    DrainAsked,
    DrainEnded,
    Ended,
    Event,
    Heartbeat,
    Member,
    Membership,
    MemberState,
    Passed,
    Registered,
    RegistrationRefused,
    RoleChanged,
    RoleGiven,
    StateChanged,
)
from router.driver import Driver
from tandem import wire
from tandem.messages import Role
from tandem.request import WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

log = logging.getLogger(__name__)

LOOK_MS = 100


class Registry(worker_pb2_grpc.RegistryServicer):
    """The shell around Membership. All methods run on the driver's event loop.

    `on_change` hears of every change of a worker's state, after the driver has; `on_refused` how many more strangers
    a worker has refused.
    """

    def __init__(
        self,
        *,
        membership: Membership,
        driver: Driver,
        on_change: Callable[[StateChanged], None],
        on_refused: Callable[[int], None] = lambda num: None,
    ) -> None:
        self.membership = membership
        self._driver = driver
        self._on_change = on_change
        self._on_refused = on_refused

    async def Register(
        self, request: pb.RegisterRequest, context: grpc.aio.ServicerContext[pb.RegisterRequest, pb.RegisterReply]
    ) -> pb.RegisterReply:
        """Takes a worker in under its incarnation, or says why not."""
        try:
            info = wire.decode_worker_info(request)
            if request.incarnation < 1:
                raise ValueError("incarnation: is missing; it counts the starts of a worker from 1")
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        actions = self._take(Registered(info=info, incarnation=request.incarnation))
        refused = next((each.reason for each in actions if isinstance(each, RegistrationRefused)), "")
        return pb.RegisterReply(heartbeat_ms=self.membership.heartbeat_ms, refused=refused)

    async def Heartbeat(
        self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext[pb.HeartbeatRequest, pb.HeartbeatReply]
    ) -> pb.HeartbeatReply:
        """Books a sign of life. `known` False: that incarnation is dead or was never here; `leave`: it was drained."""
        beat = Heartbeat(
            worker_id=WorkerId(request.worker_id),
            incarnation=request.incarnation,
            steps=request.steps,
            runnable=request.runnable,
            agent_pid=request.agent_pid,
            refused=request.refused,
            damaged=request.damaged,
        )
        member = self.membership.current(beat)
        if member is not None and beat.refused > member.refused:
            self._on_refused(beat.refused - member.refused)
        self._take(beat)
        return pb.HeartbeatReply(
            known=self.membership.current(beat) is not None, leave=self.membership.has_left(beat)
        )  # fmt: skip

    def ended(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        """The supervisor saw the worker's process end."""
        self._take(Ended(worker_id=worker_id, incarnation=incarnation, reason=reason))

    def drain(self, member: Member) -> None:
        """The worker gets nothing new from now on."""
        self._take(DrainAsked(worker_id=member.info.worker_id, incarnation=member.incarnation))

    def drained(self, worker_id: WorkerId, incarnation: int, *, left: bool, reason: str) -> None:
        """The drain is over: the worker leaves, or takes work again."""
        self._take(DrainEnded(worker_id=worker_id, incarnation=incarnation, left=left, reason=reason))

    def flipped(self, worker_id: WorkerId, incarnation: int, role: Role) -> None:
        """The worker has another role now."""
        self._take(RoleGiven(worker_id=worker_id, incarnation=incarnation, role=role))

    async def tick(self) -> None:
        """Tells membership the time, for ever."""
        while True:
            await asyncio.sleep(LOOK_MS / 1000)
            self._take(Passed())

    def _take(self, event: Event) -> list[Action]:
        actions = self.membership.handle(time.monotonic_ns() // 1_000_000, event)
        for action in actions:
            match action:
                case Admitted(info=info, incarnation=incarnation):
                    log.info("worker=%s incarnation=%d joins, pid=%d", info.worker_id, incarnation, info.pid)
                    self._driver.worker_joined(info, incarnation)
                case RegistrationRefused(worker_id=worker_id, reason=reason):
                    log.warning("worker=%s refused: %s", worker_id, reason)
                case StateChanged():
                    self._tell(action)
                case RoleChanged(worker_id=worker_id, incarnation=incarnation, role=role):
                    log.info("worker=%s incarnation=%d is a %s worker now", worker_id, incarnation, role)
                    self._driver.worker_flipped(worker_id, incarnation, role)
                case _:
                    assert_never(action)
        return actions

    def _tell(self, change: StateChanged) -> None:
        log.info(
            "worker=%s incarnation=%d state=%s: %s", change.worker_id, change.incarnation, change.state, change.reason
        )
        match change.state:
            case MemberState.LEFT | MemberState.DEAD:
                self._driver.worker_lost(change.worker_id, change.incarnation, change.reason)
            case MemberState.DRAINING:
                self._driver.worker_draining(change.worker_id, change.incarnation, True)
            case MemberState.SUSPECT:
                self._driver.worker_suspected(change.worker_id, change.incarnation, True)
            case MemberState.READY:
                self._driver.worker_suspected(change.worker_id, change.incarnation, False)
                self._driver.worker_draining(change.worker_id, change.incarnation, False)
            case MemberState.JOINING:
                raise AssertionError("no observation leads back to joining")
            case _:
                assert_never(change.state)
        self._on_change(change)
