"""What strikes when, and the book that is kept of what clients saw: nothing that is lost or wrong goes unseen."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.chaos_plan import (
    SETTLE_MS,
    STOPS_MS,
    Fault,
    FaultKind,
    Ground,
    Target,
    Victim,
    check_duration,
    deck,
    parse_kinds,
    parse_states,
    parse_victims,
    plan,
)
from cluster.chaos_states import STATES
from cluster.chaos_tally import Harm, Tally
from kv_transfer.handoff_source import SourceState
from kv_transfer.handoff_target import TargetState
from kv_transfer.migration_source import MigrationState

FAULT = Fault(number=1, at_ms=0, kind=FaultKind.KILL, victim=Victim.DECODE, pick=0)


# ---- the plan --------------------------------------------------------------------------------------------------------

BARE = Ground(faults_allowed=False, has_store=False)
FULL = Ground(faults_allowed=True, has_store=True)


@given(st.integers(0, 1000), st.sets(st.sampled_from(FaultKind), min_size=1), st.integers(500, 20_000), st.booleans())
def test_a_plan_is_that_of_its_seed_and_strikes_all_alike(
    seed: int, kinds: set[FaultKind], every_ms: int, in_states: bool
) -> None:
    states = STATES if in_states and kinds & {FaultKind.KILL, FaultKind.STOP} else ()
    suits = deck(FULL, kinds=tuple(sorted(kinds)), states=states)
    duration_ms = SETTLE_MS + 150 * every_ms

    def once() -> tuple[Fault, ...]:
        return plan(random.Random(seed).randrange, suits=suits, duration_ms=duration_ms, every_ms=every_ms)

    faults = once()
    assert faults == once()
    assert [each.number for each in faults] == list(range(1, len(faults) + 1))
    assert faults[-1].at_ms <= duration_ms - SETTLE_MS
    gaps = [after.at_ms - before.at_ms for before, after in pairwise(faults)]
    assert all(every_ms // 2 <= gap < every_ms // 2 + every_ms for gap in gaps)
    times = Counter(each.target for each in faults)
    assert set(times) <= {way for suit in suits for card in suit.cards for way in card}
    round_size = sum(suit.weight for suit in suits)
    for suit in suits:
        cards = [sum(times[way] for way in card) for card in suit.cards]
        assert max(cards) - min(cards) <= 1, "each card of a suit as often as every other"
        assert abs(sum(cards) - len(faults) * suit.weight / round_size) <= suit.weight
        for card in suit.cards:
            assert max(times[way] for way in card) - min(times[way] for way in card) <= 1
    for each in faults:
        assert each.kind is not FaultKind.STOP or each.for_ms in STOPS_MS
        assert bool(each.period_ms) is (each.kind is FaultKind.DELAY)
        assert bool(each.corrupt_every) is (each.kind is FaultKind.CORRUPT)


def _ways(ground: Ground, **wanted: Any) -> set[Target]:
    return {way for suit in deck(ground, **wanted) for card in suit.cards for way in card}


def test_every_state_of_every_table_is_struck_by_both_signals_in_worker_and_agent() -> None:
    ways = _ways(FULL, kinds=[FaultKind.KILL, FaultKind.STOP], states=STATES)
    struck = Counter((each.state, each.kind) for each in ways if each.state)
    assert struck == {(state, kind): 2 for state in STATES for kind in (FaultKind.KILL, FaultKind.STOP)}
    assert len(STATES) == len(SourceState) + len(MigrationState) + len(TargetState)


def test_sixty_faults_of_all_kinds_strike_in_each_state() -> None:
    suits = deck(FULL, kinds=tuple(FaultKind), states=STATES)
    for seed in range(50):
        faults = plan(random.Random(seed).randrange, suits=suits, duration_ms=600_000, every_ms=8_000)
        assert len(faults) >= 65
        assert {each.state for each in faults[:70]} >= set(STATES)


def test_five_hundred_faults_are_forty_of_each_kind() -> None:
    suits = deck(FULL, kinds=tuple(FaultKind), states=STATES)
    faults = plan(random.Random(1).randrange, suits=suits, duration_ms=10**7, every_ms=8_000, num_max=500)
    assert len(faults) == 500
    assert min(Counter(each.kind for each in faults).values()) >= 40


def test_a_router_is_killed_only_where_its_streams_outlive_it() -> None:
    router = Target(FaultKind.KILL, Victim.ROUTER)
    assert router in _ways(FULL, kinds=[FaultKind.KILL])
    assert router not in _ways(BARE, kinds=[FaultKind.KILL])
    assert router not in _ways(FULL, kinds=[FaultKind.KILL], router_dies=False)


@pytest.mark.parametrize(
    ("kinds", "states", "router_dies", "says"),
    [
        ("redis-down", "", None, "redis-down needs a cluster that keeps its state in Redis"),
        ("kill", "", True, "--kill-router: needs a cluster with Redis"),
        ("kill,partition,delay", "", None, "--faults: partition, delay: the cluster takes no faults"),
        ("corrupt", "", None, "--faults: corrupt: the cluster takes no faults"),
        ("kill", "handoff.sending", None, "--states: the cluster takes no faults"),
    ],
)
def test_what_the_cluster_does_not_allow_is_refused_by_name(
    kinds: str, states: str, router_dies: bool | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        deck(BARE, kinds=parse_kinds(kinds), states=parse_states(states), router_dies=router_dies)


def test_states_without_a_signal_are_refused() -> None:
    with pytest.raises(ValueError, match="--states: only kill and stop"):
        deck(FULL, kinds=[FaultKind.CANCEL], states=STATES)
    with pytest.raises(ValueError, match=r"--states: there is no state 'handoff.lost'; there are handoff.holding"):
        parse_states("handoff.lost")
    assert parse_states("all") == STATES
    assert parse_states("") == ()


def test_only_the_named_victims_are_struck() -> None:
    wanted = parse_victims("decode worker, router,decode worker")
    assert wanted == (Victim.DECODE, Victim.ROUTER)
    ways = _ways(FULL, kinds=tuple(FaultKind), states=STATES, victims=wanted)
    assert {(each.victim, each.kind) for each in ways} == {
        (victim, kind) for victim in wanted for kind in (FaultKind.KILL, FaultKind.STOP)
    }
    assert {each.state for each in ways if each.victim is Victim.DECODE} == {
        "", *(each for each in STATES if not each.startswith("handoff."))
    }  # fmt: skip
    assert parse_victims("") == ()
    assert _ways(FULL, kinds=[FaultKind.KILL]) == _ways(FULL, kinds=[FaultKind.KILL], victims=tuple(Victim))


def test_victims_that_there_are_not_are_named() -> None:
    with pytest.raises(ValueError, match=r"--victims: there is no victim 'decoder'; there are .*decode worker"):
        parse_victims("decoder")
    with pytest.raises(ValueError, match="--victims router and --faults kill: there is no such fault"):
        deck(BARE, kinds=[FaultKind.KILL], victims=[Victim.ROUTER])


def test_a_run_that_is_too_short_says_how_long_it_must_be() -> None:
    with pytest.raises(ValueError, match=r"--duration: is 11 s, too short for a fault; 26 s are enough"):
        check_duration(11_000, 8_000)
    suits = deck(BARE, kinds=[FaultKind.KILL])
    assert plan(lambda below: below - 1, suits=suits, duration_ms=26_000, every_ms=8_000)


@pytest.mark.parametrize(
    ("text", "kinds"), [("kill", "kill"), (" stop, kill ,stop,", "stop kill"), ("cancel", "cancel")]
)
def test_kinds_are_read_from_a_list(text: str, kinds: str) -> None:
    assert parse_kinds(text) == tuple(FaultKind(each) for each in kinds.split())


@pytest.mark.parametrize(("text", "says"), [("kill,earthquake", "there is no fault 'earthquake'"), (" ,", "must name")])
def test_a_fault_that_there_is_not_is_named(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"--faults: .*{says}.*kill, stop, partition"):
        parse_kinds(text)


# ---- the tally -------------------------------------------------------------------------------------------------------


def test_streams_that_are_as_they_should_be_break_nothing() -> None:
    tally = Tally()
    tally.opened(0, 1, [5, 6, 7])
    tally.came(10, 1, 0, [5])
    tally.struck(20, FAULT, "d0")
    tally.came(1_020, 1, 1, [6, 7])
    tally.ended(1_030, 1)
    (row,) = tally.rows()
    assert (row.what, row.num, row.in_flight, row.recovered_ms, row.gap_ms) == (
        "kill decode worker",
        1,
        1,
        1_000,
        1_010,
    )
    assert not row.harm
    assert tally.failures(recovery_limit_ms=1_000) == []
    assert tally.failures(recovery_limit_ms=999) == ["kill decode worker at 20 ms (d0): all went on after 1000 ms"]
    assert (tally.num_finished, tally.num_tokens, tally.worst_gap_ms) == (1, 3, 1_010)


@pytest.mark.parametrize(
    ("pieces", "harm"),
    [
        ([(0, [5, 6]), (1, [6, 7])], {Harm.DOUBLED: 1}),
        ([(0, [5]), (2, [7])], {Harm.LOST: 1}),
        ([(0, [5, 9, 7])], {Harm.WRONG: 1}),
        ([(0, [5, 6, 7, 8])], {Harm.WRONG: 1}),
        ([(0, [5, 6])], {Harm.LOST: 1}),
        ([], {Harm.LOST: 1}),
    ],
)
def test_each_harm_is_seen_and_charged_to_the_last_fault(
    pieces: list[tuple[int, list[int]]], harm: dict[Harm, int]
) -> None:
    tally = Tally()
    tally.opened(0, 1, [5, 6, 7])
    tally.struck(1, FAULT, "d0")
    tally.struck(2, FAULT, "d1")
    for index, tokens in pieces:
        tally.came(3, 1, index, tokens)
    tally.ended(4, 1)
    _serve(tally, 2_000)
    assert tally.harm == tally.strikes[1].harm == harm
    assert not tally.strikes[0].harm
    assert len(tally.failures(recovery_limit_ms=100)) == len(harm)
    assert "stream 1" in tally.examples[0]


def test_an_error_loses_a_stream_a_refusal_or_its_client_does_not() -> None:
    tally = Tally()
    for stream in range(5):
        tally.opened(0, stream, [5, 6])
    tally.ended(1, 0, "request_lost: gone")
    tally.ended(1, 1, "overloaded: full", refused=True)
    tally.came(1, 2, 0, [5])
    tally.ended(2, 2, "unavailable: no worker", refused=True)  # it had begun: that is a loss
    tally.ended(2, 3, cancelled=True)
    assert (tally.harm[Harm.LOST], tally.num_refused, tally.num_cancelled) == (2, 1, 1)
    assert "after 1 of 2 tokens: unavailable" in tally.examples[1]


def _serve(tally: Tally, now_ms: int) -> None:
    """Somebody else is served."""
    tally.opened(now_ms, 99, [5])
    tally.came(now_ms, 99, 0, [5])
    tally.ended(now_ms, 99)


def test_a_fault_that_streams_do_not_get_over_is_told_until_they_do() -> None:
    tally = Tally()
    tally.opened(0, 1, [5])
    tally.opened(0, 2, [5])
    tally.struck(10, FAULT, "d0")
    tally.came(1_010, 1, 0, [5])
    assert tally.failures(recovery_limit_ms=10_000) == ["kill decode worker at 10 ms (d0): 1 streams did not go on"]
    assert tally.rows()[0].recovered_ms is None
    tally.ended(2_500, 2, cancelled=True)
    assert tally.strikes[0].recovered_ms == 2_490
    tally.leaked(2_600, "d0: 3 blocks owned")
    assert tally.failures(recovery_limit_ms=10_000) == ["d0: 3 blocks owned"]


def test_a_token_that_was_on_its_way_ends_no_recovery() -> None:
    """The stream of a worker that is killed has one more token in its pipe, and is silent after that."""
    tally = Tally()
    tally.opened(0, 1, [5, 6, 7])
    tally.came(5, 1, 0, [5])
    tally.struck(10, FAULT, "d0")
    tally.came(12, 1, 1, [6])
    assert tally.failures(recovery_limit_ms=10_000) == ["kill decode worker at 10 ms (d0): nothing was served since"]
    tally.came(30_012, 1, 2, [7])
    tally.ended(30_013, 1)
    assert (tally.strikes[0].recovered_ms, tally.strikes[0].gap_ms) == (30_002, 30_000)
    assert tally.failures(recovery_limit_ms=10_000) == ["kill decode worker at 10 ms (d0): all went on after 30002 ms"]


def test_who_goes_on_at_once_has_recovered_at_once() -> None:
    tally = Tally()
    tally.opened(0, 1, list(range(200)))
    for index in range(200):
        if index == 50:
            tally.struck(495, FAULT, "d0")
        tally.came(10 * index, 1, index, [index])
    tally.ended(2_000, 1)
    assert tally.strikes[0].recovered_ms == 5


def test_a_cluster_that_refuses_everybody_has_not_recovered() -> None:
    tally = Tally()
    tally.opened(0, 1, [5])
    tally.struck(10, FAULT, "d0")
    tally.ended(20, 1, "unavailable: no worker", refused=True)
    tally.struck(5_000, FAULT, "d1")
    for now_ms in range(6_000, 60_000, 1_000):
        tally.opened(now_ms, now_ms, [5])
        tally.ended(now_ms, now_ms, "unavailable: no worker", refused=True)
    assert tally.failures(recovery_limit_ms=10_000) == [
        "kill decode worker at 10 ms (d0): nothing was served since",
        "kill decode worker at 5000 ms (d1): nothing was served since",
    ]
    _serve(tally, 60_000)
    assert [each.recovered_ms for each in tally.strikes] == [59_990, 55_000]


def test_a_run_whose_faults_all_missed_has_shown_nothing() -> None:
    tally = Tally()
    tally.not_met(10, FAULT, "there was no decode worker")
    assert tally.failures(recovery_limit_ms=10_000) == ["none of 1 faults struck anybody"]


def test_a_fault_with_nobody_in_flight_is_over_when_somebody_is_served() -> None:
    tally = Tally()
    tally.struck(10, FAULT, "d0")
    assert tally.strikes[0].recovered_ms is None
    _serve(tally, 3_000)
    assert tally.strikes[0].recovered_ms == 0
