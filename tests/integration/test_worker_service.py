"""The worker's end of a router's stream, over real gRPC: whatever is under way when it ends, the router hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from cluster import worker_service
from cluster.worker_service import WorkerService
from kv_transfer.actions import RouterJoined
from tandem.messages import WorkerReport
from tandem.request import WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

ROUNDS = 60
DELAYS_S = (0.0, 0.0, 0.0002, 0.0005, 0.001, 0.002)


@asynccontextmanager
async def _serving(service: WorkerService) -> AsyncIterator[worker_pb2_grpc.WorkerStub]:
    """A real server on a free port; gives a stub that calls it."""
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
    await server.stop(None)


async def _end_streams() -> int:
    """Ends streams by a malformed message while reports go out; how many ends did not reach the router in time."""
    loop = asyncio.get_running_loop()

    def post(event: object) -> None:
        if isinstance(event, RouterJoined):
            report = WorkerReport(worker_id=WorkerId("w"), incarnation=1, sequence=1)
            for delay_s in DELAYS_S:
                loop.call_later(delay_s, service.report, [(event.session, report)])

    service = WorkerService(post=post, on_session=lambda router: None)
    missed = 0
    async with _serving(service) as stub:
        for session in range(1, ROUNDS + 1):
            call = stub.Connect(timeout=2)
            await call.write(pb.RouterMessage(hello=pb.RouterHello(router_id="r", session=session)))
            await call.write(pb.RouterMessage())
            try:
                async for _ in call:
                    continue
            except grpc.aio.AioRpcError as error:
                missed += error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return missed


def test_a_stream_that_the_worker_ends_while_it_writes_ends_for_the_router_too() -> None:
    assert asyncio.run(_end_streams()) == 0


def test_a_stream_without_a_hello_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the worker, and told why: the caller sets no deadline of its own."""
    monkeypatch.setattr(worker_service, "HELLO_TIMEOUT_S", 0.2)
    posted: list[object] = []

    async def say_nothing() -> None:
        async with _serving(WorkerService(post=posted.append, on_session=lambda router: None)) as stub:
            call = stub.Connect()
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await call.details() == "no hello came within 0.2 s"

    asyncio.run(asyncio.wait_for(say_nothing(), 10))
    assert posted == []
