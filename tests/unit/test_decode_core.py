"""The decode side of a worker: what it lets in, when it runs it, and what it does with what comes late."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from role_cores import LAYOUT, ME, PEER, PROMPT, VOCAB, assign, cancel, from_peer, offer, parts, said, told

from decode_worker.config import AdmissionConfig, DecodeConfig
from decode_worker.core import DecodeCore
from engine.events import PeerGone, RouterGone, Tick
from engine.fake_runner import expected_tokens
from engine.sequence import Sequence
from engine.step import StepPlan
from kv_transfer.actions import AgentLost, FromRouter
from kv_transfer.handoff import frame_digest
from kv_transfer.messages import (
    Cancel,
    CommitRequest,
    EndTransfer,
    ExpectFrames,
    FrameLanded,
    Grant,
    Refuse,
    Renew,
    StatusAsk,
    StatusIs,
    TransferQuiet,
    Wait,
)
from tandem.messages import AssignMode, CommitAsk, OwnerIs, RequestFailed, TransferStats
from tandem.request import CANARY_PREFIX, RequestId, Sampling, Token, TransferId

DECODE = AssignMode.DECODE
EXPECTED = expected_tokens(PROMPT, Sampling(), 4, VOCAB)
FIRST = Token(request_id=RequestId("r"), epoch=1, index=0, token_id=EXPECTED[0])
QUIET = TransferQuiet(transfer_id=TransferId("r:1"), epoch=1)


class Bench:
    """A core with its parts, and steps by hand."""

    def __init__(self, config: DecodeConfig | None = None, num_blocks: int = 32) -> None:
        self.ledger, self.batch, self.runner = parts(num_blocks)
        self.core = DecodeCore(
            me=ME, layout=LAYOUT, ledger=self.ledger, batch=self.batch, config=config or DecodeConfig()
        )
        self.now_ms = 0

    def handle(self, event: object) -> list[object]:
        return [*self.core.handle(self.now_ms, event)]

    def step(self) -> list[object]:
        plan = self.batch.compose()
        assert plan is not None
        return self.done(plan)

    def done(self, plan: StepPlan) -> list[object]:
        outcome = self.batch.apply(plan, self.runner.run(plan))
        self.now_ms += 10
        return [*self.core.stepped(self.now_ms, plan, outcome)]

    def run(self) -> list[int]:
        """Steps until nothing runs; the tokens told."""
        tokens: list[int] = []
        while len(self.batch):
            tokens += [token.token_id for token in told(self.step(), Token) if isinstance(token, Token)]
        return tokens

    def reserve(self) -> Grant:
        self.handle(assign(mode=DECODE))
        (granted,) = said(self.handle(from_peer(offer())), Grant)
        assert isinstance(granted, Grant)
        return granted

    def receive(self) -> list[object]:
        """Everything up to the commit request; the blocks hold what a prefill would have left."""
        granted = self.reserve()
        fill(self, granted.blocks)
        landed = FrameLanded(
            transfer_id=TransferId("r:1"),
            epoch=1,
            sequence=0,
            target_blocks=granted.blocks,
            num_bytes=len(granted.blocks) * LAYOUT.block_bytes,
            checksum=5,
        )
        self.handle(landed)
        commit = CommitRequest(num_frames=1, digest=frame_digest({0: 5}), num_computed_tokens=10, tokens=(FIRST,))
        return self.handle(from_peer(commit))

    def at_baseline(self) -> bool:
        counts = self.ledger.counts()
        return not self.ledger.audit() and counts.free + counts.cached == counts.total and not self.core.num_attempts


def fill(bench: Bench, blocks: tuple[int, ...]) -> None:
    """Writes the prompt's KV as another worker would have computed it."""
    _, batch, runner = parts()
    sequence = Sequence(
        request_id=RequestId("x"), epoch=1, tokens=list(PROMPT), num_prompt_tokens=10, sampling=Sampling()
    )
    batch.add(sequence)
    while not sequence.index:
        plan = batch.compose()
        assert plan is not None
        batch.apply(plan, runner.run(plan))
    for read, written in zip(sequence.blocks, blocks, strict=False):
        bench.runner.write_block(written, runner.read_block(read))


def owner_is(worker_id: str | None, epoch: int, refused: str = "") -> FromRouter:
    message = OwnerIs(
        request_id=RequestId("r"),
        transfer_id=TransferId("r:1"),
        epoch=epoch,
        worker_id=None if worker_id is None else (ME if worker_id == "me" else PEER).worker_id,
        incarnation=1,
        refused=refused,
    )
    return FromRouter(session=1, message=message)


# ---- the way without faults --------------------------------------------------------------------------------------


def test_offer_is_granted_and_the_agent_told_before() -> None:
    bench = Bench()
    bench.handle(assign(mode=DECODE))
    actions = bench.handle(from_peer(offer()))
    assert isinstance(actions[0], ExpectFrames)
    (granted,) = said(actions, Grant)
    assert isinstance(granted, Grant)
    assert (granted.num_reused, len(granted.blocks), granted.endpoint) == (0, 3, "me-agent")
    assert bench.ledger.counts().granted == 3


def test_commit_is_asked_with_the_token_and_the_next_index() -> None:
    bench = Bench()
    actions = bench.receive()
    (ask,) = told(actions, CommitAsk)
    assert isinstance(ask, CommitAsk)
    assert (ask.from_epoch, ask.next_index, ask.tokens) == (1, 1, (FIRST,))
    assert any(isinstance(each, EndTransfer) for each in actions)
    assert len(bench.batch) == 0, "it runs before it owns"


def test_owned_request_goes_on_where_the_source_stopped_under_the_next_epoch() -> None:
    bench = Bench()
    bench.receive()
    bench.handle(QUIET)
    actions = bench.handle(owner_is("me", 2))
    (stats,) = told(actions, TransferStats)
    assert isinstance(stats, TransferStats)
    assert (stats.blocks_granted, stats.blocks_moved, stats.blocks_reused, stats.frames) == (3, 3, 0, 1)
    (token,) = told(bench.step(), Token)
    assert isinstance(token, Token)
    assert (token.epoch, token.index, token.token_id) == (2, 1, EXPECTED[1])
    assert bench.run() == EXPECTED[2:]
    assert bench.at_baseline()
    assert bench.ledger.counts().cached == 3, "what it received and wrote stays for the next turn"


def test_offer_may_come_before_the_assignment() -> None:
    bench = Bench()
    assert bench.handle(from_peer(offer())) == []
    assert said(bench.handle(assign(mode=DECODE)), Grant)


def test_early_offers_are_bounded_in_number_and_time() -> None:
    bench = Bench(DecodeConfig(early_offers_max=2, early_offer_ms=100))
    for name in ("a", "b", "c"):
        bench.handle(from_peer(offer(), name))
    assert not bench.handle(assign("a", mode=DECODE))
    assert said(bench.handle(assign("b", mode=DECODE)), Grant)
    bench.now_ms = 200
    bench.handle(Tick())
    assert not bench.handle(assign("c", mode=DECODE))


def test_local_request_is_prefilled_here() -> None:
    bench = Bench()
    assert bench.handle(assign(mode=AssignMode.LOCAL)) == []
    assert bench.run() == EXPECTED
    assert bench.at_baseline()


# ---- refusals and waits ------------------------------------------------------------------------------------------


def recomputed(actions: list[object]) -> int:
    """Tokens that the worker says it prefilled itself."""
    return sum(stats.tokens_recomputed for stats in told(actions, TransferStats) if isinstance(stats, TransferStats))


def until_idle(bench: Bench) -> list[object]:
    """All actions of the steps until nothing runs."""
    actions: list[object] = []
    while len(bench.batch):
        actions += bench.step()
    return actions


def test_request_that_was_handed_over_is_not_prefilled_here() -> None:
    bench = Bench()
    bench.receive()
    bench.handle(QUIET)
    actions = bench.handle(owner_is("me", 2))
    (stats,) = told(actions, TransferStats)
    assert isinstance(stats, TransferStats)
    assert (stats.blocks_granted, stats.blocks_moved) == (3, 3)
    assert recomputed([*actions, *until_idle(bench)]) == 0


def test_request_that_lost_its_blocks_counts_what_is_computed_again() -> None:
    bench = Bench()
    bench.receive()
    bench.handle(QUIET)
    bench.handle(owner_is("me", 2))
    sequence = bench.batch.get(RequestId("r"))
    assert sequence is not None
    actions = bench.step()
    bench.batch._preempt(sequence)
    assert recomputed([*actions, *until_idle(bench)]) == 11 - sequence.num_cached_tokens


def test_local_request_counts_its_whole_prefill() -> None:
    bench = Bench()
    bench.handle(assign(mode=AssignMode.LOCAL))
    assert recomputed(until_idle(bench)) == len(PROMPT)


def test_different_layout_is_refused_with_a_sentence() -> None:
    bench = Bench()
    bench.handle(assign(mode=DECODE))
    other = replace(offer(), layout=replace(LAYOUT, num_layers=2))
    (refused,) = said(bench.handle(from_peer(other)), Refuse)
    assert isinstance(refused, Refuse)
    assert refused.reason == "num_layers is 2 at the source and 1 at the target"
    assert bench.at_baseline()


@pytest.mark.parametrize("other", [offer(PROMPT[:-1]), offer((*PROMPT[:-8], *PROMPT[:8]))])
def test_other_tokens_than_assigned_are_refused(other: object) -> None:
    bench = Bench()
    bench.handle(assign(mode=DECODE))
    (refused,) = said(bench.handle(from_peer(other)), Refuse)  # type: ignore[arg-type]
    assert isinstance(refused, Refuse)
    assert refused.code == "mismatch"


def test_full_worker_says_wait_and_after_a_while_no() -> None:
    config = DecodeConfig(admission=AdmissionConfig(max_requests=1, wait_limit_ms=1_000, retry_after_ms=50))
    bench = Bench(config)
    bench.reserve()
    bench.handle(assign("b", mode=DECODE))
    (waits,) = said(bench.handle(from_peer(offer(), "b")), Wait)
    assert isinstance(waits, Wait)
    assert waits.retry_after_ms == 50
    bench.now_ms = 1_000
    (refused,) = said(bench.handle(from_peer(offer(), "b")), Refuse)
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.retryable) == ("no_room", True)


def test_sources_that_wait_ask_again_in_turn_and_hundreds_no_oftener_than_a_few() -> None:
    """Else a flood of prompts beyond what fits is a flood of offers, and to refuse them all that two workers do."""
    bench = Bench(DecodeConfig(admission=AdmissionConfig(max_requests=1, wait_limit_ms=60_000)))
    bench.reserve()
    names = [f"b{number}" for number in range(200)]
    for name in names:
        bench.handle(assign(name, mode=DECODE))
    due_ms = dict.fromkeys(names, 0)
    asked: list[tuple[int, str]] = []
    for bench.now_ms in range(3_000):
        for name in names:
            if due_ms[name] == bench.now_ms:
                (waits,) = said(bench.handle(from_peer(offer(), name)), Wait)
                assert isinstance(waits, Wait)
                assert 50 <= waits.retry_after_ms <= 1_050
                due_ms[name] += waits.retry_after_ms
                asked.append((bench.now_ms, name))
    per_second = Counter(at_ms // 1_000 for at_ms, _ in asked)
    assert per_second[1] <= 300
    assert per_second[2] <= 300
    assert len({at_ms for at_ms, _ in asked if at_ms >= 1_000}) <= 41, "a source looks at all of its attempts each time"
    turns = Counter(name for _, name in asked)
    assert max(turns.values()) - min(turns.values()) <= 1, "first come, first to ask again"


def test_who_waits_alone_asks_again_soon_also_after_a_flood() -> None:
    bench = Bench(DecodeConfig(admission=AdmissionConfig(max_requests=1, wait_limit_ms=60_000)))
    bench.reserve()
    for number in range(400):
        bench.handle(assign(f"b{number}", mode=DECODE))
        bench.handle(from_peer(offer(), f"b{number}"))
        bench.handle(cancel(f"b{number}"))
    bench.now_ms = 1_000
    bench.handle(assign("alone", mode=DECODE))
    for _ in range(10):
        (waits,) = said(bench.handle(from_peer(offer(), "alone")), Wait)
        assert isinstance(waits, Wait)
        assert waits.retry_after_ms == 50
        bench.now_ms += 50


def test_who_waits_here_for_memory_comes_before_who_offers() -> None:
    bench = Bench(num_blocks=8)
    bench.handle(assign("long", mode=AssignMode.LOCAL, tokens=tuple(range(24))))  # six blocks, none taken yet
    bench.handle(assign("b", mode=DECODE))
    assert said(bench.handle(from_peer(offer(), "b")), Wait)
    bench.run()
    assert said(bench.handle(from_peer(offer(), "b")), Grant)


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (assign(mode=DECODE, peer=None), "bad_assign"),
        (assign(mode=DECODE, peer=ME), "bad_assign"),
        (assign(mode=DECODE, tokens=tuple(range(256))), "invalid_request"),
        (assign(mode=AssignMode.LOCAL, tokens=()), "invalid_request"),
    ],
)
def test_assignment_that_cannot_be_served_is_refused(event: FromRouter, code: str) -> None:
    (failed,) = told(Bench().handle(event), RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert (failed.code, failed.retryable) == (code, False)


def test_requests_are_bounded() -> None:
    bench = Bench(DecodeConfig(max_requests=1))
    bench.handle(assign("a", mode=AssignMode.LOCAL))
    (failed,) = told(bench.handle(assign("b", mode=AssignMode.LOCAL)), RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert failed.code == "overloaded"


# ---- ends --------------------------------------------------------------------------------------------------------


def test_dead_source_ends_what_is_not_sealed() -> None:
    bench = Bench()
    bench.reserve()
    (failed,) = told(bench.handle(PeerGone(worker_id=PEER.worker_id, incarnation=1)), RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert (failed.epoch, failed.retryable) == (1, True)
    assert bench.ledger.counts().quarantined == 3
    bench.handle(QUIET)
    assert bench.at_baseline()


def test_dead_source_does_not_matter_after_the_seal() -> None:
    bench = Bench()
    bench.receive()
    assert bench.handle(PeerGone(worker_id=PEER.worker_id, incarnation=1)) == []
    bench.handle(QUIET)
    bench.handle(owner_is("me", 2))
    assert bench.run() == EXPECTED[1:]


def test_older_incarnation_of_the_source_does_not_matter() -> None:
    bench = Bench()
    bench.reserve()
    assert bench.handle(PeerGone(worker_id=PEER.worker_id, incarnation=0)) == []


def test_commit_ask_is_repeated_until_it_is_answered() -> None:
    bench = Bench()
    bench.receive()
    for _ in range(3):
        bench.now_ms += 1_000
        assert told(bench.handle(Tick()), CommitAsk)


@pytest.mark.parametrize("answer", [owner_is("peer", 1, "stale"), owner_is(None, 9, "over"), owner_is("me", 5)])
def test_refused_commit_frees_in_silence(answer: FromRouter) -> None:
    bench = Bench()
    bench.receive()
    assert not told(bench.handle(answer), RequestFailed)
    bench.handle(QUIET)
    assert bench.at_baseline()


def test_agent_that_does_not_fall_silent_costs_the_request_not_its_tokens() -> None:
    bench = Bench()
    bench.receive()
    bench.handle(owner_is("me", 2))
    bench.now_ms += 10_000
    (failed,) = told(bench.handle(Tick()), RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert (failed.epoch, failed.retryable) == (2, True)
    assert bench.ledger.counts().quarantined == 3
    bench.now_ms += 31_000
    assert "in quarantine for 31000 ms" in bench.core.audit(bench.now_ms)[0]
    bench.handle(AgentLost(reason="killed"))
    assert bench.at_baseline()


def test_cancel_ends_a_running_request_of_that_epoch() -> None:
    bench = Bench()
    bench.receive()
    bench.handle(QUIET)
    bench.handle(owner_is("me", 2))
    bench.step()
    bench.handle(cancel(epoch=1))
    assert len(bench.batch) == 1, "a cancel of the old epoch ended the new one"
    bench.handle(cancel(epoch=2))
    assert len(bench.batch) == 0
    assert bench.at_baseline()


def test_end_of_a_session_ends_what_it_assigned_and_nothing_else() -> None:
    bench = Bench()
    bench.handle(assign("a", mode=AssignMode.LOCAL, session=1))
    bench.handle(assign("b", mode=AssignMode.LOCAL, session=2))
    bench.handle(RouterGone(session=1))
    assert bench.core.epoch_of(RequestId("a")) is None
    assert bench.core.epoch_of(RequestId("b")) == 1


# ---- what comes late ---------------------------------------------------------------------------------------------


def test_source_that_speaks_of_an_ended_attempt_is_told_so() -> None:
    bench = Bench()
    bench.reserve()
    bench.handle(cancel())
    bench.handle(QUIET)
    assert said(bench.handle(from_peer(Renew(lease_ms=1))), Cancel)
    assert said(bench.handle(from_peer(offer())), Cancel)
    (state,) = said(bench.handle(from_peer(StatusAsk())), StatusIs)
    assert isinstance(state, StatusIs)
    assert state.state == "none"
    assert bench.handle(from_peer(Cancel(reason="x"))) == []


def test_doubled_commit_request_of_a_running_request_is_no_news() -> None:
    bench = Bench()
    bench.receive()
    bench.handle(QUIET)
    bench.handle(owner_is("me", 2))
    commit = CommitRequest(num_frames=1, digest=frame_digest({0: 5}), num_computed_tokens=10, tokens=(FIRST,))
    assert bench.handle(from_peer(commit)) == []
    assert bench.handle(owner_is("me", 2)) == []
    assert bench.run() == EXPECTED[1:]


def test_ownership_of_what_was_given_up_is_reported_as_failed() -> None:
    bench = Bench()
    bench.receive()
    bench.handle(cancel())
    for closed in (False, True):
        if closed:
            bench.handle(QUIET)
        failures = told(bench.handle(owner_is("me", 2)), RequestFailed)
        assert [each.epoch for each in failures if isinstance(each, RequestFailed)] == [2]


def test_words_about_nothing_known_are_counted() -> None:
    bench = Bench()
    bench.handle(from_peer(Renew(lease_ms=1)))
    bench.handle(QUIET)
    assert bench.core.num_ignored == 2
    with pytest.raises(TypeError, match="int is no event"):
        bench.handle(3)


def test_a_canary_is_let_in_where_others_wait_as_long_as_there_is_a_block() -> None:
    """It is to tell a worker that is full from one that does not work."""
    bench = Bench(DecodeConfig(admission=AdmissionConfig(max_requests=1)))
    bench.receive()
    prompt = PROMPT[:3]
    for name, kind in (("other", Wait), (f"{CANARY_PREFIX}1", Grant)):
        bench.handle(assign(name, mode=DECODE, tokens=prompt))
        assert said(bench.handle(from_peer(offer(prompt), name)), kind), name
    full = Bench(num_blocks=3)
    full.receive()  # all of them
    full.handle(assign(f"{CANARY_PREFIX}2", mode=DECODE, tokens=prompt))
    assert said(full.handle(from_peer(offer(prompt), f"{CANARY_PREFIX}2")), Wait)
