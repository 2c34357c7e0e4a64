"""Both roles in one worker: who an event is for, and what every router hears."""

from __future__ import annotations

import pytest
from role_cores import (
    LAYOUT,
    ME,
    PROMPT,
    VOCAB,
    assign,
    cancel,
    from_peer,
    grant,
    offer,
    other_session,
    parts,
    said,
    told,
)

from cluster.worker_core import WorkerCore, WorkerCoreConfig
from engine.blocks import BlockState
from engine.events import RouterGone, Tick
from engine.fake_runner import FakeRunner, expected_tokens
from engine.loop import Core, Storyteller
from engine.sequence import Sequence
from engine.step import Undrawn
from kv_transfer.actions import Report, RouterJoined
from kv_transfer.messages import Cancel, Grant, Offer, Wait
from prefill_worker import core as prefill_core
from tandem.messages import AssignMode, BlockEvents, RequestFailed, WorkerLoad
from tandem.request import CANARY_PREFIX, RequestId, Sampling, Token

LOCAL, DECODE = AssignMode.LOCAL, AssignMode.DECODE


class Bench:
    """A worker core with its runner, and steps by hand."""

    def __init__(self) -> None:
        ledger, batch, self.runner = parts()
        assert isinstance(self.runner, FakeRunner)
        self.core = WorkerCore(me=ME, layout=LAYOUT, ledger=ledger, batch=batch, config=WorkerCoreConfig())
        self.now_ms = 0

    def handle(self, event: object) -> list[object]:
        return self.core.handle(self.now_ms, event)

    def run(self) -> list[object]:
        actions: list[object] = []
        while (plan := self.core.next_plan(self.now_ms)) is not None:
            sampled = self.runner.run(plan)
            self.now_ms += 10
            actions += self.core.step_done(self.now_ms, plan, sampled)
        return actions


def blocks_told(actions: list[object], session: int) -> list[BlockEvents]:
    pieces = [each.piece for each in actions if isinstance(each, Report) and each.session == session]
    return [piece for piece in pieces if isinstance(piece, BlockEvents)]


def loads(actions: list[object]) -> list[WorkerLoad]:
    return [piece for piece in told(actions, WorkerLoad) if isinstance(piece, WorkerLoad)]


def test_it_is_what_the_engine_loop_runs() -> None:
    core: Core = Bench().core
    assert isinstance(core, Storyteller)
    assert core.next_plan(0) is None
    assert core.next_deadline_ms() is None


def test_what_changes_no_sequence_costs_no_look_at_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load is looked at with every event: with a thousand prompts here that would be most of what an event costs."""
    num_looks = 0

    class Watched(Sequence):
        @property
        def started(self) -> bool:
            nonlocal num_looks
            num_looks += 1
            return bool(self.blocks)

    monkeypatch.setattr(prefill_core, "Sequence", Watched)
    bench = Bench()
    for number in range(100):
        bench.handle(assign(f"r{number}"))
    num_looks = 0
    for _ in range(100):
        bench.handle(from_peer(Wait(retry_after_ms=50, reason="full"), "r0"))
    assert num_looks <= 300
    num_looks = 0
    (load,) = loads(bench.handle(cancel("r0")))
    assert (load.running, load.waiting, load.prefill_backlog_tokens) == (0, 99, 99 * len(PROMPT))
    assert num_looks > 0, "it is counted by the way that is watched"


def test_modes_go_to_their_roles() -> None:
    bench = Bench()
    assert said(bench.handle(assign("a")), Offer)
    bench.handle(assign("b", mode=DECODE))
    assert said(bench.handle(from_peer(offer(), "b")), Grant)
    bench.handle(assign("c", mode=LOCAL))
    assert (len(bench.core.prefill), len(bench.core.decode)) == (1, 2)
    tokens = [each for each in told(bench.run(), Token) if isinstance(each, Token)]
    assert [each.token_id for each in tokens if each.request_id == "c"] == expected_tokens(PROMPT, Sampling(), 4, VOCAB)


def test_cancel_between_workers_finds_the_source_or_the_target() -> None:
    bench = Bench()
    bench.handle(assign("a"))
    bench.handle(assign("b", mode=DECODE))
    bench.handle(from_peer(Cancel(reason="x"), "a"))
    assert (len(bench.core.prefill), len(bench.core.decode)) == (0, 1)
    bench.handle(from_peer(Cancel(reason="x"), "b"))
    assert (len(bench.core.prefill), len(bench.core.decode)) == (0, 0)


@pytest.mark.parametrize("mode", [LOCAL, AssignMode.PREFILL])
def test_request_whose_logits_are_not_finite_fails_alone(mode: AssignMode) -> None:
    bench = Bench()
    bench.handle(assign("bad", mode=mode))
    actions: list[object] = []
    while not (failed := told(actions, RequestFailed)):
        plan = bench.core.next_plan(0)
        assert plan is not None
        sampled = [None if drawn is None else Undrawn(reason="nan") for drawn in bench.runner.run(plan)]
        actions += bench.core.step_done(0, plan, sampled)
    bad = RequestFailed(request_id=RequestId("bad"), epoch=1, code="not_finite", message="nan", retryable=False)
    assert failed == [bad]
    assert not told(actions, Token)
    assert (len(bench.core.prefill), len(bench.core.decode)) == (0, 0)
    assert bench.core.ledger.counts().free == bench.core.ledger.num_blocks, "its blocks may not be shared"
    bench.handle(assign("good", mode=LOCAL))
    tokens = [each for each in told(bench.run(), Token) if isinstance(each, Token)]
    assert [each.token_id for each in tokens] == expected_tokens(PROMPT, Sampling(), 4, VOCAB)


def test_a_prompt_that_breaks_tells_its_target_to_keep_nothing_of_it() -> None:
    bench = Bench()
    bench.handle(assign())
    bench.handle(from_peer(grant()))
    plan = bench.core.next_plan(bench.now_ms)
    assert plan is not None
    actions = bench.core.step_done(bench.now_ms, plan, [Undrawn(reason="not finite")])
    assert said(actions, Cancel) == [Cancel(reason="not finite", spoiled=True)]


def test_request_that_comes_back_in_another_role_replaces_the_old_epoch() -> None:
    bench = Bench()
    bench.handle(assign(epoch=1))
    bench.handle(assign(epoch=2, mode=LOCAL))
    assert bench.core.prefill.epoch_of(RequestId("r")) is None
    assert bench.core.decode.epoch_of(RequestId("r")) == 2
    assert bench.handle(assign(epoch=1)) == [], "an old epoch came back"
    bench.handle(assign(epoch=3))
    assert bench.core.decode.epoch_of(RequestId("r")) is None
    assert bench.core.prefill.epoch_of(RequestId("r")) == 3
    assert not bench.core.ledger.audit()


@pytest.mark.parametrize("mode", [LOCAL, AssignMode.PREFILL])
def test_request_that_comes_again_under_its_old_epoch_in_the_step_that_it_left_is_another_one(mode: AssignMode) -> None:
    """A router's epochs grow, but it counts from a clock: one that was set back must not end the worker."""
    bench = Bench()
    bench.handle(assign(mode=mode))
    plan = bench.core.next_plan(bench.now_ms)
    assert plan is not None
    bench.handle(cancel())
    bench.handle(assign(mode=mode))
    bench.core.step_done(bench.now_ms, plan, bench.runner.run(plan))
    tokens = [each for each in told(bench.run(), Token) if isinstance(each, Token)]
    expected = expected_tokens(PROMPT, Sampling(), 4, VOCAB)
    assert [each.token_id for each in tokens] == (expected if mode is LOCAL else expected[:1])
    assert not bench.core.ledger.audit()


def test_routers_hear_what_the_prefix_cache_holds_in_unbroken_sequence() -> None:
    bench = Bench()
    (empty,) = blocks_told(bench.handle(RouterJoined(session=1)), 1)
    assert (empty.cleared, empty.stored) == (True, ())
    bench.handle(assign(mode=LOCAL))
    events = blocks_told(bench.run(), 1)
    stored = {each for event in events for each in event.stored}
    assert stored == set(bench.core.ledger.hashes())
    joined = bench.handle(RouterJoined(session=2))
    (full,) = blocks_told(joined, 2)
    assert full.cleared
    assert set(full.stored) == stored
    sequences = [empty.sequence, *(event.sequence for event in events), *(e.sequence for e in blocks_told(joined, 1))]
    assert sequences == list(range(1, len(sequences) + 1))


def test_session_that_was_not_announced_joins_with_its_first_word() -> None:
    bench = Bench()
    actions = bench.handle(other_session(assign(mode=LOCAL), 7))
    assert blocks_told(actions, 7)[0].cleared
    assert loads(actions)[-1].waiting == 1


def test_session_that_is_gone_hears_no_more() -> None:
    bench = Bench()
    bench.handle(RouterJoined(session=1))
    bench.handle(RouterJoined(session=2))
    bench.handle(other_session(assign("a", mode=LOCAL), 1))
    bench.handle(other_session(assign("b", mode=LOCAL), 2))
    bench.handle(RouterGone(session=1))
    sessions = {each.session for each in bench.run() if isinstance(each, Report)}
    assert sessions == {2}


def test_load_is_told_when_work_changes_and_counts_at_most_ten_times_a_second() -> None:
    bench = Bench()
    (idle,) = loads(bench.handle(RouterJoined(session=1)))
    assert (idle.running, idle.waiting, idle.blocks.free) == (0, 0, 32)
    assert loads(bench.handle(assign(mode=DECODE)))[0].waiting == 1
    assert not loads(bench.handle(from_peer(offer()))), "only counts of blocks have changed"
    assert bench.core.next_deadline_ms() == 100
    bench.now_ms = 100
    (told_later,) = loads(bench.handle(Tick()))
    assert told_later.blocks.granted == 3
    bench.handle(cancel())
    assert not loads(bench.handle(Tick()))


def test_story_names_events_and_open_attempts() -> None:
    bench = Bench()
    bench.handle(assign("a"))
    bench.handle(assign("b", mode=DECODE))
    story = "\n".join(bench.core.story())
    assert "Assign a epoch 1 of session 1" in story
    assert "source a:1: offered" in story
    assert "target b:1: none" in story


def test_blocks_are_recounted_on_a_tick_once_after_something_happened() -> None:
    bench = Bench()
    bench.handle(assign("a", mode=LOCAL))
    bench.run()
    due_ms = bench.core.next_deadline_ms()
    assert due_ms is not None
    bench.core.ledger._num_in[BlockState.FREE] += 1
    assert not any(load.audit for load in loads(bench.handle(assign("b", mode=DECODE)))), "not on the way of work"
    bench.handle(cancel("b"))
    bench.now_ms = max(due_ms, 20_000)
    assert any("are said to be free" in line for load in loads(bench.handle(Tick())) for line in load.audit)
    assert bench.core.next_deadline_ms() is None, "nothing has changed since"


def test_blocks_are_not_recounted_on_the_heels_of_work() -> None:
    """The last step of a prompt may be followed by its handoff, which the recount would hold up."""
    bench = Bench()
    bench.handle(assign("a", mode=LOCAL))
    bench.now_ms = 5_000
    bench.run()
    due_ms = bench.core.next_deadline_ms()
    assert due_ms is not None
    assert due_ms >= bench.now_ms + WorkerCoreConfig().quiet_ms
    for _ in range(100):  # but what goes on and on does not put it off for ever
        bench.now_ms += WorkerCoreConfig().quiet_ms // 2
        bench.handle(cancel("unknown"))
    due_ms = bench.core.next_deadline_ms()
    assert due_ms is not None
    assert due_ms <= bench.now_ms


def test_tokens_read_and_written_are_counted_but_for_canaries() -> None:
    bench = Bench()
    bench.handle(RouterJoined(session=1))
    bench.handle(assign("a", mode=LOCAL, max_tokens=3))
    after = loads(bench.run())[-1]
    assert (after.tokens_read, after.tokens_written) == (len(PROMPT) - 1, 3), "each draw runs one token"
    bench.handle(assign(f"{CANARY_PREFIX}1", mode=LOCAL, max_tokens=3))
    last = loads(bench.run())[-1]
    assert last.steps > after.steps
    assert (last.tokens_read, last.tokens_written) == (after.tokens_read, after.tokens_written)
