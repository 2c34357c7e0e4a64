"""Faults over real gRPC: what makes sense is armed, everything else is refused with the field and its limit."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from cluster.ambush import Ambush
from cluster.fault_service import FOR_MS_MAX, FaultService
from kv_transfer.agent_wire import Disturb
from kv_transfer.gate import Gate
from tandem.v1 import faults_pb2 as pb
from tandem.v1 import faults_pb2_grpc


class Armed:
    """What the service has armed."""

    def __init__(self, agent_pid: int = 0) -> None:
        self.gates: dict[int, Gate] = {pb.LINK_ROUTERS: Gate(), pb.LINK_WORKERS: Gate()}
        self.disturbed: list[Disturb] = []
        self.laid: list[Ambush] = []
        self.agent_pid = agent_pid

    @asynccontextmanager
    async def served(self) -> AsyncIterator[faults_pb2_grpc.FaultsStub]:
        """A stub that calls it."""
        server = grpc.aio.server()
        service = FaultService(
            gates=self.gates,
            disturb_agent=self.disturbed.append,
            agent_pid=lambda: self.agent_pid,
            lay=self.laid.append,
        )
        faults_pb2_grpc.add_FaultsServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield faults_pb2_grpc.FaultsStub(channel)  # type: ignore[no-untyped-call]
        await server.stop(None)


def test_each_link_is_shut_and_no_other() -> None:
    async def body() -> None:
        armed = Armed()
        async with armed.served() as stub:
            await stub.Disturb(pb.DisturbRequest(link=pb.LINK_ROUTERS, for_ms=60_000))
            assert armed.gates[pb.LINK_ROUTERS].wait_s(time.monotonic()) > 50
            assert not armed.gates[pb.LINK_WORKERS].wait_s(time.monotonic())
            await stub.Disturb(pb.DisturbRequest(link=pb.LINK_WORKERS, for_ms=60_000, period_ms=100))
            assert armed.gates[pb.LINK_WORKERS].period_s == 0.1
            await stub.Disturb(pb.DisturbRequest(link=pb.LINK_AGENTS, for_ms=5, corrupt_every=3))
            assert armed.disturbed == [Disturb(for_ms=5, period_ms=0, corrupt_every=3)]

    asyncio.run(body())


def test_an_ambush_kills_the_agent_that_runs_by_then() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    async def body() -> None:
        armed = Armed()
        async with armed.served() as stub:
            await stub.Ambush(
                pb.AmbushRequest(state="target.sealed", signal=pb.SIGNAL_KILL, agent=True, after_ms=2, within_ms=1000)
            )
        (ambush,) = armed.laid
        assert (ambush.state, ambush.after_ms) == ("target.sealed", 2)
        ambush.strike()  # there is no agent now: nobody is struck
        assert process.poll() is None
        armed.agent_pid = process.pid
        ambush.strike()

    asyncio.run(body())
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.DisturbRequest(link=pb.LINK_ROUTERS), "for_ms: is 0"),
        (pb.DisturbRequest(link=pb.LINK_ROUTERS, for_ms=FOR_MS_MAX + 1), f"must be 1 to {FOR_MS_MAX}"),
        (pb.DisturbRequest(link=pb.LINK_ROUTERS, for_ms=5, period_ms=FOR_MS_MAX + 1), f"must be 0 to {FOR_MS_MAX}"),
        (pb.DisturbRequest(for_ms=5), "link: is 0"),
        (pb.DisturbRequest(link=pb.LINK_WORKERS, for_ms=5, corrupt_every=2), "there is no such fault"),
        (pb.AmbushRequest(state="handoff.lost", signal=pb.SIGNAL_KILL, within_ms=5), "state: is 'handoff.lost'"),
        (pb.AmbushRequest(state="handoff.sending", within_ms=5), "signal: is 0"),
        (pb.AmbushRequest(state="handoff.sending", signal=pb.SIGNAL_STOP), "within_ms: is 0"),
        (
            pb.AmbushRequest(state="target.sealed", signal=pb.SIGNAL_KILL, within_ms=5, after_ms=FOR_MS_MAX + 1),
            f"after_ms: is {FOR_MS_MAX + 1}, must be 0 to",
        ),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused_with_its_field(
    request_: pb.DisturbRequest | pb.AmbushRequest, says: str
) -> None:
    async def body() -> None:
        armed = Armed()
        async with armed.served() as stub:
            call = stub.Disturb if isinstance(request_, pb.DisturbRequest) else stub.Ambush
            with pytest.raises(grpc.aio.AioRpcError, match=says) as refused:
                await call(request_, timeout=10)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not armed.laid
        assert not armed.disturbed
        assert not any(gate.until_s for gate in armed.gates.values())

    asyncio.run(body())
