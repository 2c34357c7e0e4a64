"""A worker that is stopped, or whose engine hangs while it answers, is found in 5 s; its streams go on within 10 s."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from checked_streams import Streams
from cluster_under_test import ClusterUnderTest
from served import wait_until

from cluster.chaos_processes import name_of, send

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(240)]

FOUND_S, GAP_S = 5.0, 10.0
SALTS = itertools.count(
    37, 2
)  # prompts of their own for each test: a worker that has them cached would take all streams
WEDGE = Path(__file__).parent / "wedge"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    """With the default bounds; engines can be wedged."""
    wedged = tmp_path_factory.mktemp("wedged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(WEDGE))
        patch.setenv("WEDGE_DIR", str(wedged))
        run_dir = tmp_path_factory.mktemp("run")
        arguments = ("--prefill", "2", "--decode", "2", "--kv-memory", "2MiB", "--fake-step-ms", "10")
        with ClusterUnderTest(*arguments, run_dir=run_dir) as served:
            yield served


def worker(cluster: ClusterUnderTest, name: str) -> dict[str, Any]:
    (found,) = [each for each in cluster.document()["workers"] if each["id"] == name]
    return dict(found)


def wedge(pid: int) -> None:
    (Path(os.environ["WEDGE_DIR"]) / str(pid)).touch()


def stop(pid: int) -> None:
    psutil.Process(pid).suspend()


@pytest.mark.parametrize("name", ["decode-0", "prefill-0"])
@pytest.mark.parametrize("harm", [stop, wedge])
def test_a_worker_that_gets_nowhere_is_found_and_its_streams_go_on(
    cluster: ClusterUnderTest, harm: Callable[[int], None], name: str
) -> None:
    cluster.settled(60)
    streams = Streams(cluster, 6, salt=next(SALTS))
    streams.wait_for_tokens(50)
    if name.startswith("decode"):
        wait_until(lambda: worker(cluster, name)["running"] > 0, 15)  # without work it hangs in nothing
    before = worker(cluster, name)
    harm(before["pid"])
    harmed_s, more = time.monotonic(), None
    if harm is wedge and name.startswith("prefill"):
        more = Streams(cluster, 8, salt=next(SALTS))
        wait_until(lambda: worker(cluster, name)["running"] > 0, 15)
        harmed_s = time.monotonic()
    wait_until(lambda: worker(cluster, name)["state"] == "dead", 15)
    found_s = time.monotonic() - harmed_s
    print(f"{harm.__name__} {name}: dead after {found_s:.2f} s")
    assert found_s < FOUND_S + 0.5, "the half second is for looking"
    streams.check(gap_s_max=GAP_S)
    if more is not None:
        more.check(gap_s_max=GAP_S)
    assert not [each for each in cluster.document()["requests"] if each["state"] == "failed"]
    wait_until(lambda: worker(cluster, name)["incarnation"] > before["incarnation"], 60)
    cluster.settled(60)


def ready(cluster: ClusterUnderTest) -> httpx.Response:
    return httpx.get(f"{cluster.url}/ready", timeout=5)


def tell_agents(workers: list[psutil.Process], number: signal.Signals) -> int:
    """Sends a signal to all agents that there are now, and says to how many."""
    agents = []
    for each in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            agents += [child for child in each.children() if name_of(child) == "agent"]
    for agent in agents:
        send(agent, number)
    return len(agents)


def test_ready_says_no_when_workers_answer_and_none_serves(cluster: ClusterUnderTest) -> None:
    """All agents are stopped, and each that is started in their place: all workers beat, and no block moves."""
    cluster.settled(60)
    assert ready(cluster).status_code == 200
    document = cluster.document()
    assert document["not_ready"] == ""
    assert {(each["prefill_worker"], each["decode_worker"]) for each in document["pairs"]} == {
        (f"prefill-{p}", f"decode-{d}") for p in range(2) for d in range(2)
    }
    assert not [each for each in document["requests"] if "canary" in each["id"]]
    pages = httpx.get(f"{cluster.url}/metrics", timeout=5).text
    assert "canary" not in pages
    workers = [psutil.Process(each["pid"]) for each in document["workers"]]
    stopped_s = time.monotonic()
    assert tell_agents(workers, signal.SIGSTOP) == len(workers) > 0
    stopping = True

    def stopped_agents() -> None:
        """Whoever starts an agent anew gets it stopped again, before it serves."""
        while stopping:
            tell_agents(workers, signal.SIGSTOP)
            time.sleep(0.05)

    thread = threading.Thread(target=stopped_agents)
    thread.start()
    try:
        wait_until(lambda: ready(cluster).status_code == 503, 20)
        print(f"not ready after {time.monotonic() - stopped_s:.1f} s: {ready(cluster).json()['reason']}")
        assert "no pair of workers has moved a block" in ready(cluster).json()["reason"]
        assert cluster.document()["not_ready"]
    finally:
        stopping = False
        thread.join()
        tell_agents(workers, signal.SIGCONT)
    wait_until(lambda: ready(cluster).status_code == 200, 60)
    cluster.settled(60)
