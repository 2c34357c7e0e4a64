"""Scales pools: has the supervisor start workers, drains others, and tells of each until the pools are as wanted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from cluster.config import ClusterConfig
from cluster.draining import Drain
from cluster.membership import MemberState
from cluster.operations import Operations, Say
from cluster.registry import Registry
from cluster.scaling import Grow, Shrink, parse_sizes, plan
from router.driver import Driver
from tandem.errors import ScaleRefused
from tandem.messages import Role
from tandem.request import WorkerId

SCALE = "scale"  # said to the supervisor: a role shall have so many workers, if it has fewer
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """What became of one worker. `state`: starting, joining, ready, or one of a drain's."""

    worker_id: WorkerId
    role: Role
    state: str
    num_requests: int = 0
    num_blocks: int = 0


class Elastic:
    """On the router's event loop. What was begun goes on when nobody listens any more."""

    def __init__(
        self, *, driver: Driver, registry: Registry, operations: Operations, config: ClusterConfig, say: Say
    ) -> None:
        self._driver = driver
        self._membership = registry.membership
        self._operations = operations
        self._config = config
        self._say = say

    async def scale(self, wanted: Mapping[str, int], *, deadline_ms: int) -> AsyncGenerator[Progress, None]:
        """Brings the pools to these sizes; the last progress comes when they have them.

        Raises InvalidRequest, ScaleRefused or DrainRefused: what was begun before that goes on.
        """
        steps = plan(
            self._membership,
            parse_sizes(wanted),
            num_requests=self._num_requests,
            draining=self._operations.draining,
        )
        drains = []
        for step in steps:
            if isinstance(step, Grow):
                self._say(SCALE, role=step.role.value, num=step.num)
            else:
                drains += [
                    (step, self._operations.drain(name, deadline_ms=deadline_ms, restart=False))
                    for name in step.workers
                ]
        for step in steps:
            if isinstance(step, Grow):
                async with aclosing(self._growing(step)) as states:
                    async for progress in states:
                        yield progress
        for step, drain in drains:
            async with aclosing(self._draining(step, drain)) as states:
                async for progress in states:
                    yield progress

    async def _growing(self, step: Grow) -> AsyncGenerator[Progress, None]:
        until_s = time.monotonic() + self._config.start_timeout_s
        told: dict[WorkerId, MemberState] = {}
        while True:
            members = [each for each in self._membership.members.values() if each.info.role is step.role]
            for each in members:
                name = each.info.worker_id
                if name not in step.now and told.get(name) is not each.state:
                    told[name] = each.state
                    yield Progress(name, step.role, each.state.value)
            num_ready = sum(each.state is MemberState.READY for each in members)
            if num_ready >= step.num:
                return
            if time.monotonic() > until_s:
                raise ScaleRefused(
                    f"{num_ready} of {step.num} {step.role} workers are ready after {self._config.start_timeout_s} s; "
                    "the others may still come: see `tandem status` and `tandem logs`"
                )
            await asyncio.sleep(LOOK_S)

    async def _draining(self, step: Shrink, drain: Drain) -> AsyncGenerator[Progress, None]:
        async with aclosing(self._operations.follow(drain)) as steps:
            async for now in steps:
                yield Progress(now.worker_id, step.role, now.state.value, now.left.num_requests, now.left.num_blocks)

    def _num_requests(self, worker_id: WorkerId) -> int:
        worker = self._driver.fleet.current(worker_id)
        return 0 if worker is None else worker.num_requests
