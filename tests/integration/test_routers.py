"""Two routers behind one address, on a real cluster: both serve, either may die or hang, no worker goes with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import psutil
import pytest
from cluster_under_test import ClusterUnderTest
from redis_server import redis_server
from served import wait_until

from engine.fake_runner import expected_tokens
from tandem.client import Client
from tandem.errors import TandemError, Unavailable
from tandem.request import Sampling
from tandem.v1 import admin_pb2 as pb
from tandem.v1 import admin_pb2_grpc, worker_pb2, worker_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

WORKERS = {"prefill-0", "decode-0", "decode-1"}
ROUTERS = ("router-0", "router-1")
GREEDY = Sampling(temperature=0.0)
PROMPT = [number * 5 % 256 for number in range(100)]
LONG = 7000
CUT_OFF_S = 60.0  # a minority is believed, or ended, after 30 s


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    with redis_server() as redis:
        arguments = (
            "--routers", "2", "--redis", redis.url, "--prefill", "1", "--decode", "2", "--kv-memory", "1MiB",
            "--fake-step-ms", "4", "--no-rebalance", "--heartbeat-ms", "300", "--max-restarts", "100",
        )  # fmt: skip
        with ClusterUnderTest(*arguments, run_dir=tmp_path_factory.mktemp("run")) as served:
            yield served


def internal(cluster: ClusterUnderTest, router: str) -> str:
    [address] = [each["address"] for each in cluster.document()["routers"] if each["id"] == router]
    return str(address)


def asked_at(address: str) -> pb.StatusResponse:
    """The whole status, asked of one router."""
    with grpc.insecure_channel(address) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        answer: pb.StatusResponse = stub.Status(pb.StatusRequest(include_finished=True), timeout=10)
        return answer


def pid_of(cluster: ClusterUnderTest, router: str) -> int:
    [pid] = [each["pid"] for each in cluster.document()["routers"] if each["id"] == router]
    return int(pid)


def worker_pids(cluster: ClusterUnderTest) -> dict[str, int]:
    return {each["id"]: each["pid"] for each in cluster.document()["workers"]}


def whole(cluster: ClusterUnderTest) -> bool:
    """Whether both routers are up and hold all workers ready."""
    try:
        routers = cluster.document()["routers"]
    except grpc.RpcError:  # it came to the one that has just died
        return False
    return all(each["up"] and set(each["workers_ready"]) == WORKERS for each in routers)


def completion(cluster: ClusterUnderTest, name: str) -> httpx.Response:
    """One completion over a connection of its own."""
    body = {"prompt": f"say {name}", "max_tokens": 5, "temperature": 0}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)


class Knocking:
    """Completions one after another, each over a new connection, on some threads, until `end`."""

    def __init__(self, cluster: ClusterUnderTest, num_threads: int = 2) -> None:
        self._cluster = cluster
        self._over = threading.Event()
        self.answers: list[tuple[float, int]] = []  # when it was asked, and the status
        self.errors: list[tuple[float, Exception]] = []
        self._threads = [threading.Thread(target=self._knock, args=(number,)) for number in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def _knock(self, number: int) -> None:
        count = 0
        while not self._over.is_set():
            began_s = time.monotonic()
            count += 1
            try:
                self.answers.append((began_s, completion(self._cluster, f"{number} {count}").status_code))
            except httpx.TransportError as error:
                self.errors.append((began_s, error))

    def answered_since(self, since_s: float) -> int:
        return sum(began_s > since_s for began_s, _ in self.answers)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(70)
            assert not thread.is_alive()


class Streaming:
    """A long answer from one router, checked token by token."""

    def __init__(self, address: str, name: str, num_tokens: int = LONG) -> None:
        prompt = [*PROMPT, *name.encode()]
        self.name, self.num = name, 0
        self.error: Exception | None = None
        self._expected = expected_tokens(prompt, GREEDY, num_tokens, 256)
        self._enough = threading.Event()
        self._client = Client(address, timeout_s=120)
        self._stream = self._client.stream(prompt, request_id=name, temperature=0.0, max_tokens=num_tokens)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_until(lambda: self.num > 3 or self.error is not None, 30)

    def _read(self) -> None:
        ids: list[int] = []
        try:
            for piece in self._stream:
                ids += piece.token_ids
                self.num = len(ids)
                if self._enough.is_set():
                    break
        except TandemError as error:
            self.error = error
        finally:
            assert isinstance(self._stream, Generator)
            self._stream.close()  # here, and not whenever it is collected: the request ends with it
            assert ids == self._expected[: len(ids)]

    def goes_on(self) -> None:
        seen = self.num
        wait_until(lambda: self.num > seen + 20 or self.error is not None, 30)
        assert self.error is None

    def fails(self) -> None:
        """Waits for its end by an error."""
        wait_until(lambda: self.error is not None, 30)
        self.end()

    def end(self) -> None:
        """Leaves, once the last pieces have been compared."""
        self._enough.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._client.close()


def test_both_routers_serve_http_and_grpc(cluster: ClusterUnderTest) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: completion(cluster, str(number)), range(60)))
    assert {each.status_code for each in answers} == {200}
    http = Counter(each["router"] for each in cluster.document()["requests"])
    assert set(http) == set(ROUTERS), http
    for number in range(30):
        with Client(cluster.grpc_address) as client:
            client.generate(PROMPT, request_id=f"grpc-{number}", temperature=0.0, max_tokens=2)
    grpcs = [each for each in cluster.document()["requests"] if each["id"].startswith("grpc-")]
    assert {each["router"] for each in grpcs} == set(ROUTERS)
    assert len(grpcs) == 30
    shown = cluster.command("status").stdout
    assert "router-1" in shown
    assert "redis://" in shown


def test_status_migrate_and_cancel_by_either_router(cluster: ClusterUnderTest) -> None:
    streams = {router: Streaming(internal(cluster, router), f"{router}-long") for router in ROUTERS}
    for asked, other in (ROUTERS, ROUTERS[::-1]):
        status = asked_at(internal(cluster, asked))
        assert {each.id: each.router for each in status.requests if each.id.endswith("-long")} == {
            f"{router}-long": router for router in ROUTERS
        }
        [request] = [each for each in status.requests if each.id == f"{other}-long"]
        target = {"decode-0": "decode-1", "decode-1": "decode-0"}[request.decode_worker]
        with grpc.insecure_channel(internal(cluster, asked)) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            move = stub.Migrate(pb.MigrateRequest(request_id=f"{other}-long", to=target), timeout=30)
            assert (move.outcome, move.to) == ("moved", target)
            with pytest.raises(grpc.RpcError) as refused:
                stub.Migrate(pb.MigrateRequest(request_id=f"{other}-long", to="nobody"), timeout=30)
            trailers: Any = refused.value.trailing_metadata()
            assert dict(trailers)["tandem-code"] == "invalid_request"
            with pytest.raises(grpc.RpcError, match="2 requests end in '-long'"):
                stub.Migrate(pb.MigrateRequest(request_id="-long"), timeout=30)
    for stream in streams.values():
        stream.goes_on()
    for router, other in (ROUTERS, ROUTERS[::-1]):
        with Client(internal(cluster, other)) as client:
            assert client.cancel(f"{router}-long")
            assert not client.cancel("nobody's")
        streams[router].fails()
    cluster.settled()


def test_a_killed_router_refuses_nobody_and_comes_back_with_all_workers(cluster: ClusterUnderTest) -> None:
    before, victim = worker_pids(cluster), pid_of(cluster, "router-0")
    knocking = Knocking(cluster)
    wait_until(lambda: len(knocking.answers) > 10, 30)
    os.kill(victim, signal.SIGKILL)
    killed_s = time.monotonic()
    for number in range(10):
        grpc_answer(cluster, f"after-{number}")
    wait_until(lambda: knocking.answered_since(killed_s) > 20, 60)
    wait_until(lambda: whole(cluster), 60)
    knocking.end()
    assert {status for _, status in knocking.answers} == {200}
    assert [error for _, error in knocking.errors if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)] == []
    assert [began_s for began_s, _ in knocking.errors if began_s > killed_s] == [], "whoever came later was served"
    assert worker_pids(cluster) == before
    assert pid_of(cluster, "router-0") != victim
    with Client(internal(cluster, "router-0")) as client:
        assert list(client.generate(PROMPT, temperature=0.0, max_tokens=9).token_ids) == expected_tokens(
            PROMPT, GREEDY, 9, 256
        )


def grpc_answer(cluster: ClusterUnderTest, name: str) -> None:
    """An answer over a new connection; one that came to a router that was just dying is asked for again."""
    for _ in range(4):
        try:
            with Client(cluster.grpc_address, timeout_s=30) as client:
                client.generate(PROMPT, request_id=name, temperature=0.0, max_tokens=2)
                return
        except Unavailable:
            continue
    raise AssertionError("four times unavailable")


def test_a_router_that_is_stopped_for_a_while_harms_nobody(cluster: ClusterUnderTest) -> None:
    before = worker_pids(cluster)
    pid = pid_of(cluster, "router-1")
    streams = [Streaming(internal(cluster, router), f"pause-{router}") for router in ROUTERS]
    alive = internal(cluster, "router-0")
    psutil.Process(pid).suspend()
    try:
        stopped_s = time.monotonic()
        streams[0].goes_on()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: completion(cluster, str(number)), range(8)))
        assert {each.status_code for each in answers} == {200}
        assert [(each.id, each.up) for each in asked_at(alive).routers] == [("router-0", True), ("router-1", False)]
        assert cluster.status_printed()["model"] == "fake", "a command finds the one that answers"
        time.sleep(max(0.0, 3.0 - (time.monotonic() - stopped_s)))
    finally:
        psutil.Process(pid).resume()
    for stream in streams:
        stream.goes_on()
        stream.end()
    assert worker_pids(cluster) == before
    assert pid_of(cluster, "router-1") == pid
    cluster.settled()


def test_a_router_that_stays_stopped_is_ended_and_started_again(cluster: ClusterUnderTest) -> None:
    before, pid = worker_pids(cluster), pid_of(cluster, "router-1")
    lines = len(cluster.lines)
    psutil.Process(pid).suspend()
    began_s = time.monotonic()
    knocking = Knocking(cluster)
    wait_until(lambda: any(line.startswith("router-1 is stuck") for line in cluster.lines[lines:]), 40)
    assert 10 < time.monotonic() - began_s < 30
    assert knocking.answered_since(began_s) > 20
    wait_until(lambda: whole(cluster), 60)
    knocking.end()
    assert {status for _, status in knocking.answers} == {200}
    assert knocking.errors == []
    assert worker_pids(cluster) == before
    assert pid_of(cluster, "router-1") != pid


@pytest.mark.parametrize("asked", ROUTERS)
def test_a_worker_is_drained_under_load_of_both_routers(cluster: ClusterUnderTest, asked: str) -> None:
    streams = [
        Streaming(internal(cluster, router), f"drain-{asked}-{router}-{number}")
        for router in ROUTERS
        for number in range(3)
    ]
    [before] = [each for each in cluster.document()["workers"] if each["id"] == "decode-0"]
    with grpc.insecure_channel(internal(cluster, asked)) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        states = [each.state for each in stub.Drain(pb.DrainRequest(worker="decode-0", restart=True), timeout=90)]
    assert list(dict.fromkeys(states)) == ["emptying", "leaving", "starting", "done"]
    for stream in streams:
        stream.goes_on()
    status = cluster.document()
    mine = [each for each in status["requests"] if each["id"].startswith(f"drain-{asked}-")]
    assert len(mine) == 6
    assert {each["num_replacements"] for each in mine} == {0}, "all were moved, none was placed again"
    [after] = [each for each in status["workers"] if each["id"] == "decode-0"]
    assert after["incarnation"] == before["incarnation"] + 1
    for stream in streams:
        stream.end()
    wait_until(lambda: whole(cluster), 30)
    cluster.settled()


def test_a_drain_whose_router_dies_is_taken_back_by_the_other(cluster: ClusterUnderTest) -> None:
    stream = Streaming(internal(cluster, "router-1"), "stays-1")
    home = next(each["decode_worker"] for each in cluster.document()["requests"] if each["id"] == "stays-1")
    held = Streaming(internal(cluster, "router-1"), "stays-2")
    with grpc.insecure_channel(internal(cluster, "router-0")) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Drain(pb.DrainRequest(worker="prefill-0", restart=True), timeout=60)
        next(call)
    os.kill(pid_of(cluster, "router-0"), signal.SIGKILL)
    wait_until(lambda: whole(cluster), 60)
    assert {each["state"] for each in cluster.document()["workers"]} == {"ready"}, home
    for each in (stream, held):
        each.goes_on()
        each.end()
    cluster.settled()


def hold_for_dead(cluster: ClusterUnderTest, router: str, *workers: str) -> None:
    """Makes one router take workers for dead that all others see alive, as if it alone were cut off from them."""
    document = cluster.document()
    with grpc.insecure_channel(internal(cluster, router)) as channel:
        registry = worker_pb2_grpc.RegistryStub(channel)  # type: ignore[no-untyped-call]
        for each in (each for each in document["workers"] if each["id"] in workers):
            reply = registry.Register(impostor(each), timeout=10, metadata=cluster.access.metadata)
            assert reply.refused == ""


def impostor(worker: dict[str, Any]) -> worker_pb2.RegisterRequest:
    """A later incarnation of a worker, which never says another word."""
    return worker_pb2.RegisterRequest(
        worker_id=worker["id"], role=worker["role"], control="127.0.0.1:1", endpoint="nowhere", pid=1, agent_pid=1,
        model=worker["model"], namespace="fake", fingerprint="f", exact=True, dtype=worker["dtype"], block_size=16,
        total_blocks=worker["kv_blocks"]["total"], context_tokens=8192, block_bytes=128,
        incarnation=worker["incarnation"] + 1000,
    )  # fmt: skip


def test_a_router_that_is_cut_off_takes_no_worker_along(cluster: ClusterUnderTest) -> None:
    before, pid = worker_pids(cluster), pid_of(cluster, "router-1")
    stream = Streaming(internal(cluster, "router-0"), "beside", LONG)
    lines = len(cluster.lines)
    hold_for_dead(cluster, "router-1", *WORKERS)
    stream.goes_on()
    stream.end()
    wait_until(lambda: any(line.startswith("router-1 is cut off") for line in cluster.lines[lines:]), CUT_OFF_S)
    wait_until(lambda: whole(cluster), 60)
    assert worker_pids(cluster) == before
    assert pid_of(cluster, "router-1") != pid


def test_a_worker_that_one_router_has_lost_for_long_is_replaced(cluster: ClusterUnderTest) -> None:
    before = worker_pids(cluster)
    hold_for_dead(cluster, "router-0", "decode-1")
    wait_until(lambda: worker_pids(cluster)["decode-1"] != before["decode-1"], CUT_OFF_S)
    os.kill(pid_of(cluster, "router-0"), signal.SIGKILL)  # it believes in the impostor's incarnation
    wait_until(lambda: whole(cluster), 60)
    assert {name: pid for name, pid in worker_pids(cluster).items() if name != "decode-1"} == {
        name: pid for name, pid in before.items() if name != "decode-1"
    }
    cluster.settled()
