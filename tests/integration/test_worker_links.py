"""The router's stream to a worker whose network lets nothing pass: lost within seconds, and up again when it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest

from cluster import worker_service
from cluster.worker_service import WorkerService
from kv_transfer.gate import Gate
from router.clients import WorkerLink
from router.config import RouterConfig
from tandem.cluster_access import ClusterAccess
from tandem.messages import WorkerReport
from tandem.request import WorkerId
from tandem.v1 import worker_pb2_grpc

CONFIG = RouterConfig(beat_ms=100, beats_missed_max=3, dial_timeout_ms=300, redial_ms=20, redial_max_ms=100)
REPORT = WorkerReport(worker_id=WorkerId("w"), incarnation=1, sequence=1)


@dataclass
class Heard:
    """What a link told, and a way to wait for it."""

    ups: int = 0
    lost: list[str] = field(default_factory=list)
    reports: list[WorkerReport] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def up(self) -> None:
        self.ups += 1
        self.changed.set()

    def down(self, reason: str) -> None:
        self.lost.append(reason)
        self.changed.set()

    def report(self, report: WorkerReport) -> None:
        self.reports.append(report)
        self.changed.set()

    async def until(self, ups: int, lost: int) -> None:
        async with asyncio.timeout(10):
            while (self.ups, len(self.lost)) != (ups, lost):
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def _linked(gate: Gate) -> AsyncIterator[tuple[Heard, WorkerService]]:
    """A real worker service behind the gate, and a router's link to it."""
    heard, sessions = Heard(), iter(range(1, 1000))
    service = WorkerService(post=lambda event: None, on_session=lambda router_id: None, gate=gate)
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = WorkerLink(
        worker_id=WorkerId("w"),
        control=f"127.0.0.1:{port}",
        config=CONFIG,
        access=ClusterAccess(),
        next_session=lambda: next(sessions),
        on_up=heard.up,
        on_report=heard.report,
        on_lost=heard.down,
    )
    link.start()
    try:
        yield heard, service
    finally:
        await link.close()
        await server.stop(None)


@pytest.fixture(autouse=True)
def fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_service, "BEAT_INTERVAL_S", 0.1)
    monkeypatch.setattr(worker_service, "LAST_WRITE_S", 0.1)


def test_a_worker_that_only_beats_stays_linked_and_its_beats_are_no_reports() -> None:
    async def body() -> None:
        async with _linked(Gate()) as (heard, service):
            await heard.until(1, 0)
            await asyncio.sleep(10 * CONFIG.beat_ms / 1000)  # what is waited for is that nothing happens
            service.report([(1, REPORT)])
            async with asyncio.timeout(5):
                while not heard.reports:
                    heard.changed.clear()
                    await heard.changed.wait()
            assert heard.reports == [REPORT]
            assert (heard.ups, heard.lost) == (1, [])

    asyncio.run(body())


def test_a_stream_over_which_nothing_comes_is_lost_and_none_is_up_before_the_worker_answers() -> None:
    async def body() -> None:
        gate = Gate()
        async with _linked(gate) as (heard, _):
            await heard.until(1, 0)
            gate.shut(time.monotonic(), for_s=2.0)
            began_s = time.monotonic()
            await heard.until(1, 1)
            assert time.monotonic() - began_s < 1.5
            assert "no sign of life for" in heard.lost[0]
            await heard.until(2, 1)
            assert time.monotonic() - began_s >= 1.9, "a stream counts only once the worker has answered on it"

    asyncio.run(body())


def test_a_router_that_was_stopped_itself_blames_nobody() -> None:
    """Its loop stands still for far longer than the beats allow; what came meanwhile is read afterwards."""

    async def body() -> None:
        async with _linked(Gate()) as (heard, _):
            await heard.until(1, 0)
            time.sleep(10 * CONFIG.beat_ms / 1000)
            await asyncio.sleep(5 * CONFIG.beat_ms / 1000)
            assert (heard.ups, heard.lost) == (1, [])

    asyncio.run(body())
