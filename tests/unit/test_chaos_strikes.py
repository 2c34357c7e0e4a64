"""Who strikes says so only when it has, shows itself as a member, and leaves nothing down that it took down."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from benchmarks.chaos import Least, _too_little
from cluster.ambush import Ambush
from cluster.chaos import ChaosRun, Place
from cluster.chaos_load import Load
from cluster.chaos_plan import Fault, FaultKind, Victim
from cluster.chaos_processes import restart_store
from cluster.chaos_tally import Tally
from cluster.fault_service import FaultService
from cluster.run_file import RunFile
from kv_transfer.agent_wire import Disturb
from kv_transfer.gate import Gate
from tandem.cluster_access import ClusterAccess, MembersOnly
from tandem.v1 import admin_pb2, faults_pb2, faults_pb2_grpc

ACCESS = ClusterAccess(token="secret")
PARTITION = Fault(number=1, at_ms=0, kind=FaultKind.PARTITION, victim=Victim.WORKER_LINK, pick=0, for_ms=1)


class Struck:
    """A run, and one worker that takes faults from members only."""

    def __init__(self) -> None:
        run = RunFile(pid=0, started_s=0.0, host="127.0.0.1", port=1, grpc_port=1, model="fake", log_dir="")
        place = Place(run=run, supervisor_pid=0, access=ACCESS)
        self.run: Any = ChaosRun(place, load=Load(), seed=1, say=lambda line: None)
        self.gate = Gate()
        self.disturbed: list[Disturb] = []
        self.laid: list[Ambush] = []

    async def serve(self) -> str:
        self.server = grpc.aio.server(interceptors=[MembersOnly(ACCESS)])
        service = FaultService(
            gates={faults_pb2.LINK_WORKERS: self.gate},
            disturb_agent=self.disturbed.append,
            agent_pid=lambda: 0,
            lay=self.laid.append,
        )
        faults_pb2_grpc.add_FaultsServicer_to_server(service, self.server)  # type: ignore[no-untyped-call]
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return f"127.0.0.1:{port}"

    def admin(self, control: str) -> Any:
        """Operators' stub that knows of the worker."""

        class Admin:
            async def Status(self, request: object, timeout: float) -> admin_pb2.StatusResponse:
                worker = admin_pb2.WorkerStatus(id="d0", state="ready", role="decode", control=control)
                return admin_pb2.StatusResponse(workers=[worker])

        return Admin()


def test_a_link_that_was_shut_was_struck_and_one_that_could_not_be_was_not() -> None:
    async def body() -> None:
        struck = Struck()
        control = await struck.serve()
        await struck.run._strike(struck.admin(control), PARTITION)
        assert struck.gate.until_s
        await struck.server.stop(None)
        await struck.run._strike(struck.admin(control), PARTITION)
        tally: Tally = struck.run.tally
        assert (len(tally.strikes), len(tally.unmet)) == (1, 1), "each fault is told of once"

    asyncio.run(body())


def test_transfers_that_shall_fail_are_provoked_by_a_member() -> None:
    """Refused as a stranger it would never come to the clients that are to leave, and no such state would be struck."""

    async def body() -> None:
        struck = Struck()
        worker = admin_pb2.WorkerStatus(id="d0", control=await struck.serve())
        provoking = asyncio.create_task(struck.run._provoke(worker))
        while not struck.disturbed and not provoking.done():
            await asyncio.sleep(0.01)
        provoking.cancel()
        await asyncio.gather(provoking, return_exceptions=True)
        await struck.server.stop(None)
        assert struck.disturbed == [Disturb(for_ms=5_000, period_ms=300, corrupt_every=0)]

    asyncio.run(body())


def test_a_store_that_was_killed_is_started_again_though_the_run_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command))

    async def body() -> None:
        striking = asyncio.create_task(restart_store(psutil.Process(store.pid), ["redis-server"], 60_000))
        while store.poll() is None:
            await asyncio.sleep(0.01)
        assert not started
        striking.cancel()
        await asyncio.gather(striking, return_exceptions=True)

    asyncio.run(body())
    assert started == [["redis-server"]]
    assert store.stdin is not None
    store.stdin.close()


def test_a_kind_that_never_struck_is_missing_from_a_run() -> None:
    tally = Tally()
    tally.struck(0, PARTITION, "d0")
    tally.not_met(0, Fault(number=2, at_ms=0, kind=FaultKind.KILL, victim=Victim.DECODE, pick=0), "nobody was there")
    assert _too_little([tally], Least(of_each_kind=1)) == ["0 faults of kind kill, at least 1 are wanted"]
