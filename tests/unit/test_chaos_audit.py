"""Leaks are found under load, when all is still, and in processes; what is well is not called a leak."""

from __future__ import annotations

import os
import random
import socket
from typing import Any

import pytest

from benchmarks.soak import ages_table, slope
from cluster.chaos_audit import (
    FILES_MORE_MAX,
    IDLE_MS,
    Footprint,
    IdleWatch,
    Lasting,
    exact_and_here,
    grown,
    held,
    missing,
    unbalanced,
)
from cluster.chaos_processes import Taken, taken
from tandem.v1.admin_pb2 import BlockCountsStatus, RequestStatus, StatusResponse, WorkerStatus


def worker(
    name: str = "d0", *, state: str = "ready", counts: dict[str, int] | None = None, **other: Any
) -> WorkerStatus:
    blocks = {"total": 10, "free": 10, **(counts or {})}
    fields = {"exact": True, "pid": 7, "incarnation": 1, **other}
    return WorkerStatus(id=name, state=state, kv_blocks=BlockCountsStatus(**blocks), **fields)


def test_blocks_that_do_not_add_up_are_found_under_load() -> None:
    assert unbalanced(worker(counts={"free": 4, "owned": 3, "cached": 2, "granted": 1})) == []
    (problem,) = unbalanced(worker(counts={"free": 4, "owned": 3}))
    assert problem == "d0: the states of its blocks sum to 7, its pool has 10"
    assert unbalanced(worker(audit=["block 3 is owned by nobody"])) == ["d0: block 3 is owned by nobody"]


@pytest.mark.parametrize("state", ["owned", "exported", "granted", "quarantined"])
def test_what_is_held_when_all_is_still_is_found(state: str) -> None:
    status = StatusResponse(workers=[worker("p0"), worker(counts={"free": 8, state: 2})])
    assert held(status) == [f"d0 has 2 blocks {state}"]
    assert held(StatusResponse(workers=[worker(counts={"free": 8, "cached": 2}), worker("d1", state="left")])) == []
    assert held(StatusResponse(workers=[worker("d1", state="dead")])) == ["d1 is dead"], "nobody has replaced it"
    assert held(StatusResponse(workers=[worker()]), ["d0", "d1"]) == ["d1 is not known"]
    assert held(StatusResponse(workers=[worker(state="joining")])) == ["d0 is joining"]
    assert held(StatusResponse(workers=[worker(running=1)])) == ["d0 has 1 requests running and 0 waiting"]


def test_a_worker_that_holds_blocks_for_nobody_is_found_while_others_work() -> None:
    watch = IdleWatch()
    leaks = worker(counts={"free": 8, "owned": 2})
    busy = RequestStatus(prefill_worker="p0", decode_worker="d1")
    period_ms = IDLE_MS // 8
    found = [watch.look(100 + look * period_ms, StatusResponse(workers=[leaks], requests=[busy])) for look in range(12)]
    assert found == [["d0 holds 2 blocks, and no request has a part in it"] if look == 8 else [] for look in range(12)]
    mine = RequestStatus(prefill_worker="p0", decode_worker="d1", moving_to="d0")
    for look in range(12, 36):
        assert watch.look(look * period_ms, StatusResponse(workers=[leaks], requests=[mine])) == []


def test_a_time_in_which_nobody_answered_tells_nothing_of_idle_workers() -> None:
    watch = IdleWatch()
    status = StatusResponse(workers=[worker(counts={"free": 8, "owned": 2})])
    times_ms = [0, 2 * IDLE_MS, 2 * IDLE_MS + 1, 2 * IDLE_MS + 2]
    assert [bool(watch.look(now_ms, status)) for now_ms in times_ms] == [False, False, False, True]


def test_what_comes_and_goes_does_not_last() -> None:
    """A canary's block is there in one look, and gone in another; a leak is in each."""
    lasting = Lasting(6_000)
    looks = [
        lasting.look(now_ms, ["leak", "canary"] if now_ms % 4_000 else ["leak"]) for now_ms in range(0, 9_000, 500)
    ]
    assert looks == [["leak"] if now_ms >= 6_000 else [] for now_ms in range(0, 9_000, 500)]


def test_processes_and_files_that_were_not_there_before_are_found() -> None:
    before = {"agent": Footprint(num_processes=4, num_files=100)}
    assert grown(before, {"agent": Footprint(num_processes=4, num_files=100 + 4 * FILES_MORE_MAX)}) == []
    assert grown(before, {"agent": Footprint(num_processes=5, num_files=100)}) == [
        "5 processes agent run, 4 did before"
    ]
    (files,) = grown(before, {"agent": Footprint(num_processes=4, num_files=101 + 4 * FILES_MORE_MAX)})
    assert files.endswith("100 before")
    assert grown(before, {"stray": Footprint(num_processes=1, num_files=1)}) == ["1 processes stray run, 0 did before"]


def test_processes_that_nobody_has_replaced_are_found() -> None:
    before = {name: Footprint(num_processes=2, num_files=9) for name in ("router", "agent", "Ray")}
    assert missing(before, before) == []
    fewer = {"agent": Footprint(num_processes=1, num_files=9)}
    assert missing(before, fewer) == ["0 processes router run, 2 did before", "1 processes agent run, 2 did before"]


def test_what_cannot_be_struck_from_here_is_named() -> None:
    status = StatusResponse(workers=[worker(), worker("d1", pid=8)])
    assert exact_and_here(status, [7, 8]) == ""
    assert exact_and_here(status, [7]) == "d1: runs on another machine, where no fault can be made from here"
    inexact = StatusResponse(workers=[worker(exact=False)])
    assert exact_and_here(inexact, [7]) == "d0: not in exact mode, so tokens cannot be compared"


def test_a_slope_is_that_within_processes_and_noise_is_none() -> None:
    """Two processes of very different levels, each of which grows by 100 an hour, and two that only jitter."""
    grows = [(pid, float(age), 1000.0 * pid + 100 * age / 3600) for pid in (1, 2) for age in range(0, 600, 5)]
    found = slope("worker", grows)
    assert found is not None
    assert found.per_hour == pytest.approx(100)
    assert found.grows
    flat = [(pid, float(age), 1000.0 * pid + (age // 5) % 2) for pid in (1, 2) for age in range(0, 600, 5)]
    still = slope("worker", flat)
    assert still is not None
    assert abs(still.per_hour) <= still.noise_per_hour
    assert not still.grows
    assert slope("worker", grows[:2]) is None


def test_what_comes_and_goes_slowly_is_noise_and_a_leak_beneath_it_is_still_found() -> None:
    """Streams that are open for a minute or two: the count wanders, and each sample is much like the one before."""
    draw = random.Random(3)
    for leaks_per_hour, found in ((0.0, False), (60.0, True)):
        points, level = [], 0.0
        for age in range(0, 3600, 5):
            level += draw.gauss(0, 1) - level * 5 / 90
            points.append((1, float(age), 50 + level + leaks_per_hour * age / 3600))
        told = slope("router", points)
        assert told is not None
        assert told.grows is found, told


def test_the_oldest_process_is_shown_at_ages_from_its_first_to_its_last() -> None:
    def at(pid: int, age_s: float, mb: int) -> Taken:
        return Taken(name="router", pid=pid, age_s=age_s, num_files=9, heap_bytes=mb << 20, shared_bytes=0)

    old = [at(1, 60.0 * minute, 60 + minute) for minute in range(15)]
    young = [at(2, 60.0 * minute, 90) for minute in range(3)]
    cells = [each.strip() for each in ages_table([*young, *old]).splitlines()[-1].strip("| ").split(" | ")]
    assert cells == ["router", *(f"{60 + minute}.0 ({minute})" for minute in range(0, 15, 2))]


def test_files_and_memory_of_a_process_are_its_own() -> None:
    me = os.getpid()

    def num_files() -> int:
        (found,) = [each for each in taken(me) if each.pid == me]
        assert found.heap_bytes > 1 << 20
        return found.num_files

    before = num_files()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        inside, _ = server.accept()
        with inside:
            assert num_files() == before + 3
    assert num_files() == before
