"""Moves at the router: refusals, the one commit point, the failure edges of algorithms.md 14 (3), and their records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from router_rig import D2, PROMPT, D, P, R, Rig, request, token

from router.config import RouterConfig
from router.events import (
    Action,
    ClientGone,
    Fail,
    Finish,
    LinkLost,
    LinkUp,
    MoveEnded,
    MoveLost,
    MoveRefused,
    MoveRequested,
    StopRequested,
    Submitted,
    Tick,
    WorkerDraining,
    WorkerLost,
    WorkerSuspected,
)
from router.history import MoveHistory
from router.move import MOVES_MAX, MoveOutcome, MoveReason, MoveRecord
from router.request import RequestSnapshot, RequestState
from tandem.errors import DeadlinePassed, InvalidRequest, MoveImpossible, TandemError, UnknownRequest
from tandem.messages import (
    Assign,
    AssignMode,
    BlockCounts,
    CancelAssigned,
    CommitAsk,
    Migrate,
    MoveFailed,
    OwnerIs,
    OwnerQuery,
    RequestFailed,
    Role,
    StopMove,
    TransferStats,
    WorkerLoad,
)
from tandem.request import FinishReason, RequestId, Token, TransferId, WorkerId

D3 = WorkerId("d2")
MOVE = TransferId("r.2.m1")


class MoveRig(Rig):
    """A rig whose request decodes on d0 at epoch 2, with tokens 0 and 1 delivered; d1 could take it."""

    def __init__(self, config: RouterConfig | None = None, **d1: Any) -> None:
        super().__init__(config)
        self.up("p0", Role.PREFILL)
        self.up("d0", Role.DECODE)
        self.feed(Submitted(request=request(max_tokens=400)))
        self.commit(D, 1, 1, (token(1, 0),))
        self.token(D, 2, 1)
        self.up("d1", Role.DECODE, **d1)
        self.actions.clear()
        self.ticket = 0

    def move(
        self, to: WorkerId | None = D2, reason: MoveReason = MoveReason.OPERATOR, request_id: RequestId = R
    ) -> list[Action]:
        self.ticket += 1
        event = MoveRequested(request_id=request_id, to=to, reason=reason, why="because", ticket=self.ticket)
        return self.feed(event)

    def moved(self, transfer_id: TransferId = MOVE, next_index: int = 2, **other: Any) -> list[Action]:
        """The target asks for the commit."""
        worker, epoch, tokens = other.get("worker", D2), other.get("epoch", 2), other.get("tokens", ())
        ask = CommitAsk(request_id=R, transfer_id=transfer_id, from_epoch=epoch, next_index=next_index, tokens=tokens)
        return self.report(worker, commit_asks=(ask,))

    def asked(self, transfer_id: TransferId = MOVE, worker: WorkerId = D, revoke: bool = False) -> OwnerIs:
        query = OwnerQuery(request_id=R, transfer_id=transfer_id, epoch=2, revoke=revoke)
        ((to, answer),) = self.sent(OwnerIs, self.report(worker, owner_queries=(query,)))
        assert to == worker
        assert isinstance(answer, OwnerIs)
        return answer

    def failed(self, transfer_id: TransferId = MOVE) -> list[Action]:
        """The source gives the move up."""
        failed = MoveFailed(request_id=R, transfer_id=transfer_id, epoch=2, code="slow", message="does not converge")
        return self.report(D, moves_failed=(failed,))

    def records(self) -> list[MoveRecord]:
        """Of the moves that ended; each has ended once."""
        ended = [each for each in self.actions if isinstance(each, MoveEnded)]
        assert len({each.ticket for each in ended}) == len(ended)
        return [each.record for each in ended]

    def shown(self) -> RequestSnapshot:
        return self.core.status(self.now_ms).requests[-1]

    def refusal(self, actions: list[Action]) -> TandemError:
        (refused,) = actions
        assert isinstance(refused, MoveRefused)
        assert (refused.request_id, refused.ticket) == (R, self.ticket)
        return refused.error

    def at_rest(self) -> bool:
        """Whether no worker is charged with anything."""
        return all(
            not (each.reserved or each.arriving or each.dispatches or each.num_reserved_blocks)
            and each.num_arriving_blocks == 0
            for each in self.core.fleet
        )


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
    assert (record.rounds, record.precopy_ms) == (2, 33)
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


# ---- failure edges -------------------------------------------------------------------------------------------------

# What ends a move while its source runs on (edges 1, 7, 9, 11, and the deadline), and whether the source must be told.
DROPS: list[tuple[str, Callable[[MoveRig], object], bool, bool]] = [
    ("does not converge", lambda rig: rig.failed(), False, True),
    ("revoked", lambda rig: rig.asked(revoke=True), False, True),
    (
        "no_room",
        lambda rig: rig.report(
            D2, failed=(RequestFailed(request_id=R, epoch=2, code="no_room", message="full", retryable=True),)
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
        D2, failed=(RequestFailed(request_id=R, epoch=2, code="handoff_failed", message="", retryable=True),)
    ),
    lambda rig: rig.moved(next_index=9),
]


@pytest.mark.parametrize("lose", ORPHANS)
def test_an_orphan_whose_move_fails_too_is_placed_anew(moving: MoveRig, lose: Callable[[MoveRig], object]) -> None:
    """Edges 8 and 12: with what was delivered, and the target's copy as a prefix cache if it is there."""
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


def test_a_target_that_dies_right_after_the_commit_loses_the_request_to_a_new_place(moving: MoveRig) -> None:
    """Edge 17, without a grace: the source's blocks are prefix cache by then."""
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


def test_a_draining_source_goes_on_until_it_is_rid_of_the_request(rig: MoveRig) -> None:
    """Edge 19: without a target it stays; nobody drops it."""
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
