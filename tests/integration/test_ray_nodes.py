"""A cluster over two nodes of a Ray of somebody else's: one of them loses its power, and another one comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checked_streams import CheckedStreams
from cluster_under_test import ClusterUnderTest
from ray_nodes import RayNode, own_address
from served import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

FAKE = ["--kv-memory", "1MiB", "--heartbeat-ms", "200", "--fake-step-ms", "20", "--max-restarts", "100"]
HEALED_WITHIN_S = 60.0


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RayNode, RayNode, RayNode]]:
    """A head that takes no workers, and two nodes with two CPUs each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    host = own_address()
    with (
        RayNode(host, num_cpus=0) as head,
        RayNode(host, num_cpus=2, address=head.address) as one,
        RayNode(host, num_cpus=2, address=head.address) as other,
    ):
        yield head, one, other


def workers(cluster: ClusterUnderTest) -> list[dict[str, Any]]:
    return [each for each in cluster.document()["workers"] if each["state"] == "ready"]


def on(node: RayNode, cluster: ClusterUnderTest) -> set[str]:
    """The workers that run on the node."""
    pids = {process.pid for process in node.tree()}
    return {each["id"] for each in workers(cluster) if each["pid"] in pids}


def test_a_node_dies_and_another_comes(nodes: tuple[RayNode, RayNode, RayNode], tmp_path: Path) -> None:
    head, one, other = nodes
    with ClusterUnderTest(*FAKE, "--address", head.address, "--host", head.host, run_dir=tmp_path) as cluster:
        assert on(one, cluster), "they are spread"
        assert on(other, cluster)
        with CheckedStreams(cluster.grpc_address) as streams:
            seen = len(cluster.lines)
            other.kill()
            wait_until(
                lambda: any("waits for a machine: all 2 CPUs" in line for line in cluster.lines[seen:]), HEALED_WITHIN_S
            )
            assert len(on(one, cluster)) == 2, "one of three has no place"
            streams.wait_for_finished(4, 60)
            with RayNode(head.host, num_cpus=2, address=head.address) as third:
                wait_until(lambda: len(workers(cluster)) == 3, HEALED_WITHIN_S)
                assert len(on(third, cluster)) == 1
                streams.wait_for_finished(4, 60)
                print(f"longest gap {streams.longest_gap_s:.1f} s", *cluster.lines[seen:], sep="\n")
