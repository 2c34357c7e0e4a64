"""The pools of workers over actors without a process: whatever comes together, each worker's end is told once."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.exceptions

from cluster import pools_process
from cluster.actors import STARTED
from cluster.config import load
from cluster.pool_events import PoolEvent, RayLost, RayUp, WorkerDown, WorkerUp
from cluster.pools import Pools
from cluster.pools_process import PoolsProcess
from cluster.worker_settings import WorkerSettings
from tandem.messages import Role
from tandem.request import WorkerId


class Calls:
    """One method of an actor; its calls end when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Future[Any]] = []

    def remote(self) -> Calls:
        self.asked.append(Future())
        return self

    def future(self) -> Future[Any]:
        return self.asked[-1]


class Actor:
    """An actor in Ray's clothes."""

    def __init__(self) -> None:
        self.start, self.wait, self.stop = Calls(), Calls(), Calls()

    def options(self, **_: Any) -> Actor:
        return self

    def remote(self, *_: Any) -> Actor:
        return self

    def die(self) -> None:
        """All calls that it has not answered end with its death."""
        for each in (*self.start.asked, *self.wait.asked, *self.stop.asked):
            if not each.done():
                each.set_exception(ray.exceptions.RayActorError())


class Bench:
    """Pools over such actors; what they post is taken as the process that holds Ray does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session: Any = type("Session", (), {"is_local": True})()
        self.posted: list[WorkerUp | WorkerDown] = []
        self.told: list[WorkerUp | WorkerDown] = []
        self.pools = Pools(self.session, threads=1, post=self.posted.append)
        monkeypatch.setattr(ray, "kill", lambda actor, no_restart: actor.die())

    def start(self, incarnation: int) -> Actor:
        actor = self.pools._actor = Actor()
        config = load({"model": "fake"}, {}).config
        self.pools.start(
            WorkerSettings(
                worker_id=WorkerId("decode-0"), incarnation=incarnation, role=Role.DECODE, config=config, threads=1,
                registries={"router-0": "h:1"}, bind_host="127.0.0.1", log_file="w.log", join_token="",
            )
        )  # fmt: skip
        return actor

    def take(self) -> list[str]:
        """What the supervisor is told of all that was posted."""
        told = []
        while self.posted:
            item = self.posted.pop(0)
            if isinstance(item, WorkerUp):
                self.pools.watch(item)
                told.append(f"up {item.incarnation}")
            else:
                self.pools.bury(item)
                told.append(f"down {item.incarnation} {'ran' if item.started else 'never ran'}")
        return told


def test_a_worker_that_is_retired_while_it_starts_has_ended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second end would be that of the next one, or of nobody, and the process that holds Ray, with all workers."""
    bench = Bench(monkeypatch)
    actor = bench.start(1)
    bench.pools.retire(WorkerId("decode-0"))
    actor.stop.future().set_result(None)
    assert bench.take() == ["down 1 ran"]
    assert bench.take() == []
    second = bench.start(2)
    second.start.future().set_result(json.dumps({STARTED: {"pid": 7, "timings_ms": {}}}))
    assert bench.take() == ["up 2"]


def test_a_worker_that_has_started_after_its_end_was_told_is_not_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    actor = bench.start(1)
    bench.pools.retire(WorkerId("decode-0"))
    actor.stop.future().set_result(None)
    actor.start.future().set_result(json.dumps({STARTED: {"pid": 7, "timings_ms": {}}}))
    assert bench.take() == ["down 1 ran"]
    assert actor.wait.asked == []


class BrokenSession:
    """A Ray whose parts cannot even be looked at."""

    is_local = True

    def __init__(self, *_: object, **__: object) -> None:
        self.forgotten = False

    def open(self, *, is_again: bool) -> None: ...

    def look(self) -> list[str]:
        raise PermissionError("its processes cannot be seen")

    def forget(self) -> None:
        self.forgotten = True


def test_whatever_ends_the_holder_of_ray_is_told_and_ends_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its workers would go with Ray, one after the other, and nobody would say so."""
    killed: list[object] = []
    stand_ins: dict[str, Callable[..., Any]] = {
        "RaySession": BrokenSession, "Reaper": object, "kill_all": killed.append, "descendants": lambda: ["raylet"],
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(pools_process, name, stand_in)
    monkeypatch.setattr(PoolsProcess, "_listen", lambda self: None)
    told: list[PoolEvent] = []
    holder: Any = PoolsProcess(load({"model": "fake"}, {}).config, threads=1, log_file=Path("ray.log"), say=told.append)
    assert holder.run(is_again=False) == 1
    assert told[0] == RayUp()
    assert told[-1] == RayLost(reason="its processes cannot be seen")
    assert killed == [["raylet"]]
    assert holder._session.forgotten
