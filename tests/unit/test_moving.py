"""A running request that moves between two workers: the way without faults, refusals, memory, other work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from move_bench import (
    HANDOFF,
    PROMPT,
    Bench,
    R,
    cancel,
    crowd,
    failures,
    queries,
    rest,
    stop_move,
    to_fencing,
    to_granted,
    to_offered,
    to_precopy,
    to_sealed,
    waits,
)
from role_cores import BLOCK, LAYOUT, VOCAB, address
from role_cores import assign as assigned

from decode_worker.config import AdmissionConfig
from decode_worker.request import TOKENS_KEPT
from engine.events import Tick
from engine.fake_runner import expected_tokens
from kv_transfer.messages import (
    Cancel,
    FrameAcked,
    Offer,
    Refuse,
    SendFrame,
    TransferMessage,
    Wait,
)
from tandem.messages import (
    AssignMode,
    CommitAsk,
    TransferStats,
    WorkerLoad,
)
from tandem.request import RequestId, Sampling, TransferId

# ---- the way without faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_between", [0, 1])
@pytest.mark.parametrize("behind", [0, 1, 2])
@pytest.mark.parametrize("num_tokens", range(2, 39))
def test_move_at_every_token(num_tokens: int, behind: int, steps_between: int) -> None:
    bench = Bench()
    bench.start(num_tokens=num_tokens)
    bench.move(behind=min(behind, num_tokens - 1))
    while bench.line and len(bench.tokens()) < 39:
        bench.let()
        if not bench["a"].held():
            bench.step("a", steps_between)
    rest(bench)
    if bench.asks("b"):
        before = len(bench.tokens())
        bench.commit()
        bench.settle()
        bench.begin("b")
        plan = bench["b"].plan
        assert plan is not None, "it is in the very next step"
        assert [row.request_id for row in plan.rows] == [R]
        bench.end("b")
        assert (len(bench.tokens()), bench.tokens()[-1].epoch) == (before + 1, 2)
        bench.finish("b")
    else:
        bench.finish("a")


@pytest.mark.parametrize("sampling", [
    Sampling(max_tokens=40, temperature=0.7, seed=3, logprobs=2),
    Sampling(max_tokens=40, presence_penalty=0.5, repetition_penalty=1.1, logprobs=0),
])  # fmt: skip
def test_five_moves_forth_and_back(sampling: Sampling) -> None:
    bench = Bench()
    bench.start(sampling=sampling)
    where = "a"
    for _ in range(5):
        bench.move(where, behind=1)
        bench.settle()
        where = "b" if where == "a" else "a"
        bench.commit(where)
        bench.settle()
        for _ in range(5):
            bench.begin(where)
            plan = bench[where].plan
            assert plan is not None
            (row,) = plan.rows
            known = [*PROMPT, *(token.token_id for token in bench.tokens())]
            assert list(row.context) == (known if sampling.repetition_penalty != 1 else [])
            assert row.sampling == sampling
            bench.end(where)
    bench.finish(where)
    assert all((token.logprob is not None, len(token.top)) == (True, sampling.logprobs) for token in bench.tokens())


def test_commit_carries_the_tokens_that_the_router_had_not_seen() -> None:
    bench = Bench()
    bench.start(num_tokens=9, sampling=Sampling(max_tokens=40, logprobs=2))
    bench.move(behind=4)
    bench.settle()
    (ask,) = bench.asks("b")
    assert ask.tokens == tuple(bench.tokens()[5:9])
    assert ask.next_index == 9
    assert all(len(token.top) == 2 for token in ask.tokens)


def test_request_decodes_while_its_blocks_are_copied_and_what_fills_meanwhile_goes_in_the_next_round() -> None:
    bench = Bench(handoff=replace(HANDOFF, credits=1))
    bench.start(num_tokens=30)
    bench.move()
    while bench.line:
        if waits(bench, FrameAcked) and len(bench.tokens()) < 38:
            bench.step("a")
        bench.let()
    assert len(bench.tokens()) > 30
    bench.commit()
    stats = [each for each in bench["a"].told if isinstance(each, TransferStats) and each.rounds]
    assert [each.rounds for each in stats] == [2]
    bench.finish("b")


def test_precopy_frames_give_way_and_the_tail_does_not() -> None:
    bench = Bench()
    bench.start()
    to_precopy(bench)
    assert {each.priority for _, each in bench.line if isinstance(each, SendFrame)} == {1}
    bench.settle(bench["a"].held)
    assert {each.priority for _, each in bench.line if isinstance(each, SendFrame)} == {0}


def test_fence_waits_for_the_step_under_way_and_counts_its_token() -> None:
    bench = Bench()
    bench.start(num_tokens=6)
    to_fencing(bench)
    bench.settle()
    assert not bench.asks("b"), "the step still writes"
    bench.end("a")
    bench.settle()
    (ask,) = bench.asks("b")
    assert ask.next_index == len(bench.tokens()) == 7
    bench.commit()
    bench.finish("b")


def test_figures_are_told_by_both_ends() -> None:
    bench = Bench()
    bench.start(num_tokens=8)
    to_sealed(bench)
    bench.now_ms += 30
    bench.commit()
    bench.settle()
    bench.step("b")
    (source,) = (each for each in bench["a"].told if isinstance(each, TransferStats) and each.transfer_id)
    assert (source.rounds, source.fence_ms) == (1, 30)
    target, first = (each for each in bench["b"].told if isinstance(each, TransferStats))
    assert (target.blocks_moved, target.frames, target.blocks_reused) == (5, 5, 0)
    assert target.blocks_granted > target.blocks_moved, "room to grow was granted"
    assert first.first_step_ms == 10
    bench.finish("b")


def test_tail_by_token_ids_is_computed_in_the_first_step_there() -> None:
    bench = Bench()
    bench.start(num_tokens=6)
    bench.move()
    while bench.line:
        if waits(bench, FrameAcked):
            bench.now_ms += 400  # a frame takes much longer than the two tokens of the partial block
        bench.let()
    assert bench["b"].core.decode.num_attempts
    (ask,) = bench.asks("b")
    bench.commit()
    bench.settle()
    long = assigned("long", mode=AssignMode.LOCAL, tokens=tuple(range(40)))
    bench.handle("b", long)
    bench.begin("b")
    plan = bench["b"].plan
    assert plan is not None
    row = next(each for each in plan.rows if each.request_id == R)
    assert (row.start, len(row.tokens)) == (16, 1) or len(row.tokens) <= BLOCK
    assert row.sample, "the next token is drawn in that very step"
    bench.end("b")
    assert len(bench.tokens()) == ask.next_index + 1


def test_blocks_that_the_target_holds_are_shared_and_the_rest_is_sent() -> None:
    bench = Bench()
    bench.handle("b", assigned("same", mode=AssignMode.LOCAL, tokens=PROMPT, max_tokens=1))
    bench.step("b", 2)
    bench.start(num_tokens=3)
    bench.move()
    bench.settle()
    bench.commit()
    (stats,) = (each for each in bench["b"].told if isinstance(each, TransferStats) and each.blocks_granted)
    assert stats.blocks_reused == len(PROMPT) // BLOCK
    bench.finish("b")


def test_twins_with_a_shared_prefix_move_apart() -> None:
    bench = Bench()
    bench.handle("a", assigned("twin", mode=AssignMode.LOCAL, tokens=PROMPT, max_tokens=30))
    bench.start(num_tokens=4)
    bench.move()
    bench.settle()
    bench.commit()
    bench.settle()
    while bench["a"].batch.get(RequestId("twin")) is not None:
        bench.step("a")
    bench.finish("b")


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(bench: Bench) -> tuple[str, str]:
    (failed,) = failures(bench)
    return failed.code, failed.message


def test_request_that_is_not_here_is_not_moved() -> None:
    bench = Bench()
    bench.transfer = TransferId("x")
    bench.say("a", bench.migrate("a"))
    assert refused(bench) == ("not_here", "r is not here under epoch 1")
    bench.start()
    bench.say("a", bench.migrate("a", epoch=2))
    assert [each.code for each in failures(bench)] == ["not_here", "not_here"]
    bench.finish("a")


def test_request_that_is_prefilled_is_not_moved() -> None:
    bench = Bench()
    bench.prompt = tuple(range(30))
    bench.transfer = TransferId("x")
    bench.handle("a", assigned("r", mode=AssignMode.LOCAL, tokens=bench.prompt))
    bench.step("a")
    bench.say("a", bench.migrate("a"))
    assert refused(bench) == ("prefilling", "r has 22 tokens to compute before it decodes")


def test_request_that_is_itself_on_its_way_is_not_moved() -> None:
    bench = Bench()
    bench.start()
    to_sealed(bench)
    bench.say("b", bench.migrate("b", transfer_id=TransferId("on"), peer=address("c")))
    (failed,) = failures(bench, "b")
    assert failed.code == "not_active"
    bench.commit()
    bench.finish("b")


def test_request_is_moved_once_at_a_time() -> None:
    bench = Bench()
    bench.start()
    to_precopy(bench)
    bench.say("a", bench.migrate("a"))
    assert not failures(bench), "the same word twice is no news"
    bench.say("a", bench.migrate("a", transfer_id=TransferId("other")))
    assert refused(bench)[0] == "moving"
    bench.settle()
    bench.commit()
    bench.finish("b")


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"num_tokens": 3}, "mismatch"),
        ({"num_tokens": 99}, "mismatch"),
        ({"peer": address("a")}, "bad_move"),
        ({"transfer_id": TransferId("")}, "bad_move"),
    ],
)
def test_move_that_makes_no_sense_is_refused(changed: dict[str, object], code: str) -> None:
    bench = Bench()
    bench.start()
    bench.transfer = TransferId("x")
    bench.say("a", bench.migrate("a", **changed))  # type: ignore[arg-type]
    assert refused(bench)[0] == code
    bench.finish("a")


def test_router_that_is_too_far_behind_cannot_move_it() -> None:
    bench = Bench(num_blocks=128)
    bench.prompt = (1, 2)
    bench.start(num_tokens=TOKENS_KEPT - 10, sampling=Sampling(max_tokens=TOKENS_KEPT - 3))
    bench["a"].core.decode._requests[R].newest.popleft()
    bench.transfer = TransferId("x")
    bench.say("a", bench.migrate("a", num_tokens=2))
    assert refused(bench)[0] == "too_far_behind"
    bench.say("a", bench.migrate("a", num_tokens=3))
    assert len(failures(bench)) == 1
    bench.settle()


def test_edge_1_target_without_room_says_wait_and_then_no() -> None:
    bench = Bench(admission=AdmissionConfig(max_requests=1, wait_limit_ms=300, retry_after_ms=50))
    bench.handle("b", assigned("other", mode=AssignMode.LOCAL, max_tokens=200))
    bench.step("b", 2)
    bench.start()
    bench.move()
    bench.let()
    assert waits(bench, Wait)
    for _ in range(10):
        bench.settle()
        bench.now_ms += 60
        bench.step("a")
        bench.handle("a", Tick())
    bench.settle()
    assert refused(bench)[0] == "no_room"
    assert not bench["a"].held()
    assert len(bench.tokens()) > 10, "it ran on all the while"


def test_edge_1_pool_that_can_never_hold_it_refuses_at_once() -> None:
    bench = Bench(num_blocks=16)
    bench.start(num_tokens=10, sampling=Sampling(max_tokens=60))
    bench.move()
    bench.settle()
    assert refused(bench) == ("too_large", "needs 19 blocks, the pool has 16")


def test_edge_1_different_layout_is_refused_with_a_sentence() -> None:
    bench = Bench(target_layout=replace(LAYOUT, fingerprint="other"))
    bench.start()
    bench.move()
    bench.settle()
    assert refused(bench) == ("layout", "fingerprint is 'fake' at the source and 'other' at the target")
    bench.finish("a")


@pytest.mark.parametrize(
    "changed", [{"move": False}, {"hashes": (b"x" * 16,)}, {"num_tokens": 3}], ids=["handoff", "hashes", "tokens"]
)
def test_offer_that_is_not_the_one_that_was_announced_is_refused(changed: dict[str, object]) -> None:
    bench = Bench()
    bench.start(num_tokens=4)
    to_offered(bench)
    _, message = bench.line.popleft()
    assert isinstance(message, TransferMessage)
    assert isinstance(message.body, Offer)
    bench.handle("b", replace(message, body=replace(message.body, **changed)))  # type: ignore[arg-type]
    assert waits(bench, Refuse)
    bench.settle()
    assert refused(bench)[0] == "mismatch"
    bench.finish("a")


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_edge_4_starved_request_leaves_at_once_when_most_of_it_is_there() -> None:
    bench = Bench()
    bench.start(num_tokens=9)  # 19 tokens are computed, the twentieth begins no block
    bench.step("a")
    crowd(bench, bench["a"].ledger.num_available)
    to_precopy(bench)
    for _ in range(3):
        bench.settle(lambda: waits(bench, FrameAcked))
        bench.let()
        bench.settle(lambda: waits(bench, SendFrame) or waits(bench, FrameAcked))
    while not bench["a"].held():
        bench.begin("a")
        if bench["a"].plan is None:
            assert bench["a"].core.next_deadline_ms() == bench.now_ms, "somebody has to look at once"
            bench.handle("a", Tick())
            break
        bench.end("a")
    assert bench["a"].held()
    bench.settle()
    bench.commit()
    bench["a"].ledger.release("crowd")
    bench.finish("b")


def test_edge_4_starved_request_loses_its_blocks_when_most_of_it_is_here() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    crowd(bench, bench["a"].ledger.num_available)
    to_precopy(bench)
    while (sequence := bench["a"].batch.get(R)) is not None and sequence.started:
        bench.step("a")
        bench.handle("a", Tick())
    assert len(failures(bench)) == 1
    assert "found no block" in failures(bench)[0].message
    bench.say("b", cancel(1))
    bench["a"].ledger.release("crowd")
    bench.settle()
    bench.finish("a")


def test_edge_4_older_request_that_starves_gets_the_blocks_of_the_one_that_moves() -> None:
    bench = Bench()
    bench.handle("a", assigned("old", mode=AssignMode.LOCAL, tokens=PROMPT, max_tokens=60))
    bench.step("a", 2)
    bench.prompt = tuple(range(40, 60))
    bench.start(num_tokens=3)
    crowd(bench, bench["a"].ledger.num_available)
    to_precopy(bench)
    bench.step("a", 8)
    bench.handle("a", Tick())
    assert failures(bench)
    bench.step("a", 2)
    sequence = bench["a"].batch.get(R)
    assert sequence is not None
    assert not sequence.started, "it gave way, as it had to before it was moved"
    bench["a"].ledger.release("crowd")
    bench.say("b", cancel(1))
    bench.settle()
    while bench["a"].batch.get(RequestId("old")) is not None:
        bench.step("a")
    bench.finish("a")


def test_edge_4_request_that_loses_its_blocks_while_it_is_offered_is_not_moved() -> None:
    bench = Bench()
    bench.handle("a", assigned("old", mode=AssignMode.LOCAL, tokens=PROMPT, max_tokens=60))
    bench.step("a", 2)
    bench.prompt = tuple(range(40, 60))
    bench.start(num_tokens=3)
    crowd(bench, bench["a"].ledger.num_available)
    to_granted(bench)
    while (sequence := bench["a"].batch.get(R)) is not None and sequence.started:
        bench.end("a")
        bench.begin("a")  # takes the blocks; the grant arrives while that step runs
    bench.let()
    assert "lost its blocks" in failures(bench)[0].message
    bench.end("a")
    bench["a"].ledger.release("crowd")
    bench.say("b", cancel(1))
    bench.settle()
    while bench["a"].batch.get(RequestId("old")) is not None:
        bench.step("a")
    bench.finish("a")


def test_granted_room_does_not_count_as_room_for_others() -> None:
    """Blocks that a migrated request has yet to fill are its own: they may not let in a prompt that does not fit."""
    bench = Bench(num_blocks=24)
    bench.start(num_tokens=9, sampling=Sampling(max_tokens=60))
    bench.move()
    bench.settle()
    bench.commit()
    bench.settle()
    bench.handle("b", assigned("big", mode=AssignMode.LOCAL, tokens=tuple(range(40, 60)), max_tokens=4))
    for _ in range(60):
        bench.step("b")
    assert len(bench.tokens()) == 60
    sequence = bench["b"].batch.get(RequestId("big"))
    assert sequence is None or sequence.num_preemptions == 0


# ---- beside other work ---------------------------------------------------------------------------------------------


def test_step_story_and_load_know_of_moves() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_sealed(bench)
    story = "\n".join(bench["a"].core.story())
    assert "Migrate r epoch 1 of session 1, transfer r.1.m1" in story
    assert "move r.1.m1: committing" in story
    load = [each for each in bench["a"].told if isinstance(each, WorkerLoad)][-1]
    assert (load.running, load.waiting) == (1, 0), "who stands still is still there"
    bench.commit()
    bench.settle()
    assert [each for each in bench["a"].told if isinstance(each, WorkerLoad)][-1].running == 0
    bench.handle("a", Tick())
    bench.say("a", stop_move(bench))
    bench.finish("b")


def test_handoff_of_the_same_worker_goes_on_beside_a_move() -> None:
    """Grants and cancels find the prefill side or the decode side by their transfer."""
    bench = Bench()
    bench.start(num_tokens=9)
    bench.handle("a", assigned("p", peer=address("b")))
    assert isinstance(bench.line[0][1], TransferMessage)
    bench.handle("b", assigned("p", mode=AssignMode.DECODE, peer=address("a")))
    bench.move()
    for _ in range(12):
        bench.settle()
        bench.step("a")
    bench.settle()
    asks = {each.request_id: each for each in bench["b"].told if isinstance(each, CommitAsk)}
    assert set(asks) == {R, RequestId("p")}
    assert asks[RequestId("p")].tokens[0].token_id == expected_tokens(range(5, 15), Sampling(), 1, VOCAB)[0]
    handing = bench["a"].core.prefill.has_attempt(TransferId("p:1"))
    assert handing
    move = bench["b"].core.decode._attempts[bench.transfer].machine
    assert move is not None
    bench.handle("a", TransferMessage(header=move.attempt.header(), body=Cancel(reason="x")))
    assert queries(bench), "the cancel went to the move, not to the handoff"
