"""The whole square of states and events of a migration's source, and the failure edges that it decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.events import PeerGone, Tick
from engine.fake_runner import fake_layout
from kv_transfer.actions import AgentLost
from kv_transfer.handoff import (
    AskOwner,
    Attempt,
    Closed,
    EndExport,
    ExportFrame,
    GiveUp,
    HandedOver,
    HandoffConfig,
    Hold,
    Over,
    Resume,
    Say,
    Silence,
    Stop,
    frame_digest,
    mermaid,
)
from kv_transfer.handoff_source import BlocksReady, Start
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
from kv_transfer.migration_source import (
    MIGRATION_INSIDE,
    MIGRATION_TABLE,
    Fenced,
    MigrationState,
    Preempted,
    SourceMigration,
    Starved,
    tail_by_ids,
)
from kv_transfer.plan import SendWindow
from tandem.messages import OwnerIs, StopMove, WorkerAddress
from tandem.request import RequestId, Token, TransferId, WorkerId

LAYOUT = fake_layout(block_size=4)
TRANSFER, REQUEST = TransferId("t"), RequestId("r")
CONFIG = HandoffConfig(max_frame_bytes=LAYOUT.block_bytes, credits=2)
# 13 tokens, 12 computed: three full blocks, of which the target has the first; room for 40 tokens, ten blocks.
OFFER = Offer(
    layout=LAYOUT,
    num_tokens=40,
    hashes=(b"a" * 16, b"b" * 16, b"c" * 16),
    lease_ms=30_000,
    exact=True,
    endpoint="source",
    move=True,
)
GRANT = Grant(
    num_reused=1, blocks=tuple(range(20, 29)), generations=(0,) * 9, credits=2, lease_ms=30_000, endpoint="target"
)
BEGAN_MS, DEADLINE_MS = 1_000, 9_000


def token(index: int) -> Token:
    return Token(request_id=REQUEST, epoch=3, index=index, token_id=index + 50)


FENCED = Fenced(num_computed=13, tokens=(token(2), token(3)))
STARTED: list[object] = [Start()]
COPYING: list[object] = [Start(), GRANT]


def owner(worker_id: str | None, epoch: int, *, over: bool = False) -> OwnerIs:
    name = None if worker_id is None else WorkerId(worker_id)
    return OwnerIs(request_id=REQUEST, transfer_id=TRANSFER, epoch=epoch, worker_id=name, incarnation=1, over=over)


def acked(sequence: int) -> FrameAcked:
    return FrameAcked(transfer_id=TRANSFER, epoch=3, sequence=sequence, checksum=sequence + 90)


def failed(sequence: int | None) -> FrameFailed:
    return FrameFailed(transfer_id=TRANSFER, epoch=3, sequence=sequence, reason="checksum")


FENCING: list[object] = [*COPYING, acked(0), acked(1)]
TAIL: list[object] = [*FENCING, FENCED]
COMMITTING: list[object] = [*TAIL, acked(2)]
HANDED: list[object] = [*COMMITTING, owner("target", 4)]
QUIET = TransferQuiet(transfer_id=TRANSFER, epoch=3)
GONE = PeerGone(worker_id=WorkerId("target"), incarnation=1)
LOST = AgentLost(reason="killed")
STOP_MOVE = StopMove(request_id=REQUEST, epoch=3, transfer_id=TRANSFER, reason="the target died")
REFUSE = Refuse(code="no_room", reason="full", retryable=True)
CANCEL = Cancel(reason="x")

WAYS: list[tuple[MigrationState, list[object]]] = [
    (MigrationState.RUNNING, []),
    (MigrationState.OFFERED, STARTED),
    (MigrationState.PRECOPY, COPYING),
    (MigrationState.FENCING, FENCING),
    (MigrationState.TAIL, TAIL),
    (MigrationState.COMMITTING, COMMITTING),
    (MigrationState.HANDED, HANDED),
    (MigrationState.FREED, [*HANDED, QUIET]),
]
DRAINING: list[object] = [*COPYING, CANCEL]  # failed, with frames under way
EVENTS: list[object] = [
    Start(), BlocksReady(num=4), FENCED, Preempted(), Starved(), Stop(reason="x"), Tick(), GRANT,
    Wait(retry_after_ms=5, reason="x"), REFUSE, CANCEL, StatusIs(state="x"), owner("source", 3),
    owner("source", 3, over=True), owner("target", 4), owner("other", 9), owner(None, 9), GONE, acked(0), failed(0),
    failed(None), QUIET, LOST, STOP_MOVE, OFFER, Renew(lease_ms=1), StatusAsk(),
    CommitRequest(num_frames=0, digest=b"", num_computed_tokens=0, tokens=()),
    FrameLanded(transfer_id=TRANSFER, epoch=3, sequence=0, target_blocks=(), num_bytes=0, checksum=0),
]  # fmt: skip


def machine(events: list[object], config: HandoffConfig = CONFIG, offer: Offer = OFFER) -> SourceMigration:
    """A source that has been through the events."""
    target = WorkerAddress(worker_id=WorkerId("target"), incarnation=1, control="target", endpoint="target")
    attempt = Attempt(
        transfer_id=TRANSFER,
        request_id=REQUEST,
        epoch=3,
        me=WorkerId("source"),
        peer=target,
        source_incarnation=1,
        target_incarnation=1,
    )
    made = SourceMigration(attempt=attempt, config=config, deadline_ms=DEADLINE_MS, offer=offer, first_index=2)
    for event in events:
        made.handle(BEGAN_MS, event)
    return made


def kinds(actions: list[object]) -> list[type]:
    """What is asked, where Say stands as what is said."""
    return [type(each.body) if isinstance(each, Say) else type(each) for each in actions]


SQUARES = [(state, way, event) for state, way in WAYS for event in EVENTS]
SQUARES += [(MigrationState.RUNNING, DRAINING, event) for event in EVENTS if not isinstance(event, Start)]


@pytest.mark.parametrize(
    ("state", "way", "event"), [pytest.param(*each, id=f"{each[0]}-{each[2]!r:.40}") for each in SQUARES]
)
@pytest.mark.parametrize("now_ms", [BEGAN_MS, 1_200, 60_000])
def test_square(state: MigrationState, way: list[object], event: object, now_ms: int) -> None:
    """Each pair: a row leads where it says; without one an outsider has no effect and an insider is a bug."""
    source = machine(way)
    assert source.state is state
    row = MIGRATION_TABLE.get((state, type(event)))
    if row is None and type(event) in MIGRATION_INSIDE:
        with pytest.raises(AssertionError, match=type(event).__name__):
            source.handle(now_ms, event)
        return
    ignored = source.num_ignored
    actions = source.handle(now_ms, event)
    if row is None:
        assert (source.state, actions, source.num_ignored) == (state, [], ignored + 1)
    else:
        assert source.state in row.to
    asked = kinds(actions)
    stood = state in (MigrationState.TAIL, MigrationState.COMMITTING)
    stands = source.state in (MigrationState.TAIL, MigrationState.COMMITTING)
    if stood and not stands:
        assert {Resume, HandedOver, Over} & set(asked) or isinstance(event, Stop), "it stands still for ever"
    assert asked.count(Resume) + asked.count(HandedOver) + asked.count(Over) <= 1
    assert asked.count(Closed) == (source.state is MigrationState.FREED and state is not MigrationState.FREED)
    if Closed in asked:
        assert asked[-1] is Closed
        assert source.next_deadline_ms() is None, "a closed attempt wants no tick"


def test_table_names_every_state() -> None:
    named = {state for state, _ in MIGRATION_TABLE} | {to for row in MIGRATION_TABLE.values() for to in row.to}
    assert named == set(MigrationState)


def test_mermaid_draws_every_edge() -> None:
    drawn = mermaid(MIGRATION_TABLE, MigrationState.RUNNING).splitlines()
    for (state, event), row in MIGRATION_TABLE.items():
        for to in row.to:
            assert any(f"{state.name} --> {to.name}:" in line and event.__name__ in line for line in drawn)


# ---- the way without faults ----------------------------------------------------------------------------------------


def test_rounds_follow_one_another_until_nothing_is_left_but_the_partial_block() -> None:
    source = machine(STARTED)
    first = source.handle(BEGAN_MS, GRANT)
    assert [(each.first, each.target_blocks, each.priority) for each in first] == [(1, (20,), 1), (2, (21,), 1)]
    assert source.handle(BEGAN_MS, BlocksReady(num=4)) == [], "a round takes in only what was full when it began"
    assert kinds(source.handle(BEGAN_MS, acked(0))) == [EndExport]
    second = source.handle(BEGAN_MS, acked(1))
    assert [(each.first, each.target_blocks) for each in second[1:]] == [(3, (22,))]
    assert kinds(source.handle(BEGAN_MS, acked(2))) == [EndExport, Hold]
    assert source.num_rounds == 2
    tail = source.handle(BEGAN_MS, Fenced(num_computed=18, tokens=(token(2),)))
    assert [(each.first, each.target_blocks, each.priority) for each in tail] == [(4, (23,), 0)]
    (_, said) = source.handle(BEGAN_MS, acked(3))
    assert isinstance(said, Say)
    digest = frame_digest({sequence: sequence + 90 for sequence in range(4)})
    assert said.body == CommitRequest(num_frames=4, digest=digest, num_computed_tokens=18, tokens=(token(2),))


def test_a_request_may_be_fenced_with_full_blocks_left() -> None:
    source = machine(STARTED, replace(CONFIG, fence_blocks=2))
    assert kinds(source.handle(BEGAN_MS, GRANT)) == [Hold], "two full blocks are missing, and two may be left"
    tail = source.handle(BEGAN_MS, Fenced(num_computed=18, tokens=(token(2),)))
    assert [(each.first, each.target_blocks, each.priority) for each in tail] == [(1, (20,), 0), (2, (21,), 0)]
    assert source.num_rounds == 0


def test_nothing_is_copied_that_the_target_has() -> None:
    everything = replace(GRANT, num_reused=3, blocks=GRANT.blocks[2:], generations=(0,) * 7)
    source = machine(STARTED)
    assert kinds(source.handle(BEGAN_MS, everything)) == [Hold]
    assert kinds(source.handle(BEGAN_MS, Fenced(num_computed=12, tokens=()))) == [CommitRequest]
    assert kinds(source.handle(BEGAN_MS, owner("target", 4))) == [HandedOver, Closed], "no agent ever heard of it"


def test_window_is_complete_only_when_it_is_known_how_many_blocks_there_are() -> None:
    window = SendWindow(num_blocks=None, num_reused=1, credits=4, blocks_per_frame=2)
    assert [(each.first, each.num) for each in window.due(3)] == [(1, 2)]
    assert (window.num_acked, window.complete) == (1, False)
    window.acked(0, 7)
    assert (window.num_acked, window.complete) == (3, False), "the request may still grow"
    window.close(4)
    assert [(each.first, each.num) for each in window.due(9)] == [(3, 1)], "and no block beyond"
    window.acked(1, 8)
    assert window.complete
    with pytest.raises(AssertionError, match="closed at 4 blocks already"):
        window.close(5)


def test_figures_of_a_move_are_those_of_its_times() -> None:
    source = machine(STARTED)
    source.handle(1_100, GRANT)
    for sequence in (0, 1):
        source.handle(1_200, acked(sequence))
    source.handle(1_210, FENCED)
    assert (source.num_rounds, source.granted_ms, source.fenced_ms) == (1, 1_100, 1_210)


def test_renewals_keep_the_lease_while_blocks_are_copied() -> None:
    assert kinds(machine(COPYING).handle(6_000, Tick())) == [Renew]


@pytest.mark.parametrize(
    ("exact", "frame_ms", "token_ms", "expected"),
    [
        (True, 50, 4.0, True),  # three tokens cost 12 ms, a frame 50
        (True, 5, 4.0, False),
        (False, 50, 4.0, False),  # other bits
        (True, 50, None, False),
    ],
)
def test_tail_goes_by_token_ids_when_that_is_shorter_and_exact(
    exact: bool, frame_ms: int, token_ms: float | None, expected: bool
) -> None:
    source = machine(STARTED, offer=replace(OFFER, exact=exact))
    source.handle(BEGAN_MS, GRANT)
    for sequence in (0, 1):
        source.handle(BEGAN_MS + frame_ms, acked(sequence))
    asked = source.handle(BEGAN_MS + frame_ms, Fenced(num_computed=15, tokens=(token(2),), token_ms=token_ms))
    if not expected:
        assert kinds(asked) == [ExportFrame]
        return
    (said,) = asked
    assert isinstance(said, Say)
    assert isinstance(said.body, CommitRequest)
    assert (said.body.num_computed_tokens, said.body.num_frames) == (12, 2)


def test_tail_by_ids_needs_to_know_both_durations() -> None:
    assert not tail_by_ids(exact=True, num_tokens=1, frame_ms=None, token_ms=1.0)
    assert not tail_by_ids(exact=True, num_tokens=1, frame_ms=1.0, token_ms=None)


# ---- failure edges, by their numbers in the reference ----------------------------------------------------------------


def test_edge_1_refusal_lets_the_request_run_on() -> None:
    source = machine(STARTED)
    (resume, told, closed) = source.handle(BEGAN_MS, REFUSE)
    assert isinstance(resume, Resume)
    assert told == GiveUp(code="no_room", reason="full")
    assert isinstance(closed, Closed)


def test_edge_2_offer_without_an_answer_is_repeated_then_given_up() -> None:
    source = machine(STARTED)
    assert kinds(source.handle(2_000, Tick())) == [Offer]
    assert kinds(source.handle(DEADLINE_MS, Tick())) == [Cancel, Resume, GiveUp, Closed]


@pytest.mark.parametrize("way", [COPYING, FENCING, TAIL])
def test_edge_3_request_that_ends_tells_the_target_and_drains(way: list[object]) -> None:
    assert kinds(machine(way).handle(BEGAN_MS, Stop(reason="finished"))) == [Cancel, Silence]


def test_edge_4_starved_request_leaves_at_once_when_half_of_it_is_there() -> None:
    source = machine([*COPYING, acked(0)])  # two of three blocks are there
    assert kinds(source.handle(BEGAN_MS, Starved())) == [Hold]
    assert kinds(source.handle(BEGAN_MS, acked(1))) == [EndExport], "frames go on meanwhile"
    assert kinds(source.handle(BEGAN_MS, FENCED)) == [ExportFrame]


def test_edge_4_starved_request_stays_when_most_of_it_is_here() -> None:
    grant = replace(GRANT, num_reused=0, blocks=(*GRANT.blocks, 40), generations=(0,) * 10)
    source = machine([Start(), grant])
    assert kinds(source.handle(BEGAN_MS, Starved())) == [Cancel, Resume, GiveUp, Silence]


@pytest.mark.parametrize("way", [STARTED, COPYING])
def test_edge_4_preempted_request_is_not_moved(way: list[object]) -> None:
    source = machine(way)
    asked = kinds(source.handle(BEGAN_MS, Preempted()))
    assert asked[:3] == [Cancel, Resume, GiveUp]


@pytest.mark.parametrize("way", [COPYING, TAIL])
def test_edge_5_frame_that_fails_goes_again_twice(way: list[object]) -> None:
    sequence = 0 if way is COPYING else 2
    source = machine(way)
    for _ in range(CONFIG.resends_max):
        assert [each.sequence for each in source.handle(BEGAN_MS, failed(sequence))] == [sequence]
    assert kinds(source.handle(BEGAN_MS, failed(sequence))) == [Cancel, Resume, GiveUp, Silence]


def test_edge_6_link_that_the_agent_gave_up_ends_the_move_and_the_request_runs_on() -> None:
    assert kinds(machine(COPYING).handle(BEGAN_MS, failed(None))) == [Cancel, Resume, GiveUp, Silence]


@pytest.mark.parametrize("way", [STARTED, COPYING, FENCING, TAIL])
def test_edge_7_dead_target_lets_the_request_run_on(way: list[object]) -> None:
    asked = kinds(machine(way).handle(BEGAN_MS, GONE))
    assert asked[:2] == [Resume, GiveUp]
    assert asked[2:] == ([Closed] if way is STARTED else [Silence])


def test_edge_9_target_that_cannot_take_the_tail_lets_the_request_run_on() -> None:
    assert kinds(machine(TAIL).handle(BEGAN_MS, CANCEL)) == [Resume, GiveUp, Silence]


def test_edge_9_tail_lasts_a_bounded_time() -> None:
    source = machine(TAIL)
    assert source.next_deadline_ms() == BEGAN_MS + CONFIG.fence_limit_ms
    assert kinds(source.handle(BEGAN_MS + CONFIG.fence_limit_ms, Tick())) == [Cancel, Resume, GiveUp, Silence]


def test_edge_10_commit_without_an_answer_is_said_again_and_then_revoked_never_guessed() -> None:
    source = machine(COMMITTING)
    for now_ms in (1_100, 1_200, 1_300, 1_400):
        assert kinds(source.handle(now_ms, Tick())) == [CommitRequest]
    assert source.handle(1_500, Tick()) == [AskOwner(revoke=True)]
    for now_ms in (2_500, 3_500, 60_000):
        assert source.handle(now_ms, Tick()) == [AskOwner(revoke=True)]
    assert source.handle(60_000, owner("source", 3)) == [], "that is no end of the attempt"
    assert kinds(source.handle(60_001, owner("source", 3, over=True))) == [Cancel, Resume, Silence]
    assert source.handle(60_002, owner("target", 4)) == [], "an owner record does not take its word back"


def test_edge_10_commit_that_happened_is_found_by_the_revocation() -> None:
    source = machine(COMMITTING)
    source.handle(1_500, Tick())
    assert kinds(source.handle(1_600, owner("target", 4, over=True))) == [HandedOver, Silence]


@pytest.mark.parametrize("event", [GONE, CANCEL])
def test_edge_11_target_that_is_lost_before_the_answer_is_asked_about(event: object) -> None:
    source = machine(COMMITTING)
    assert source.handle(BEGAN_MS, event) == [AskOwner(revoke=True)]
    assert source.state is MigrationState.COMMITTING
    assert Resume in kinds(source.handle(BEGAN_MS, owner("source", 3, over=True)))


def test_edge_11_router_that_gives_the_move_up_is_believed_at_once() -> None:
    for way in (STARTED, COPYING, FENCING, TAIL, COMMITTING):
        asked = kinds(machine(way).handle(BEGAN_MS, STOP_MOVE))
        assert asked[:2] == [Cancel, Resume]
        assert GiveUp not in asked, "the router knows"


@pytest.mark.parametrize("answer", [owner(None, 3), owner("other", 9), owner("target", 9)])
def test_edge_14_source_lets_go_in_silence_when_the_request_is_another_ones(answer: OwnerIs) -> None:
    assert kinds(machine(COMMITTING).handle(BEGAN_MS, answer)) == [Over, Silence, EndExport, Closed]
    assert kinds(machine(TAIL).handle(BEGAN_MS, answer)) == [Cancel, Over, Silence]


@pytest.mark.parametrize("event", [CANCEL, GONE, LOST, Tick(), owner("source", 3)])
def test_edge_15_nobody_resumes_without_the_owner_record(event: object) -> None:
    source = machine(COMMITTING)
    for now_ms in range(BEGAN_MS, 200_000, 500):
        asked = kinds(source.handle(now_ms, event))
        assert source.state is MigrationState.COMMITTING
        assert not {Resume, Over, HandedOver, GiveUp, Closed} & set(asked)


def test_edge_16_handed_request_waits_only_for_its_agent() -> None:
    source = machine(HANDED)
    assert source.next_deadline_ms() is None
    assert kinds(source.handle(BEGAN_MS, QUIET)) == [EndExport, Closed]


@pytest.mark.parametrize(("state", "way"), WAYS[1:6])
def test_edge_18_cancelled_request_is_over_in_every_state(state: MigrationState, way: list[object]) -> None:
    source = machine(way)
    asked = kinds(source.handle(BEGAN_MS, Stop(reason="client gone")))
    assert asked[0] is Cancel
    assert not {Resume, GiveUp, HandedOver} & set(asked)
    if source.state is not MigrationState.FREED:
        assert kinds(source.handle(BEGAN_MS, QUIET)) == [EndExport, Closed]


def test_edge_22_blocks_stay_pinned_until_the_agent_is_quiet_or_reaped() -> None:
    for end in (QUIET, LOST):
        source = machine(DRAINING)
        assert source.handle(BEGAN_MS, Tick()) == []
        assert kinds(source.handle(BEGAN_MS, acked(0))) == [EndExport]
        assert kinds(source.handle(BEGAN_MS, end)) == [EndExport, Closed]


# ---- what else ends it -----------------------------------------------------------------------------------------------


def test_copying_that_does_not_shrink_is_given_up() -> None:
    grant = replace(GRANT, credits=9)
    source = machine([Start(), grant], replace(CONFIG, credits=9))
    source.handle(BEGAN_MS, BlocksReady(num=5))
    source.handle(BEGAN_MS, acked(0))
    asked = source.handle(BEGAN_MS, acked(1))  # two were copied, two became full
    assert kinds(asked) == [EndExport, Cancel, Resume, GiveUp, Silence]
    assert isinstance(asked[3], GiveUp)
    assert "does not converge: round 1 copied 2 blocks, 2 became full" in asked[3].reason


def test_rounds_are_bounded() -> None:
    source = machine([*STARTED, GRANT], replace(CONFIG, rounds_max=3))
    num_ready, sequence = 3, 0
    while source.state is MigrationState.PRECOPY:
        num_ready += 1
        source.handle(BEGAN_MS, BlocksReady(num=num_ready))
        while source.state is MigrationState.PRECOPY and source._window is not None and source._window.in_flight:
            source.handle(BEGAN_MS, acked(sequence))
            sequence += 1
            if source._window.num_acked == num_ready - 1:
                break
    assert source.num_rounds == 3
    assert "does not converge" in str(source.story)


@pytest.mark.parametrize(("num_acked", "expected"), [(1, [Hold]), (0, [Cancel, Resume, GiveUp, Silence])])
def test_request_that_outgrows_its_room_is_fenced_when_half_of_it_is_there(
    num_acked: int, expected: list[type]
) -> None:
    grant = replace(GRANT, blocks=GRANT.blocks[:4], generations=(0,) * 4)
    way = [Start(), grant, *(acked(each) for each in range(num_acked))]
    source = machine(way, offer=replace(OFFER, num_tokens=20))
    assert kinds(source.handle(BEGAN_MS, BlocksReady(num=4))) == expected, "the fifth block begins to fill"


def test_grant_that_does_not_fit_is_no_grant() -> None:
    for wrong in (replace(GRANT, num_reused=4), replace(GRANT, credits=0), replace(GRANT, generations=(0,))):
        asked = kinds(machine(STARTED).handle(BEGAN_MS, wrong))
        assert asked == [Cancel, Resume, GiveUp, Closed]


def test_tokens_that_do_not_reach_back_are_never_handed_over() -> None:
    source = machine(FENCING)
    gap = Fenced(num_computed=13, tokens=(token(3), token(4)))
    assert kinds(source.handle(BEGAN_MS, gap)) == [Cancel, Resume, GiveUp, Silence]


def test_deadline_ends_what_is_not_committed_and_revokes_what_may_be() -> None:
    for way in (STARTED, COPYING, FENCING, TAIL):
        assert Resume in kinds(machine(way).handle(DEADLINE_MS, Tick()))
    assert machine(COMMITTING).handle(DEADLINE_MS, Tick()) == [AskOwner(revoke=True)]
