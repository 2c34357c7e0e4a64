"""What the death of each part of a local Ray, and of the process that holds it, does to streams that check tokens."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from checked_streams import CheckedStreams
from cluster_under_test import ClusterUnderTest
from served import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(240)]

RECOVERED_WITHIN_S = 30.0  # on a machine that does other things too; docs/ray.md says what it takes on an idle one
FAKE = ["--kv-memory", "1MiB", "--heartbeat-ms", "500", "--fake-step-ms", "20", "--max-restarts", "100"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    with ClusterUnderTest(*FAKE, run_dir=tmp_path_factory.mktemp("run")) as served:
        yield served


def process_named(cluster: ClusterUnderTest, name: str) -> psutil.Process:
    """The process of this cluster's tree with this name, or with it in its command line."""
    [found] = [
        each
        for each in cluster.tree()
        if each.status() != psutil.STATUS_ZOMBIE and (each.name() == name or name in " ".join(each.cmdline()[:3]))
    ]
    return found


def incarnations(cluster: ClusterUnderTest) -> dict[str, int]:
    return {each["id"]: each["incarnation"] for each in cluster.document()["workers"]}


def all_ready(cluster: ClusterUnderTest) -> bool:
    workers = cluster.document()["workers"]
    return len(workers) == 3 and all(each["state"] == "ready" for each in workers)


def new_line(cluster: ClusterUnderTest, wanted: Callable[[str], bool], *, after: int) -> None:
    wait_until(lambda: any(wanted(line) for line in cluster.lines[after:]), RECOVERED_WITHIN_S)


def report(what: str, seconds: float, streams: CheckedStreams) -> None:
    print(f"{what}: whole again after {seconds:.1f} s, longest gap {streams.longest_gap_s:.1f} s")


def test_a_killed_gcs_is_started_again_and_no_stream_notices(cluster: ClusterUnderTest) -> None:
    before = incarnations(cluster)
    with CheckedStreams(cluster.grpc_address) as streams:
        for _ in range(2):  # the second one was started by us
            seen, began_s = len(cluster.lines), time.monotonic()
            process_named(cluster, "gcs_server").kill()
            new_line(cluster, lambda line: "gcs_server ended and is started again" in line, after=seen)
            streams.wait_for_tokens(100, 30)
        report("gcs_server killed", time.monotonic() - began_s, streams)
        assert streams.longest_gap_s < 2.0, "tokens do not pass through Ray"
        streams.wait_for_finished(4, 60)
    assert incarnations(cluster) == before


def test_a_worker_that_dies_while_the_gcs_is_dead_is_replaced(cluster: ClusterUnderTest) -> None:
    before = incarnations(cluster)
    with CheckedStreams(cluster.grpc_address) as streams:
        victim = next(each for each in cluster.document()["workers"] if each["id"] == "decode-0")
        began_s = time.monotonic()
        process_named(cluster, "gcs_server").kill()
        psutil.Process(victim["pid"]).kill()
        wait_until(lambda: incarnations(cluster)["decode-0"] > before["decode-0"], RECOVERED_WITHIN_S)
        wait_until(lambda: all_ready(cluster), RECOVERED_WITHIN_S)
        report("gcs_server and decode-0 killed", time.monotonic() - began_s, streams)
        streams.wait_for_finished(4, 60)
    cluster.settled()


def test_a_gcs_that_hangs_is_replaced(cluster: ClusterUnderTest) -> None:
    with CheckedStreams(cluster.grpc_address) as streams:
        seen, began_s = len(cluster.lines), time.monotonic()
        process_named(cluster, "gcs_server").suspend()
        new_line(cluster, lambda line: "gcs_server ended and is started again" in line, after=seen)
        report("gcs_server stopped for good", time.monotonic() - began_s, streams)
        assert streams.longest_gap_s < 2.0
    cluster.settled()


@pytest.mark.parametrize("victim", ["raylet", "cluster.pools_process"])
def test_all_workers_die_with_their_node_and_every_stream_goes_on(cluster: ClusterUnderTest, victim: str) -> None:
    before = incarnations(cluster)
    with CheckedStreams(cluster.grpc_address) as streams:
        began_s = time.monotonic()
        process_named(cluster, victim).kill()
        wait_until(lambda: all(now > before[name] for name, now in incarnations(cluster).items()), RECOVERED_WITHIN_S)
        wait_until(lambda: all_ready(cluster), RECOVERED_WITHIN_S)
        report(f"{victim} killed", time.monotonic() - began_s, streams)
        streams.wait_for_finished(8, 60)
        report(f"{victim} killed", time.monotonic() - began_s, streams)
    cluster.settled()
    assert process_named(cluster, "gcs_server").is_running(), "nothing of the old Ray is left"


def test_a_supervisor_that_stands_still_harms_no_stream(cluster: ClusterUnderTest) -> None:
    before, seen = incarnations(cluster), len(cluster.lines)
    holder = process_named(cluster, "cluster.pools_process")
    with CheckedStreams(cluster.grpc_address) as streams:
        for process in (psutil.Process(cluster.process.pid), holder):
            process.suspend()
        streams.wait_for_finished(8, 60)
        for process in (holder, psutil.Process(cluster.process.pid)):
            process.send_signal(signal.SIGCONT)
        streams.wait_for_finished(4, 60)
        assert streams.longest_gap_s < 2.0
    assert incarnations(cluster) == before
    assert cluster.lines[seen:] == []
