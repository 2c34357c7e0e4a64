"""Decode workers run out of KV memory under load: KV goes to host memory and comes back, and no token is wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checked_streams import Streams
from cluster_under_test import ClusterUnderTest
from served import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

# 128 blocks of 16 tokens; answers are longer than a decode worker expects while it has seen none.
SMALL = ("--kv-memory", "16KiB", "--fake-step-ms", "3", "--no-rebalance", "--no-prefix-cache")
NUM_STREAMS, NUM_TOKENS = 6, 700


@contextmanager
def served(tmp_path: Path, *arguments: str) -> Iterator[ClusterUnderTest]:
    with ClusterUnderTest(*SMALL, *arguments, run_dir=tmp_path) as cluster:
        yield cluster


def swap_of(cluster: ClusterUnderTest, role: str) -> list[dict[str, Any]]:
    return [each["swap"] for each in cluster.document()["workers"] if each["role"] == role]


def recomputed(document: dict[str, Any]) -> int:
    return sum(int(each["tokens_recomputed"]) for each in document["requests"])


def test_what_does_not_fit_is_swapped_and_nothing_is_computed_again(tmp_path: Path) -> None:
    with served(tmp_path, "--prefill", "1", "--decode", "1", "--swap-memory", "16KiB") as cluster:
        Streams(cluster, NUM_STREAMS, num_tokens=NUM_TOKENS).check(gap_s_max=60)
        document = cluster.settled()
        (swap,) = swap_of(cluster, "decode")
        print(swap)
        assert swap["total"] == 128
        assert swap["swapped_out"] == swap["brought_back"] > 0
        assert (swap["used"], swap["requests"], swap["recomputed"]) == (0, 0, 0)
        assert recomputed(document) == 0
        assert cluster.mishaps() == []


def test_without_swap_memory_it_is_computed_again(tmp_path: Path) -> None:
    with served(tmp_path, "--prefill", "1", "--decode", "1", "--swap-memory", "0") as cluster:
        Streams(cluster, NUM_STREAMS, num_tokens=NUM_TOKENS).check(gap_s_max=60)
        document = cluster.settled()
        (swap,) = swap_of(cluster, "decode")
        assert (swap["total"], swap["swapped_out"]) == (0, 0)
        assert swap["recomputed"] > 0
        assert recomputed(document) > 0


def test_what_was_swapped_out_where_a_worker_dies_goes_on_elsewhere(tmp_path: Path) -> None:
    with served(tmp_path, "--prefill", "1", "--decode", "2", "--swap-memory", "16KiB") as cluster:
        streams = Streams(cluster, 2 * NUM_STREAMS, num_tokens=NUM_TOKENS)

        def swapped() -> list[dict[str, Any]]:
            return [each for each in cluster.document()["workers"] if each["swap"]["requests"]]

        wait_until(lambda: bool(swapped()), 60)
        os.kill(swapped()[0]["pid"], signal.SIGKILL)
        streams.check(gap_s_max=60)
        document = cluster.settled(90)
        assert not [each for each in document["requests"] if each["state"] != "finished"]
        assert all(each["used"] == 0 for each in swap_of(cluster, "decode"))
