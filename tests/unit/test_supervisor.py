"""What `tandem serve` makes of what it hears: when it is ready, and that a drained worker's end is no crash."""

from __future__ import annotations

import itertools
import socket
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, load
from cluster.drain_relay import Tell
from cluster.own_secrets import OwnSecrets
from cluster.pool_events import RayLost, RayMended, RayUp, WorkerDown, WorkerUp, WorkerWaits, from_line, to_line
from cluster.pools_child import PoolsChild, PoolsEnded
from cluster.router_child import RouterEnded, RouterSaid
from cluster.routers import Routers
from cluster.start_check import StartFailed
from cluster.supervisor import StopAsked, Supervisor
from cluster.worker_settings import WorkerSettings
from tandem.request import WorkerId

WORKERS = ("prefill-0", "decode-0")


class NoPools(PoolsChild):
    """No process: what is asked for is noted."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def start(self, settings: WorkerSettings) -> None:
        self.asked.append(f"start {settings.worker_id}")

    def retire(self, worker_id: WorkerId) -> None:
        self.asked.append(f"retire {worker_id}")

    def kill(self, worker_id: WorkerId) -> None:
        self.asked.append(f"kill {worker_id}")

    def end_now(self) -> None:
        self.asked.append("end")


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


def serving(reason: str = "", router: str = "router-0") -> RouterSaid:
    return said("readiness", router=router, not_ready=reason)


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
        self.pools = NoPools()
        self.routers = NoRouters(
            config,
            listener=socket.socket(),
            grpc_held=socket.socket(),
            log_dir=Path("logs"),
            secrets=OwnSecrets(),
            post=self.supervisor._events.put,
        )
        self.supervisor._pools, self.supervisor._threads = self.pools, 1
        self.supervisor._has_ray = True
        self.supervisor._start_pools = self._start_pools  # type: ignore[method-assign]
        self.supervisor._log_dir = Path("logs")
        self.routers.stop(0)  # its ports are not needed
        self.supervisor._routers = self.routers
        for worker_id in self.supervisor._workers.wanted:
            self.supervisor._workers.start(worker_id)
        for name in self.routers.names:
            self.supervisor._router_said(said("listening", router=name, pid=7))

    def _start_pools(self, *, is_again: bool) -> None:
        self.pools.asked.append(f"ray again={is_again}")

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
    lines = watched([*(events[index] for index in order), StopAsked(reason="the end")])
    told = [line for line in lines if "Tandem is ready" in line or " up, pid 7 (" in line]
    kinds = ["ready" if "Tandem" in line else "up" for line in told]
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
    assert watching.take(down("decode-1")) == []
    assert watching.routers.told == ["decode-1/1 ended: stopped"]
    assert watching.said[-1] == "decode-1 is drained and has left"
    assert watching.take() == []


def test_a_drained_worker_is_replaced_at_once_when_that_is_wanted() -> None:
    watching = three_up()
    assert watching.take(drained("decode-1", restart=True)) == ["retire decode-1"]
    assert watching.take(down("decode-1")) == ["start decode-1"]
    assert watching.said[-1] == "decode-1 is drained and has left; another one takes its place"
    assert watching.take(down("decode-1", "exit code 1")) == ["start decode-1"], "that was a crash"
    assert any("decode-1 ended: exit code 1; it is started again" in line for line in watching.said)


def test_a_drained_worker_that_does_not_end_is_killed() -> None:
    watching = three_up()
    assert watching.take(drained("decode-1")) == ["retire decode-1"]
    watching.supervisor._workers.leaving[WorkerId("decode-1")].until_ms = 0
    assert watching.take(said("beat"), said("beat")) == ["kill decode-1"], "once in a while is enough"


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
    assert (WorkerId("decode-1") in watching.supervisor._workers.roles) is restart


@pytest.mark.parametrize("restart", [False, True])
def test_a_drained_worker_that_has_crashed_and_is_back_has_been_replaced(restart: bool) -> None:
    """Its restart may be quicker than the router's word: the fresh one is what a drain with a restart is for."""
    watching = three_up()
    assert watching.take(down("decode-1", "exit code 1")) == ["start decode-1"]
    assert watching.take(drained("decode-1", restart=restart)) == ([] if restart else ["retire decode-1"])
    assert (WorkerId("decode-1") in watching.supervisor._workers.leaving) is not restart


@pytest.mark.parametrize("restart", [False, True])
def test_a_worker_that_is_drained_while_there_is_no_ray_has_left(restart: bool) -> None:
    """Nobody waits for the end of a process that went with Ray, nor kills the fresh one for being late."""
    watching = three_up()
    watching.take(PoolsEnded(code=-9))
    assert watching.take(drained("decode-1", restart=restart)) == []
    others = ["start decode-0", "start prefill-0"]
    assert sorted(watching.take(RayUp())) == sorted([*others, *(["start decode-1"] if restart else [])])
    assert not watching.supervisor._workers.leaving


def test_a_worker_that_died_too_often_and_was_drained_is_not_waited_for() -> None:
    watching = Watched(decode=2, max_restarts=0)
    names = ("prefill-0", "decode-0", "decode-1")
    watching.take(*(each(name) for name in names for each in (up, ready)), serving())
    assert watching.take(down("decode-1"), drained("decode-1")) == []
    assert not watching.supervisor._workers.leaving
    assert watching.take(down("decode-0")) == []
    with pytest.raises(StartFailed, match="no worker is left"):
        watching.take(down("prefill-0"))


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
    watching.take(*(ready(name, "router-1") for name in names), serving())
    assert not any("is ready at" in line for line in watching.said), "one router has not seen that they serve"
    watching.take(serving(router="router-1"))
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
    watching.take(*(each(name) for name in WORKERS for each in (up, ready)), serving())
    with pytest.raises(StartFailed, match="no router is left"):
        watching.take(RouterEnded(router="router-0", generation=1, code=1))
    assert watching.said[-1].startswith("error: router-0 ended with status 1; it has died too often")


def test_a_ray_that_is_lost_is_replaced_and_every_worker_started_anew() -> None:
    watching = three_up()
    lost = [RayLost(reason="its raylet ended"), PoolsEnded(code=1)]
    assert watching.take(*lost) == ["ray again=True"]
    assert {line.split("/")[0] for line in watching.routers.told} == {"prefill-0", "decode-0", "decode-1"}
    assert any("Ray is gone: its raylet ended; it is started again" in line for line in watching.said)
    assert sorted(watching.take(RayUp())) == ["start decode-0", "start decode-1", "start prefill-0"]


def test_a_worker_that_waits_for_its_restart_when_ray_goes_is_started_once() -> None:
    watching = three_up()
    watching.supervisor._restarts.times["decode-1"] = deque([int(time.monotonic() * 1000)])  # so that it waits
    assert watching.take(down("decode-1", "exit code 1"), PoolsEnded(code=-9)) == ["ray again=True"]
    assert watching.take(RayUp()).count("start decode-1") == 1
    assert watching.supervisor._due == []


def test_a_worker_that_was_drained_does_not_come_back_with_ray() -> None:
    watching = three_up()
    watching.take(drained("decode-1"), PoolsEnded(code=-9))
    assert sorted(watching.take(RayUp())) == ["start decode-0", "start prefill-0"]


def test_a_ray_that_is_lost_before_all_is_ready_is_told_and_not_tried_again() -> None:
    with pytest.raises(StartFailed, match=r"^Ray did not start: no room$"):
        watched([RayLost(reason="Ray did not start: no room"), PoolsEnded(code=1)])


def test_a_ray_that_is_lost_again_and_again_ends_the_cluster() -> None:
    watching = Watched(decode=1, max_restarts=1)
    watching.take(*(each(name) for name in WORKERS for each in (up, ready)), serving())
    assert watching.take(PoolsEnded(code=-9)) == ["ray again=True"]
    with pytest.raises(StartFailed, match="has died too often and stays down"):
        watching.take(PoolsEnded(code=-9))


def test_a_worker_that_dies_at_every_start_is_given_up_and_the_others_serve_on() -> None:
    watching = Watched(decode=2, max_restarts=1)
    names = ("prefill-0", "decode-0", "decode-1")
    watching.take(*(each(name) for name in names for each in (up, ready)), serving())
    assert watching.take(down("decode-1", "a")) == ["start decode-1"]
    assert watching.take(down("decode-1", "b")) == []
    assert any("decode-1 ended: b; it has died too often and stays down" in line for line in watching.said)
    assert sorted(watching.take(PoolsEnded(code=-9), RayUp())) == [
        "ray again=True",
        "start decode-0",
        "start prefill-0",
    ]


def test_workers_of_one_role_serve_on_alone_until_the_last_one_is_given_up() -> None:
    watching = Watched(decode=2, max_restarts=1)
    names = ("prefill-0", "decode-0", "decode-1")
    watching.take(*(each(name) for name in names for each in (up, ready)), serving())
    assert watching.take(down("decode-1"), down("decode-0")) == ["start decode-1", "start decode-0"]
    assert watching.take(down("decode-1"), down("decode-0")) == [], "no decode worker comes back"
    assert watching.take(down("prefill-0")) == ["start prefill-0"]
    with pytest.raises(StartFailed, match="no worker is left"):
        watching.take(down("prefill-0"))


def test_what_ray_says_of_its_parts_and_of_room_is_passed_on() -> None:
    watching = three_up()
    waits = WorkerWaits(worker_id=WorkerId("decode-1"), reason="all 2 CPUs of the Ray cluster are taken")
    watching.take(RayMended(what="its gcs_server is started again"), waits)
    assert watching.said[-2:] == [
        "Ray: its gcs_server is started again",
        "decode-1 waits for a machine: all 2 CPUs of the Ray cluster are taken",
    ]


def test_a_holder_of_ray_that_hangs_is_ended_only_when_a_worker_is_missing() -> None:
    watching = three_up()
    watching.supervisor._pools_silent_s = 1e6
    assert watching.take() == [], "everybody works: it may hang"
    assert watching.take(down("decode-1", "exit code 1")) == ["start decode-1", "end"]


def test_a_holder_of_ray_that_hangs_is_ended_when_a_worker_is_to_be_killed() -> None:
    """It would neither kill it nor start another one: the worker that nobody can use would never be replaced."""
    watching = three_up()
    assert watching.take(state("decode-1", "dead")) == ["kill decode-1"]
    watching.supervisor._pools_silent_s = 1e6
    assert watching.take() == ["end"]
    watching = three_up()
    watching.take(drained("decode-1"))
    watching.supervisor._workers.leaving[WorkerId("decode-1")].until_ms = 0
    watching.supervisor._pools_silent_s = 1e6
    assert watching.take() == ["kill decode-1", "end"]


def test_time_in_which_the_supervisor_stood_still_is_no_silence() -> None:
    watching = three_up()
    watching.take(down("decode-1", "exit code 1"))
    watching.supervisor._looked_s -= 3600
    assert watching.take() == []


@pytest.mark.parametrize(
    "event",
    [
        RayUp(), RayLost(reason="r"), up("decode-0"), down("decode-0"),
        WorkerWaits(worker_id=WorkerId("decode-0"), reason="r"),
    ],
)  # fmt: skip
def test_what_the_holder_of_ray_says_travels_as_a_line(event: Any) -> None:
    line = to_line(event)
    assert "\n" not in line
    assert from_line(line) == event
