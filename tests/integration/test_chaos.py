"""`tandem chaos run` on a real cluster: what it breaks heals, and what it is shown broken it tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, tandem

from cluster.chaos_plan import FaultKind

pytestmark = [
    pytest.mark.usefixtures("no_process_left"),
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(420),
]
FAULTS_S = 50
STATES = "handoff.sending,migration.precopy,target.sealed"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Served]:
    """Two prefill and two decode workers over the fake model, that take faults."""
    arguments = ["--model", "fake", "--prefill", "2", "--decode", "2", "--fake-step-ms", "5", "--allow-faults"]
    with Served([*arguments, "--max-restarts", "1000", "--restart-delay-max-ms", "1000"], run_dir=tmp_path) as served:
        yield served


def test_every_fault_leaves_every_token_as_it_was(cluster: Served) -> None:
    kinds = ",".join(kind for kind in FaultKind if kind is not FaultKind.REDIS_DOWN)
    asked = ["--seed", "7", "--duration", str(FAULTS_S), "--every", "3", "--clients", "8", "--recovery", "20"]
    done = cluster.command("chaos", "run", "--faults", kinds, "--states", STATES, *asked, "--json", timeout_s=400)
    told = json.loads(done.stdout)
    assert done.returncode == 0, (told["broken"], told["examples"], done.stderr)
    assert told["lost"] == told["doubled"] == told["wrong"] == 0
    assert told["leaks"] == []
    assert len(told["faults"]) + len(told["unmet"]) == told["planned"] >= 10
    assert sum(each["in_flight"] for each in told["faults"]) > 0
    assert told["finished"] > 20
    assert told["moves"]["moved"] > 0
    assert told["audits"] >= 2
    assert {entry["what"] for entry in told["timeline"]} >= {"fault", "move", "audit"}


def test_a_cluster_that_takes_no_faults_is_not_struck_with_them(tmp_path: Path) -> None:
    with Served(["--model", "fake", "--prefill", "1", "--decode", "1"], run_dir=tmp_path) as served:
        for arguments, says in (
            (["--faults", "partition"], "--faults: partition: the cluster takes no faults"),
            (["--faults", "redis-down"], "--faults: redis-down needs a cluster that keeps its state in Redis"),
            (["--faults", "kill", "--kill-router"], "--kill-router: needs a cluster with Redis"),
            (["--faults", "kill", "--states", "all"], "--states: the cluster takes no faults"),
        ):
            done = served.command("chaos", "run", *arguments)
            assert (done.returncode, done.stdout) == (2, "")
            assert says in done.stderr
        assert len(served.workers()) == 2


def test_an_impossible_plan_is_refused_by_name() -> None:
    for arguments, says in (
        (["--faults", "flood"], "--faults: there is no fault 'flood'"),
        (["--states", "handoff.lost"], "--states: there is no state 'handoff.lost'"),
        (["--duration", "5"], "--duration: is 5 s, too short"),
    ):
        done = tandem("chaos", "run", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_no_cluster_is_one_line() -> None:
    done = tandem("chaos", "run", "--run-dir", "/nonexistent")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
