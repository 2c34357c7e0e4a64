"""The whole square of states and events of both ends of a handoff, and that the tables are drawn as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.events import PeerGone, Tick
from engine.fake_runner import fake_layout
from kv_transfer.actions import AgentLost
from kv_transfer.handoff import (
    Attempt,
    Closed,
    EndQuarantine,
    Failed,
    HandoffConfig,
    Machine,
    Say,
    Stop,
    frame_digest,
    mermaid,
)
from kv_transfer.handoff_source import (
    SOURCE_INSIDE,
    SOURCE_TABLE,
    BlocksReady,
    Fence,
    SourceHandoff,
    SourceState,
    Start,
)
from kv_transfer.handoff_target import (
    TARGET_INSIDE,
    TARGET_TABLE,
    Declined,
    Postponed,
    Reserved,
    TargetHandoff,
    TargetState,
)
from kv_transfer.messages import (
    Cancel,
    CommitRequest,
    FrameAcked,
    FrameFailed,
    FrameLanded,
    Grant,
    Offer,
    Refuse,
    Renew,
    StatusAsk,
    StatusIs,
    TransferQuiet,
    Wait,
)
from tandem.messages import OwnerIs, WorkerAddress
from tandem.request import RequestId, Token, TransferId, WorkerId

LAYOUT = fake_layout(block_size=4)
TRANSFER, REQUEST = TransferId("t"), RequestId("r")
CONFIG = HandoffConfig(max_frame_bytes=LAYOUT.block_bytes, credits=2)
OFFER = Offer(
    layout=LAYOUT, num_tokens=11, hashes=(b"a" * 16, b"b" * 16), lease_ms=30_000, exact=True, endpoint="source"
)
GRANT = Grant(num_reused=1, blocks=(7, 9), generations=(1, 2), credits=2, lease_ms=30_000, endpoint="target")
TOKEN = Token(request_id=REQUEST, epoch=3, index=0, token_id=5)
CHECKSUMS = {0: 11, 1: 12}
COMMIT = CommitRequest(num_frames=2, digest=frame_digest(CHECKSUMS), num_computed_tokens=11, tokens=(TOKEN,))
DEADLINE_MS = 50_000


def address(name: str) -> WorkerAddress:
    return WorkerAddress(worker_id=WorkerId(name), incarnation=1, control=name, endpoint=name)


def attempt(me: str, peer: str) -> Attempt:
    return Attempt(
        transfer_id=TRANSFER,
        request_id=REQUEST,
        epoch=3,
        me=WorkerId(me),
        peer=address(peer),
        source_incarnation=1,
        target_incarnation=1,
    )


def owner(worker_id: str | None, epoch: int) -> OwnerIs:
    name = None if worker_id is None else WorkerId(worker_id)
    return OwnerIs(request_id=REQUEST, transfer_id=TRANSFER, epoch=epoch, worker_id=name, incarnation=1)


def acked(sequence: int) -> FrameAcked:
    return FrameAcked(transfer_id=TRANSFER, epoch=3, sequence=sequence, checksum=CHECKSUMS[sequence])


def landed(sequence: int) -> FrameLanded:
    block = GRANT.blocks[sequence]
    return FrameLanded(
        transfer_id=TRANSFER,
        epoch=3,
        sequence=sequence,
        target_blocks=(block,),
        num_bytes=LAYOUT.block_bytes,
        checksum=CHECKSUMS[sequence],
    )


FAILED = FrameFailed(transfer_id=TRANSFER, epoch=3, sequence=0, reason="checksum")
QUIET = TransferQuiet(transfer_id=TRANSFER, epoch=3)
GONE = PeerGone(worker_id=WorkerId("peer"), incarnation=1)
LOST = AgentLost(reason="killed")

SOURCE_EVENTS: list[object] = [
    Start(), BlocksReady(num=3), Fence(tokens=(TOKEN,)), Stop(reason="x"), Tick(), GRANT,
    Wait(retry_after_ms=5, reason="x"), Refuse(code="x", reason="x", retryable=True),
    Cancel(reason="x"), StatusIs(state="x"), owner("source", 3), GONE,
    owner("target", 4), owner(None, 9), acked(0), FAILED, QUIET, LOST, OFFER, COMMIT, Renew(lease_ms=1), StatusAsk(),
]  # fmt: skip
TARGET_EVENTS: list[object] = [
    OFFER, Reserved(num_reused=1, blocks=(7, 9), generations=(1, 2), endpoint="target"),
    Postponed(retry_after_ms=5, reason="x"), Declined(code="x", reason="x", retryable=True), COMMIT, Cancel(reason="x"),
    Renew(lease_ms=1), StatusAsk(), landed(0), FAILED, QUIET, owner("target", 4), owner("source", 3), owner(None, 9),
    GONE, LOST, Stop(reason="x"), Tick(), GRANT, Wait(retry_after_ms=5, reason="x"), StatusIs(state="x"),
]  # fmt: skip
SOURCE_WAY: list[tuple[SourceState, list[object]]] = [
    (SourceState.HOLDING, []),
    (SourceState.OFFERED, [Start()]),
    (SourceState.SENDING, [Start(), GRANT, BlocksReady(num=2)]),
    (SourceState.FENCED, [Start(), GRANT, Fence(tokens=(TOKEN,)), acked(0), acked(1)]),
    (SourceState.HANDED, [Start(), GRANT, Fence(tokens=(TOKEN,)), acked(0), acked(1), owner("target", 4)]),
    (SourceState.FREED, [Start(), GRANT, Fence(tokens=(TOKEN,)), acked(0), acked(1), owner("target", 4), QUIET]),
]
RESERVED = TARGET_EVENTS[1]
TARGET_WAY: list[tuple[TargetState, list[object]]] = [
    (TargetState.NONE, [OFFER]),
    (TargetState.RESERVED, [OFFER, RESERVED]),
    (TargetState.RECEIVING, [OFFER, RESERVED, landed(0)]),
    (TargetState.SEALED, [OFFER, RESERVED, landed(0), landed(1), COMMIT]),
    (TargetState.ACTIVE, [OFFER, RESERVED, landed(0), landed(1), COMMIT, QUIET, owner("target", 4)]),
    (TargetState.QUARANTINE, [OFFER, RESERVED, landed(0), Cancel(reason="x")]),
]


def source(events: list[object]) -> SourceHandoff:
    machine = SourceHandoff(
        attempt=attempt("source", "target"), config=CONFIG, deadline_ms=DEADLINE_MS, offer=OFFER, num_blocks=3
    )
    for event in events:
        machine.handle(1_000, event)
    return machine


def target(events: list[object]) -> TargetHandoff:
    machine = TargetHandoff(
        attempt=attempt("target", "source"),
        config=CONFIG,
        deadline_ms=DEADLINE_MS,
        num_tokens=11,
        next_index=0,
        block_size=4,
    )
    for event in events:
        machine.handle(1_000, event)
    return machine


Make = Callable[[list[object]], Machine[Any]]
SQUARES: list[tuple[Make, Any, list[object], object, Any, frozenset[type]]] = [
    (source, state, way, event, SOURCE_TABLE, SOURCE_INSIDE) for state, way in SOURCE_WAY for event in SOURCE_EVENTS
]
DRAINING = [Start(), GRANT, BlocksReady(num=2), Cancel(reason="x")]  # failed, with frames under way
SQUARES += [
    (source, SourceState.HOLDING, DRAINING, event, SOURCE_TABLE, SOURCE_INSIDE)
    for event in SOURCE_EVENTS
    if not isinstance(event, Start)
]
SQUARES += [
    (target, state, way, event, TARGET_TABLE, TARGET_INSIDE) for state, way in TARGET_WAY for event in TARGET_EVENTS
]


@pytest.mark.parametrize(
    ("make", "state", "way", "event", "table", "inside"),
    [pytest.param(*square, id=f"{type(square[1]).__name__}.{square[1]}-{square[3]!r:.40}") for square in SQUARES],
)
@pytest.mark.parametrize("now_ms", [1_000, 60_000])
def test_square(
    make: Make, state: Any, way: list[object], event: object, table: Any, inside: frozenset[type], now_ms: int
) -> None:
    """Each pair: a row leads where it says; without one an outsider has no effect and an insider is a bug."""
    machine = make(way)
    assert machine.state is state
    row = table.get((state, type(event)))
    if row is None and type(event) in inside:
        with pytest.raises(AssertionError, match=type(event).__name__):
            machine.handle(now_ms, event)
        return
    before, ignored = machine.state, machine.num_ignored
    actions = machine.handle(now_ms, event)
    if row is None:
        assert (machine.state, actions, machine.num_ignored) == (before, [], ignored + 1)
    else:
        assert machine.state in row.to
    closed = [each for each in actions if isinstance(each, Closed)]
    assert len(closed) <= 1
    if closed:
        assert isinstance(machine, SourceHandoff | TargetHandoff)
        assert machine.next_deadline_ms() is None, "a closed attempt wants no tick"
        assert actions[-1] is closed[0]


@pytest.mark.parametrize(("table", "states"), [(SOURCE_TABLE, SourceState), (TARGET_TABLE, TargetState)])
def test_table_names_every_state(table: Any, states: Any) -> None:
    assert {state for state, _ in table} | {state for row in table.values() for state in row.to} == set(states)


def test_mermaid_draws_every_edge() -> None:
    tables: list[tuple[Any, Any]] = [(SOURCE_TABLE, SourceState.HOLDING), (TARGET_TABLE, TargetState.NONE)]
    for table, initial in tables:
        drawn = mermaid(table, initial)
        for (state, event), row in table.items():
            for following in row.to:
                line = next(
                    each for each in drawn.splitlines() if each.startswith(f"    {state.name} --> {following.name}:")
                )
                assert event.__name__ in line


# ---- what single rows promise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [Cancel(reason="x"), GONE, LOST, Tick()])
def test_fenced_source_never_ends_without_the_owner_record(event: object) -> None:
    machine = source(SOURCE_WAY[3][1])
    for now_ms in range(1_000, 200_000, 500):
        actions = machine.handle(now_ms, event)
        assert machine.state is SourceState.FENCED
        assert not [each for each in actions if isinstance(each, Failed | Closed)]


def test_fenced_source_that_is_still_the_owner_waits_while_nothing_speaks_against_it() -> None:
    way = SOURCE_WAY[3][1]
    assert source([*way, owner("source", 3)]).state is SourceState.FENCED
    machine = source([*way, GONE])
    assert any(isinstance(each, Failed) for each in machine.handle(2_100, owner("source", 3)))
    assert machine.state is SourceState.HOLDING


@pytest.mark.parametrize("answer", [owner(None, 3), owner("other", 9)])
def test_fenced_source_lets_go_in_silence_when_the_request_is_not_its_own(answer: OwnerIs) -> None:
    machine = source(SOURCE_WAY[3][1])
    actions = machine.handle(2_000, answer)
    assert machine.state is SourceState.FREED
    assert not [each for each in actions if isinstance(each, Failed)]


def test_frame_is_sent_three_times_at_most() -> None:
    machine = source([Start(), GRANT, BlocksReady(num=2)])
    for _ in range(CONFIG.resends_max):
        sent = machine.handle(1_000, FAILED)
        assert [getattr(each, "sequence", None) for each in sent] == [0]
    assert any(isinstance(each, Failed) and each.retryable for each in machine.handle(1_000, FAILED))
    assert machine.state is SourceState.HOLDING


def test_acknowledgement_after_the_frame_was_given_up_for_lost_counts() -> None:
    machine = source([Start(), GRANT, Fence(tokens=(TOKEN,))])
    machine.handle(1_000, FAILED)
    machine.handle(1_000, acked(0))
    machine.handle(1_000, acked(1))
    assert machine.state is SourceState.FENCED


def test_link_that_the_agent_gave_up_ends_the_attempt_at_once() -> None:
    """It was made anew once already: trying again here would double a wait that the client sees."""
    machine = source([Start(), GRANT, Fence(tokens=(TOKEN,))])
    actions = machine.handle(1_000, FrameFailed(transfer_id=TRANSFER, epoch=3, sequence=None, reason="link"))
    assert machine.state is SourceState.HOLDING
    (failed,) = (each for each in actions if isinstance(each, Failed))
    assert failed.retryable
    assert "no frame gets through: link" in failed.reason


def test_grant_that_does_not_fit_the_offer_is_no_grant() -> None:
    machine = source([Start()])
    wrong = Grant(num_reused=2, blocks=(7, 9), generations=(1, 2), credits=2, lease_ms=1, endpoint="x")
    actions = machine.handle(1_000, wrong)
    assert [type(each) for each in actions] == [Say, Failed, Closed]
    assert machine.state is SourceState.FREED


def test_target_needs_both_the_owner_record_and_silence() -> None:
    way = TARGET_WAY[3][1]
    assert target([*way, QUIET]).state is TargetState.SEALED
    assert target([*way, owner("target", 4)]).state is TargetState.SEALED
    assert target([*way, owner("target", 4), QUIET]).state is TargetState.ACTIVE


def test_commit_request_may_overtake_the_last_frame() -> None:
    assert target([OFFER, RESERVED, COMMIT, landed(0)]).state is TargetState.RECEIVING
    assert target([OFFER, RESERVED, COMMIT, landed(0), landed(1)]).state is TargetState.SEALED


@pytest.mark.parametrize(
    "commit",
    [
        CommitRequest(num_frames=2, digest=b"other", num_computed_tokens=11, tokens=(TOKEN,)),
        CommitRequest(num_frames=1, digest=COMMIT.digest, num_computed_tokens=11, tokens=(TOKEN,)),
        CommitRequest(num_frames=2, digest=COMMIT.digest, num_computed_tokens=12, tokens=(TOKEN,)),
        CommitRequest(num_frames=2, digest=COMMIT.digest, num_computed_tokens=11, tokens=()),
    ],
)
def test_commit_request_that_does_not_fit_is_never_asked_for(commit: CommitRequest) -> None:
    machine = target([OFFER, RESERVED, landed(0), landed(1)])
    actions = machine.handle(1_000, commit)
    assert machine.state is TargetState.QUARANTINE
    assert any(isinstance(each, Failed) for each in actions)


def test_frame_into_foreign_blocks_ends_the_attempt() -> None:
    machine = target([OFFER, RESERVED])
    foreign = FrameLanded(transfer_id=TRANSFER, epoch=3, sequence=0, target_blocks=(8,), num_bytes=1, checksum=1)
    machine.handle(1_000, foreign)
    assert machine.state is TargetState.QUARANTINE


def test_lease_is_renewed_by_frames_and_by_word() -> None:
    machine = target([OFFER, RESERVED])
    machine.handle(25_000, landed(0))
    machine.handle(40_000, Tick())
    assert machine.state is TargetState.RECEIVING
    machine = target([OFFER, RESERVED])
    machine.handle(31_000, Tick())
    assert machine.state is TargetState.QUARANTINE
    machine = target([OFFER, RESERVED])
    machine.handle(25_000, Renew(lease_ms=30_000))
    machine.handle(31_000, Tick())
    assert machine.state is TargetState.RESERVED


def test_digest_depends_on_order_number_and_content() -> None:
    digests = {frame_digest(each) for each in ({}, {0: 1}, {0: 2}, {0: 1, 1: 2}, {0: 2, 1: 1}, {1: 1, 2: 2})}
    assert len(digests) == 6
    assert frame_digest({1: 2, 0: 1}) == frame_digest({0: 1, 1: 2})
    assert len(frame_digest({0: (1 << 64) - 1})) == 16


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="credits is 0, must be at least 1"):
        HandoffConfig(credits=0)
    with pytest.raises(ValueError, match="renew_ms is 20000, must be at most half of lease_ms, 30000"):
        HandoffConfig(renew_ms=20_000)


# ---- what the target keeps of an attempt that failed ---------------------------------------------------------------


def kept(events: list[object]) -> tuple[tuple[int, int], ...]:
    """What the quarantine leaves, place in the block table and block."""
    machine = target([OFFER, RESERVED, *events])
    (end,) = (each for each in machine.handle(1_000, QUIET) if isinstance(each, EndQuarantine))
    return end.whole


@pytest.mark.parametrize("end", [Cancel(reason="x"), GONE, Stop(reason="x")])
def test_full_blocks_that_landed_are_kept(end: object) -> None:
    """The second of the prompt's two full blocks was granted as block 7; block 9 is the rest of the prompt."""
    assert kept([landed(0), landed(1), end]) == ((1, 7),)
    assert kept([landed(1), end]) == ()
    assert kept([end]) == ()


@pytest.mark.parametrize("before", [[], [Stop(reason="x")]])
def test_nothing_is_kept_of_a_source_whose_own_blocks_may_be_broken(before: list[object]) -> None:
    assert kept([landed(0), landed(1), *before, Cancel(reason="not finite", spoiled=True)]) == ()
    assert kept([landed(0), *before, Cancel(reason="gone")]) == ((1, 7),)


def test_blocks_that_landed_are_kept_when_the_agent_dies() -> None:
    actions = target([OFFER, RESERVED, landed(0)]).handle(1_000, LOST)
    assert [each.whole for each in actions if isinstance(each, EndQuarantine)] == [((1, 7),)]


@pytest.mark.parametrize(
    "wrong",
    [
        [replace(landed(0), checksum=1)],
        [replace(landed(1), target_blocks=(8,))],
        [landed(1), replace(COMMIT, digest=b"x" * 16)],
        [landed(1), replace(COMMIT, num_computed_tokens=3)],
        [COMMIT, replace(COMMIT, num_frames=3)],
    ],
)
def test_nothing_is_kept_of_a_source_that_breaks_the_rules(wrong: list[object]) -> None:
    assert kept([landed(0), *wrong]) == ()
