"""`tandem chaos run` on a real cluster: what it breaks heals, and what it is shown broken it tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, tandem

pytestmark = [pytest.mark.usefixtures("no_process_left")]
FAULTS_S = 45


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Served]:
    """Two prefill and two decode workers over the fake model."""
    arguments = ["--model", "fake", "--prefill", "2", "--decode", "2", "--max-restarts", "1000"]
    with Served(arguments, run_dir=tmp_path) as served:
        yield served


def test_kills_stops_and_cancels_lose_no_token(cluster: Served) -> None:
    asked = ["--seed", "7", "--duration", str(FAULTS_S), "--every", "4", "--clients", "8", "--recovery", "20", "--json"]
    done = cluster.command("chaos", "run", *asked)
    told = json.loads(done.stdout)
    assert done.returncode == 0, (told["broken"], told["examples"], done.stderr)
    assert told["lost"] == told["doubled"] == told["wrong"] == 0
    assert told["leaks"] == []
    assert len(told["faults"]) == told["planned"] >= 8
    assert sum(each["in_flight"] for each in told["faults"]) > 0
    assert told["finished"] > 20
    assert told["cancelled"] > 0


def test_an_impossible_plan_is_refused_by_name() -> None:
    for arguments, says in (
        (["--faults", "flood"], "--faults: there is no fault 'flood'"),
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
