"""The prefill side of a worker: what it takes, offers, sends, and what it lets go of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from role_cores import LAYOUT, ME, PEER, PROMPT, assign, cancel, from_peer, grant, parts, said, told

from engine.blocks import BlockLedger
from engine.events import PeerGone, RouterGone, Tick
from engine.fake_runner import FakeRunner, expected_tokens
from engine.step import Batch
from kv_transfer.actions import AgentLost, FromRouter, Registered
from kv_transfer.handoff import HandoffConfig
from kv_transfer.messages import Cancel, CommitRequest, EndTransfer, FrameAcked, Offer, SendFrame, TransferQuiet
from prefill_worker.config import PrefillConfig
from prefill_worker.core import PrefillCore
from tandem.messages import OwnerIs, RequestFailed, TransferStats
from tandem.request import RequestId, Sampling, Token, TransferId


class Bench:
    """A core with its parts, and steps by hand."""

    def __init__(self, config: PrefillConfig | None = None, num_blocks: int = 32) -> None:
        self.ledger: BlockLedger
        self.batch: Batch
        self.runner: FakeRunner
        self.ledger, self.batch, self.runner = parts(num_blocks)
        self.core = PrefillCore(
            me=ME, layout=LAYOUT, ledger=self.ledger, batch=self.batch, config=config or PrefillConfig()
        )
        self.now_ms = 0

    def handle(self, event: object) -> list[object]:
        return [*self.core.handle(self.now_ms, event)]

    def step(self) -> list[object]:
        self.core.arrange(self.now_ms)
        plan = self.batch.compose()
        assert plan is not None
        self.core.planned(self.now_ms, plan)
        outcome = self.batch.apply(plan, self.runner.run(plan))
        self.now_ms += 10
        return [*self.core.stepped(self.now_ms, plan, outcome)]

    def acks(self, actions: list[object]) -> list[object]:
        """Acknowledges every frame, and those that follow."""
        done: list[object] = []
        for frame in [each for each in actions if isinstance(each, SendFrame)]:
            header = frame.header
            event = FrameAcked(transfer_id=header.transfer_id, epoch=header.epoch, sequence=header.sequence, checksum=1)
            following = self.handle(event)
            done += [*following, *self.acks(following)]
        return done

    def at_baseline(self) -> bool:
        counts = self.ledger.counts()
        return not self.ledger.audit() and counts.free + counts.cached == counts.total and not self.core.num_attempts


def peer_owns(epoch: int) -> FromRouter:
    message = OwnerIs(
        request_id=RequestId("r"), transfer_id=TransferId("r:1"), epoch=epoch, worker_id=PEER.worker_id, incarnation=1
    )
    return FromRouter(session=1, message=message)


def test_offer_goes_out_before_the_first_chunk_runs() -> None:
    bench = Bench()
    (offered,) = said(bench.handle(assign()), Offer)
    assert isinstance(offered, Offer)
    assert (offered.num_tokens, len(offered.hashes), offered.endpoint) == (10, 2, "me-agent")


def test_chunks_leave_while_the_next_one_runs_and_the_first_token_ends_the_prefill() -> None:
    bench = Bench()
    bench.handle(assign())
    bench.handle(from_peer(grant()))
    first = bench.step()
    (frame,) = [each for each in first if isinstance(each, SendFrame)]
    assert frame.header.target_blocks == (0, 1)
    assert frame.header.num_bytes == 2 * LAYOUT.block_bytes
    assert bench.ledger.counts().exported == 2
    last = bench.step()
    (token,) = told(last, Token)
    assert isinstance(token, Token)
    assert token.token_id == expected_tokens(PROMPT, Sampling(), 1, 97)[0]
    assert (token.index, token.epoch) == (0, 1)
    asked = [*bench.acks(first), *bench.acks(last)]
    (request,) = said(asked, CommitRequest)
    assert isinstance(request, CommitRequest)
    assert (request.num_frames, request.num_computed_tokens, request.tokens) == (2, 10, (token,))
    (stats,) = told(asked, TransferStats)
    assert isinstance(stats, TransferStats)
    assert (stats.first_frame_ms, stats.last_chunk_start_ms) == (10, 10)


def test_chunks_that_end_before_the_grant_wait_and_travel_together() -> None:
    bench = Bench()
    bench.handle(assign())
    bench.step()
    bench.step()
    frames = [each for each in bench.handle(from_peer(grant())) if isinstance(each, SendFrame)]
    assert [each.header.target_blocks for each in frames] == [(0, 1, 2)]


def test_blocks_stay_until_the_owner_record_speaks_and_are_cached_after() -> None:
    bench = Bench()
    bench.handle(assign())
    bench.handle(from_peer(grant()))
    bench.acks([*bench.step(), *bench.step()])
    for event in (from_peer(Cancel(reason="x")), PeerGone(worker_id=PEER.worker_id, incarnation=1), Tick()):
        bench.now_ms += 2_000
        assert not told(bench.handle(event), RequestFailed)
        assert bench.ledger.counts().owned == 3
    ended = bench.handle(peer_owns(2))
    assert [type(each) for each in ended] == [EndTransfer]
    counts = bench.ledger.counts()
    assert (counts.owned, counts.cached) == (0, 2)
    bench.handle(TransferQuiet(transfer_id=TransferId("r:1"), epoch=1))
    assert bench.at_baseline()


def test_cancel_keeps_what_is_being_read_until_the_agent_is_quiet() -> None:
    bench = Bench()
    bench.handle(assign())
    bench.handle(from_peer(grant()))
    bench.step()
    actions = bench.handle(cancel())
    assert said(actions, Cancel)
    counts = bench.ledger.counts()
    assert (counts.exported, counts.owned, len(bench.batch)) == (2, 0, 0)
    bench.handle(TransferQuiet(transfer_id=TransferId("r:1"), epoch=1))
    assert bench.at_baseline()


def test_lost_agent_ends_all_its_reading() -> None:
    bench = Bench()
    bench.handle(assign())
    bench.handle(from_peer(grant()))
    bench.step()
    (failed,) = told(bench.handle(AgentLost(reason="killed")), RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert (failed.code, failed.retryable) == ("handoff_failed", True)
    assert bench.at_baseline()


def test_what_is_offered_after_an_agent_was_replaced_names_the_new_one() -> None:
    bench = Bench(PrefillConfig(offer_ahead_tokens=0))
    bench.handle(assign("a"))
    assert not said(bench.handle(assign("b")), Offer)
    bench.handle(AgentLost(reason="killed"))
    bench.handle(Registered(address=replace(ME, endpoint="next-agent")))
    offers = [*said(bench.step(), Offer), *said(bench.step(), Offer)]
    assert [each.endpoint for each in offers if isinstance(each, Offer)] == ["next-agent"]


def test_deadline_ends_what_was_never_granted() -> None:
    bench = Bench()
    bench.handle(assign())
    bench.now_ms = 10_000
    due_ms = bench.core.next_deadline_ms()
    assert due_ms is not None
    assert due_ms <= bench.now_ms
    (failed,) = told(bench.handle(Tick()), RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert failed.message == "the target granted no room in time"
    assert bench.at_baseline()


def test_only_prompts_whose_turn_is_near_are_offered() -> None:
    bench = Bench(PrefillConfig(offer_ahead_tokens=10), num_blocks=64)
    offered = [len(said(bench.handle(assign(f"r{i}", tokens=tuple(range(i, i + 10)))), Offer)) for i in range(5)]
    assert offered == [1, 1, 0, 0, 0]
    num_steps = 0
    while sum(offered) < 5:
        offered.append(len(said(bench.step(), Offer)))
        num_steps += 1
        assert num_steps < 20


def test_assignment_that_is_doubled_or_old_has_no_effect() -> None:
    bench = Bench()
    bench.handle(assign(epoch=2))
    assert bench.handle(assign(epoch=2)) == []
    assert bench.handle(assign(epoch=1)) == []
    assert bench.core.num_ignored == 2
    assert bench.core.epoch_of(RequestId("r")) == 2


def test_newer_epoch_replaces_the_older_one() -> None:
    bench = Bench()
    bench.handle(assign(epoch=1))
    bench.step()
    actions = bench.handle(assign(epoch=2))
    assert said(actions, Cancel)
    assert said(actions, Offer)
    assert bench.core.epoch_of(RequestId("r")) == 2
    assert bench.core.num_attempts == 1
    assert not bench.ledger.audit()


def test_cancel_of_an_older_epoch_has_no_effect() -> None:
    bench = Bench()
    bench.handle(assign(epoch=2))
    assert bench.handle(cancel(epoch=1)) == []
    assert bench.core.epoch_of(RequestId("r")) == 2


def test_queue_is_bounded() -> None:
    bench = Bench(PrefillConfig(max_queued=1))
    bench.handle(assign("a"))
    (failed,) = told(bench.handle(assign("b")), RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert (failed.code, failed.retryable) == ("overloaded", True)


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (assign(peer=None), "bad_assign"),
        (assign(peer=ME), "bad_assign"),
        (assign(tokens=tuple(range(256))), "invalid_request"),
        (assign(tokens=()), "invalid_request"),
    ],
)
def test_assignment_that_cannot_be_served_is_refused(event: FromRouter, code: str) -> None:
    bench = Bench()
    (failed,) = told(bench.handle(event), RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert (failed.code, failed.retryable) == (code, False)
    assert bench.at_baseline()


def test_end_of_a_session_ends_what_it_assigned_and_nothing_else() -> None:
    bench = Bench()
    bench.handle(assign("a", session=1))
    bench.handle(assign("b", session=2))
    bench.handle(RouterGone(session=1))
    assert bench.core.epoch_of(RequestId("a")) is None
    assert bench.core.epoch_of(RequestId("b")) == 1


def test_one_token_prompt_is_handed_over_too() -> None:
    bench = Bench()
    bench.handle(assign(tokens=(7,)))
    sent = [*bench.step(), *bench.handle(from_peer(grant(1)))]
    assert said(bench.acks(sent), CommitRequest)


def test_shorter_prompt_overtakes_between_chunks() -> None:
    bench = Bench(num_blocks=64)
    bench.core.queue.cost.observe([(1, 1)], 100)
    bench.handle(assign("long", tokens=tuple(range(100))))
    bench.step()
    bench.handle(assign("short", tokens=(90, 91, 92, 93)))
    tokens = told(bench.step(), Token)
    assert [token.request_id for token in tokens if isinstance(token, Token)] == ["short"]
    assert [place.request_id for place in bench.core.places] == ["short", "long"]


def test_frames_go_again_at_most_twice_and_credits_bound_them() -> None:
    config = PrefillConfig(handoff=HandoffConfig(max_frame_bytes=LAYOUT.block_bytes, credits=2))
    bench = Bench(config, num_blocks=64)
    bench.handle(assign(tokens=tuple(range(20))))
    for _ in range(3):
        bench.step()
    frames = [each for each in bench.handle(from_peer(grant(5))) if isinstance(each, SendFrame)]
    assert len(frames) == 2
    assert bench.ledger.counts().exported == 2


def test_foreign_event_is_an_error() -> None:
    with pytest.raises(TypeError, match="int is no event"):
        Bench().handle(3)


@pytest.mark.parametrize("ending", [cancel(), peer_owns(2)])
def test_a_handoff_whose_agent_does_not_fall_silent_shows_in_the_audit(ending: FromRouter) -> None:
    bench = Bench()
    bench.handle(assign())
    bench.handle(from_peer(grant()))
    sent = [*bench.step(), *bench.step()]
    if ending != cancel():
        bench.acks(sent)
    since_ms = bench.now_ms
    ended = bench.handle(ending)
    assert any(isinstance(each, EndTransfer) for each in ended)
    assert bench.core.num_attempts == 1
    due_ms = bench.core.audit_due_ms(since_ms)
    assert due_ms == since_ms + HandoffConfig().quarantine_warn_ms + 1
    assert bench.core.audit(due_ms - 1) == []
    (line,) = bench.core.audit(due_ms)
    assert "transfer r:1 is over for 30001 ms and its agent is not quiet" in line
    assert bench.core.audit_due_ms(due_ms) is None
    bench.handle(TransferQuiet(transfer_id=TransferId("r:1"), epoch=1))
    assert bench.core.audit(due_ms) == []
    assert bench.at_baseline()
