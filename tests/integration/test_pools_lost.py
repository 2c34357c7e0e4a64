"""A whole pool is killed under load: the other one serves alone until it heals, and nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from checked_streams import Streams
from cluster_under_test import ClusterUnderTest
from served import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    arguments = ("--prefill", "2", "--decode", "2", "--kv-memory", "2MiB", "--fake-step-ms", "10")
    run_dir: Path = tmp_path_factory.mktemp("run")
    with ClusterUnderTest(*arguments, "--max-restarts", "50", run_dir=run_dir) as served:
        yield served


def pool(cluster: ClusterUnderTest, role: str) -> list[dict[str, Any]]:
    return [each for each in cluster.document()["workers"] if each["role"] == role]


def finished(cluster: ClusterUnderTest, num_tokens: int) -> list[dict[str, Any]]:
    """The answers of that length."""
    requests = cluster.document()["requests"]
    return [each for each in requests if each["state"] == "finished" and each["tokens"] == num_tokens]


@pytest.mark.parametrize(("lost", "other"), [("prefill", "decode"), ("decode", "prefill")])
def test_the_other_pool_serves_alone_until_the_lost_one_is_back(
    cluster: ClusterUnderTest, lost: str, other: str
) -> None:
    cluster.settled(60)
    streams = Streams(cluster, 6, num_tokens=1_000)
    streams.wait_for_tokens(20)
    before = {each["id"]: each["incarnation"] for each in pool(cluster, lost)}
    for each in pool(cluster, lost):
        os.kill(each["pid"], signal.SIGKILL)
    num_tokens = 50 + len(lost)
    Streams(cluster, 4, salt=101, num_tokens=num_tokens).check(gap_s_max=10)
    alone = finished(cluster, num_tokens)
    assert len(alone) == 4
    assert {each["mode"] for each in alone} == {"local"}
    assert all(each["decode_worker"].startswith(other) for each in alone)
    assert all(f"no {lost} worker is ready" in each["reason"] for each in alone)
    assert httpx.get(f"{cluster.url}/ready", timeout=5).status_code == 200, "it serves"
    streams.check(gap_s_max=10)
    assert not [each for each in cluster.document()["requests"] if each["state"] != "finished"]

    def is_back() -> bool:
        workers = pool(cluster, lost)
        return all(each["state"] == "ready" and each["incarnation"] > before[each["id"]] for each in workers)

    wait_until(is_back, 90)
    wait_until(lambda: cluster.document()["not_ready"] == "", 30)
    Streams(cluster, 4, salt=53, num_tokens=num_tokens + 20).check(gap_s_max=10)
    assert {each["mode"] for each in finished(cluster, num_tokens + 20)} == {"prefill"}, (
        "what is read goes to its pool again"
    )
    cluster.settled(60)
