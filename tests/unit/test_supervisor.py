"""What `tandem serve` makes of what it hears: when it is ready, and that a drained worker's end is no crash."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import load
from cluster.pools import Pools, WorkerDown, WorkerUp
from cluster.router_child import RouterSaid
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


class NoRouter:
    """A router's process that only listens."""

    generation = 0

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell_ended(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        self.told.append(f"{worker_id}/{incarnation} ended: {reason}")


def up(name: str) -> WorkerUp:
    return WorkerUp(worker_id=WorkerId(name), pid=7, incarnation=1, timings_ms={"model": 1200})


def ready(name: str) -> RouterSaid:
    fields: dict[str, object] = {"id": name, "state": "ready", "incarnation": 1, "exact": True, "exact_reason": ""}
    return RouterSaid(generation=0, event="worker", fields=fields)


def serving(reason: str = "") -> RouterSaid:
    return RouterSaid(generation=0, event="readiness", fields={"not_ready": reason})


def drained(name: str, *, restart: bool = False) -> RouterSaid:
    return RouterSaid(generation=0, event="drained", fields={"id": name, "incarnation": 1, "restart": restart})


def down(name: str, reason: str = "stopped") -> WorkerDown:
    return WorkerDown(worker_id=WorkerId(name), incarnation=1, started=True, reason=reason)


class Watched:
    """A supervisor over no processes, and all that it says and asks for."""

    def __init__(self, **flags: object) -> None:
        self.said: list[str] = []
        config = load({"model": "fake", "prefill": 1, "decode": 1, **flags}, {}).config
        self.supervisor = Supervisor(config, say=self.said.append)
        self.pools = NoPools(config, threads=1, post=self.supervisor._events.put)
        self.pools.asked = []
        self.router = NoRouter()
        self.supervisor._pools, self.supervisor._threads = self.pools, 1
        self.supervisor._log_dir = Path("logs")
        self.supervisor._router = self.router  # type: ignore[assignment]

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


@pytest.mark.parametrize("order", list(itertools.permutations(range(5))))
def test_ready_is_said_once_and_after_all_workers_are_up_and_serve(order: tuple[int, ...]) -> None:
    events = [*(each(name) for name in WORKERS for each in (up, ready)), serving()]
    said = watched([*(events[index] for index in order), StopAsked(reason="the end")])
    kinds = ["up" if " up, pid 7" in line else "ready" for line in said if "Tandem is ready" in line or " up, " in line]
    assert kinds == ["up", "up", "ready"]


@pytest.mark.parametrize("kind", [up, ready])
def test_a_worker_of_which_only_one_half_is_known_is_missing(kind: Any) -> None:
    events = [up("prefill-0"), ready("prefill-0"), kind("decode-0")]
    with pytest.raises(StartFailed, match=r"not ready within start_timeout_s, 1 s: decode-0$"):
        watched(events, start_timeout_s=1)


def test_a_cluster_whose_workers_are_up_and_do_not_serve_is_not_ready_and_says_why() -> None:
    events = [*(each(name) for name in WORKERS for each in (up, ready)), serving("no pair has moved a block yet")]
    with pytest.raises(StartFailed, match=r"not ready within start_timeout_s, 1 s: no pair has moved a block yet$"):
        watched(events, start_timeout_s=1)


def three_up() -> Watched:
    """A cluster that is ready, with one worker more than it needs."""
    watching = Watched(decode=2)
    names = ("prefill-0", "decode-0", "decode-1")
    assert watching.take(*(each(name) for name in names for each in (up, ready)), serving()) == []
    assert any("is ready at" in line for line in watching.said)
    return watching


def test_a_drained_worker_is_retired_and_not_started_again() -> None:
    watching = three_up()
    assert watching.take(drained("decode-1")) == ["retire decode-1"]
    assert watching.take(down("decode-1")) == ["bury decode-1"]
    assert watching.router.told == ["decode-1/1 ended: stopped"]
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
