"""Readiness: true only of a cluster that served lately; every pair is asked in turn, at a bounded cost."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_rig import info

from cluster.readiness import Readiness, ReadinessConfig, pairs_of
from router.fleet import Fleet
from tandem.messages import Role
from tandem.request import Pair, WorkerId

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}


class Cluster:
    """A fleet and its readiness; `broken` targets let canaries fail, `full` ones have no room."""

    def __init__(self, *names: str) -> None:
        self.fleet = Fleet(report_lag_ms=20)
        self.readiness = Readiness(served_ms=self.fleet.served_ms)
        self.now_ms = 1_000_000
        self.broken: set[str] = set()
        self.full: set[str] = set()
        self.sent: list[tuple[int, Pair]] = []
        for name in names:
            self.up(name)

    def up(self, name: str, incarnation: int = 1) -> None:
        worker = self.fleet.join(info(name, ROLES[name[0]]), incarnation)
        self.fleet.linked(worker, True)

    def down(self, name: str, incarnation: int = 1) -> None:
        worker = self.fleet.get(WorkerId(name), incarnation)
        assert worker is not None
        self.fleet.leave(worker, "killed")

    def run(self, for_ms: int, answer_ms: int = 20) -> None:
        """Looks each 100 ms; a canary is over a moment after it is sent."""
        until_ms = self.now_ms + for_ms
        while self.now_ms < until_ms:
            self.now_ms += 100
            pair = self.readiness.look(self.now_ms, self.fleet)
            if pair is None:
                continue
            self.sent.append((self.now_ms, pair))
            target = pair[1][0]
            if target in self.full:
                self.readiness.ended(self.now_ms + answer_ms, error="no memory", full=True)
            elif target in self.broken:
                self.readiness.ended(self.now_ms + answer_ms, error="no first token")
            else:
                self.fleet.served(pair, self.now_ms)
                self.readiness.ended(self.now_ms + answer_ms, error="")

    @property
    def not_ready(self) -> str:
        return self.readiness.not_ready(self.now_ms)


def names(pair: Pair) -> str:
    return f"{pair[0][0]}>{pair[1][0]}"


@pytest.mark.parametrize(
    ("workers", "pairs"),
    [
        ("p0 p1 d0 d1", "p0>d0 p0>d1 p1>d0 p1>d1"),
        ("p0 d0 m0", "p0>d0 m0>m0"),
        ("p0 m0", "p0>m0 m0>m0"),
        ("m0 m1", "m0>m0 m1>m1"),
        ("d0 d1", "d0>d0 d1>d1"),
        ("p0", "p0>p0"),
        ("", ""),
    ],
)
def test_the_pairs_are_those_that_placement_uses(workers: str, pairs: str) -> None:
    cluster = Cluster(*workers.split())
    found, lacks = pairs_of(cluster.fleet)
    assert " ".join(map(names, found)) == pairs
    assert bool(lacks) == (not pairs)


def test_nothing_is_ready_before_it_has_served() -> None:
    cluster = Cluster("p0", "d0")
    assert cluster.not_ready
    cluster.broken = {"d0"}
    cluster.run(2_000)
    assert "yet" in cluster.not_ready
    assert "p0 -> d0: no first token" in cluster.not_ready
    cluster.broken = set()
    cluster.run(1_000)
    assert cluster.not_ready == ""


def test_an_idle_cluster_asks_all_pairs_in_turn_and_seldom() -> None:
    cluster = Cluster("p0", "p1", "d0", "d1")
    cluster.run(60_000)
    counts = Counter(names(pair) for _, pair in cluster.sent)
    assert set(counts) == {f"{p}>{d}" for p, d in product(("p0", "p1"), ("d0", "d1"))}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert sum(counts.values()) <= 60_000 / cluster.readiness.config.quiet_ms + len(counts)
    assert cluster.not_ready == ""


def test_what_clients_use_is_not_asked_by_canaries_too() -> None:
    cluster = Cluster("p0", "d0")
    cluster.run(1_000)
    cluster.sent.clear()
    for _ in range(30):
        cluster.fleet.served(((WorkerId("p0"), 1), (WorkerId("d0"), 1)), cluster.now_ms)
        cluster.run(1_000)
    assert cluster.sent == []
    assert cluster.not_ready == ""


def test_a_cluster_that_serves_no_more_is_found_out_though_its_workers_say_that_they_are_ready() -> None:
    cluster = Cluster("p0", "d0", "d1")
    cluster.run(20_000)
    cluster.broken = {"d0"}
    cluster.run(20_000)
    assert cluster.not_ready == "", "one pair serves"
    cluster.broken = {"d0", "d1"}
    cluster.run(cluster.readiness.config.lately_ms + cluster.readiness.config.quiet_ms)
    assert "no pair of workers has moved a block" in cluster.not_ready
    cluster.broken = set()
    cluster.run(1_000)
    assert cluster.not_ready == "", "while it fails it is asked often"


def test_a_full_cluster_stays_ready_and_one_that_never_served_does_not_become_so() -> None:
    cluster = Cluster("p0", "d0")
    cluster.run(1_000)
    cluster.full = {"d0"}
    cluster.run(120_000)
    assert cluster.not_ready == ""
    fresh = Cluster("p0", "d0")
    fresh.full = {"d0"}
    fresh.run(5_000)
    assert "no memory" in fresh.not_ready


def test_what_an_incarnation_did_says_nothing_of_the_next_one() -> None:
    cluster = Cluster("p0", "d0")
    cluster.run(1_000)
    cluster.down("d0")
    cluster.up("d0", incarnation=2)
    cluster.broken = {"d0"}
    cluster.run(200)
    assert "yet" in cluster.not_ready


@given(st.lists(st.sampled_from(["d0", "d1", "p1"]), max_size=12), st.integers(2, 5))
def test_whatever_dies_and_breaks_the_last_good_pair_keeps_it_ready(events: list[str], num: int) -> None:
    """p0 and d9 stay well: while they do, the cluster is ready, and canaries stay within their bound."""
    cluster = Cluster("p0", "p1", "d0", "d1", "d9")
    cluster.run(15_000)
    incarnations = dict.fromkeys(("p1", "d0", "d1"), 1)
    for name in events:
        if name in cluster.broken or name.startswith("p"):
            cluster.down(name, incarnations[name])
            incarnations[name] += 1
            cluster.up(name, incarnations[name])
            cluster.broken.discard(name)
        else:
            cluster.broken.add(name)
        before = len(cluster.sent)
        cluster.run(1_000 * num)
        assert cluster.not_ready == ""
        assert len(cluster.sent) - before <= 1_000 * num / cluster.readiness.config.again_ms + 1


def test_bad_bounds_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="lately_ms: is 10"):
        ReadinessConfig(lately_ms=10)
    with pytest.raises(ValueError, match="again_ms: is 0"):
        ReadinessConfig(again_ms=0)
