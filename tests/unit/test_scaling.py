"""Which workers come and go for a wanted size, what is refused, and the names that new ones get."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_rig import info

from cli.scale import sizes
from cluster.config import ConfigError
from cluster.membership import Heartbeat, Membership, Registered
from cluster.roster import Roster
from cluster.scaling import Grow, Shrink, parse_sizes, plan
from tandem.errors import InvalidRequest, ScaleRefused
from tandem.messages import Role
from tandem.request import WorkerId


def membership(*names: str, joining: tuple[str, ...] = ()) -> Membership:
    """With workers that are ready, and some that have only registered."""
    members = Membership(heartbeat_ms=60_000)
    for name in (*names, *joining):
        members.handle(0, Registered(info=info(name, Role(name.split("-")[0])), incarnation=1))
        if name not in joining:
            beat = Heartbeat(worker_id=WorkerId(name), incarnation=1, steps=0, runnable=False, agent_pid=2)
            members.handle(0, beat)
    return members


def steps(
    members: Membership,
    wanted: Mapping[str, int],
    *,
    busy: Mapping[str, int] | None = None,
    draining: tuple[str, ...] = (),
) -> list[Grow | Shrink]:
    return plan(
        members,
        parse_sizes(wanted),
        num_requests=lambda name: (busy or {}).get(name, 0),
        draining=[WorkerId(each) for each in draining],
    )


ALL = ("prefill-0", "decode-0", "decode-1", "decode-2")


def test_a_pool_that_has_its_size_is_left_alone() -> None:
    assert steps(membership(*ALL), {"decode": 3, "prefill": 1}) == []


def test_a_pool_grows_and_another_shrinks_by_those_with_the_fewest_requests() -> None:
    assert steps(membership(*ALL), {"prefill": 3, "decode": 1}, busy={"decode-2": 4, "decode-0": 1}) == [
        Grow(Role.PREFILL, 3, (WorkerId("prefill-0"),)),
        Shrink(Role.DECODE, (WorkerId("decode-1"), WorkerId("decode-0"))),
    ]
    [step] = steps(membership(*ALL), {"decode": 2})
    assert step == Shrink(Role.DECODE, (WorkerId("decode-2"),)), "of as many the highest number"


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({}, "pools: is empty"),
        ({"decoder": 2}, "no role 'decoder'; there are prefill"),
        ({"decode": 65}, "must be 0 to 64"),
    ],
)
def test_nonsense_is_named(wanted: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        parse_sizes(wanted)


@pytest.mark.parametrize(
    ("wanted", "draining", "says"),
    [
        ({"prefill": 0}, (), "prefill-0 is the last ready worker that reads prompts"),
        ({"decode": 0}, (), "is the last ready worker that writes tokens"),
        ({"prefill": 0, "mixed": 1}, (), "the last ready worker that reads prompts"),
        ({"decode": 5}, ("decode-1",), "decode-1 is draining; scale decode when that is over"),
        ({"decode": 2}, ("decode-1",), "decode-1 is draining"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    wanted: dict[str, int], draining: tuple[str, ...], says: str
) -> None:
    with pytest.raises(ScaleRefused, match=says):
        steps(membership(*ALL), wanted, draining=draining)


def test_only_who_is_ready_may_go() -> None:
    members = membership("prefill-0", "decode-0", joining=("decode-1", "decode-2"))
    with pytest.raises(ScaleRefused, match="2 of 3 decode workers would have to go, and 1 are ready"):
        steps(members, {"decode": 1})


def test_new_workers_get_the_lowest_free_names_and_incarnations_go_on() -> None:
    roster = Roster([(WorkerId("decode-0"), Role.DECODE), (WorkerId("decode-1"), Role.DECODE)])
    for name in ("decode-0", "decode-1"):
        roster.up(WorkerId(name), roster.start(WorkerId(name)))
    assert roster.grow(Role.DECODE, 2) == []
    assert roster.grow(Role.DECODE, 4) == ["decode-2", "decode-3"]
    roster.drained(WorkerId("decode-0"), 1, restart=False, until_ms=9, is_gone=False)
    assert roster.grow(Role.DECODE, 4) == ["decode-4"], "one that leaves is no more counted, and still has its name"
    roster.down(WorkerId("decode-0"))
    assert roster.grow(Role.DECODE, 5) == ["decode-0"]
    assert roster.start(WorkerId("decode-0")) == 2


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_a_roster_has_as_many_as_were_wanted_last_and_no_name_twice(targets: list[int]) -> None:
    roster = Roster([])
    most = 0
    for target in targets:
        before = set(roster.roles)
        added = roster.grow(Role.MIXED, target)
        most = max(most, target)
        assert not before & set(added)
        assert len(roster.roles) == most


@pytest.mark.parametrize(
    ("words", "says"),
    [(["decode"], "not like decode=4"), (["decode=-1"], "'decode=-1'"), (["a=1", "a=2"], "a is given twice")],
)
def test_words_that_are_no_sizes_are_named(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sizes(words)
    assert [(each.role, each.num) for each in sizes(["prefill=2", "decode=4"])] == [("prefill", 2), ("decode", 4)]
