"""The pools of workers on Ray: actors created, watched, stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions

from cluster.actors import START_FAILED, STARTED, WorkerActor
from cluster.pool_events import WorkerDown, WorkerUp, WorkerWaits
from cluster.ray_session import SLOT, RaySession
from cluster.worker_settings import WorkerSettings, worker_environment
from tandem.request import WorkerId

PLACED_WITHIN_S = 10.0  # after which a worker that no machine has room for is told of

PoolsEvent = WorkerUp | WorkerDown


class _Member:
    """One actor, from its creation to its end."""

    def __init__(self, settings: WorkerSettings, actor: Any) -> None:
        self.settings = settings
        self.actor = actor
        self.pid = 0
        self.retiring = False
        self.is_down = False  # WorkerDown was posted
        self.asked_s = time.monotonic()
        self.is_late = False  # WorkerWaits was told


class Pools:
    """All workers of one cluster. Methods are for one thread; `post` is called on threads of Ray.

    On those threads nothing of Ray may be called: so whoever takes the events calls `watch` after WorkerUp and `bury`
    after WorkerDown.
    """

    def __init__(self, session: RaySession, *, threads: int, post: Callable[[PoolsEvent], None]) -> None:
        self._session = session
        self._threads = threads
        self._post = post
        self._members: dict[WorkerId, _Member] = {}
        self._posting = threading.Lock()  # a worker's end may come in two ways at once
        # One class for all: Ray stores a class once, with its control service, and waits for that as long as it takes.
        self._actor: Any = ray.remote(WorkerActor)

    def start(self, settings: WorkerSettings) -> None:
        """Creates a worker; WorkerUp follows, or WorkerDown, and after WorkerUp some day WorkerDown."""
        options: dict[str, Any] = {"max_restarts": 0, "max_concurrency": 4}
        if self._session.is_local:
            options |= {"num_cpus": 0, "resources": {SLOT: 1}}
        else:
            options["num_cpus"] = 1
            options["runtime_env"] = {"env_vars": worker_environment(self._threads)}
            options["scheduling_strategy"] = "SPREAD"
        actor = self._actor.options(**options).remote(settings.to_json())
        member = _Member(settings, actor)
        self._members[settings.worker_id] = member
        actor.start.remote().future().add_done_callback(lambda done: self._started(member, done))

    def watch(self, up: WorkerUp) -> None:
        """Sees to it that WorkerDown comes when the worker ends."""
        member = self._members[up.worker_id]
        member.pid = up.pid
        member.actor.wait.remote().future().add_done_callback(lambda done: self._ended(member, done))

    def bury(self, down: WorkerDown) -> None:
        """Gives back what a worker that ended still holds: its process may live, of no use to anybody."""
        member = self._members.pop(down.worker_id)  # told of once: another one is started only after that
        with suppress(ray.exceptions.RayError):
            ray.kill(member.actor, no_restart=True)

    def waiting(self) -> list[WorkerWaits]:
        """Workers that have waited long for a machine with room; each is told of once."""
        if self._session.is_local:
            return []
        until_s = time.monotonic() - PLACED_WITHIN_S
        late = [each for each in self._members.values() if not each.pid and not each.is_late and each.asked_s < until_s]
        if not late:
            return []
        free, total = self._session.free_cpus()
        if free >= 1:  # it is on its way
            return []
        for member in late:
            member.is_late = True
        reason = f"all {total:g} CPUs of the Ray cluster are taken"
        return [WorkerWaits(worker_id=member.settings.worker_id, reason=reason) for member in late]

    def _started(self, member: _Member, done: Future[str]) -> None:
        worker_id, incarnation = member.settings.worker_id, member.settings.incarnation
        try:
            answer = json.loads(done.result())
        except ray.exceptions.RayError as error:
            answer = {START_FAILED: _first_line(error)}
        if START_FAILED in answer:
            self._down(member, answer[START_FAILED], started=False)
            return
        facts = answer[STARTED]
        up = WorkerUp(
            worker_id=worker_id, pid=facts["pid"], incarnation=incarnation, timings_ms=facts["timings_ms"]
        )  # fmt: skip
        with self._posting:
            if not member.is_down:  # it may have been retired while it started
                self._post(up)

    def _ended(self, member: _Member, done: Future[str]) -> None:
        try:
            reason = done.result()
        except ray.exceptions.RayError as error:
            reason = _first_line(error)
        if not member.retiring:  # else it ends its parts in order first
            self._down(member, reason)

    def _down(self, member: _Member, reason: str, *, started: bool = True) -> None:
        name, incarnation = member.settings.worker_id, member.settings.incarnation
        with self._posting:
            if not member.is_down:
                member.is_down = True
                self._post(WorkerDown(worker_id=name, incarnation=incarnation, started=started, reason=reason))

    def retire(self, worker_id: WorkerId) -> None:
        """Asks a worker that runs to end in order. WorkerDown follows when it has; `kill` ends one that does not."""
        member = self._members.get(worker_id)
        if member is None:
            return
        member.retiring = True

        def stopped(done: Future[None]) -> None:
            error = done.exception()
            self._down(member, _first_line(error) if isinstance(error, Exception) else "stopped")

        member.actor.stop.remote().future().add_done_callback(stopped)

    def kill(self, worker_id: WorkerId) -> None:
        """Ends a worker's process at once, also one that is stopped or stuck. WorkerDown follows."""
        member = self._members.get(worker_id)
        if member is not None:
            self._kill(member)

    def _kill(self, member: _Member) -> None:
        if self._session.is_local and member.pid:
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
        with suppress(ray.exceptions.RayError):
            ray.kill(member.actor, no_restart=True)

    def stop(self, timeout_s: float) -> None:
        """Stops all workers in order, and those that do not within `timeout_s` by force."""
        members = list(self._members.values())
        refs = [member.actor.stop.remote() for member in members if member.pid]  # the others may never have a place
        with suppress(ray.exceptions.RayError):
            ray.wait(refs, num_returns=len(refs), timeout=timeout_s) if refs else None
        for member in members:
            self._kill(member)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
