"""What operators began from a dashboard and nobody waits for: drains, flips, scalings, followed until they are over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from cluster.dashboard_frames import Task
from tandem.errors import Overloaded, TandemError

log = logging.getLogger(__name__)

RUNNING_MAX = 16
REMEMBERED_MAX = 32
BEGIN_S = 0.05  # a refusal comes at once; progress may take a while


class Tasks:
    """On the router's event loop. `close` ends the following, not what is followed."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, Task] = OrderedDict()
        self._followers: set[asyncio.Task[None]] = set()
        self._next_id = 1

    def all(self) -> Sequence[Task]:
        """Oldest first."""
        return tuple(self._known.values())

    async def begin(self, kind: str, what: str, by: str, steps: AsyncGenerator[str, None]) -> Task:
        """Follows `steps`, each of which says how far it is; returns once it is known that it began.

        Raises the TandemError that it is refused with at once.
        """
        num = sum(each.state == "running" for each in self._known.values())
        if num >= RUNNING_MAX:
            await steps.aclose()
            raise Overloaded(f"{num} drains, flips and scalings are under way, no more may be", retry_after_ms=5_000)
        first = asyncio.ensure_future(anext(steps, None))
        done, _ = await asyncio.wait({first}, timeout=BEGIN_S)
        if done:
            first.result()  # raises
        task = Task(
            id=self._next_id, kind=kind, what=what, state="running", detail="", at_ms=time.time_ns() // 1_000_000, by=by
        )
        self._next_id += 1
        log.info("dashboard key=%s begins %s %s", by or "-", kind, what)
        self._keep(task)
        follower = asyncio.create_task(self._follow(task, first, steps))
        self._followers.add(follower)
        follower.add_done_callback(self._followers.discard)
        return task

    async def _follow(self, task: Task, first: asyncio.Future[str | None], steps: AsyncGenerator[str, None]) -> None:
        try:
            async with aclosing(steps):
                detail = await first
                while detail is not None:
                    task = self._keep(replace(task, detail=detail))
                    detail = await anext(steps, None)
        except TandemError as error:
            self._keep(replace(task, state="failed", detail=error.message))
        else:
            self._keep(replace(task, state="done"))

    def _keep(self, task: Task) -> Task:
        self._known[task.id] = task
        over = [each.id for each in self._known.values() if each.state != "running"]
        for task_id in over[: max(0, len(self._known) - REMEMBERED_MAX)]:
            del self._known[task_id]
        return task

    async def close(self) -> None:
        """Stops following."""
        for follower in self._followers:
            follower.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)
