"""Pools of a real cluster grow and shrink under load: no stream fails, none is wrong, and a new worker serves soon."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from checked_streams import CheckedStreams
from cluster_under_test import ClusterUnderTest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

SERVES_S = 10.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    arguments = ("--prefill", "1", "--decode", "1", "--kv-memory", "1MiB", "--fake-step-ms", "4")
    with ClusterUnderTest(*arguments, run_dir=tmp_path_factory.mktemp("run")) as served:
        yield served


def pools(cluster: ClusterUnderTest) -> dict[str, list[str]]:
    """Ready workers by role."""
    found: dict[str, list[str]] = {}
    for each in cluster.document()["workers"]:
        if each["state"] == "ready":
            found.setdefault(each["role"], []).append(each["id"])
    return found


def scale(cluster: ClusterUnderTest, *words: str) -> list[dict[str, Any]]:
    done = cluster.command("scale", *words, "--json", timeout_s=200)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_pools_grow_and_shrink_under_load_and_no_stream_notices(cluster: ClusterUnderTest) -> None:
    with CheckedStreams(cluster.grpc_address) as streams:
        began_s = time.monotonic()
        told = scale(cluster, "decode=3")
        took_s = time.monotonic() - began_s
        assert {each["worker"] for each in told if each["state"] == "ready"} == {"decode-1", "decode-2"}
        assert pools(cluster)["decode"] == ["decode-0", "decode-1", "decode-2"]
        assert took_s < SERVES_S, "two more workers"
        told = scale(cluster, "prefill=2", "decode=1")
        assert [each["worker"] for each in told if each["state"] == "ready"] == ["prefill-1"]
        assert len([each for each in told if each["state"] == "done"]) == 2
        found = pools(cluster)
        assert (len(found["decode"]), found["prefill"]) == (1, ["prefill-0", "prefill-1"])
        scale(cluster, "decode=2", "prefill=1")
        assert {role: len(names) for role, names in pools(cluster).items()} == {"decode": 2, "prefill": 1}
        streams.wait_for_finished(4, 60)
    assert streams.wrong == []
    document = cluster.settled(60)
    assert not [each for each in document["requests"] if each["state"] == "failed"]
    assert cluster.mishaps() == []


def test_what_has_its_size_is_left_alone_and_nonsense_is_refused(cluster: ClusterUnderTest) -> None:
    before = pools(cluster)
    assert scale(cluster, f"decode={len(before['decode'])}") == []
    for words, says in (
        (("decode=0",), "is the last ready worker that writes tokens"),
        (("decode=65",), "pools.decode: is 65, must be 0 to 64"),
        (("decoder=2",), "there is no role 'decoder'; there are prefill, decode, mixed"),
        (("decode=two",), "'decode=two' is not like decode=4"),
    ):
        done = cluster.command("scale", *words)
        assert done.returncode in (1, 2)
        assert says in done.stderr
    assert pools(cluster) == before
