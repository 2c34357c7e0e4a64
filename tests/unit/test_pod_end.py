"""What is done before a pod ends: whose workers are meant, whom it is asked of, and how long is waited."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from cluster.pod_end import PodLeaves, addresses_of, requests_of, wait_until_idle, workers_at
from tandem.v1 import admin_pb2 as pb
from tandem.v1 import admin_pb2_grpc


def status(*workers: tuple[str, str, str], running: tuple[int, ...] = ()) -> pb.StatusResponse:
    """Workers by name, state and address; routers by their requests."""
    return pb.StatusResponse(
        workers=[pb.WorkerStatus(id=name, state=state, control=control) for name, state, control in workers],
        routers=[pb.RouterStatus(num_requests=num) for num in running],
    )


def test_the_workers_of_a_pod_are_those_at_its_address() -> None:
    answer = status(
        ("prefill-0", "ready", "10.0.0.1:4000"),
        ("decode-0", "ready", "10.0.0.11:4000"),
        ("decode-1", "suspect", "10.0.0.1:4001"),
        ("decode-2", "dead", "10.0.0.1:4002"),
        ("decode-3", "draining", "10.0.0.1:4003"),
        ("decode-4", "left", "10.0.0.1:4004"),
        ("decode-5", "ready", "[fd00::1]:4005"),
    )
    assert workers_at(answer, "10.0.0.1") == ["prefill-0", "decode-1"]
    assert workers_at(answer, "fd00::1") == ["decode-5"]
    assert workers_at(answer, "10.0.0.2") == []


def test_requests_of_all_routers_count() -> None:
    assert requests_of(status(running=(2, 0, 3))) == 5


def test_idle_is_waited_for_and_told_of_once_for_each_number() -> None:
    numbers = iter([2, 2, 1, 0])
    told: list[str] = []
    assert wait_until_idle(lambda: next(numbers), settle_s=0, within_s=60, say=told.append)
    assert told == ["2 requests run", "1 requests run"]


def test_waiting_has_an_end() -> None:
    assert not wait_until_idle(lambda: 1, settle_s=0, within_s=0, say=lambda line: None)


def test_a_name_stands_for_all_its_addresses() -> None:
    assert "127.0.0.1:50051" in addresses_of("localhost:50051")
    with pytest.raises(OSError, match=r"."):
        addresses_of("no-such-host.invalid:1")
    with pytest.raises(ValueError, match="invalid literal"):
        addresses_of("localhost:http")


class _Router(admin_pb2_grpc.AdminServicer):
    """Answers as a router does; `refusal`: of every drain."""

    def __init__(self, answer: pb.StatusResponse, refusal: str = "") -> None:
        self.answer, self.refusal = answer, refusal
        self.drains: list[pb.DrainRequest] = []
        self.keys: list[str] = []

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        self.keys.append(str(dict(context.invocation_metadata()).get("authorization", "")))
        return self.answer

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> Iterator[pb.DrainProgress]:
        self.drains.append(request)
        if self.refusal:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        for state in ("emptying", "leaving", "starting"):
            yield pb.DrainProgress(worker=request.worker, state=state)
        raise AssertionError("nobody waits for the fresh one")


@pytest.fixture
def routers() -> Iterator[list[tuple[str, _Router]]]:
    """One that has a worker at the address, one that has not, and one that refuses."""
    mine = status(("decode-0", "ready", "10.0.0.1:1"), ("prefill-0", "ready", "10.0.0.2:1"))
    parts = [_Router(mine), _Router(status(("decode-0", "ready", "10.0.0.3:1"))), _Router(mine, "it is the last one")]
    servers, found = [], []
    for part in parts:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        admin_pb2_grpc.add_AdminServicer_to_server(part, server)  # type: ignore[no-untyped-call]
        found.append((f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", part))
        server.start()
        servers.append(server)
    yield found
    for server in servers:
        server.stop(0).wait(5)


def test_a_pod_leaves_whichever_cluster_its_worker_is_of(routers: list[tuple[str, _Router]]) -> None:
    told: list[str] = []
    leaves = PodLeaves(tls=None, metadata=(("authorization", "Bearer k"),), say=told.append)
    [one, other, refusing] = routers
    assert leaves.leave("10.0.0.1", [other[0], one[0]], within_s=30) == []
    assert not other[1].drains
    [drain] = one[1].drains
    assert (drain.worker, drain.restart) == ("decode-0", True)
    assert 20_000 < drain.deadline_ms <= 30_000
    assert one[1].keys == other[1].keys == ["Bearer k"]
    assert told[-1].startswith("decode-0 is starting")
    failures = leaves.leave("10.0.0.1", ["127.0.0.1:1", refusing[0]], within_s=30)
    assert failures[0].startswith("the router at 127.0.0.1:1 does not answer")
    assert failures[1] == "decode-0 is not drained: it is the last one"
