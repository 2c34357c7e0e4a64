"""One whole worker without Ray, at a real registry: it starts, outlives its agent, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import grpc.aio
import psutil
import pytest
from test_cluster_registry import D0, next_change, registry

from cluster.config import load
from cluster.membership import MemberState
from cluster.worker_host import StartFailed, WorkerHost
from cluster.worker_settings import WorkerSettings
from engine.fake_runner import FakeRunner
from engine.step import Sampled, StepPlan
from tandem.cluster_access import ClusterAccess
from tandem.messages import Assign, AssignMode, Role
from tandem.report_wire import decode_report, is_beat
from tandem.request import RequestId, Sampling, TransferId
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc
from tandem.wire import encode_router_message

POISON = 11  # a token that breaks the runner

pytestmark = pytest.mark.usefixtures("no_process_left")


def settings_of(address: str, log_file: Path, **flags: object) -> WorkerSettings:
    config = load({"model": "fake", "kv_memory": "1MiB", "transport": "shm", **flags}, {}).config
    return WorkerSettings(
        worker_id=D0, incarnation=1, role=Role.DECODE, config=config, threads=1, registries={"router-0": address},
        bind_host="127.0.0.1", log_file=str(log_file), router_gone_s=10,
    )  # fmt: skip


def test_a_worker_from_its_start_to_its_end(tmp_path: Path) -> None:
    async def body() -> None:
        async with registry(heartbeat_ms=2000) as place:
            host = WorkerHost(settings_of(place.address, tmp_path / "w.log"))
            started = await asyncio.to_thread(host.start)
            assert (await next_change(place)).state is MemberState.READY
            os.kill(started.info.agent_pid, signal.SIGKILL)
            deadline = time.monotonic() + 30
            while place.membership.members[D0].agent_pid in (0, started.info.agent_pid):
                assert time.monotonic() < deadline, "no heartbeat tells of another agent"
                await asyncio.sleep(0.05)
            assert psutil.pid_exists(place.membership.members[D0].agent_pid)
            with pytest.raises(TimeoutError):
                host.wait(0)
            await asyncio.to_thread(host.stop)
            assert host.wait(0) == "stopped"

    asyncio.run(body())
    gc.collect()  # the fake runner's view of the pool goes with the worker
    assert not _pools_open()


def test_a_worker_fails_a_request_that_breaks_its_runner_and_forgets_routers_that_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRunner.run

    def brittle(runner: FakeRunner, plan: StepPlan) -> list[Sampled | None]:
        if any(POISON in row.tokens for row in plan.rows):
            raise IndexError("no such token")
        return run(runner, plan)

    monkeypatch.setattr(FakeRunner, "run", brittle)

    async def ask(control: str, session: int) -> tuple[list[str], list[int]]:
        """Codes of failures and indices of tokens that one router session hears of two requests."""
        failed: list[str] = []
        indices: list[int] = []
        async with grpc.aio.insecure_channel(control) as channel:
            call = worker_pb2_grpc.WorkerStub(channel).Connect(timeout=20, metadata=ClusterAccess().metadata)  # type: ignore[no-untyped-call]
            await call.write(pb.RouterMessage(hello=pb.RouterHello(router_id="r", session=session)))
            for name, tokens in (("good", (3, 4, 5)), ("bad", (3, POISON, 5))):
                await call.write(encode_router_message(_local(f"{name}-{session}", tokens)))
            async for message in call:
                if is_beat(message):
                    continue
                report = decode_report(message)
                failed += [f"{each.request_id} {each.code}" for each in report.failed]
                indices += [token.index for token in report.tokens]
                if len(failed) == 1 and len(indices) == 4:
                    await call.done_writing()
        return failed, indices

    async def body() -> None:
        async with registry(heartbeat_ms=2000) as place:
            host = WorkerHost(settings_of(place.address, tmp_path / "w.log"))
            started = await asyncio.to_thread(host.start)
            try:
                for session in range(1, 5):
                    assert await ask(started.info.control, session) == ([f"bad-{session} step_failed"], [0, 1, 2, 3])
                # The registry's own session, and at most the last of these four: its end may have called for no report.
                assert host._reports.num_sessions <= 2
                with pytest.raises(TimeoutError):
                    host.wait(0)
            finally:
                await asyncio.to_thread(host.stop)

    asyncio.run(body())
    gc.collect()


def _local(name: str, tokens: tuple[int, ...]) -> Assign:
    return Assign(
        request_id=RequestId(name), epoch=1, mode=AssignMode.LOCAL, tokens=tokens, num_prompt_tokens=len(tokens),
        sampling=Sampling(max_tokens=4), transfer_id=TransferId(""), peer=None, deadline_ms=20_000,
    )  # fmt: skip


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    host = WorkerHost(replace(settings_of("127.0.0.1:1", tmp_path / "w.log"), router_gone_s=1))
    with pytest.raises(StartFailed, match="no registry for"):
        host.start()
    assert host.wait(0).startswith("did not start: no registry for")


def _pools_open() -> list[str]:
    names = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return [name for name in names if "tandem-kv" in name]
