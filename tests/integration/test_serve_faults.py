"""What a served cluster does when one of its processes is killed or stopped: it goes on, or it ends as a whole."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from served import Served, alive, wait_until

from engine.fake_runner import expected_tokens
from tandem.request import Sampling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAKE = ["--model", "fake", "--kv-memory", "1MiB", "--heartbeat-ms", "200"]
GREEDY = Sampling(temperature=0.0)
PROMPT = [number * 5 % 256 for number in range(300)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(FAKE, run_dir=tmp_path_factory.mktemp("run")) as served:
        yield served


def serves(cluster: Served) -> bool:
    return cluster.greedy(PROMPT, 20) == expected_tokens(PROMPT, GREEDY, 20, 256)


def test_a_killed_agent_is_replaced_and_its_worker_lives(cluster: Served) -> None:
    before = cluster.workers()["prefill-0"]
    os.kill(before["agent_pid"], signal.SIGKILL)

    def replaced() -> bool:
        agent_pid = cluster.workers()["prefill-0"]["agent_pid"]
        return agent_pid not in (0, before["agent_pid"])

    wait_until(replaced, 30)
    after = cluster.workers()["prefill-0"]
    assert (after["pid"], after["incarnation"]) == (before["pid"], before["incarnation"])
    assert serves(cluster)


def test_a_stopped_worker_is_taken_for_dead_and_replaced(cluster: Served) -> None:
    before = cluster.workers()["decode-1"]
    stopped = psutil.Process(before["pid"])
    stopped.suspend()
    cluster.wait_for(lambda line: line.startswith("decode-1 is dead"), 30)
    assert serves(cluster)
    wait_until(lambda: cluster.workers()["decode-1"]["state"] == "ready", 60)
    assert cluster.workers()["decode-1"]["incarnation"] == before["incarnation"] + 1
    assert not alive([stopped])
    assert serves(cluster)


def test_a_router_that_was_stopped_for_a_while_takes_nobody_for_dead(cluster: Served) -> None:
    before = cluster.workers()
    router = psutil.Process(cluster.status()["router_pid"])
    for _ in range(2):
        router.suspend()
        time.sleep(2)  # three times as long as a worker may be silent
        router.resume()
        assert serves(cluster)
    after = cluster.workers()
    assert {name: (each["pid"], each["state"]) for name, each in after.items()} == {
        name: (each["pid"], "ready") for name, each in before.items()
    }


def test_killing_all_prefill_workers_leaves_a_cluster_that_answers(cluster: Served) -> None:
    os.kill(cluster.workers()["prefill-0"]["pid"], signal.SIGKILL)
    assert serves(cluster)
    wait_until(lambda: cluster.workers()["prefill-0"]["state"] == "ready", 60)
    assert serves(cluster)


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with Served([*FAKE, "--decode", "1"], run_dir=tmp_path) as served:
        tree = served.tree()
        served.process.kill()
        served.process.wait(10)
        wait_until(lambda: not alive(tree), 60)
        done = served.command("status")
        assert done.returncode == 1
        assert "no cluster runs here" in done.stderr
