"""What `tandem serve` makes of what it hears: when it is ready, and that a drained worker's end is no crash."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, load
from cluster.drain_relay import Tell
from cluster.pools import Pools, WorkerDown, WorkerUp
from cluster.router_child import RouterEnded, RouterSaid
from cluster.routers import Routers
from cluster.supervisor import StartFailed, StopAsked, Supervisor
from cluster.worker_settings import WorkerSettings
from tandem.request import WorkerId

WORKERS = ("prefill-0", "decode-0")


class NoPools(Pools):
    """Pools over no Ray: nobody is watched, and what is asked for is noted."""

    asked: list[str]

    def watch(self, up: WorkerUp) -> None:
        pass

    def bury(self, down: WorkerDown) -> None:
        self.asked.append(f"bury {down.worker_id}")

    def start(self, settings: WorkerSettings) -> None:
        self.asked.append(f"start {settings.worker_id}")

    def retire(self, worker_id: WorkerId) -> None:
        self.asked.append(f"retire {worker_id}")

    def kill(self, worker_id: WorkerId) -> None:
        self.asked.append(f"kill {worker_id}")


class NoRouters(Routers):
    """Routers without a process; what is asked for is noted."""

    def __init__(self, config: ClusterConfig, **given: Any) -> None:
        super().__init__(config, **given)
        self.told: list[str] = []
        self.killed: list[str] = []

    def is_current(self, event: RouterSaid | RouterEnded) -> bool:
        return event.generation == 1

    def start(self, name: str) -> None:
        self.told.append(f"start {name}")

    @property
    def pids(self) -> dict[str, int]:
        return dict.fromkeys(self._ready, 7)

    def kill(self, name: str) -> None:
        self.killed.append(name)

    def tell_ended(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        self.told.append(f"{worker_id}/{incarnation} ended: {reason}")

    def relay(self, told: Iterable[Tell]) -> None:
        self.told += [f"{each.router}: {each.word} {each.worker_id} {each.requests}" for each in told]


def up(name: str) -> WorkerUp:
    return WorkerUp(worker_id=WorkerId(name), pid=7, incarnation=1, timings_ms={"model": 1200})


def said(event: str, *, router: str = "router-0", **fields: object) -> RouterSaid:
    return RouterSaid(router=router, generation=1, event=event, fields=fields)


def state(name: str, what: str, *, router: str = "router-0", incarnation: int = 1) -> RouterSaid:
    fields: dict[str, object] = {"id": name, "state": what, "incarnation": incarnation, "reason": "silence"}
    return said("worker", router=router, **fields, exact=True, exact_reason="")


def ready(name: str, router: str = "router-0") -> RouterSaid:
    return state(name, "ready", router=router)


def drained(name: str, *, restart: bool = False) -> RouterSaid:
    return said("drained", id=name, incarnation=1, restart=restart)


def down(name: str, reason: str = "stopped") -> WorkerDown:
    return WorkerDown(worker_id=WorkerId(name), incarnation=1, started=True, reason=reason)


class Watched:
    """A supervisor over no processes, and all that it says and asks for."""

    def __init__(self, **flags: object) -> None:
        self.said: list[str] = []
        config = load({"model": "fake", "prefill": 1, "decode": 1, "grpc_port": 0, **flags}, {}).config
        self.supervisor = Supervisor(config, say=self.said.append)
        self.pools = NoPools(config, threads=1, post=self.supervisor._events.put)
        self.pools.asked = []
        self.routers = NoRouters(
            config, listener=socket.socket(), log_dir=Path("logs"), post=self.supervisor._events.put
        )  # fmt: skip
        self.supervisor._pools, self.supervisor._threads = self.pools, 1
        self.supervisor._log_dir = Path("logs")
        self.routers.stop(0)  # its ports are not needed
        self.supervisor._routers = self.routers
        self.supervisor._starts = dict.fromkeys(self.supervisor._starts, 1)
        for name in self.routers.names:
            self.supervisor._router_said(said("listening", router=name, pid=7))

    def take(self, *events: Any) -> list[str]:
        """What is asked of the pools while these events are taken."""
        self.pools.asked.clear()
        for event in (*events, StopAsked(reason="the end")):
            self.supervisor._events.put(event)
        assert self.supervisor._watch() == "the end"
        return list(self.pools.asked)


def watched(events: list[Any], **flags: object) -> list[str]:
    """What a supervisor says while it takes these events."""
    watching = Watched(**flags)
    for event in events:
        watching.supervisor._events.put(event)
    assert watching.supervisor._watch() == "the end"
    return watching.said


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_ready_is_said_once_and_after_all_workers_are_up(order: tuple[int, ...]) -> None:
    events = [each(name) for name in WORKERS for each in (up, ready)]
    lines = watched([*(events[index] for index in order), StopAsked(reason="the end")])
    told = [line for line in lines if "Tandem is ready" in line or " up, pid 7 (" in line]
    kinds = ["ready" if "Tandem" in line else "up" for line in told]
    assert kinds == ["up", "up", "ready"]


@pytest.mark.parametrize("kind", [up, ready])
def test_a_worker_of_which_only_one_half_is_known_is_missing(kind: Any) -> None:
    events = [up("prefill-0"), ready("prefill-0"), kind("decode-0")]
    with pytest.raises(StartFailed, match=r"not ready within start_timeout_s, 1 s: decode-0$"):
        watched(events, start_timeout_s=1)


def three_up() -> Watched:
    """A cluster that is ready, with one worker more than it needs."""
    watching = Watched(decode=2)
    names = ("prefill-0", "decode-0", "decode-1")
    assert watching.take(*(each(name) for name in names for each in (up, ready))) == []
    assert any("is ready at" in line for line in watching.said)
    return watching


def test_a_drained_worker_is_retired_and_not_started_again() -> None:
    watching = three_up()
    assert watching.take(drained("decode-1")) == ["retire decode-1"]
    assert watching.take(down("decode-1")) == ["bury decode-1"]
    assert watching.routers.told == ["decode-1/1 ended: stopped"]
    assert watching.said[-1] == "decode-1 is drained and has left"
    assert watching.take() == []


def test_a_drained_worker_is_replaced_at_once_when_that_is_wanted() -> None:
    watching = three_up()
    assert watching.take(drained("decode-1", restart=True)) == ["retire decode-1"]
    assert watching.take(down("decode-1")) == ["bury decode-1", "start decode-1"]
    assert watching.said[-1] == "decode-1 is drained and has left; another one takes its place"
    assert watching.take(down("decode-1", "exit code 1")) == ["bury decode-1", "start decode-1"], "that was a crash"
    assert any("decode-1 ended: exit code 1; it is started again" in line for line in watching.said)


def test_a_drained_worker_that_does_not_end_is_killed() -> None:
    watching = three_up()
    assert watching.take(drained("decode-1")) == ["retire decode-1"]
    leaving = watching.supervisor._leaving[WorkerId("decode-1")]
    watching.supervisor._leaving[WorkerId("decode-1")] = replace(leaving, until_s=0.0)
    assert "kill decode-1" in watching.take()


@pytest.mark.parametrize("restart", [False, True])
def test_a_worker_that_crashes_when_it_has_just_been_drained_has_left(restart: bool) -> None:
    """Its end may be heard before the router's word; then it waits for its restart, which is not wanted any more."""
    watching = three_up()
    watching.supervisor._restarts.died(0, "decode-1")  # so that the next restart waits
    watching.supervisor._restarts.times["decode-1"][0] = int(time.monotonic() * 1000)
    watching.take(down("decode-1", "exit code 1"))
    asked = watching.take(drained("decode-1", restart=restart))
    assert asked == (["start decode-1"] if restart else [])
    assert watching.supervisor._due == []
    assert (WorkerId("decode-1") in watching.supervisor._roles) is restart


def test_a_worker_that_left_is_not_drained_twice() -> None:
    watching = three_up()
    watching.take(drained("decode-1"), down("decode-1"))
    assert watching.take(drained("decode-1")) == []


# ---- several routers -------------------------------------------------------------------------------------------------


def two_routers() -> Watched:
    """A cluster of two routers that is ready."""
    watching = Watched(decode=2, routers=2, redis="redis://h")
    names = ("prefill-0", "decode-0", "decode-1")
    watching.take(*(up(name) for name in names), *(ready(name) for name in names))
    assert not any("is ready at" in line for line in watching.said), "one router has no worker yet"
    watching.take(*(ready(name, "router-1") for name in names))
    assert any("is ready at" in line for line in watching.said)
    return watching


def test_one_of_two_routers_ends_no_worker_and_both_do() -> None:
    watching = two_routers()
    assert watching.take(state("decode-0", "dead", router="router-1")) == []
    assert watching.take(state("decode-0", "dead", router="router-1")) == [], "it says so again"
    assert watching.take(state("decode-0", "dead")) == ["kill decode-0"]
    assert watching.said[-1] == "decode-0 is dead: silence"


def test_what_is_said_of_an_earlier_start_is_no_verdict() -> None:
    watching = two_routers()
    words = [state("decode-0", "dead", router=name, incarnation=7) for name in ("router-0", "router-1")]
    assert watching.take(*words) == []


def test_the_last_router_decides_alone_while_the_other_is_away() -> None:
    watching = two_routers()
    watching.take(RouterEnded(router="router-1", generation=1, code=-9))
    assert "router-1 ended with status -9; it is started again" in watching.said
    assert "start router-1" in watching.routers.told
    assert watching.take(state("decode-0", "dead")) == ["kill decode-0"]


def test_a_router_that_is_cut_off_is_ended_and_no_worker() -> None:
    watching = two_routers()
    watching.supervisor._verdicts.minority_ms = 1
    watching.take(*(state(name, "dead", router="router-1") for name in ("prefill-0", "decode-0", "decode-1")))
    while not watching.routers.killed:
        assert watching.take() == []
    assert watching.routers.killed == ["router-1"]
    assert any(line.startswith("router-1 is cut off: it alone holds most workers for dead") for line in watching.said)


def test_a_router_that_says_nothing_is_ended() -> None:
    watching = two_routers()
    watching.routers._silence.expect(0, "router-1", 15_000)
    watching.take(said("beat"))
    assert watching.routers.killed == ["router-1"]
    assert any(line.startswith("router-1 is stuck: not a word for") for line in watching.said)


def test_a_drain_is_passed_on_and_its_end_too() -> None:
    watching = two_routers()
    begun = said("draining", id="decode-1", incarnation=1, restart=False)
    watching.take(begun, said("drain_part", router="router-1", id="decode-1", incarnation=1, requests=3))
    assert watching.routers.told == [
        "router-0: drain_elsewhere decode-1 1",
        "router-1: draining decode-1 0",
        "router-0: drain_elsewhere decode-1 3",
    ]
    assert watching.take(drained("decode-1")) == ["retire decode-1"]
    assert watching.routers.told[-1] == "router-1: drained decode-1 0"


def test_the_last_router_that_dies_too_often_ends_the_cluster() -> None:
    watching = Watched(max_restarts=0)
    watching.take(*(each(name) for name in WORKERS for each in (up, ready)))
    with pytest.raises(StartFailed, match="no router is left"):
        watching.take(RouterEnded(router="router-0", generation=1, code=1))
    assert watching.said[-1].startswith("error: router-0 ended with status 1; it has died too often")
