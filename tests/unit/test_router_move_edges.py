"""The failure edges of a move that the router decides (algorithms.md 14 (3), by their numbers), each ended once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from router_rig import D2, MOVE, PROMPT, D, MoveRig, P, R, request, token

from router.config import RouterConfig
from router.events import (
    Action,
    ClientGone,
    Fail,
    LinkLost,
    LinkUp,
    MoveLost,
    StopRequested,
    Submitted,
    Tick,
    WorkerDraining,
    WorkerLost,
)
from router.move import MoveOutcome, MoveReason
from router.request import RequestState
from tandem.errors import DeadlinePassed
from tandem.messages import (
    Assign,
    CancelAssigned,
    Migrate,
    MoveFailed,
    OwnerIs,
    RequestFailed,
    Role,
    StopMove,
)
from tandem.request import FinishReason, RequestId, TransferId, WorkerId


@pytest.fixture
def rig() -> MoveRig:
    """Not moving yet."""
    return MoveRig()


@pytest.fixture
def moving() -> MoveRig:
    """d0 to d1, as transfer r.2.m1."""
    rig = MoveRig()
    rig.move()
    return rig


# What ends a move while its source runs on (edges 1, 7, 9, 11, and the deadline), and whether the source must be told.
DROPS: list[tuple[str, Callable[[MoveRig], object], bool, bool]] = [
    ("does not converge", lambda rig: rig.failed(), False, True),
    ("revoked", lambda rig: rig.asked(revoke=True), False, True),
    (
        "no_room",
        lambda rig: rig.report(
            D2,
            failed=(
                RequestFailed(request_id=R, epoch=2, transfer_id=MOVE, code="no_room", message="full", retryable=True),
            ),
        ),
        True,
        True,
    ),
    ("killed", lambda rig: rig.feed(WorkerLost(worker_id=D2, incarnation=1, reason="killed")), True, False),
    ("cut", lambda rig: rig.feed(LinkLost(worker_id=D2, incarnation=1, reason="cut")), True, False),
    ("superseded", lambda rig: rig.up("d1", Role.DECODE, incarnation=2), True, False),
    ("draining", lambda rig: rig.feed(WorkerDraining(worker_id=D2, incarnation=1)), True, True),
    ("no commit 11000 ms", lambda rig: rig.feed(Tick(), after_ms=11_000), True, True),
]


@pytest.mark.parametrize(("says", "drop", "tells_source", "tells_target"), DROPS)
def test_a_move_that_fails_leaves_the_request_where_it_runs(
    moving: MoveRig, says: str, drop: Callable[[MoveRig], object], tells_source: bool, tells_target: bool
) -> None:
    drop(moving)
    (record,) = moving.records()
    assert record.outcome is MoveOutcome.FAILED
    assert says in record.error
    stops = [(to, each.transfer_id, each.epoch) for to, each in moving.sent(StopMove)]
    assert stops == ([(D, MOVE, 2)] if tells_source else [])
    cancels = [(to, each.epoch) for to, each in moving.sent(CancelAssigned)]
    assert cancels == ([(D2, 2)] if tells_target else [])
    drop(moving)  # once more: no news
    for actions in (moving.moved(), moving.failed()):
        assert not moving.sent(StopMove, actions)
    assert moving.asked().over
    moving.token(D2, 3, 2)  # nobody may believe it
    moving.token(D, 2, 2)
    moving.token(D, 2, 3, FinishReason.LENGTH)
    assert moving.delivered() == [2, 3]
    assert len(moving.records()) == len(moving.ends()) == 1
    assert moving.shown().num_replacements == 0
    assert moving.at_rest()


def test_the_commit_of_a_dropped_move_is_refused(moving: MoveRig) -> None:
    """Edges 10 and 14: after the revocation the target's own copy counts for nothing."""
    answer = moving.asked(revoke=True)
    assert (answer.worker_id, answer.epoch, answer.over) == (D, 2, True)
    ((_, refused),) = moving.sent(OwnerIs, moving.moved())
    assert refused.refused
    assert (refused.worker_id, refused.over) == (D, True)


def test_a_revocation_that_comes_after_the_commit_is_told_who_owns(moving: MoveRig) -> None:
    """Edges 10 and 16."""
    moving.moved()
    answer = moving.asked(revoke=True)
    assert (answer.worker_id, answer.epoch, answer.over) == (D2, 3, False)
    moving.token(D2, 3, 2)
    assert moving.records()[0].outcome is MoveOutcome.MOVED


@pytest.mark.parametrize("stale", [TransferId("r.2.m0"), TransferId("r.1"), TransferId("")])
def test_what_a_target_says_late_of_an_earlier_attempt_does_not_end_this_one(
    moving: MoveRig, stale: TransferId
) -> None:
    failed = RequestFailed(request_id=R, epoch=2, transfer_id=stale, code="handoff_failed", message="", retryable=True)
    assert not moving.report(D2, failed=(failed,))
    moving.moved()
    moving.token(D2, 3, 2)
    assert moving.records()[0].outcome is MoveOutcome.MOVED


def test_edge_20_move_whose_planner_is_gone_ends_by_itself(rig: MoveRig) -> None:
    """Nobody speaks up for it any more: it is committed all the same, and one that stands still has a deadline."""
    rig.move()
    rig.moved()
    rig.token(D2, 3, 2)
    assert [each.outcome for each in rig.records()] == [MoveOutcome.MOVED]
    rig.feed(Tick(), after_ms=10_000)
    rig.move(to=None)
    rig.feed(Tick(), after_ms=11_000)
    assert [each.outcome for each in rig.records()] == [MoveOutcome.MOVED, MoveOutcome.FAILED]
    rig.token(D2, 3, 3)
    assert rig.delivered() == [2, 3]


def test_edge_21_second_plan_for_a_request_is_refused_while_the_first_runs(moving: MoveRig) -> None:
    for reason in (MoveReason.OPERATOR, MoveReason.BALANCE, MoveReason.DRAIN):
        assert "is being moved already" in moving.refusal(moving.move(to=None, reason=reason)).message
    moving.moved()
    assert "is being moved already" in moving.refusal(moving.move(to=None)).message  # until the first token is here
    moving.token(D2, 3, 2)
    assert [each.outcome for each in moving.records()] == [MoveOutcome.MOVED]


def test_only_the_source_revokes_and_only_its_own_move(moving: MoveRig) -> None:
    for worker, transfer_id in ((D2, MOVE), (P, MOVE), (D, TransferId("r.1")), (D, TransferId("r.2.m0"))):
        moving.asked(transfer_id, worker, revoke=True)
    failed = MoveFailed(request_id=R, transfer_id=MOVE, epoch=2, code="x", message="")
    moving.report(D2, moves_failed=(failed,))
    assert not moving.records()
    moving.moved()
    assert moving.shown().decode_worker == D2


@pytest.mark.parametrize("lost", [WorkerLost, LinkLost])
def test_a_target_that_holds_all_of_it_may_commit_after_its_source_was_lost(moving: MoveRig, lost: type) -> None:
    """Edge 13."""
    assert not moving.feed(lost(worker_id=D, incarnation=1, reason="killed"))
    assert moving.state() is RequestState.ORPHANED
    assert "orphaned" in moving.refusal(moving.move(to=None)).message
    moving.feed(Tick(), after_ms=299)
    answers = moving.sent(OwnerIs, moving.moved(next_index=3, tokens=(token(2, 2),)))
    assert [(to, each.worker_id, each.epoch) for to, each in answers] == [(D2, D2, 3)]
    moving.token(D2, 3, 3, FinishReason.LENGTH)
    assert moving.delivered() == [2, 3]
    assert moving.records()[0].outcome is MoveOutcome.MOVED
    assert moving.shown().num_replacements == 0
    assert moving.at_rest()


ORPHANS: list[Callable[[MoveRig], object]] = [
    lambda rig: rig.feed(Tick(), after_ms=300),
    lambda rig: rig.feed(WorkerLost(worker_id=D2, incarnation=1, reason="killed")),
    lambda rig: rig.feed(LinkLost(worker_id=D2, incarnation=1, reason="cut")),
    lambda rig: rig.report(
        D2,
        failed=(
            RequestFailed(request_id=R, epoch=2, transfer_id=MOVE, code="handoff_failed", message="", retryable=True),
        ),
    ),
    lambda rig: rig.moved(next_index=9),
]


@pytest.mark.parametrize("lose", ORPHANS)
def test_edges_8_and_12_orphan_whose_move_fails_too_is_placed_anew(
    moving: MoveRig, lose: Callable[[MoveRig], object]
) -> None:
    """With what was delivered, and the target's copy as a prefix cache if it is there."""
    moving.up("d2", Role.DECODE)
    moving.feed(WorkerLost(worker_id=D, incarnation=1, reason="killed"))
    moving.actions.clear()
    lose(moving)
    told = moving.sent(Assign)
    assert {each.tokens for _, each in told} == {(*PROMPT, 100, 101)}
    assert {each.epoch > 3 for _, each in told} == {True}
    (record,) = moving.records()
    assert record.outcome is MoveOutcome.ENDED
    assert "killed" in record.error
    shown = moving.shown()
    assert (shown.state, shown.num_replacements) == ("prefilling", 1)
    assert all(answer.refused for _, answer in moving.sent(OwnerIs, moving.moved()))
    assert moving.shown().state == "prefilling"


def test_an_orphans_target_is_not_to_blame(moving: MoveRig) -> None:
    moving.feed(WorkerLost(worker_id=D, incarnation=1, reason="killed"))
    moving.feed(Tick(), after_ms=300)
    assert {to for to, _ in moving.sent(Assign)[1:]} == {P, D2}


def test_a_draining_target_still_saves_an_orphan(moving: MoveRig) -> None:
    moving.feed(WorkerLost(worker_id=D, incarnation=1, reason="killed"))
    moving.feed(WorkerDraining(worker_id=D2, incarnation=1))
    moving.moved()
    assert moving.shown().decode_worker == D2


def test_what_a_lost_source_says_on_a_new_stream_is_not_heard_by_its_orphan(moving: MoveRig) -> None:
    moving.feed(LinkLost(worker_id=D, incarnation=1, reason="cut"))
    moving.feed(LinkUp(worker_id=D, incarnation=1))
    moving.token(D, 2, 2)
    moving.failed()
    moving.asked(revoke=True)
    assert moving.delivered() == []
    moving.moved()
    moving.token(D2, 3, 2)
    assert moving.delivered() == [2]


def test_both_lost_and_in_either_order(moving: MoveRig) -> None:
    moving.up("d2", Role.DECODE)
    moving.feed(WorkerLost(worker_id=D2, incarnation=1, reason="killed"))
    moving.feed(WorkerLost(worker_id=D, incarnation=1, reason="killed"))
    assert moving.sent(Assign)[-1][1].tokens == (*PROMPT, 100, 101)
    assert [each.outcome for each in moving.records()] == [MoveOutcome.FAILED]


def test_edge_17_target_that_dies_right_after_the_commit_loses_the_request_to_a_new_place(moving: MoveRig) -> None:
    """Without a grace: the source's blocks are prefix cache by then."""
    moving.moved()
    moving.actions.clear()
    moving.feed(WorkerLost(worker_id=D2, incarnation=1, reason="killed"))
    assert {to for to, _ in moving.sent(Assign)} == {P, D}
    assert moving.records()[0].outcome is MoveOutcome.MOVED


def test_a_source_that_gives_the_request_up_takes_the_move_with_it(moving: MoveRig) -> None:
    failed = RequestFailed(request_id=R, epoch=2, code="x", message="y", retryable=True)
    actions = moving.report(D, failed=(failed,))
    assert [to for to, _ in moving.sent(CancelAssigned, actions)] == [D, D2]
    assert moving.records()[0].outcome is MoveOutcome.ENDED
    assert moving.shown().num_replacements == 1


ENDS: list[tuple[Callable[[MoveRig], list[Action]], list[WorkerId]]] = [
    (lambda rig: rig.feed(ClientGone(request_id=R, reason="hung up")), [D, D2]),
    (lambda rig: rig.feed(StopRequested(request_id=R, index=0)), [D, D2]),
    (lambda rig: rig.token(D, 2, 2, FinishReason.STOP), [D2]),
    (lambda rig: rig.moved(next_index=3, tokens=(token(2, 2, FinishReason.STOP),)), [D2]),
    (lambda rig: rig.feed(Tick(), after_ms=900_000), [D, D2]),
]


@pytest.mark.parametrize(("end", "told"), ENDS)
@pytest.mark.parametrize("orphaned", [False, True])
def test_the_end_of_a_request_ends_its_move_everywhere(
    moving: MoveRig, end: Callable[[MoveRig], list[Action]], told: list[WorkerId], orphaned: bool
) -> None:
    """Edges 3 and 18."""
    if orphaned:
        if told == [D2] and end is ENDS[2][0]:
            return  # its source is gone
        moving.feed(WorkerLost(worker_id=D, incarnation=1, reason="killed"))
    actions = end(moving)
    assert [to for to, _ in moving.sent(CancelAssigned, actions)] == ([D2] if orphaned else told)
    (record,) = moving.records()
    assert record.outcome is MoveOutcome.ENDED
    assert len(moving.ends()) == 1
    assert moving.shown().moving_to == ""
    moving.token(D, 2, 3)
    moving.moved()
    moving.failed()
    assert len(moving.ends()) == len(moving.records()) == 1
    assert moving.at_rest()


def test_a_request_that_ends_before_the_targets_first_token_was_moved(moving: MoveRig) -> None:
    moving.moved()
    moving.feed(ClientGone(request_id=R, reason="hung up"))
    assert [each.outcome for each in moving.records()] == [MoveOutcome.MOVED]
    assert moving.at_rest()


def test_a_stalled_source_is_to_blame_and_not_its_target() -> None:
    rig = MoveRig(RouterConfig(decode_stall_ms=5_000))
    rig.move()
    rig.actions.clear()
    rig.feed(Tick(), after_ms=5_000)
    assert {to for to, _ in rig.sent(Assign)} == {P, D2}
    assert rig.records()[0].outcome is MoveOutcome.ENDED


def test_edge_19_draining_source_goes_on_until_it_is_rid_of_the_request(rig: MoveRig) -> None:
    """Without a target it stays; nobody drops it."""
    rig.feed(WorkerDraining(worker_id=D, incarnation=1))
    rig.feed(WorkerDraining(worker_id=D2, incarnation=1))
    assert "d1: that worker is draining" in rig.refusal(rig.move(to=None, reason=MoveReason.DRAIN)).message
    rig.token(D, 2, 2)
    rig.feed(WorkerDraining(worker_id=D2, incarnation=1, draining=False))
    assert rig.sent(Migrate, rig.move(to=None, reason=MoveReason.DRAIN))
    rig.moved(next_index=3)
    rig.token(D2, 3, 3)
    assert rig.delivered() == [2, 3]


def test_the_deadline_of_a_request_bounds_its_move() -> None:
    rig = MoveRig(RouterConfig(request_deadline_ms=4_000))
    ((_, told),) = rig.sent(Assign, rig.move())
    assert told.deadline_ms <= 4_000
    rig.feed(Tick(), after_ms=4_000)
    (end,) = rig.ends()
    assert isinstance(end, Fail)
    assert isinstance(end.error, DeadlinePassed)


def test_events_from_inside_have_no_row_where_they_make_no_sense(rig: MoveRig) -> None:
    rig.feed(Submitted(request=request("b")))
    placed = rig.core._requests[RequestId("b")]
    with pytest.raises(AssertionError):
        rig.core._step(placed, None, MoveLost("from nowhere"))
