"""Pools of a real cluster grow, shrink and change roles under load: no stream fails, none is wrong, and all is soon."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from checked_streams import CheckedStreams
from cluster_under_test import ClusterUnderTest
from prometheus_server import Prometheus, prometheus
from promql import GRAFANA, filled
from served import wait_until

from tandem.v1 import admin_pb2, admin_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

SERVES_S = 10.0
FLIPS_S = 2.0


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


def process_of(cluster: ClusterUnderTest, worker: str) -> tuple[int, int]:
    """Its process and its incarnation."""
    [found] = [(each["pid"], each["incarnation"]) for each in cluster.document()["workers"] if each["id"] == worker]
    return found


def flip(cluster: ClusterUnderTest, worker: str, role: str) -> dict[str, Any]:
    """The last that is told of it."""
    done = cluster.command("flip", worker, role, "--json", timeout_s=100)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_roles_go_back_and_forth_under_load_and_no_stream_notices(cluster: ClusterUnderTest) -> None:
    scale(cluster, "decode=2", "prefill=1")
    worker = pools(cluster)["decode"][1]
    before = process_of(cluster, worker)
    with CheckedStreams(cluster.grpc_address) as streams:
        for role in ("prefill", "mixed", "decode", "mixed", "prefill"):
            streams.wait_for_finished(1, 60)
            told = flip(cluster, worker, role)
            assert (told["state"], told["worker"]) == ("done", worker)
            assert told["elapsed_ms"] < 1000 * FLIPS_S, role
            assert worker in pools(cluster)[role]
        wait_until(lambda: worker in [each["prefill_worker"] for each in cluster.document()["requests"]], 60)
        assert process_of(cluster, worker) == before, "its weights stay where they are"
        scale(cluster, "prefill=1", "decode=2")  # by their roles, whatever their names are
        assert {role: len(each) for role, each in pools(cluster).items()} == {"prefill": 1, "decode": 2}
        streams.wait_for_finished(2, 60)
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


def test_what_cannot_be_flipped_is_refused_and_changes_nothing(cluster: ClusterUnderTest) -> None:
    before = pools(cluster)
    [reads] = before["prefill"]
    for words, says in (
        ((reads, "decode"), f"{reads} is the last ready worker that reads prompts; make it mixed, or leave it"),
        ((reads, "prefill"), f"{reads} is a prefill worker already"),
        ((reads, "decoder"), "there is no role 'decoder'; there are prefill, decode, mixed"),
        (("decode-9", "prefill"), "no worker of id 'decode-9' is known"),
    ):
        done = cluster.command("flip", *words)
        assert done.returncode in (1, 2)
        assert says in done.stderr
    assert pools(cluster) == before


def test_a_worker_that_dies_comes_back_in_the_role_that_it_was_given(cluster: ClusterUnderTest) -> None:
    worker = pools(cluster)["decode"][0]
    flip(cluster, worker, "mixed")
    pid, incarnation = process_of(cluster, worker)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: process_of(cluster, worker)[1] > incarnation and worker in pools(cluster).get("mixed", []), 60)
    assert process_of(cluster, worker)[1] == incarnation + 1


BOARDS = sorted((Path(__file__).resolve().parents[2] / "helm/tandem/dashboards").glob("*.json"))
WINDOW = GRAFANA | {"$__rate_interval": "5m", "$cluster": "laptop|"}
# What the load below does, and so may not stay at zero: a panel that shows a line of zeros has data, too.
SEEN = (
    'sum(increase(tandem_router_migrations_total{reason="operator", result="moved"}[5m]))',
    'sum(increase(tandem_router_migrations_total{reason="drain"}[5m]))',
    'sum(increase(tandem_router_refused_requests_total{code="invalid_request"}[5m]))',
    'sum(increase(tandem_router_slo_requests_total{slo="ttft", slo_class="batch"}[5m]))',
    "sum(increase(tandem_router_handoff_seconds_count[5m]))",
    'sum(increase(tandem_router_transferred_blocks_total{how="moved"}[5m]))',
    "sum(increase(tandem_router_cpu_seconds_total[5m]))",
    "sum(tandem_router_resident_bytes) > 10e6",
    "sum(increase(tandem_router_loop_late_seconds_count[5m]))",
    'tandem_routers{state="answering"}',
    'sum(tandem_workers{state="left"})',
)


def queries() -> Iterator[tuple[str, str]]:
    """What every panel and every variable of every board asks, with the names of both."""
    for path in BOARDS:
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                yield f"{path.stem}: {panel['title']}", filled(target["expr"], WINDOW)
        for each in board["templating"]["list"]:
            if each["type"] == "query":
                selector = re.sub(r"label_values\((.*), \w+\)", r"\1", each["definition"])
                yield f"{path.stem}: ${each['name']}", filled(selector, WINDOW)


def move_one(cluster: ClusterUnderTest) -> None:
    """Moves a request that is being decoded; one that ends meanwhile makes room for the next."""

    def moved() -> bool:
        running = [each["id"] for each in cluster.document()["requests"] if each["state"] == "decoding"]
        with grpc.insecure_channel(cluster.grpc_address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            try:
                answer = stub.Migrate(admin_pb2.MigrateRequest(request_id=running[-1]), timeout=30)
            except (grpc.RpcError, IndexError):
                return False
            return bool(answer.outcome == "moved")

    wait_until(moved, 60)


@pytest.mark.prometheus
def test_every_panel_of_every_board_has_data(cluster: ClusterUnderTest) -> None:
    """A real Prometheus scrapes while requests run, move, are refused and miss their targets, and pools change."""
    with prometheus(urlsplit(cluster.url).netloc, cluster="laptop") as asked:
        wait_until(lambda: asked.value("count_over_time(tandem_router_ready_pairs[1m])") >= 2, 30)
        with CheckedStreams(cluster.grpc_address, tokens=400) as streams:
            scale(cluster, "decode=2")
            move_one(cluster)
            body = {"prompt": "late", "max_tokens": 3, "ttft_target_ms": 1, "slo_class": "batch"}
            assert cluster.post("/v1/completions", body).status_code == 200
            assert cluster.post("/v1/completions", {"prompt": "hot", "temperature": 7}).status_code == 400
            scale(cluster, "decode=1")
            streams.wait_for_finished(2, 60)
        wait_until(lambda: all(asked.value(expr) > 0 for expr in SEEN), 20)
        assert empty(asked) == []
        assert {rule["health"] for group in asked.ask("rules")["groups"] for rule in group["rules"]} == {"ok"}
        assert asked.values('ALERTS{alertstate="firing"}') == {}


def empty(asked: Prometheus) -> list[str]:
    """Queries without a series, or with nothing but NaN."""
    asking = list(queries())
    assert len(asking) > 60
    return [
        f"{name}: {expr}" for name, expr in asking if all(math.isnan(value) for value in asked.values(expr).values())
    ]  # fmt: skip
