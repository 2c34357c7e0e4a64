"""Membership: the whole square of states and observations, and the sentences it must keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.membership import (
    OVER,
    TRANSITIONS,
    Admitted,
    DrainAsked,
    DrainEnded,
    Ended,
    Event,
    Heartbeat,
    Membership,
    MemberState,
    Observation,
    Passed,
    Registered,
    RegistrationRefused,
    RoleChanged,
    RoleGiven,
    StateChanged,
)
from tandem.messages import Role, WorkerInfo
from tandem.request import WorkerId

D0 = WorkerId("decode-0")
INFO = WorkerInfo(
    worker_id=D0, role=Role.DECODE, control="127.0.0.1:1", endpoint="e", pid=1, agent_pid=2, model="m", namespace="n",
    fingerprint="f", exact=True, dtype="float32", block_size=16, total_blocks=8, context_tokens=128, block_bytes=64,
)  # fmt: skip


def beat(incarnation: int = 1, steps: int = 0, runnable: bool = False) -> Heartbeat:
    return Heartbeat(worker_id=D0, incarnation=incarnation, steps=steps, runnable=runnable, agent_pid=2)


def joined(now_ms: int = 0) -> Membership:
    membership = Membership()
    assert membership.handle(now_ms, Registered(info=INFO, incarnation=1)) == [Admitted(info=INFO, incarnation=1)]
    return membership


def ready(now_ms: int = 0) -> Membership:
    membership = joined(now_ms)
    assert states(membership.handle(now_ms, beat())) == [MemberState.READY]
    return membership


def states(actions: object) -> list[MemberState]:
    assert isinstance(actions, list)
    return [action.state for action in actions if isinstance(action, StateChanged)]


def state_of(membership: Membership) -> MemberState:
    return membership.members[D0].state


@pytest.mark.parametrize("state", MemberState)
@pytest.mark.parametrize("observation", Observation)
def test_whole_square(state: MemberState, observation: Observation) -> None:
    """Each pair leads where the table says, and a missing pair changes nothing and says nothing."""
    membership = joined()
    member = membership.members[D0]
    member.state = state
    actions = membership._observe(member, observation, "why")
    expected = TRANSITIONS.get((state, observation))
    if expected is None:
        assert (actions, member.state) == ([], state)
    else:
        assert actions == [StateChanged(worker_id=D0, incarnation=1, state=expected, reason="why")]
        assert member.state is expected


def test_dead_is_final_and_every_other_state_can_die() -> None:
    assert not [pair for pair in TRANSITIONS if pair[0] in OVER]
    for state in set(MemberState) - OVER:
        for observation in (Observation.ENDED, Observation.SUPERSEDED, Observation.EXPIRED):
            assert TRANSITIONS[(state, observation)] is MemberState.DEAD


def test_a_draining_worker_leaves_dies_or_is_taken_back() -> None:
    ways = {pair[1]: TRANSITIONS[pair] for pair in TRANSITIONS if pair[0] is MemberState.DRAINING}
    assert ways.pop(Observation.DRAINED) is MemberState.LEFT
    assert ways.pop(Observation.TAKEN_BACK) is MemberState.READY
    assert set(ways.values()) == {MemberState.DEAD}
    assert {pair[0] for pair, state in TRANSITIONS.items() if state is MemberState.LEFT} == {MemberState.DRAINING}


def test_silence_makes_suspect_then_dead() -> None:
    membership = ready()
    assert membership.handle(2000, Passed()) == []
    assert states(membership.handle(2001, Passed())) == [MemberState.SUSPECT]
    assert membership.handle(3000, Passed()) == []
    assert states(membership.handle(3001, Passed())) == [MemberState.DEAD]
    assert membership.handle(3002, beat()) == []
    assert state_of(membership) is MemberState.DEAD


@pytest.mark.parametrize("look_ms", [100, 400])
def test_time_in_which_the_observer_was_away_counts_against_nobody(look_ms: int) -> None:
    membership = ready()
    membership.look_ms = 100
    membership.handle(0, beat(runnable=True))
    membership.handle(100, Passed())
    assert membership.handle(60_000, Passed()) == [], "it was asleep; what was said meanwhile is read next"
    now_ms = 60_000
    while state_of(membership) is not MemberState.DEAD:  # but a worker that stays silent is found
        now_ms += look_ms
        membership.handle(now_ms, Passed())
        assert now_ms < 60_000 + 10_000
    assert now_ms > 60_000 + 2_500


def test_a_heartbeat_clears_suspicion() -> None:
    membership = ready()
    membership.handle(2500, Passed())
    assert states(membership.handle(2600, beat())) == [MemberState.READY]
    assert membership.handle(4600, Passed()) == []


def test_work_without_steps_makes_suspect_then_dead() -> None:
    membership = ready()
    seen: list[tuple[int, MemberState]] = []
    for now_ms in range(1000, 15_000, 100):
        event = Passed() if now_ms % 1000 else beat(steps=7, runnable=True)
        seen += [(now_ms, state) for state in states(membership.handle(now_ms, event))]
    assert seen == [(2_800, MemberState.SUSPECT), (4_500, MemberState.DEAD)], "it was seen to move at 1000 at last"


@given(wedged_ms=st.integers(10_000, 11_000), phase_ms=st.integers(0, 999))
def test_a_wedged_worker_is_found_within_five_seconds(wedged_ms: int, phase_ms: int) -> None:
    """Whenever it stops getting on, with heartbeats that go on as ever: the defaults leave no gap."""
    membership = ready()
    died_ms = None
    for now_ms in range(100, 20_000, 100):
        if now_ms % 1000 == phase_ms // 100 * 100:
            membership.handle(now_ms, beat(steps=min(now_ms, wedged_ms), runnable=True))
        elif MemberState.DEAD in states(membership.handle(now_ms, Passed())):
            died_ms = now_ms
    assert died_ms is not None
    assert died_ms - wedged_ms <= 5_000


def test_idle_or_moving_workers_are_not_stuck() -> None:
    membership = ready()
    for now_ms in range(1000, 30_000, 1000):
        assert membership.handle(now_ms, beat(steps=7, runnable=False)) == []
    for now_ms in range(30_000, 60_000, 1000):
        assert membership.handle(now_ms, beat(steps=now_ms, runnable=True)) == []


def test_a_step_clears_a_stall() -> None:
    membership = ready()
    for now_ms in range(1000, 4000, 1000):
        membership.handle(now_ms, beat(steps=7, runnable=True))
    assert state_of(membership) is MemberState.SUSPECT
    assert states(membership.handle(4000, beat(steps=8, runnable=True))) == [MemberState.READY]


def test_joining_has_its_own_deadline() -> None:
    membership = joined()
    assert membership.handle(14_999, Passed()) == []
    assert states(membership.handle(15_000, Passed())) == [MemberState.DEAD]


def test_a_new_incarnation_ends_the_old_one_first() -> None:
    membership = ready()
    actions = membership.handle(10, Registered(info=replace(INFO, pid=9), incarnation=2))
    assert actions == [
        StateChanged(
            worker_id=D0, incarnation=1, state=MemberState.DEAD, reason="a new incarnation registered"
        ),
        Admitted(info=replace(INFO, pid=9), incarnation=2),
    ]  # fmt: skip
    assert membership.handle(11, beat(incarnation=1)) == []
    assert membership.handle(11, Ended(worker_id=D0, incarnation=1, reason="late")) == []
    assert state_of(membership) is MemberState.JOINING


def test_an_incarnation_survives_the_router_but_not_its_own_death() -> None:
    membership = Membership()
    assert membership.handle(0, Registered(info=INFO, incarnation=3)) == [Admitted(info=INFO, incarnation=3)]
    membership.handle(1, Ended(worker_id=D0, incarnation=3, reason="exit"))
    [refused] = membership.handle(2, Registered(info=INFO, incarnation=3))
    assert isinstance(refused, RegistrationRefused)
    assert "incarnation 3 of decode-0 is over" in refused.reason
    assert membership.handle(3, Registered(info=INFO, incarnation=4)) == [Admitted(info=INFO, incarnation=4)]


def test_who_registers_twice_because_an_answer_was_lost_is_taken_in_once() -> None:
    membership = ready()
    again = Registered(info=replace(INFO, agent_pid=9), incarnation=1)
    assert membership.handle(5, again) == [Admitted(info=INFO, incarnation=1)]
    assert state_of(membership) is MemberState.READY
    [refused] = membership.handle(6, Registered(info=replace(INFO, pid=9), incarnation=1))
    assert isinstance(refused, RegistrationRefused), "another process says that it is the same one"


def test_registering_again_is_no_heartbeat() -> None:
    membership = joined()
    membership.handle(14_000, Registered(info=INFO, incarnation=1))
    assert states(membership.handle(15_000, Passed())) == [MemberState.DEAD]


def test_a_role_that_is_given_holds_for_its_incarnation_whenever_that_registers() -> None:
    given = RoleGiven(worker_id=D0, incarnation=1, role=Role.PREFILL)
    early, late = Membership(), ready()
    assert early.handle(0, given) == []
    [admitted] = early.handle(1, Registered(info=INFO, incarnation=1))
    assert isinstance(admitted, Admitted)
    assert admitted.info.role is Role.PREFILL
    assert late.handle(0, given) == [RoleChanged(worker_id=D0, incarnation=1, role=Role.PREFILL)]
    assert late.handle(0, given) == []
    for membership in (early, late):
        assert membership.members[D0].info.role is Role.PREFILL
        membership.handle(2, Registered(info=INFO, incarnation=1))
        assert membership.members[D0].info.role is Role.PREFILL, "an answer was lost, and it asked again"
        membership.handle(2, Registered(info=INFO, incarnation=2))
        assert membership.members[D0].info.role is Role.DECODE, "the supervisor has started it in its role"


def test_one_cluster_serves_one_model() -> None:
    membership = ready()
    other = replace(INFO, worker_id=WorkerId("decode-1"), namespace="other")
    [refused] = membership.handle(1, Registered(info=other, incarnation=1))
    assert isinstance(refused, RegistrationRefused)
    assert "'other'" in refused.reason
    assert "'n'" in refused.reason


ASKED = DrainAsked(worker_id=D0, incarnation=1)


def drain_ended(*, left: bool) -> DrainEnded:
    return DrainEnded(worker_id=D0, incarnation=1, left=left, reason="why")


def test_a_draining_worker_may_die() -> None:
    membership = ready()
    assert states(membership.handle(1, ASKED)) == [MemberState.DRAINING]
    assert membership.handle(2, ASKED) == []
    assert membership.handle(1500, beat()) == []
    assert states(membership.handle(1600, Ended(worker_id=D0, incarnation=1, reason="left"))) == [MemberState.DEAD]
    assert membership.handle(1601, ASKED) == []
    assert membership.handle(1, DrainAsked(worker_id=WorkerId("nobody"), incarnation=1)) == []


def test_a_drained_worker_is_told_to_leave_and_does_not_come_back() -> None:
    membership = ready()
    membership.handle(1, ASKED)
    assert states(membership.handle(2, drain_ended(left=True))) == [MemberState.LEFT]
    assert membership.handle(3, beat()) == []
    assert membership.current(beat()) is None
    assert membership.has_left(beat())
    assert not membership.has_left(beat(incarnation=2))
    assert list(membership.alive()) == []
    [refused] = membership.handle(4, Registered(info=INFO, incarnation=1))
    assert isinstance(refused, RegistrationRefused)
    assert membership.handle(5, Registered(info=INFO, incarnation=2)) == [Admitted(info=INFO, incarnation=2)]


def test_a_drain_that_is_given_up_leaves_a_worker_that_works() -> None:
    membership = ready()
    membership.handle(1, ASKED)
    assert states(membership.handle(2, drain_ended(left=False))) == [MemberState.READY]
    assert membership.handle(3, drain_ended(left=True)) == [], "it does not drain"
    assert states(membership.handle(2500, Passed())) == [MemberState.SUSPECT]


EVENTS = st.one_of(
    st.builds(Registered, info=st.just(INFO), incarnation=st.integers(1, 4)),
    st.builds(beat, incarnation=st.integers(1, 4), steps=st.integers(0, 3), runnable=st.booleans()),
    st.builds(Ended, worker_id=st.just(D0), incarnation=st.integers(1, 4), reason=st.just("x")),
    st.builds(DrainAsked, worker_id=st.just(D0), incarnation=st.integers(1, 4)),
    st.builds(
        DrainEnded, worker_id=st.just(D0), incarnation=st.integers(1, 4), left=st.booleans(), reason=st.just("x")
    ),
    st.just(Passed()),
)


@given(st.lists(st.tuples(st.integers(0, 4000), EVENTS), max_size=40))
def test_incarnations_only_rise_and_the_dead_stay_dead(steps: list[tuple[int, Event]]) -> None:
    membership, now_ms = Membership(), 0
    highest, dead = 0, set[int]()
    for passed_ms, event in steps:
        now_ms += passed_ms
        for action in membership.handle(now_ms, event):
            if isinstance(action, Admitted):
                assert action.incarnation >= highest
                assert action.incarnation not in dead
                highest = action.incarnation
            elif isinstance(action, StateChanged):
                assert action.incarnation not in dead
                if action.state in OVER:
                    dead.add(action.incarnation)
