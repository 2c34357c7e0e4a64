"""A running request that moves, and every way that it can end or go wrong, by the numbers of the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from move_bench import (
    PROMPT,
    STAGES,
    UNCOMMITTED,
    Bench,
    R,
    cancel,
    failures,
    queries,
    rest,
    stop_move,
    to_committing,
    to_fencing,
    to_precopy,
    to_sealed,
    waits,
)
from role_cores import BLOCK

from engine.events import PeerGone, RouterGone, Tick
from engine.step import Undrawn
from kv_transfer.actions import AgentLost
from kv_transfer.messages import (
    CommitRequest,
    FrameAcked,
    FrameFailed,
    FrameLanded,
    SendFrame,
)
from tandem.messages import (
    AssignMode,
    RequestFailed,
    TransferStats,
)
from tandem.request import Sampling, TransferId, WorkerId

# ---- ends in every stage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("stage", STAGES)
def test_edge_18_cancel_in_every_stage_frees_both(stage: Callable[[Bench], None], first: str) -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    stage(bench)
    for name in (first, "b" if first == "a" else "a"):
        bench.say(name, cancel(1))
        bench.settle()
    rest(bench)
    bench.at_rest()
    assert first == "b" or not failures(bench), "the router knows"


@pytest.mark.parametrize("stage", STAGES)
def test_router_that_is_gone_frees_both(stage: Callable[[Bench], None]) -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    stage(bench)
    for name in ("a", "b"):
        bench.handle(name, RouterGone(session=1))
    rest(bench)
    bench.at_rest()


@pytest.mark.parametrize("stage", STAGES)
def test_edge_11_move_that_the_router_stops_lets_the_request_run_on(stage: Callable[[Bench], None]) -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    stage(bench)
    bench.say("a", stop_move(bench))
    bench.say("b", cancel(1))
    rest(bench)
    assert not bench["a"].held()
    bench.finish("a")


@pytest.mark.parametrize("stage", UNCOMMITTED)
def test_edge_7_dead_target_lets_the_request_run_on(stage: Callable[[Bench], None]) -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    stage(bench)
    bench.line.clear()
    bench.handle("a", PeerGone(worker_id=WorkerId("b"), incarnation=1))
    rest(bench)
    assert len(failures(bench)) == 1
    bench.say("b", cancel(1))
    bench.finish("a")


@pytest.mark.parametrize("stage", [to_committing, to_sealed])
def test_edge_11_dead_target_after_the_commit_request_is_asked_about(stage: Callable[[Bench], None]) -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    stage(bench)
    bench.handle("a", PeerGone(worker_id=WorkerId("b"), incarnation=1))
    (query,) = queries(bench)
    assert query.revoke
    assert bench["a"].held()
    bench.say("b", cancel(1))
    bench.answer("a", "a", 1, over=True)
    bench.settle()
    bench.finish("a")


def num_whole(bench: Bench) -> int:
    """Blocks that b could keep of an attempt: those that have landed, of those that were full when it was offered."""
    request = bench["b"].core.decode._attempts[bench.transfer]
    assert request.machine is not None
    landed = sum(len(frame.target_blocks) for frame in request.machine._landed.values())
    return min(landed, (len(PROMPT) + 9 - 1) // BLOCK)


def lost_source(stage: Callable[[Bench], None]) -> tuple[Bench, int]:
    """The source dies in that stage, after nine tokens; and the blocks that the target keeps."""
    bench = Bench()
    bench.start(num_tokens=9)
    stage(bench)
    whole = num_whole(bench)
    bench.line.clear()
    bench.handle("b", PeerGone(worker_id=WorkerId("a"), incarnation=1))
    (failed,) = (each for each in bench["b"].told if isinstance(each, RequestFailed))
    assert (failed.epoch, failed.retryable) == (1, True)
    bench.settle()
    return bench, whole


@pytest.mark.parametrize("stage", STAGES[1:6])
def test_edges_8_and_12_dead_source_leaves_what_has_landed_as_prefix_cache(stage: Callable[[Bench], None]) -> None:
    bench, whole = lost_source(stage)
    counts = bench["b"].ledger.counts()
    assert (counts.free, counts.cached) == (counts.total - whole, whole)
    assert whole == {"to_committing": 4}.get(stage.__name__, whole)


@pytest.mark.parametrize("stage", [to_fencing, to_committing])
def test_edge_8_request_is_placed_anew_where_its_blocks_have_landed(stage: Callable[[Bench], None]) -> None:
    bench, whole = lost_source(stage)
    assert whole
    bench.restart("b")
    for _ in range(40):
        bench.step("b")
    assert len(bench.tokens()) == 40
    (stats,) = (each for each in bench["b"].told if isinstance(each, TransferStats) and each.first is None)
    assert stats.tokens_cached == whole * BLOCK


def test_edge_13_commit_proceeds_when_the_source_dies_after_the_seal() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_sealed(bench)
    bench.handle("b", PeerGone(worker_id=WorkerId("a"), incarnation=1))
    bench.commit(tell_source=False)
    for _ in range(40):
        bench.step("b")
    assert len(bench.tokens()) == 40


@pytest.mark.parametrize("answer", [("a", 1, True), (None, 1, True), ("c", 65, True)])
def test_edge_14_refused_commit_leaves_nothing_at_the_target_but_prefix_cache(
    answer: tuple[str | None, int, bool],
) -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_sealed(bench)
    owner, epoch, over = answer
    bench.answer("b", owner, epoch, over=over, refused="stale")
    bench.settle()
    counts = bench["b"].ledger.counts()
    assert (counts.free, counts.cached) == (counts.total - 4, 4)
    assert not len(bench["b"].batch)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("stage", STAGES[2:5])
def test_lost_agent_of_either_side_lets_the_request_run_on(stage: Callable[[Bench], None], name: str) -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    stage(bench)
    bench.line = type(bench.line)(each for each in bench.line if not isinstance(each[1], SendFrame))
    bench.handle(name, AgentLost(reason="killed"))
    rest(bench)
    assert len(failures(bench)) == 1
    bench.say("b", cancel(1))
    bench.finish("a")


@pytest.mark.parametrize(("stage", "name"), [(to_committing, "a"), (to_sealed, "a"), (to_sealed, "b")])
def test_lost_agent_after_the_last_frame_is_no_reason_to_stop(stage: Callable[[Bench], None], name: str) -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    stage(bench)
    bench.handle(name, AgentLost(reason="killed"))
    bench.settle()
    bench.commit()
    bench.finish("b")


def test_request_that_finishes_in_the_step_that_fences_it_is_not_moved() -> None:
    bench = Bench()
    bench.start(num_tokens=11, sampling=Sampling(max_tokens=12))
    to_fencing(bench)
    bench.end("a")
    assert len(bench.tokens()) == 12
    assert not failures(bench), "its last token says it all"
    bench.settle()
    bench.at_rest()


# ---- the network -----------------------------------------------------------------------------------------------------


def test_edge_5_frames_that_are_lost_go_again_and_doubled_ones_are_no_news() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    bench.move()
    lost: dict[int, int] = {}
    while bench.line:
        event = bench.line[0][1]
        if isinstance(event, SendFrame):
            bench.line.popleft()
            header = event.header
            if lost.setdefault(header.sequence, 0) < 2:
                lost[header.sequence] += 1
                failed = FrameFailed(
                    transfer_id=header.transfer_id, epoch=1, sequence=header.sequence, reason="checksum"
                )
                bench.line.append(("a", failed))
            else:
                bench.land(event, times=2)
        else:
            bench.let()
    bench.commit()
    bench.finish("b")


def test_words_that_are_doubled_and_late_change_nothing() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    bench.move()
    words: list[tuple[str, object]] = []
    while bench.line:
        words.append(bench.line[0])
        to, event = bench.line[0]
        if not isinstance(event, SendFrame):
            bench.handle(to, event)
        bench.let()
    bench.commit()
    bench.settle()
    bench.step("b", 3)
    for to, event in words:
        if not isinstance(event, SendFrame):
            bench.handle(to, event)
    bench.line.clear()
    bench.finish("b")


def test_edge_10_commit_request_that_is_lost_is_said_again() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_committing(bench)
    bench.line.popleft()
    bench.now_ms += 100
    bench.handle("a", Tick())
    assert waits(bench, CommitRequest)
    bench.settle()
    bench.commit()
    bench.finish("b")


def test_edge_10_revocation_that_comes_first_gives_the_request_back() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_sealed(bench)
    bench.now_ms += 500
    bench.handle("a", Tick())
    (query,) = queries(bench)
    assert (query.revoke, query.transfer_id) == (True, bench.transfer)
    bench.answer("a", "a", 1, over=True)
    bench.settle()
    bench.step("a")
    bench.say("b", cancel(1))
    bench.answer("b", "a", 1, over=True, refused="revoked")  # to its ask, which was under way
    bench.settle()
    bench.finish("a")


def test_edge_10_commit_that_comes_first_ends_the_revocation() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_sealed(bench)
    bench.now_ms += 500
    bench.handle("a", Tick())
    assert queries(bench)
    bench.commit()
    bench.answer("a", "b", 2, over=True)  # to its query, which was under way
    bench.settle()
    bench.finish("b")


def test_edge_16_source_that_was_not_told_of_the_commit_asks() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_sealed(bench)
    bench.commit(tell_source=False)
    bench.settle()
    bench.step("b", 3)
    assert bench["a"].held()
    bench.now_ms += 500
    bench.handle("a", Tick())
    assert queries(bench)
    bench.answer("a", "b", 2)
    bench.settle()
    assert bench["a"].batch.get(R) is None
    bench.finish("b")


def test_source_that_hears_of_the_commit_only_by_a_new_assignment_lets_go() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_sealed(bench)
    bench.commit(tell_source=False)
    bench.settle()
    bench.step("b")
    bench.move("b")  # back again, before the source has heard that it left
    bench.settle()
    assert bench.asks("a")
    bench.commit("a")
    bench.finish("a")


def test_target_that_gave_up_what_it_is_given_says_so() -> None:
    """Edge 14 the other way round: the owner record accepts, the target has let go."""
    bench = Bench()
    bench.start(num_tokens=9)
    to_sealed(bench)
    bench.say("b", cancel(1))
    bench.settle()
    bench.answer("b", "b", 2)
    failed = [each for each in bench["b"].told if isinstance(each, RequestFailed)]
    assert [each.epoch for each in failed] == [2]
    bench.answer("a", "b", 2)
    bench.settle()
    assert bench["a"].batch.get(R) is None


def test_words_of_another_attempt_have_no_effect() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_precopy(bench)
    bench.say("a", replace(stop_move(bench), epoch=9))
    bench.say("a", replace(stop_move(bench), transfer_id=TransferId("other")))
    assert bench["a"].core.decode.has_source(bench.transfer)
    frame = next(each for _, each in bench.line if isinstance(each, SendFrame))
    bench.handle("a", FrameAcked(transfer_id=bench.transfer, epoch=9, sequence=0, checksum=0))
    foreign = FrameLanded(
        transfer_id=bench.transfer,
        epoch=9,
        sequence=0,
        target_blocks=frame.header.target_blocks,
        num_bytes=1,
        checksum=0,
    )
    bench.handle("b", foreign)
    bench.settle()
    bench.commit()
    bench.finish("b")


def test_second_attempt_begins_while_frames_of_the_first_are_still_read() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_precopy(bench)
    late = [each for each in bench.line if isinstance(each[1], SendFrame)]
    bench.line.clear()
    bench.say("a", stop_move(bench))
    bench.say("b", cancel(1))
    quiet = list(bench.line)
    bench.line.clear()
    bench.transfer = TransferId("r.1.m2")
    tokens = (*bench.prompt, *(token.token_id for token in bench.tokens()))
    bench.say("b", bench._assign(AssignMode.DECODE, tokens, "b", "a"))
    bench.say("a", bench.migrate("a"))
    bench.settle()
    sequence = bench["a"].batch.get(R)
    assert sequence is not None
    assert sequence.held
    assert bench.asks("b")
    for _, frame in late:
        assert isinstance(frame, SendFrame)
        assert set(frame.header.source_blocks) <= set(bench["a"].ledger.exported_by(frame.header.transfer_id))
    bench.commit()
    bench.line.extend(quiet)
    bench.settle()
    bench.finish("b")


@pytest.mark.parametrize("router_is_faster", [False, True])
def test_a_request_that_breaks_while_it_is_copied_leaves_nothing_at_the_target(router_is_faster: bool) -> None:
    """Its blocks may be what is broken, and whoever shared them there would break too."""
    bench = Bench()
    bench.start(num_tokens=9)
    to_precopy(bench)
    bench.begin("a")
    bench.settle(bench["a"].held)
    plan = bench["a"].plan
    assert plan is not None
    assert bench["b"].ledger.counts().granted > 0
    bench["a"].plan = None
    bench._take("a", bench["a"].core.step_done(bench.now_ms, plan, [Undrawn(reason="not finite")]))
    if router_is_faster:
        bench.say("b", cancel(1))
    bench.at_rest()
    assert bench["a"].ledger.hashes() == ()
    assert bench["b"].ledger.hashes() == ()


def test_edge_22_agent_that_does_not_fall_silent_shows_in_the_audit() -> None:
    bench = Bench()
    bench.start(num_tokens=9)
    to_precopy(bench)
    bench.line.clear()
    bench.say("a", stop_move(bench))
    bench.now_ms += 30_001
    (line,) = bench["a"].core.decode.audit(bench.now_ms)
    assert line == f"transfer {bench.transfer} is over for 30001 ms and its agent is not quiet"
    assert bench["a"].ledger.counts().exported > 0
    bench.handle("a", AgentLost(reason="reaped"))
    assert not bench["a"].core.decode.audit(bench.now_ms)
    assert not bench["a"].ledger.counts().exported
