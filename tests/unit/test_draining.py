"""Drains: the whole square of states and events, who may be drained, and what is left on a worker."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.draining import (
    OVER,
    TABLE,
    Back,
    Drain,
    DrainState,
    Event,
    Flip,
    Flipped,
    GiveUp,
    Gone,
    Leave,
    Looked,
    TakeBack,
    drainable,
    left_on,
    parse_role,
    requests_on,
)
from cluster.membership import DrainAsked, DrainEnded, Ended, Heartbeat, Membership, Registered
from router.request import RequestSnapshot, RequestState, StatusSnapshot, Transferred, WorkerSnapshot
from tandem.errors import DrainRefused, InvalidRequest
from tandem.messages import BlockCounts, Role, WorkerInfo, WorkerLoad
from tandem.request import RequestId, WorkerId

D0 = WorkerId("decode-0")
EMPTY = Looked(num_requests=0, num_blocks=0)
BUSY = Looked(num_requests=2, num_blocks=30)


def drain(*, restart: bool = False, becomes: Role | None = None, role: Role = Role.DECODE) -> Drain:
    return Drain(
        worker_id=D0, incarnation=3, role=role, restart=restart, becomes=becomes, began_ms=0, deadline_ms=10_000,
        leave_ms=500, start_ms=4_000,
    )  # fmt: skip


def leaving(*, restart: bool = False) -> Drain:
    """A drain that began at 0 and found its worker empty at 300."""
    begun = drain(restart=restart)
    assert begun.handle(0, EMPTY) == []
    assert begun.handle(300, EMPTY) == [Leave(restart)]
    assert begun.state is DrainState.LEAVING
    return begun


# ---- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", DrainState)
@pytest.mark.parametrize(
    "event", [EMPTY, BUSY, Gone("exit"), Back(4), Flipped(), GiveUp("no")], ids=lambda each: type(each).__name__
)
def test_whole_square(state: DrainState, event: Event) -> None:
    """A pair that is not in the table changes nothing and asks for nothing."""
    begun = drain()
    begun.state = state
    actions = begun.handle(1, event)
    if (state, type(event)) not in TABLE:
        assert (begun.state, actions) == (state, [])
    assert not [pair for pair in TABLE if pair[0] in OVER]


def test_a_worker_that_is_empty_for_a_while_leaves() -> None:
    begun = leaving()
    begun.handle(400, Gone("stopped"))
    assert (begun.state, begun.reason) == (DrainState.DONE, "")


def test_what_comes_meanwhile_counts_from_anew() -> None:
    """A token or a cancellation may be on its way when both ends look empty for a moment."""
    begun = drain()
    for now_ms, seen in ((0, BUSY), (100, EMPTY), (300, BUSY), (350, EMPTY), (649, EMPTY)):
        assert begun.handle(now_ms, seen) == []
    assert begun.handle(650, EMPTY) == [Leave(False)]


@pytest.mark.parametrize("seen", [Looked(num_requests=1, num_blocks=0), Looked(num_requests=0, num_blocks=1)])
def test_a_block_or_a_request_holds_it(seen: Looked) -> None:
    begun = drain()
    for now_ms in range(0, 9_999, 200):
        assert begun.handle(now_ms, seen) == []
    assert begun.state is DrainState.EMPTYING


def test_a_drain_that_is_late_is_given_up_with_its_obstacle() -> None:
    begun = drain()
    assert begun.handle(9_999, BUSY) == []
    [taken] = begun.handle(10_000, replace(BUSY, obstacle="no room anywhere"))
    assert taken == TakeBack(
        "decode-0 still has 2 requests and 30 blocks after 10000 ms: no room anywhere; it takes work again"
    )
    assert (begun.state, begun.reason) == (DrainState.FAILED, taken.reason)
    assert begun.handle(10_001, EMPTY) == []


def test_a_worker_that_is_empty_at_its_deadline_still_leaves() -> None:
    begun = drain()
    assert begun.handle(9_900, EMPTY) == []
    assert begun.handle(10_200, EMPTY) == [Leave(False)]


def test_a_worker_that_dies_was_not_drained() -> None:
    begun = drain()
    begun.handle(50, Gone("exit code 1"))
    assert (begun.state, begun.reason) == (DrainState.FAILED, "decode-0 died while it drained: exit code 1")


def test_a_restart_ends_with_a_fresh_one() -> None:
    begun = leaving(restart=True)
    seen = []
    for now_ms, event in ((310, Back(3)), (400, Gone("stopped")), (900, Back(4))):
        begun.handle(now_ms, event)
        seen.append(begun.state)
    assert seen == [DrainState.LEAVING, DrainState.STARTING, DrainState.DONE], "the one that leaves is not fresh"
    assert begun.fresh_incarnation == 4


@pytest.mark.parametrize("restart", [False, True])
def test_each_state_has_a_bound(restart: bool) -> None:
    begun = leaving(restart=restart)
    begun.tick(799)
    assert begun.state is DrainState.LEAVING
    begun.tick(800)
    assert begun.reason == "decode-0 has not ended within 500 ms"
    if restart:
        begun = leaving(restart=True)
        begun.handle(400, Gone("stopped"))
        begun.tick(4_399)
        assert begun.state is DrainState.STARTING
        begun.tick(4_400)
        assert begun.reason == "decode-0 has left, and no fresh one is ready within 4000 ms"
    assert begun.state is DrainState.FAILED


def test_a_drain_that_another_router_was_first_with_is_given_up() -> None:
    begun = drain()
    assert begun.handle(5, GiveUp("decode-0 is draining already")) == [TakeBack("decode-0 is draining already")]
    assert (begun.state, begun.reason) == (DrainState.FAILED, "decode-0 is draining already")


def test_a_flip_waits_until_nothing_is_left_and_then_for_the_supervisor() -> None:
    begun = drain(becomes=Role.PREFILL)
    for now_ms, seen in ((0, BUSY), (100, EMPTY)):
        assert begun.handle(now_ms, seen) == []
    assert begun.handle(400, EMPTY) == [Flip(Role.PREFILL)]
    assert begun.handle(500, EMPTY) == [], "said once"
    assert begun.state is DrainState.FLIPPING
    begun.handle(600, Flipped())
    assert (begun.state, begun.reason) == (DrainState.DONE, "")


@pytest.mark.parametrize(
    ("role", "becomes", "at_once"),
    [
        (Role.DECODE, Role.MIXED, True),
        (Role.PREFILL, Role.MIXED, True),
        (Role.MIXED, Role.DECODE, False),
        (Role.PREFILL, Role.DECODE, False),
    ],
)
def test_a_role_that_does_all_of_the_old_one_needs_no_emptying(role: Role, becomes: Role, at_once: bool) -> None:
    begun = drain(becomes=becomes, role=role)
    assert begun.handle(0, BUSY) == ([Flip(becomes)] if at_once else [])


def test_a_flip_that_the_supervisor_does_not_answer_is_taken_back() -> None:
    begun = drain(becomes=Role.MIXED)
    begun.handle(0, EMPTY)
    assert begun.tick(4_999) == []
    assert begun.tick(5_000) == [TakeBack("decode-0 was not given its new role within 5000 ms")]
    assert begun.state is DrainState.FAILED


def test_a_worker_that_dies_before_it_has_its_role_was_not_flipped() -> None:
    begun = drain(becomes=Role.MIXED)
    begun.handle(0, EMPTY)
    begun.handle(1, Gone("exit code 1"))
    begun.handle(2, Flipped())
    assert (begun.state, begun.reason) == (DrainState.FAILED, "decode-0 died while it drained: exit code 1")


# ---- who may be drained ----------------------------------------------------------------------------------------------


def info(name: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name), role=Role(name.split("-")[0]), control="h:1", endpoint="e", pid=1, agent_pid=2,
        model="m", namespace="n", fingerprint="f", exact=True, dtype="float32", block_size=16, total_blocks=100,
        context_tokens=128, block_bytes=64,
    )  # fmt: skip


def members(*names: str) -> Membership:
    """All of them ready."""
    membership = Membership()
    for name in names:
        membership.handle(0, Registered(info=info(name), incarnation=1))
        membership.handle(
            0, Heartbeat(worker_id=WorkerId(name), incarnation=1, steps=0, runnable=False, agent_pid=2)
        )  # fmt: skip
    return membership


def refusal(membership: Membership, worker: str, *, restart: bool = False, draining: tuple[str, ...] = ()) -> str:
    names = [WorkerId(each) for each in draining]
    with pytest.raises((DrainRefused, InvalidRequest)) as refused:
        drainable(membership, worker, restart=restart, draining=names)
    return str(refused.value)


def test_one_of_two_may_be_drained() -> None:
    membership = members("prefill-0", "prefill-1", "decode-0", "decode-1")
    for name in membership.members:
        assert drainable(membership, name, restart=False, draining=()).info.worker_id == name


def test_the_last_one_stays_unless_it_is_restarted() -> None:
    membership = members("prefill-0", "decode-0")
    assert "decode-0 is the last ready worker that writes tokens" in refusal(membership, "decode-0")
    assert "prefill-0 is the last ready worker that reads prompts" in refusal(membership, "prefill-0")
    assert drainable(membership, "decode-0", restart=True, draining=())
    mixed = members("mixed-0", "prefill-0", "decode-0")
    assert drainable(mixed, "decode-0", restart=False, draining=())
    assert drainable(mixed, "mixed-0", restart=False, draining=())
    assert "the last ready worker that writes tokens" in refusal(members("mixed-0", "prefill-0"), "mixed-0")


def test_who_may_get_which_role() -> None:
    membership = members("prefill-0", "decode-0", "decode-1")
    assert drainable(membership, "decode-0", becomes=Role.PREFILL, draining=())
    with pytest.raises(DrainRefused, match="decode-0 is a decode worker already"):
        drainable(membership, "decode-0", becomes=Role.DECODE, draining=())
    why = "prefill-0 is the last ready worker that reads prompts; make it mixed, or leave it"
    with pytest.raises(DrainRefused, match=why):
        drainable(membership, "prefill-0", becomes=Role.DECODE, draining=())
    assert drainable(membership, "prefill-0", becomes=Role.MIXED, draining=())
    with pytest.raises(InvalidRequest, match="role: there is no role 'decoder'; there are prefill, decode, mixed"):
        parse_role("decoder")


def test_others_that_drain_do_not_count() -> None:
    membership = members("prefill-0", "decode-0", "decode-1")
    membership.handle(1, DrainAsked(worker_id=D0, incarnation=1))
    assert "decode-1 is the last ready worker that writes tokens" in refusal(membership, "decode-1")
    assert refusal(membership, "decode-0") == "decode-0 is draining already"


def test_unknown_dead_joining_left_and_restarting_workers_are_named() -> None:
    membership = members("prefill-0", "decode-0", "decode-1", "decode-2")
    assert refusal(membership, "x") == (
        "worker: no worker of id 'x' is known; there are: decode-0, decode-1, decode-2, prefill-0"
    )
    assert refusal(membership, "").startswith("worker: is missing")
    membership.handle(1, Ended(worker_id=D0, incarnation=1, reason="exit code 1"))
    assert refusal(membership, "decode-0") == "decode-0 is dead: exit code 1"
    membership.handle(2, Registered(info=info("decode-0"), incarnation=2))
    assert refusal(membership, "decode-0") == "decode-0 is joining; wait until it is ready"
    name = WorkerId("decode-1")
    membership.handle(3, DrainAsked(worker_id=name, incarnation=1))
    membership.handle(4, DrainEnded(worker_id=name, incarnation=1, left=True, reason="drained"))
    assert refusal(membership, "decode-1") == "decode-1 was drained and has left"
    assert refusal(membership, "decode-1", draining=("decode-1",)) == "decode-1 is draining already"


# ---- what is left on a worker ----------------------------------------------------------------------------------------


def load(running: int = 0, waiting: int = 0, **blocks: int) -> WorkerLoad:
    counts = BlockCounts(total=100, free=100 - sum(blocks.values()), **blocks)
    return WorkerLoad(
        running=running, waiting=waiting, blocks=counts, prefill_backlog_tokens=0, steps=1, last_step_ms=1.0
    )


def snapshot_of(told: WorkerLoad | None, *requests: RequestSnapshot, num_requests: int = 0) -> StatusSnapshot:
    worker = WorkerSnapshot(
        worker_id=D0, incarnation=3, state="draining", info=info("decode-0"), load=told, num_requests=num_requests,
        num_free_blocks=0, num_arriving=0, num_arriving_blocks=0, cached_hashes=0, reason="",
    )  # fmt: skip
    return StatusSnapshot(now_ms=0, workers=(worker,), requests=requests, moves=(), queued_tokens=0, waiting=0)


def request(state: RequestState, *, prefill: str = "", decode: str = "", to: str = "") -> RequestSnapshot:
    return RequestSnapshot(
        request_id=RequestId("r"), state=state, mode="prefill", prefill_worker=prefill, decode_worker=decode, epoch=1,
        prompt_tokens=1, tokens=0, max_tokens=9, num_moves=0, moving_to=to, transferred=Transferred(),
        num_replacements=0, ttft_ms=None, age_ms=0, error="", reason="", placements=(), story=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("told", "num_blocks"),
    [
        (load(), 0),
        (load(cached=50), 0),
        (load(owned=1), 1),
        (load(exported=2, granted=3, quarantined=4, cached=5), 9),
    ],
)
def test_cached_blocks_are_nobodys(told: WorkerLoad, num_blocks: int) -> None:
    assert left_on(snapshot_of(told), D0, 3, "").num_blocks == num_blocks


@pytest.mark.parametrize(
    ("state", "prefill", "decode", "to", "involved"),
    [
        (RequestState.ADMITTED, "decode-0", "decode-0", "", 0),
        (RequestState.PREFILLING, "decode-0", "x", "", 1),
        (RequestState.PREFILLING, "x", "decode-0", "", 1),
        (RequestState.HANDING_OFF, "decode-0", "x", "", 1),
        (RequestState.DECODING, "decode-0", "x", "", 0),
        (RequestState.DECODING, "x", "decode-0", "", 1),
        (RequestState.DECODING, "x", "x", "decode-0", 1),
        (RequestState.ORPHANED, "x", "decode-0", "", 1),
        (RequestState.FINISHED, "decode-0", "decode-0", "", 0),
        (RequestState.FAILED, "decode-0", "decode-0", "", 0),
    ],
)
def test_who_has_a_part_in_a_request(state: RequestState, prefill: str, decode: str, to: str, involved: int) -> None:
    seen = snapshot_of(load(), request(state, prefill=prefill, decode=decode, to=to))
    assert left_on(seen, D0, 3, "").num_requests == involved


def test_the_workers_own_count_and_the_routers_count_both_hold_it() -> None:
    assert left_on(snapshot_of(load(), num_requests=2), D0, 3, "").num_requests == 2
    assert left_on(snapshot_of(load(), request(RequestState.DECODING, decode="decode-0")), D0, 3, "").num_requests == 1


def test_what_other_routers_have_there_holds_it_too() -> None:
    """A request that is on its way from another router is in no report of the worker yet."""
    assert left_on(snapshot_of(load()), D0, 3, "", 2).num_requests == 2
    here = request(RequestState.DECODING, decode="decode-0")
    assert left_on(snapshot_of(load(), here, num_requests=3), D0, 3, "", 2).num_requests == 3, "the worker counts all"
    assert left_on(snapshot_of(load(), here, num_requests=1), D0, 3, "", 2).num_requests == 3
    assert requests_on(snapshot_of(load(), here), D0) == 1


def test_a_worker_of_which_nothing_is_known_is_not_empty() -> None:
    assert left_on(snapshot_of(None), D0, 3, "").num_requests == 1
    assert left_on(snapshot_of(load()), D0, 4, "").num_requests == 1
