"""The dashboard's frames: one with everything and those after it tell what there is, however late one comes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from router_rig import D2, D, P, R, Rig, request, token

from benchmarks.fake_cluster import FakeCluster
from cluster.admin import move_status
from cluster.dashboard_frames import TURNS, Frames, Task
from cluster.dashboard_view import ENDED_MAX, MOVE_FIELDS, MOVES_MAX, REQUEST_FIELDS, RUNNING_MAX, WORKER_FIELDS, Viewer
from cluster.membership import Member, MemberState
from router.events import Submitted
from router.move import MoveOutcome, MoveReason, MoveRecord
from router.recent import Recent
from router.request import StatusSnapshot
from tandem.messages import BlockCounts, Role, WorkerLoad
from tandem.request import RequestId, WorkerId
from tandem.v1 import admin_pb2 as pb

UNIX_MS = 1_700_000_000_000


@dataclass
class Page:
    """What a browser makes of frames, as cluster/dashboard/store.js does."""

    number: int = 0
    head: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, dict[Any, list[Any]]] = field(default_factory=dict)
    seconds: list[list[Any]] = field(default_factory=list)

    def take(self, line: bytes) -> dict[str, Any]:
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        frame: dict[str, Any] = json.loads(line)
        if frame["kind"] == "full":
            self.tables, self.seconds = {name: {} for name in ("workers", "requests", "moves", "tasks")}, []
        else:
            assert frame["number"] == self.number + 1
        self.number = frame["number"]
        self.head = frame.get("head", self.head)
        for name, table in self.tables.items():
            table.update({row[0]: row for row in frame.get(name, ())})
            for key in frame.get(f"{name}_gone", ()):
                del table[key]
        counters = frame.get("tokens", ())
        for handle, tokens in zip(counters[::2], counters[1::2], strict=True):
            self.tables["requests"][handle][-1] = tokens
        self.seconds += frame.get("seconds", ())
        return frame


def test_a_late_comer_knows_what_one_from_the_beginning_knows() -> None:
    fake = FakeCluster(num_workers=9, num_requests=60, moves_each_s=20, seed=3)
    frames, recent, first, late = Frames(), fake.recent, Page(), Page()
    first.take(frames.full())
    for number in range(1, 80):
        fake.advance(number * 0.5)
        view = fake._viewer.view(fake.snapshot(), fake.members.values(), not_ready="", others={})
        if number % 2:
            recent.close_second()
        tasks = [Task(id=number // 20, kind="drain", what="d", state="running", detail=str(number), at_ms=1, by="")]
        delta = frames.look(UNIX_MS + number, view, recent.seconds(), tasks)
        first.take(delta)
        if number == 41:
            late.take(frames.full())
        elif number > 41:
            late.take(delta)
    for page in (first, late):
        assert {key: tuple(row) for key, row in page.tables["workers"].items()} == view.workers
        assert {key: tuple(row) for key, row in page.tables["moves"].items()} == view.moves
        known = {row[1]: tuple(row[1:-1]) for row in page.tables["requests"].values()}
        assert known == view.requests
        assert page.head == json.loads(json.dumps(view.head))
    assert first.tables["requests"] == late.tables["requests"]
    assert [row[0] for row in first.seconds] == list(range(40))
    assert late.seconds == first.seconds
    assert any(each.moves for each in recent.seconds())


def test_tokens_are_told_in_turns_and_none_is_forgotten() -> None:
    fake = FakeCluster(num_workers=4, num_requests=40, moves_each_s=0)
    frames, page, told = Frames(), Page(), []
    page.take(frames.full())
    for number in range(1, 30):
        fake.advance(number * 0.05)
        view = fake._viewer.view(fake.snapshot(), fake.members.values(), not_ready="", others={})
        told.append(len(page.take(frames.look(UNIX_MS, view, (), ())).get("tokens", ())) // 2)
    assert max(told[2:]) <= 40 // TURNS + 1
    for _ in range(TURNS):
        page.take(frames.look(UNIX_MS, view, (), ()))
    assert {row[1]: row[-1] for row in page.tables["requests"].values()} == view.tokens


def test_what_stays_as_it_is_costs_nothing() -> None:
    fake = FakeCluster(num_workers=20, num_requests=200, moves_each_s=0)
    view = fake._viewer.view(fake.snapshot(), fake.members.values(), not_ready="", others={})
    frames = Frames()
    frames.look(UNIX_MS, view, (), ())
    for _ in range(TURNS):
        frames.look(UNIX_MS, view, (), ())
    assert len(frames.look(UNIX_MS, view, (), ())) < 80


def viewer() -> Viewer:
    return Viewer(router="router-0", model="m", since_ms=UNIX_MS, to_unix_ms=UNIX_MS)


def test_a_view_has_what_the_router_knows_and_no_prompt() -> None:
    rig = Rig()
    for name, role in ((P, Role.PREFILL), (D, Role.DECODE), (D2, Role.DECODE)):
        rig.up(name, role)
    secret = tuple(range(77_001, 77_041))
    rig.feed(Submitted(request=request("r", tokens=secret)))
    blocks = BlockCounts(total=100, free=60, cached=20, owned=10, exported=5, granted=3, quarantined=2)
    rig.report(
        P, load=WorkerLoad(running=1, waiting=2, blocks=blocks, prefill_backlog_tokens=40, steps=7, last_step_ms=12.34)
    )
    rig.report(P, tokens=(replace(token(rig.assigns()[0].epoch, 0), token_id=88_088),))
    snapshot = rig.core.status(rig.now_ms)
    members = [
        Member(info=each.info, incarnation=each.incarnation, state=MemberState.READY, heard_ms=0)
        for each in snapshot.workers
    ]
    view = viewer().view(snapshot, members, not_ready="nobody", others={})
    worker = dict(zip(WORKER_FIELDS, view.workers["p0"], strict=True))
    states = ("free", "cached", "owned", "exported", "granted", "quarantined")
    assert sum(int(worker[state] or 0) for state in states) == worker["total"] == 100
    assert (worker["running"], worker["waiting"], worker["backlog"], worker["step_ms"]) == (1, 2, 40, 12.3)
    asked = dict(zip(REQUEST_FIELDS, view.requests["r"], strict=True))
    assert (asked["state"], asked["prefill"], asked["prompt_tokens"], view.tokens["r"]) == ("handing_off", "p0", 40, 1)
    assert asked["began_ms"] == UNIX_MS + snapshot.now_ms - snapshot.requests[0].age_ms
    frames = Frames()
    shown = frames.look(UNIX_MS, view, (), ()) + frames.full()
    for number in (*secret, 88_088):
        assert str(number).encode() not in shown, "a prompt or an answer is in a frame"


def snapshot_of(num_running: int, num_moves: int = 0) -> StatusSnapshot:
    rig = Rig()
    rig.up(P, Role.PREFILL)
    rig.up(D, Role.DECODE)
    rig.feed(Submitted(request=request("r")))
    status = rig.core.status(rig.now_ms)
    many = tuple(replace(status.requests[0], request_id=RequestId(f"r{number}")) for number in range(num_running))
    moves = tuple(
        MoveRecord(
            request_id=R, source=D, target=D2, reason=MoveReason.DRAIN, why="", at_ms=number,
            outcome=MoveOutcome.MOVED if number else MoveOutcome.MOVING,
        )
        for number in range(num_moves)
    )  # fmt: skip
    return replace(status, requests=many, moves=moves)


def test_a_view_is_bounded_and_says_what_it_leaves_out() -> None:
    view = viewer().view(snapshot_of(RUNNING_MAX + 7, MOVES_MAX + 20), (), not_ready="", others={})
    assert len(view.requests) == RUNNING_MAX
    assert view.head["hidden_requests"] == 7
    outcomes = [row[MOVE_FIELDS.index("outcome")] for row in view.moves.values()]
    assert outcomes.count("moving") == 1, "the oldest, which is under way"
    assert len(outcomes) == MOVES_MAX + 1
    theirs = pb.StatusResponse(requests=[pb.RequestStatus(id=f"o{number}", state="decoding") for number in range(500)])
    view = viewer().view(snapshot_of(RUNNING_MAX - 1), (), not_ready="", others={"router-1": theirs})
    assert len(view.requests) == RUNNING_MAX + ENDED_MAX
    assert view.head["hidden_requests"] == 500 - ENDED_MAX - 1


def test_other_routers_are_named_and_their_moves_keep_their_names() -> None:
    """Each answer says when a move began on a clock that was read anew: it stays one move."""
    record = MoveRecord(
        request_id=R, source=D, target=D2, reason=MoveReason.BALANCE, why="w", outcome=MoveOutcome.MOVING, at_ms=5
    )
    look, seen = viewer(), []
    for jitter_ms in (0, 1, -1):
        move = move_status(record, now_ms=10)
        move.at_ms = UNIX_MS + jitter_ms
        request = pb.RequestStatus(id="theirs", state="decoding", decode_worker="d0", tokens=9, ttft_ms=50)
        others = {"router-1": pb.StatusResponse(moves=[move], requests=[request]), "router-2": None}
        view = look.view(snapshot_of(1), (), not_ready="", others=others)
        seen.append(view.moves)
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 1
    assert view.head["routers"] == [("router-0", True, 1), ("router-1", True, 1), ("router-2", False, 0)]
    assert dict(zip(REQUEST_FIELDS, view.requests["theirs"], strict=True))["router"] == "router-1"
    look.view(snapshot_of(1), (), not_ready="", others={})
    assert look._began == {}


@pytest.mark.parametrize("incarnation", [1, 2])
def test_a_load_is_shown_only_of_the_incarnation_that_lives(incarnation: int) -> None:
    rig = Rig()
    rig.up(D, Role.DECODE)
    blocks = BlockCounts(total=100, free=0, owned=100)
    rig.report(
        D, load=WorkerLoad(running=9, waiting=0, blocks=blocks, prefill_backlog_tokens=0, steps=1, last_step_ms=1.0)
    )
    snapshot = rig.core.status(rig.now_ms)
    member = Member(info=snapshot.workers[0].info, incarnation=incarnation, state=MemberState.JOINING, heard_ms=0)
    row = viewer().view(snapshot, [member], not_ready="", others={}).workers[WorkerId("d0")]
    worker = dict(zip(WORKER_FIELDS, row, strict=True))
    assert (worker["running"], worker["free"]) == ((9, 0) if incarnation == 1 else (0, 100))


def test_recent_seconds_are_told_once() -> None:
    frames, recent, page = Frames(), Recent(), Page()
    page.take(frames.full())
    view = viewer().view(snapshot_of(1), (), not_ready="", others={})
    for _ in range(5):
        recent.close_second()
        page.take(frames.look(UNIX_MS, view, recent.seconds(), ()))
        page.take(frames.look(UNIX_MS, view, recent.seconds(), ()))
    assert [row[0] for row in page.seconds] == [0, 1, 2, 3, 4]
