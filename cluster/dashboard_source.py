"""The real cluster behind a router's dashboard: what it shows, and what its buttons do."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol

from cluster.admin import Admin
from cluster.canary import Canaries
from cluster.dashboard_frames import Task
from cluster.dashboard_tasks import Tasks
from cluster.dashboard_view import View, Viewer
from cluster.documents import plain, record_document
from cluster.draining import Drain
from cluster.elastic import Elastic
from cluster.membership import Membership
from cluster.operations import Operations
from cluster.peers import Peers
from router.driver import Driver
from tandem.v1 import admin_pb2 as pb


class Cluster(Protocol):
    """What a dashboard shows and does. What cannot be done raises TandemError, or AioRpcError as others said."""

    def view(self) -> View:
        """How things are now."""
        ...

    async def refresh(self) -> None:
        """Asks the other routers, within a second."""
        ...

    def tasks(self) -> Sequence[Task]:
        """What operators began lately."""
        ...

    async def explain(self, request: str) -> dict[str, object]:
        """A request's flight record."""
        ...

    async def migrate(self, request: str, to: str, by: str) -> dict[str, object]:
        """Moves a running request; how that went. `to` empty: wherever the router thinks best."""
        ...

    async def drain(self, worker: str, *, restart: bool, by: str) -> Task:
        """Begins a drain."""
        ...

    async def flip(self, worker: str, role: str, by: str) -> Task:
        """Begins to give a worker another role."""
        ...

    async def scale(self, sizes: Mapping[str, int], by: str) -> Task:
        """Begins to give pools other sizes."""
        ...

    async def close(self) -> None:
        """Stops following what was begun."""
        ...


class RealCluster:
    """One router's view, and its operators' service."""

    def __init__(
        self,
        *,
        model: str,
        driver: Driver,
        membership: Membership,
        operations: Operations,
        elastic: Elastic,
        canaries: Canaries,
        peers: Peers,
        admin: Admin,
    ) -> None:
        self._driver = driver
        self._membership = membership
        self._operations = operations
        self._elastic = elastic
        self._canaries = canaries
        self._peers = peers
        self._admin = admin
        self._tasks = Tasks()
        self._others: dict[str, pb.StatusResponse | None] = {}
        # Both clocks once: else what began at one time would seem to begin at another with each look.
        now_ms = time.time_ns() // 1_000_000
        to_unix_ms = now_ms - time.monotonic_ns() // 1_000_000
        self._viewer = Viewer(router=peers.me, model=model, since_ms=now_ms, to_unix_ms=to_unix_ms)

    def view(self) -> View:
        """How things are now."""
        return self._viewer.view(
            self._driver.status(),
            self._membership.members.values(),
            not_ready=self._canaries.not_ready(),
            others=self._others,
        )

    async def refresh(self) -> None:
        """Asks the other routers, within a second."""
        self._others = await self._peers.statuses(pb.StatusRequest())

    def tasks(self) -> Sequence[Task]:
        """What operators began lately."""
        return self._tasks.all()

    async def explain(self, request: str) -> dict[str, object]:
        """A request's flight record."""
        return record_document(await self._admin.explain(pb.ExplainRequest(request_id=request)))

    async def migrate(self, request: str, to: str, by: str) -> dict[str, object]:
        """Moves a running request; how that went."""
        return plain(await self._admin.migrate(pb.MigrateRequest(request_id=request, to=to)))

    async def drain(self, worker: str, *, restart: bool, by: str) -> Task:
        """Begins a drain."""
        begin = partial(self._operations.drain, worker, deadline_ms=0, restart=restart)
        return await self._tasks.begin("drain", worker, by, self._draining(begin))

    async def flip(self, worker: str, role: str, by: str) -> Task:
        """Begins to give a worker another role."""
        begin = partial(self._operations.flip, worker, role, deadline_ms=0)
        return await self._tasks.begin("flip", f"{worker} to {role}", by, self._draining(begin))

    async def _draining(self, begin: Callable[[], Drain]) -> AsyncGenerator[str, None]:
        drain = begin()
        async with aclosing(self._operations.follow(drain)) as steps:
            async for now in steps:
                yield f"{now.state.value}: {now.left.num_requests} requests and {now.left.num_blocks} blocks left"

    async def scale(self, sizes: Mapping[str, int], by: str) -> Task:
        """Begins to give pools other sizes."""
        what = " ".join(f"{role}={num}" for role, num in sizes.items())
        return await self._tasks.begin("scale", what, by, self._scaling(sizes))

    async def _scaling(self, sizes: Mapping[str, int]) -> AsyncGenerator[str, None]:
        async with aclosing(self._elastic.scale(sizes, deadline_ms=0)) as steps:
            async for progress in steps:
                yield f"{progress.worker_id} is {progress.state}"

    async def close(self) -> None:
        """Stops following what goes on."""
        await self._tasks.close()
