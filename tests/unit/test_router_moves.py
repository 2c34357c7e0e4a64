"""Moves at the router: their way, refusals, the one commit point, and records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from router_rig import D2, D3, MOVE, PROMPT, D, MoveRig, P, R, Rig, request, token

from router.events import (
    ClientGone,
    Finish,
    LinkLost,
    MoveRefused,
    StopRequested,
    Submitted,
    WorkerDraining,
    WorkerLost,
    WorkerSuspected,
)
from router.history import MoveHistory
from router.move import MOVES_MAX, MoveOutcome, MoveReason, MoveRecord
from tandem.errors import InvalidRequest, MoveImpossible, UnknownRequest
from tandem.messages import (
    Assign,
    AssignMode,
    BlockCounts,
    CancelAssigned,
    CommitAsk,
    Migrate,
    OwnerIs,
    OwnerQuery,
    RequestFailed,
    Role,
    StopMove,
    TransferStats,
    WorkerLoad,
)
from tandem.request import FinishReason, RequestId, Token, TransferId, WorkerId


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


# ---- the way of a move ---------------------------------------------------------------------------------------------


def test_a_move_tells_the_target_then_the_source_and_the_request_runs_on(rig: MoveRig) -> None:
    actions = rig.move()
    ((to, assign),) = rig.sent(Assign, actions)
    ((source, migrate),) = rig.sent(Migrate, actions)
    assert [type(each.message) for each in actions] == [Assign, Migrate]  # type: ignore[union-attr]
    assert (to, assign.mode, assign.move, assign.epoch, assign.transfer_id) == (
        *(D2, AssignMode.DECODE, True, 2, MOVE),
    )
    assert (assign.tokens, assign.num_prompt_tokens, assign.peer.worker_id) == ((*PROMPT, 100, 101), 40, D)
    assert (source, migrate.epoch, migrate.transfer_id, migrate.num_tokens) == (D, 2, MOVE, 42)
    assert (migrate.peer.worker_id, migrate.deadline_ms, assign.deadline_ms) == (D2, 10_000, 10_000)
    assert "operator: because" in migrate.reason
    rig.token(D, 2, 2)
    assert rig.delivered() == [2]
    shown = rig.shown()
    assert (shown.state, shown.decode_worker, shown.moving_to, shown.num_moves) == ("decoding", D, D2, 0)
    (record,) = rig.core.status(rig.now_ms).moves
    assert (record.outcome, record.source, record.target) == (MoveOutcome.MOVING, D, D2)


def test_the_commit_moves_owner_account_and_tokens(moving: MoveRig) -> None:
    moving.token(D, 2, 2)
    moving.now_ms += 7
    answers = moving.sent(OwnerIs, moving.moved(next_index=4, tokens=(token(2, 2), token(2, 3))))
    assert [(to, each.worker_id, each.epoch, each.over, each.refused) for to, each in answers] == [
        (D2, D2, 3, False, ""),
        (D, D2, 3, False, ""),
    ]
    assert moving.delivered() == [2, 3]
    d0, d1 = moving.core.fleet.current(D), moving.core.fleet.current(D2)
    assert d0 is not None
    assert d1 is not None
    assert (list(d0.reserved), list(d1.reserved), list(d1.arriving)) == ([], [R], [])
    moving.token(D, 2, 4)  # stale
    assert not moving.records()
    moving.now_ms += 9
    moving.token(D2, 3, 4)
    moving.token(D2, 3, 5, FinishReason.LENGTH)
    assert moving.delivered() == [2, 3, 4, 5]
    (record,) = moving.records()
    assert (record.outcome, record.pause_ms, record.error, record.why) == (MoveOutcome.MOVED, 9, "", "because")
    assert isinstance(moving.ends()[0], Finish)
    shown = moving.shown()
    assert (shown.decode_worker, shown.prefill_worker, shown.num_moves, shown.moving_to) == (D2, P, 1, "")
    assert moving.at_rest()


def test_the_figures_of_both_ends_are_in_the_record_whenever_they_come(moving: MoveRig) -> None:
    target = TransferStats(
        request_id=R, transfer_id=MOVE, blocks_granted=3, blocks_moved=2, blocks_reused=1, bytes=2_000
    )
    moving.moved()
    moving.report(D2, transfers=(target,))
    moving.token(D2, 3, 2)
    moving.report(D2, transfers=(target,))  # doubled
    source = TransferStats(request_id=R, transfer_id=MOVE, rounds=2, precopy_ms=33, fence_ms=2)
    moving.token(D2, 3, 3, FinishReason.LENGTH)
    moving.report(D, transfers=(source,))
    (record,) = moving.core.status(moving.now_ms).moves
    assert (record.rounds, record.precopy_ms, record.fence_ms) == (2, 33, 2)
    assert (record.blocks_moved, record.blocks_reused, record.bytes_moved) == (2, 1, 2_000)
    assert moving.shown().transferred.blocks_moved == 0  # that is about the handoff


def test_the_first_steps_time_is_told_of_a_handoff(rig: MoveRig) -> None:
    rig.report(D, transfers=(TransferStats(request_id=R, transfer_id=TransferId("r.1"), first_step_ms=4.5),))
    assert rig.shown().transferred.first_step_ms == 4.5


def test_a_request_that_decodes_where_it_was_prefilled_moves_too() -> None:
    rig = MoveRig()
    rig.feed(ClientGone(request_id=R, reason=""))
    rig.feed(WorkerLost(worker_id=P, incarnation=1, reason="gone"))
    rig.feed(Submitted(request=request(max_tokens=8)))
    ((home, assign),) = rig.sent(Assign)
    assert assign.mode is AssignMode.LOCAL
    rig.token(home, assign.epoch, 0)
    other = D2 if home == D else D
    ((to, told),) = rig.sent(Assign, rig.move(to=other))
    assert (to, told.epoch, told.move) == (other, assign.epoch, True)
    rig.moved(told.transfer_id, 1, worker=other, epoch=assign.epoch)
    rig.token(other, assign.epoch + 1, 1)
    assert rig.shown().decode_worker == other
    assert rig.records()[-1].outcome is MoveOutcome.MOVED


def test_it_moves_again_and_back_under_rising_epochs(rig: MoveRig) -> None:
    at, other, epoch = D, D2, 2
    for number in range(1, 4):
        ((to, told),) = rig.sent(Assign, rig.move(to=other))
        assert (to, told.epoch, told.transfer_id) == (other, epoch, f"r.{epoch}.m{number}")
        index = number + 1
        rig.moved(told.transfer_id, index, worker=other, epoch=epoch)
        epoch += 1
        rig.token(other, epoch, index)
        at, other = other, at
    assert [each.outcome for each in rig.records()] == [MoveOutcome.MOVED] * 3
    assert rig.shown().num_moves == 3


def test_placements_take_their_epochs_in_advance_and_moves_never_leave_them(rig: MoveRig) -> None:
    at, other, epoch = D, D2, 2
    for number in range(MOVES_MAX):
        ((_, told),) = rig.sent(Assign, rig.move(to=other))
        rig.moved(told.transfer_id, number + 2, worker=other, epoch=epoch)
        epoch += 1
        rig.token(other, epoch, number + 2)
        at, other = other, at
    error = rig.refusal(rig.move(to=other))
    assert "62 times" in error.message
    rig.actions.clear()
    rig.feed(WorkerLost(worker_id=at, incarnation=1, reason="killed"))
    assert {each.epoch > epoch for _, each in rig.sent(Assign)} == {True}
    (to, assign) = rig.sent(Assign)[0]
    rig.token(P, assign.epoch, MOVES_MAX + 2)
    rig.report(
        to,
        commit_asks=(
            CommitAsk(
                request_id=R,
                transfer_id=assign.transfer_id,
                from_epoch=assign.epoch,
                next_index=MOVES_MAX + 3,
                tokens=(),
            ),
        ),
    )
    rig.up("d2", Role.DECODE)
    assert rig.sent(Migrate, rig.move(to=D3))  # a fresh placement, fresh epochs


def test_without_a_target_the_least_loaded_one_is_chosen_and_the_scores_told(rig: MoveRig) -> None:
    rig.up("d2", Role.DECODE)
    rig.up("m0", Role.MIXED)
    counts = BlockCounts(total=100, free=20, owned=80)
    full = WorkerLoad(running=5, waiting=0, blocks=counts, prefill_backlog_tokens=0, steps=1, last_step_ms=1.0)
    rig.report(D2, load=full)
    rig.report(D3, load=full)
    ((to, _),) = rig.sent(Assign, rig.move(to=None))
    assert to == "m0"
    (record,) = rig.core.status(rig.now_ms).moves
    assert "lowest load of 3" in record.why
    assert "m0 0.00, d1 0.80, d2 0.80" in record.why


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_unknown_and_ended_requests_are_not_moved(rig: MoveRig) -> None:
    (refused,) = rig.move(request_id=RequestId("nobody"))
    assert isinstance(refused, MoveRefused)
    assert isinstance(refused.error, UnknownRequest)
    rig.feed(StopRequested(request_id=R, index=0))
    error = rig.refusal(rig.move())
    assert isinstance(error, MoveImpossible)
    assert "finished" in error.message


def test_a_request_that_does_not_decode_yet_is_not_moved() -> None:
    rig = MoveRig()
    rig.feed(Submitted(request=request("b")))
    rig.report(P, tokens=())
    for state in ("prefilling", "handing_off"):
        (refused,) = rig.move(request_id=RequestId("b"))
        assert isinstance(refused, MoveRefused)
        assert state in refused.error.message
        first = rig.core.status(rig.now_ms).requests[-1]
        rig.report(P, tokens=(Token(request_id=RequestId("b"), epoch=first.epoch, index=0, token_id=1, finish=None),))


@pytest.mark.parametrize("after", [lambda rig: None, lambda rig: rig.moved()])
def test_one_move_at_a_time(moving: MoveRig, after: Callable[[MoveRig], object]) -> None:
    """Edge 21; also until the target of the last move has written its first token."""
    after(moving)
    error = moving.refusal(moving.move(to=D))
    assert isinstance(error, MoveImpossible)
    assert "is being moved already, from d0 to d1" in error.message


def test_a_request_dwells_between_moves_but_not_for_operators_and_drains(moving: MoveRig) -> None:
    moving.failed()
    moving.now_ms += 4_999
    assert "4999 ms ago" in moving.refusal(moving.move(reason=MoveReason.BALANCE)).message
    assert moving.sent(Migrate, moving.move(reason=MoveReason.DRAIN))
    moving.failed(TransferId("r.2.m2"))
    assert moving.sent(Migrate, moving.move(reason=MoveReason.OPERATOR))
    moving.failed(TransferId("r.2.m3"))
    moving.now_ms += 5_000
    assert moving.sent(Migrate, moving.move(reason=MoveReason.BALANCE))


UNFIT: list[tuple[str, Callable[[MoveRig], object], str]] = [
    ("d0", lambda rig: None, "it is there"),
    ("p0", lambda rig: None, "role is prefill"),
    ("d1", lambda rig: rig.feed(WorkerLost(worker_id=D2, incarnation=1, reason="killed")), "d1 is dead: killed"),
    ("d1", lambda rig: rig.feed(WorkerSuspected(worker_id=D2, incarnation=1, suspected=True)), "suspect"),
    ("d1", lambda rig: rig.feed(LinkLost(worker_id=D2, incarnation=1, reason="cut")), "suspect"),
    ("d1", lambda rig: rig.feed(WorkerDraining(worker_id=D2, incarnation=1)), "draining"),
]


@pytest.mark.parametrize(("to", "spoil", "says"), UNFIT)
def test_a_target_must_be_another_worker_that_is_well(
    rig: MoveRig, to: str, spoil: Callable[[MoveRig], object], says: str
) -> None:
    spoil(rig)
    error = rig.refusal(rig.move(to=WorkerId(to)))
    assert isinstance(error, MoveImpossible)
    assert says in error.message
    if to == "d1":
        assert isinstance(rig.refusal(rig.move(to=None)), MoveImpossible)
    assert rig.shown().state == "decoding"


def test_an_unknown_target_is_the_askers_mistake(rig: MoveRig) -> None:
    error = rig.refusal(rig.move(to=WorkerId("d9")))
    assert isinstance(error, InvalidRequest)
    assert "d9" in error.message


@pytest.mark.parametrize(
    "differs",
    [
        {"namespace": "other"},
        {"fingerprint": "other"},
        {"exact": False},
        {"dtype": "bfloat16"},
        {"block_size": 32},
        {"block_bytes": 7},
    ],
)
def test_workers_that_differ_do_not_exchange_requests(differs: dict[str, Any]) -> None:
    rig = MoveRig(**differs)
    error = rig.refusal(rig.move())
    ((name, there),) = differs.items()
    assert f"{name} is" in error.message
    assert f"{there!r} there" in error.message
    assert name in rig.refusal(rig.move(to=None)).message


@pytest.mark.parametrize("differs", [{"context_tokens": 160}, {"total_blocks": 10}])
def test_a_target_that_could_not_hold_it_to_its_end_is_refused(differs: dict[str, Any]) -> None:
    rig = MoveRig(**differs)
    says = "it may reach 440 tokens, that worker has context and memory for 160"
    assert says in rig.refusal(rig.move()).message


def test_a_target_without_room_is_refused_and_says_what_is_free() -> None:
    rig = MoveRig()
    counts = BlockCounts(total=100, free=3, cached=2, owned=95)
    rig.report(
        D2,
        load=WorkerLoad(running=9, waiting=0, blocks=counts, prefill_backlog_tokens=0, steps=1, last_step_ms=1.0),
    )
    assert "it needs 19 blocks there, 5 are free and not promised" in rig.refusal(rig.move()).message


def test_two_moves_do_not_fill_the_same_room(rig: MoveRig) -> None:
    """Neither by what is promised, nor by what the target reports while the blocks are on their way."""
    second = RequestId("b")
    rig.feed(WorkerSuspected(worker_id=D2, incarnation=1, suspected=True))
    rig.feed(Submitted(request=replace(request(max_tokens=400), request_id=second)))
    ((_, assign), _) = rig.sent(Assign)
    first = Token(request_id=second, epoch=assign.epoch, index=0, token_id=1, finish=None)
    ask = CommitAsk(
        request_id=second, transfer_id=assign.transfer_id, from_epoch=assign.epoch, next_index=1, tokens=(first,)
    )
    rig.report(D, commit_asks=(ask,))
    rig.feed(WorkerSuspected(worker_id=D2, incarnation=1, suspected=False))
    counts = BlockCounts(total=100, free=30, owned=70)
    load = WorkerLoad(running=9, waiting=0, blocks=counts, prefill_backlog_tokens=0, steps=1, last_step_ms=1.0)
    rig.report(D2, load=load)
    assert rig.sent(Migrate, rig.move())
    (refused,) = rig.move(request_id=second)
    assert isinstance(refused, MoveRefused)
    assert "11 are free and not promised" in refused.error.message
    granted = replace(counts, free=11, granted=19)  # the first one's blocks are in the report now, and count once
    rig.report(D2, load=replace(load, blocks=granted))
    (refused,) = rig.move(request_id=second)
    assert isinstance(refused, MoveRefused)
    assert "11 are free and not promised" in refused.error.message
    rig.failed()
    rig.report(D2, load=load)
    assert rig.sent(Migrate, rig.move(request_id=second))


# ---- the compare-and-swap ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"epoch": 1}, "from_epoch is 1"),
        ({"epoch": 3}, "from_epoch is 3"),
        ({"transfer_id": TransferId("r.2.m9")}, "transfer_id"),
        ({"transfer_id": TransferId("r.1")}, "transfer_id"),
        ({"worker": P}, "the target is d1"),
    ],
)
def test_another_commit_than_the_moves_own_is_refused_and_the_move_lives(
    moving: MoveRig, other: dict[str, Any], says: str
) -> None:
    ((_, answer),) = moving.sent(OwnerIs, moving.moved(**other))
    assert says in answer.refused
    assert (answer.worker_id, answer.epoch) == (D, 2)
    assert answer.over == (other.get("transfer_id") == "r.2.m9")  # the handoff's commit could still be doubled
    assert not moving.records()
    moving.moved()
    assert moving.shown().decode_worker == D2


@pytest.mark.parametrize(
    ("next_index", "tokens"),
    [(3, ()), (1, ()), (4, (token(2, 3),)), (2, (token(2, 1, None, 7),))],
)
def test_a_commit_whose_tokens_do_not_fit_ends_the_move_not_the_request(
    moving: MoveRig, next_index: int, tokens: tuple[Token, ...]
) -> None:
    actions = moving.moved(next_index=next_index, tokens=tokens)
    ((to, answer),) = moving.sent(OwnerIs, actions)
    assert (to, answer.worker_id, answer.epoch, answer.over) == (D2, D, 2, True)
    assert answer.refused
    assert [to for to, _ in moving.sent(CancelAssigned, actions)] == [D2]
    assert [to for to, _ in moving.sent(StopMove, actions)] == [D]
    moving.token(D, 2, 2)
    assert moving.delivered() == [2]
    assert moving.records()[0].outcome is MoveOutcome.FAILED


def test_a_doubled_commit_gets_the_same_answer(moving: MoveRig) -> None:
    moving.moved()
    moving.token(D2, 3, 2)
    ((to, answer),) = moving.sent(OwnerIs, moving.moved())
    assert (to, answer.worker_id, answer.epoch, answer.refused, answer.over) == (D2, D2, 3, "", False)
    assert len(moving.records()) == 1


def test_whether_a_transfer_is_over_is_told_truly() -> None:
    rig = MoveRig()
    handoff = TransferId("r.1")
    assert not rig.asked(handoff).over  # committed, and a doubled commit is accepted still
    assert rig.asked().over  # there is no such move
    rig.move()
    assert not rig.asked().over
    rig.failed()
    assert rig.asked().over
    rig.move()
    again = TransferId("r.2.m2")
    assert not rig.asked(again).over
    rig.moved(again)
    assert not rig.asked(again).over
    assert rig.asked(handoff).over  # what follows it has begun
    rig.feed(ClientGone(request_id=R, reason=""))
    assert (rig.asked(again).over, rig.asked(again).worker_id) == (True, None)


def test_a_handoff_is_over_when_its_attempt_is() -> None:
    rig = Rig()
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    rig.feed(Submitted(request=request()))

    def asked() -> OwnerIs:
        query = OwnerQuery(request_id=R, transfer_id=TransferId("r.1"), epoch=1)
        ((_, answer),) = rig.sent(OwnerIs, rig.report(D, owner_queries=(query,)))
        assert isinstance(answer, OwnerIs)
        return answer

    assert not asked().over
    rig.report(D, failed=(RequestFailed(request_id=R, epoch=1, code="x", message="", retryable=True),))
    assert asked().over


# ---- records -------------------------------------------------------------------------------------------------------


def test_the_records_of_moves_are_bounded_in_number_and_time() -> None:
    history = MoveHistory(keep_ms=100, num_max=2)
    record = MoveRecord(
        request_id=R,
        source=D,
        target=D2,
        reason=MoveReason.BALANCE,
        why="",
        outcome=MoveOutcome.MOVING,
    )
    for number in range(4):
        history.begin(TransferId(str(number)), record)
    for number in range(3):
        history.settle(TransferId(str(number)), MoveOutcome.MOVED, pause_ms=number)
        assert history.end(TransferId(str(number)), number).pause_ms == number
    assert [each.pause_ms for each in history.records()] == [1, 2, 0]
    assert not history.transferred(TransferStats(request_id=R, transfer_id=TransferId("0"), rounds=1))
    assert history.transferred(TransferStats(request_id=R, transfer_id=TransferId("2"), rounds=1))
    history.expire(102)
    assert [(each.rounds, each.outcome) for each in history.records()] == [(1, "moved"), (0, "moving")]
    history.expire(10_000)
    assert [each.outcome for each in history.records()] == [MoveOutcome.MOVING]
