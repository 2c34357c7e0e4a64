"""The router's core: exactly one end, each token once and in order, and one commit point."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from router_rig import D2, PROMPT, D, P, R, Rig, request, token

from engine.prefix_cache import block_hashes
from router.config import RouterConfig
from router.core import TABLE
from router.events import (
    INTERNAL,
    AttemptLost,
    Cause,
    ClientGone,
    FenceRaised,
    Finish,
    LetGo,
    LinkLost,
    MoveLost,
    Refuse,
    RequestDue,
    StageDue,
    StopRequested,
    Submitted,
    Tick,
    WorkerDraining,
    WorkerGone,
    WorkerLost,
)
from router.request import RequestState
from tandem.errors import (
    Cancelled,
    DeadlinePassed,
    DuplicateRequest,
    InvalidRequest,
    NotFinite,
    Overloaded,
    RequestLost,
    Unavailable,
)
from tandem.messages import (
    Assign,
    AssignMode,
    BlockCounts,
    BlockEvents,
    CancelAssigned,
    CommitAsk,
    MoveFailed,
    OwnerIs,
    OwnerQuery,
    RequestFailed,
    Role,
    TransferStats,
    WorkerLoad,
)
from tandem.request import FinishReason, RequestId, Token, TransferId, WorkerId


@pytest.fixture
def rig() -> Rig:
    """A prefill and a decode worker, and one request placed on them at epoch 1."""
    rig = Rig()
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    rig.feed(Submitted(request=request()))
    return rig


def test_a_request_is_prefilled_handed_off_and_decoded(rig: Rig) -> None:
    (to_decode, decode), (to_prefill, prefill) = rig.sent(Assign)
    assert (to_decode, decode.mode, decode.peer.worker_id) == (D, AssignMode.DECODE, P)
    assert (to_prefill, prefill.mode, prefill.peer.worker_id) == (P, AssignMode.PREFILL, D)
    assert decode.transfer_id == prefill.transfer_id != ""
    assert prefill.tokens == PROMPT
    assert rig.state() is RequestState.PREFILLING
    rig.token(P, 1, 0)
    assert rig.state() is RequestState.HANDING_OFF
    answers = rig.sent(OwnerIs, rig.commit(D, 1, 1))
    assert [(to, owner.worker_id, owner.epoch, owner.refused) for to, owner in answers] == [
        (D, D, 2, ""),
        (P, D, 2, ""),
    ]
    assert rig.state() is RequestState.DECODING
    rig.token(D, 2, 1)
    rig.token(D, 2, 2, FinishReason.LENGTH)
    assert rig.delivered() == [0, 1, 2]
    (end,) = rig.ends()
    assert isinstance(end, Finish)
    assert (end.reason, end.usage.prompt_tokens, end.usage.completion_tokens) == (FinishReason.LENGTH, 40, 3)
    assert rig.core.num_requests == 0
    assert rig.state() is RequestState.FINISHED


def test_the_commit_delivers_the_first_token_when_it_comes_before_the_sources_report(rig: Rig) -> None:
    rig.commit(D, 1, 1, (token(1, 0),))
    assert rig.delivered() == [0]
    rig.token(P, 1, 0)  # late, of the epoch before
    rig.token(D, 2, 1)
    assert rig.delivered() == [0, 1]


def test_a_doubled_commit_is_answered_accepted_again(rig: Rig) -> None:
    rig.token(P, 1, 0)
    rig.commit(D, 1, 1)
    rig.token(D, 2, 1)
    ((to, answer),) = rig.sent(OwnerIs, rig.commit(D, 1, 1))
    assert (to, answer.worker_id, answer.epoch, answer.refused) == (D, D, 2, "")


@pytest.mark.parametrize(
    ("worker", "epoch", "next_index", "carried", "says"),
    [
        (D, 0, 1, (), "from_epoch is 0"),
        (D, 2, 1, (), "from_epoch is 2"),
        (P, 1, 1, (), "the target is d0"),
        (D, 1, 2, (), "next_index is 2"),
        (D, 1, 0, (), "next_index is 0"),
        (D, 1, 3, (token(1, 2),), "carries token 2 where 1 is due"),
        (D, 1, 1, (token(1, 0, None, 7),), "token 0 is 7 in the commit, 100 was delivered"),
        (D, 1, 3, (token(1, 1, FinishReason.STOP), token(1, 2)), "carries token 2 after token 1, which ends"),
    ],
)
def test_a_commit_that_does_not_fit_is_refused(
    rig: Rig, worker: WorkerId, epoch: int, next_index: int, carried: tuple[Token, ...], says: str
) -> None:
    rig.token(P, 1, 0)
    (_, answer), *_ = rig.sent(OwnerIs, rig.commit(worker, epoch, next_index, carried))
    assert says in answer.refused
    assert rig.state() is not RequestState.DECODING
    rig.token(D, 2, 1)  # it must not be believed
    assert rig.delivered() == [0]


def test_a_commit_of_another_transfer_or_an_unknown_request_is_refused(rig: Rig) -> None:
    ask = CommitAsk(request_id=R, transfer_id=TransferId("other"), from_epoch=1, next_index=0, tokens=())
    ((_, answer),) = rig.sent(OwnerIs, rig.report(D, commit_asks=(ask,)))
    assert "transfer_id" in answer.refused
    ask = CommitAsk(request_id=RequestId("x"), transfer_id=TransferId("x"), from_epoch=1, next_index=0, tokens=())
    ((_, answer),) = rig.sent(OwnerIs, rig.report(D, commit_asks=(ask,)))
    assert (answer.worker_id, answer.refused) == (None, "the request is over")


def test_the_owner_record_is_always_answered(rig: Rig) -> None:
    def asked(request_id: str) -> OwnerIs:
        query = OwnerQuery(request_id=RequestId(request_id), transfer_id=TransferId("t"), epoch=1)
        ((_, answer),) = rig.sent(OwnerIs, rig.report(P, owner_queries=(query,)))
        assert isinstance(answer, OwnerIs)
        return answer

    assert (asked("r").worker_id, asked("r").epoch) == (P, 1)
    rig.commit(D, 1, 1, (token(1, 0),))
    assert (asked("r").worker_id, asked("r").epoch) == (D, 2)
    rig.token(D, 2, 1, FinishReason.STOP)
    assert asked("r").worker_id is None
    assert asked("nobody").worker_id is None


def test_a_first_token_that_is_the_last_ends_the_request_and_frees_the_target(rig: Rig) -> None:
    actions = rig.token(P, 1, 0, FinishReason.STOP)
    assert [to for to, _ in rig.sent(CancelAssigned, actions)] == [D]
    assert isinstance(rig.ends()[0], Finish)


def test_tokens_doubled_stale_or_of_strangers_are_dropped(rig: Rig) -> None:
    rig.token(P, 1, 0)
    rig.token(P, 1, 0)
    rig.token(D, 1, 1)
    rig.token(P, 7, 1)
    rig.report(P, incarnation=9, tokens=(token(1, 1),))
    assert rig.delivered() == [0]
    rig.commit(D, 1, 1)
    rig.token(P, 1, 1)
    rig.token(D, 2, 1)
    assert rig.delivered() == [0, 1]


def test_a_hole_between_tokens_loses_the_attempt_not_the_request(rig: Rig) -> None:
    rig.commit(D, 1, 1, (token(1, 0),))
    actions = rig.token(D, 2, 2)
    assert [to for to, _ in rig.sent(CancelAssigned, actions)] == [D]
    again = rig.sent(Assign, actions)
    assert again
    assert all(each.tokens == (*PROMPT, 100) and each.num_prompt_tokens == 40 for _, each in again)
    assert rig.delivered() == [0]


LOSSES: list[Callable[[Rig], object]] = [
    lambda rig: rig.feed(WorkerLost(worker_id=D, incarnation=1, reason="killed")),
    lambda rig: rig.feed(LinkLost(worker_id=D, incarnation=1, reason="cut")),
    lambda rig: rig.report(D, failed=(RequestFailed(request_id=R, epoch=2, code="x", message="y", retryable=True),)),
    lambda rig: rig.feed(Tick(), after_ms=61_000),
]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_lost_owner_is_replaced_with_what_was_delivered(rig: Rig, lose: Callable[[Rig], object]) -> None:
    rig.up("d1", Role.DECODE)
    rig.commit(D, 1, 1, (token(1, 0),))
    rig.token(D, 2, 1)
    rig.actions.clear()
    lose(rig)
    (to, assign), _ = rig.sent(Assign)
    assert (to, assign.tokens, assign.epoch > 2) == (D2, (*PROMPT, 100, 101), True)
    rig.token(D, 2, 2)  # of the epoch that is over
    rig.token(P, assign.epoch, 2)
    rig.commit(D2, assign.epoch, 3)
    rig.token(D2, assign.epoch + 1, 3, FinishReason.LENGTH)
    assert rig.delivered() == [2, 3]
    assert len(rig.ends()) == 1


def test_a_commit_of_an_attempt_that_is_over_is_refused(rig: Rig) -> None:
    rig.token(P, 1, 0)
    transfer = rig.assigns()[-1].transfer_id
    rig.feed(LinkLost(worker_id=P, incarnation=1, reason="cut"))
    rig.feed(Tick(), after_ms=301)
    ask = CommitAsk(request_id=R, transfer_id=transfer, from_epoch=1, next_index=1, tokens=())
    (_, answer) = rig.sent(OwnerIs, rig.report(D, commit_asks=(ask,)))[0]
    assert answer.refused


# ---- recovery from KV that another worker still holds ----------------------------------------------------------------


def test_a_target_that_has_all_of_it_goes_on_though_the_source_of_its_handoff_died(rig: Rig) -> None:
    rig.token(P, 1, 0)
    rig.actions.clear()
    rig.feed(WorkerLost(worker_id=P, incarnation=1, reason="killed"))
    assert (rig.state(), rig.assigns()) == (RequestState.ORPHANED, [])
    rig.token(P, 1, 1)  # of a worker that is gone
    ask = CommitAsk(request_id=R, transfer_id=TransferId("r.1"), from_epoch=1, next_index=1, tokens=(token(1, 0),))
    ((_, answer),) = rig.sent(OwnerIs, rig.report(D, commit_asks=(ask,)))
    assert (answer.refused, answer.worker_id, answer.epoch) == ("", D, 2)
    rig.token(D, 2, 1, FinishReason.LENGTH)
    assert rig.delivered() == [1]
    (request,) = rig.core.status(rig.now_ms).requests
    assert (request.num_replacements, request.state) == (0, RequestState.FINISHED)


GIVES_UP = RequestFailed(
    request_id=R,
    epoch=1,
    transfer_id=TransferId("r.1"),
    code="handoff_failed",
    message="it is gone",
    retryable=True,
)
NO_COMMIT: list[Callable[[Rig], object]] = [
    lambda rig: rig.feed(WorkerLost(worker_id=D, incarnation=1, reason="killed too")),
    lambda rig: rig.feed(Tick(), after_ms=301),
    lambda rig: rig.report(D, failed=(GIVES_UP,)),
]


@pytest.mark.parametrize("lose", NO_COMMIT)
def test_an_orphaned_handoff_that_is_not_committed_is_placed_anew_and_its_target_is_not_to_blame(
    rig: Rig, lose: Callable[[Rig], object]
) -> None:
    rig.token(P, 1, 0)
    rig.feed(WorkerLost(worker_id=P, incarnation=1, reason="killed"))
    rig.up("d1", Role.DECODE)
    rig.up("p1", Role.PREFILL)
    rig.actions.clear()
    lose(rig)
    rig.feed(Tick(), after_ms=200)
    assert rig.state() is RequestState.PREFILLING
    assert rig.assigns()[-1].tokens == (*PROMPT, 100)
    (request,) = rig.core._requests.values()
    assert request.avoid == set()


def test_what_landed_of_a_lost_attempt_is_not_computed_again(rig: Rig) -> None:
    """The source dies in mid-prefill; two of three blocks have come, and the target says so once they are its own."""
    rig.up("p1", Role.PREFILL)
    hashes = block_hashes(b"n", PROMPT, 16)
    rig.report(D, blocks=BlockEvents(sequence=1, cleared=True))
    rig.actions.clear()
    rig.feed(WorkerLost(worker_id=P, incarnation=1, reason="killed"))
    assert rig.assigns() == [], "it waits for what may be saved"
    assert [worker for worker, _ in rig.sent(CancelAssigned)] == [D]
    rig.report(D, blocks=BlockEvents(sequence=2, stored=tuple(hashes)))
    rig.feed(Tick(), after_ms=100)
    (assign,) = rig.assigns()
    assert assign.mode is AssignMode.LOCAL
    (request,) = rig.core.status(rig.now_ms).requests
    assert request.decode_worker == D
    assert "holds 32 tokens" in request.reason


def test_a_longer_rest_goes_to_who_holds_most_of_it_only_when_it_was_lost() -> None:
    rig = Rig(RouterConfig(local_prefill_tokens=16))
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    prompt = tuple(range(200))
    rig.report(D, blocks=BlockEvents(sequence=1, stored=tuple(block_hashes(b"n", prompt, 16)[:8]), cleared=True))
    rig.feed(Submitted(request=request("r", prompt)))
    assert {each.mode for each in rig.assigns()} == {AssignMode.DECODE, AssignMode.PREFILL}
    rig.actions.clear()
    rig.report(P, failed=(RequestFailed(request_id=R, epoch=1, code="boom", message="", retryable=True),))
    rig.feed(Tick(), after_ms=1_000)
    assert [each.mode for each in rig.assigns()] == [AssignMode.LOCAL], "72 tokens here, 200 there"


def test_only_attempts_that_brought_nothing_are_in_vain(rig: Rig) -> None:
    for number in range(8):
        epoch, worker = rig.assigns()[-1].epoch, rig.sent(Assign)[-1][0]
        rig.token(worker, epoch, number)
        rig.report(worker, failed=(RequestFailed(request_id=R, epoch=epoch, code="x", message="", retryable=True),))
        rig.feed(Tick(), after_ms=2_000)
    assert rig.ends() == []
    assert rig.core.status(rig.now_ms).requests[-1].num_replacements == 8


def test_a_request_that_gets_on_and_kills_each_time_is_given_up_at_last() -> None:
    rig = Rig(RouterConfig(replacements_all_max=5))
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    rig.feed(Submitted(request=request(max_tokens=100)))
    for number in range(6):
        epoch, worker = rig.assigns()[-1].epoch, rig.sent(Assign)[-1][0]
        rig.token(worker, epoch, number)
        rig.report(worker, failed=(RequestFailed(request_id=R, epoch=epoch, code="x", message="", retryable=True),))
        rig.feed(Tick(), after_ms=2_000)
    assert "placed 6 times" in str(rig.error())


def test_a_worker_that_comes_back_is_not_avoided_for_what_its_last_life_did(rig: Rig) -> None:
    rig.report(D, failed=(RequestFailed(request_id=R, epoch=1, code="x", message="", retryable=True),))
    (lost,) = rig.core._requests.values()
    assert lost.avoid == {(D, 1)}
    rig.feed(WorkerLost(worker_id=D, incarnation=1, reason="restarted"))
    rig.up("d0", Role.DECODE, incarnation=2)
    rig.feed(Tick(), after_ms=2_000)
    assert rig.assigns()[-2].mode is AssignMode.DECODE
    assert rig.sent(Assign)[-2][0] == D


def test_failures_are_bounded_and_the_last_one_is_named(rig: Rig) -> None:
    for attempt in range(4):
        assert not rig.ends()
        epoch = rig.assigns()[-1].epoch
        failed = RequestFailed(request_id=R, epoch=epoch, code="boom", message=f"number {attempt}", retryable=True)
        rig.report(rig.sent(Assign)[-1][0], failed=(failed,))
        rig.feed(Tick(), after_ms=5_000)
    error = rig.error()
    assert isinstance(error, RequestLost)
    assert "number 3" in error.message
    assert len({each.epoch for each in rig.assigns()}) == 4


def test_a_pair_that_failed_rests_and_others_serve_meanwhile(rig: Rig) -> None:
    """Other requests need not find out that two workers do not get through to each other; they try it later."""
    rig.up("d1", Role.DECODE)

    def targets() -> list[WorkerId]:
        return [worker for worker, assign in rig.sent(Assign) if assign.mode is AssignMode.DECODE]

    def ask(number: int) -> WorkerId:
        rig.feed(Submitted(request=request(f"other-{number}", tokens=(number,) * 40)))
        return targets()[-1]

    assert targets() == [D]
    failed = RequestFailed(
        request_id=R, epoch=1, code="handoff_failed", message="no frame gets through", retryable=True
    )
    rig.report(P, failed=(failed,))
    rig.feed(Tick(), after_ms=RouterConfig().salvage_ms)
    assert targets() == [D, D2]
    assert {ask(number) for number in range(4)} == {D2}
    rig.feed(Tick(), after_ms=RouterConfig().pair_rest_ms + 1)
    assert D in {ask(number) for number in range(4, 8)}, "no list of what failed outlives its time"


def test_a_failure_that_no_other_place_mends_ends_the_request(rig: Rig) -> None:
    rig.report(
        P, failed=(RequestFailed(request_id=R, epoch=1, code="invalid_request", message="bad", retryable=False),)
    )
    assert isinstance(rig.error(), InvalidRequest)


def test_what_the_model_cannot_say_is_not_tried_elsewhere(rig: Rig) -> None:
    rig.report(P, failed=(RequestFailed(request_id=R, epoch=1, code="not_finite", message="nan", retryable=False),))
    error = rig.error()
    assert isinstance(error, NotFinite)
    assert "nan" in error.message
    assert len({each.epoch for each in rig.assigns()}) == 1


def test_both_ends_of_an_attempt_may_fail_and_it_counts_once(rig: Rig) -> None:
    failed = RequestFailed(request_id=R, epoch=1, code="x", message="", retryable=True)
    rig.report(P, failed=(failed,))
    rig.report(D, failed=(failed,))
    assert rig.core.status(rig.now_ms).requests[-1].num_replacements == 1


def test_without_workers_a_request_waits_a_bounded_time() -> None:
    rig = Rig(RouterConfig(workers_wait_ms=1_000))
    rig.feed(Submitted(request=request()))
    assert rig.core.status(rig.now_ms).requests[0].reason == "no worker is ready"
    rig.feed(Tick(), after_ms=999)
    assert not rig.ends()
    rig.feed(Tick(), after_ms=1)
    assert isinstance(rig.error(), Unavailable)


def test_a_request_that_waited_is_placed_when_a_worker_comes() -> None:
    rig = Rig()
    rig.feed(Submitted(request=request()))
    rig.up("m0", Role.MIXED)
    assert [(to, each.mode) for to, each in rig.sent(Assign)] == [(WorkerId("m0"), AssignMode.LOCAL)]


def test_memory_is_waited_for_in_order() -> None:
    rig = Rig()
    rig.up("m0", Role.MIXED, total_blocks=10)
    for name in ("r", "a", "b"):
        rig.feed(Submitted(request=request(name, tuple(range(100)))))
    assert [each.request_id for each in rig.assigns()] == ["r"]
    rig.token(WorkerId("m0"), 1, 0, FinishReason.STOP)
    assert [each.request_id for each in rig.assigns()] == ["r", "a"]


def test_higher_priorities_are_placed_first_and_each_in_its_order() -> None:
    rig = Rig()
    rig.up("m0", Role.MIXED, total_blocks=10)
    for name, priority in (("r", 0), ("a", 0), ("b", 1), ("c", 3), ("d", 1), ("e", 0)):
        rig.feed(Submitted(request=request(name, tuple(range(100)), priority=priority)))
    for _ in range(5):
        last = rig.assigns()[-1]
        end = Token(request_id=last.request_id, epoch=last.epoch, index=0, token_id=1, finish=FinishReason.STOP)
        rig.report(WorkerId("m0"), tokens=(end,))
    assert [each.request_id for each in rig.assigns()] == ["r", "c", "b", "d", "a", "e"]
    assert {each.request_id: each.priority for each in rig.core.status(rig.now_ms).requests}[RequestId("c")] == 3


def test_who_is_placed_again_comes_before_those_of_its_priority_alone() -> None:
    rig = Rig()
    rig.up("m0", Role.MIXED, total_blocks=10)
    for name, priority in (("r", 1), ("a", 1), ("b", 2)):
        rig.feed(Submitted(request=request(name, tuple(range(100)), priority=priority)))
    rig.feed(WorkerLost(worker_id=WorkerId("m0"), incarnation=1, reason="killed"))
    rig.up("m0", Role.MIXED, incarnation=2, total_blocks=10)
    for _ in range(2):
        last = rig.assigns()[-1]
        end = Token(request_id=last.request_id, epoch=last.epoch, index=0, token_id=1, finish=FinishReason.STOP)
        rig.report(WorkerId("m0"), incarnation=2, tokens=(end,))
    assert [each.request_id for each in rig.assigns()] == ["r", "b", "r", "a"]


def test_a_prompt_larger_than_any_memory_is_invalid() -> None:
    rig = Rig()
    rig.up("m0", Role.MIXED, total_blocks=2)
    rig.feed(Submitted(request=request()))
    assert isinstance(rig.error(), InvalidRequest)
    assert "40 tokens" in str(rig.error())


def test_the_client_may_go_in_any_state(rig: Rig) -> None:
    actions = rig.feed(ClientGone(request_id=R, reason="hung up"))
    assert sorted(to for to, _ in rig.sent(CancelAssigned, actions)) == [D, P]
    assert isinstance(rig.error(), Cancelled)
    rig.feed(ClientGone(request_id=R, reason="again"))
    assert len(rig.ends()) == 1


def test_a_stop_string_ends_the_request_where_it_says(rig: Rig) -> None:
    rig.commit(D, 1, 1, (token(1, 0),))
    rig.token(D, 2, 1)
    rig.feed(StopRequested(request_id=R, index=5))  # not delivered: no effect
    assert not rig.ends()
    actions = rig.feed(StopRequested(request_id=R, index=0))
    assert [to for to, _ in rig.sent(CancelAssigned, actions)] == [D]
    (end,) = rig.ends()
    assert isinstance(end, Finish)
    assert (end.reason, end.usage.completion_tokens) == (FinishReason.STOP, 1)


def test_deadlines_end_requests() -> None:
    rig = Rig()
    rig.up("m0", Role.MIXED)
    rig.feed(Submitted(request=request(deadline_ms=500)))
    rig.feed(Tick(), after_ms=500)
    assert isinstance(rig.error(), DeadlinePassed)
    assert rig.sent(CancelAssigned)


def test_refusals_touch_nothing_that_runs(rig: Rig) -> None:
    (refused,) = rig.feed(Submitted(request=request()))
    assert isinstance(refused, Refuse)
    assert isinstance(refused.error, DuplicateRequest)
    (refused,) = rig.feed(Submitted(request=request("empty", ())))
    assert isinstance(refused, Refuse)
    assert isinstance(refused.error, InvalidRequest)
    assert not rig.ends()


def test_capacity_is_bounded() -> None:
    rig = Rig(RouterConfig(requests_max=2, queued_tokens_max=100))
    rig.feed(Submitted(request=request("a")))
    (refused,) = rig.feed(Submitted(request=request("b", tuple(range(80)))))
    assert isinstance(refused, Refuse)
    assert isinstance(refused.error, Overloaded)
    assert "queued" in refused.error.message
    rig.feed(Submitted(request=request("c")))
    (refused,) = rig.feed(Submitted(request=request("d", (1,))))
    assert isinstance(refused, Refuse)
    assert isinstance(refused.error, Overloaded)
    assert refused.error.retry_after_ms > 0
    assert "limit is 2" in refused.error.message


def test_a_superseded_incarnation_loses_its_requests_and_is_not_heard(rig: Rig) -> None:
    rig.commit(D, 1, 1, (token(1, 0),))
    rig.up("d0", Role.DECODE, incarnation=2)
    rig.token(D, 2, 1)
    assert rig.delivered() == [0]
    assert rig.sent(Assign)[-1][1].epoch > 2


def test_a_draining_worker_keeps_its_requests_and_gets_none(rig: Rig) -> None:
    rig.up("d1", Role.DECODE)
    rig.feed(WorkerDraining(worker_id=D, incarnation=1))
    rig.commit(D, 1, 1, (token(1, 0),))
    rig.token(D, 2, 1)
    assert rig.delivered() == [0, 1]
    rig.actions.clear()
    rig.feed(Submitted(request=request("b")))
    assert {to for to, _ in rig.sent(Assign)} == {P, D2}


def test_status_tells_transfers_also_after_the_end(rig: Rig) -> None:
    stats = TransferStats(request_id=R, transfer_id=TransferId("t"), blocks_granted=2, blocks_moved=2, blocks_reused=1)
    rig.report(D, transfers=(stats,))
    rig.token(P, 1, 0, FinishReason.STOP)
    rig.report(P, transfers=(TransferStats(request_id=R, transfer_id=TransferId("t"), tokens_cached=16),))
    (shown,) = rig.core.status(rig.now_ms).requests
    done = shown.transferred
    assert (done.blocks_granted, done.blocks_moved, done.blocks_reused, done.tokens_cached) == (2, 2, 1, 16)
    assert (shown.prefill_worker, shown.decode_worker, shown.tokens, shown.state) == ("p0", "d0", 1, "finished")
    rig.feed(Tick(), after_ms=300_001)
    assert not rig.core.status(rig.now_ms).requests


def test_accounts_are_empty_when_all_is_over(rig: Rig) -> None:
    load = WorkerLoad(
        running=1,
        waiting=0,
        blocks=BlockCounts(total=100, free=100),
        prefill_backlog_tokens=0,
        steps=1,
        last_step_ms=5.0,
    )
    rig.report(P, load=load, blocks=BlockEvents(sequence=1, stored=(b"a" * 16,)))
    rig.feed(Submitted(request=request("b")))
    rig.feed(ClientGone(request_id=RequestId("b"), reason=""))
    rig.commit(D, 1, 1, (token(1, 0),))
    rig.feed(WorkerLost(worker_id=D, incarnation=1, reason="killed"))
    rig.feed(ClientGone(request_id=R, reason=""))
    status = rig.core.status(rig.now_ms)
    assert status.queued_tokens == 0
    assert all(not worker.reserved and not worker.dispatches for worker in rig.core.fleet)
    assert all(worker.num_reserved_blocks == 0 for worker in rig.core.fleet)
    assert {each.worker_id: each.state for each in status.workers} == {P: "ready", D: "dead"}


def test_the_whole_square() -> None:
    """Every pair of state and event is in the table, or has no effect when from outside and is a bug from inside."""
    outside = (Token, CommitAsk, RequestFailed, ClientGone, LetGo, FenceRaised, StopRequested)
    assigned = {RequestState.PREFILLING, RequestState.HANDING_OFF, RequestState.DECODING}
    for state in RequestState:
        rows = {event for (of, event) in TABLE if of is state}
        if state in assigned:
            moves = {MoveLost, MoveFailed, OwnerQuery} if state is RequestState.DECODING else set()
            assert rows == {*outside, AttemptLost, WorkerGone, StageDue, RequestDue} | moves
        elif state is RequestState.ORPHANED:
            assert rows == {*outside, *INTERNAL} - {Token}
        elif state is RequestState.ADMITTED:
            assert rows == {CommitAsk, ClientGone, LetGo, FenceRaised, StopRequested, StageDue, RequestDue}
        else:
            assert rows == set()


def test_a_missing_row_is_silent_from_outside_and_loud_from_inside() -> None:
    rig = Rig()
    rig.feed(Submitted(request=request()))
    waiting = rig.core._requests[R]
    failed = RequestFailed(request_id=R, epoch=1, code="x", message="", retryable=True)
    rig.core._step(waiting, None, failed)
    assert not rig.ends()
    with pytest.raises(AssertionError):
        rig.core._step(waiting, None, AttemptLost("from nowhere", Cause.OVERDUE))
