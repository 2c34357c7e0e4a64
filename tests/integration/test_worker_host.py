"""One whole worker without Ray, at a real registry: it starts, outlives its agent, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from test_cluster_registry import D0, next_change, registry

from cluster.config import load
from cluster.membership import MemberState
from cluster.worker_host import StartFailed, WorkerHost
from cluster.worker_settings import WorkerSettings
from tandem.messages import Role

pytestmark = pytest.mark.usefixtures("no_process_left")


def settings_of(address: str, log_file: Path, **flags: object) -> WorkerSettings:
    config = load({"model": "fake", "kv_memory": "1MiB", "transport": "shm", **flags}, {}).config
    return WorkerSettings(
        worker_id=D0, role=Role.DECODE, config=config, threads=1, registry=address, bind_host="127.0.0.1",
        log_file=str(log_file), router_gone_s=10,
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


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    host = WorkerHost(replace(settings_of("127.0.0.1:1", tmp_path / "w.log"), router_gone_s=1))
    with pytest.raises(StartFailed, match="no registry for"):
        host.start()
    assert host.wait(0).startswith("did not start: no registry for")


def _pools_open() -> list[str]:
    names = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return [name for name in names if "tandem-kv" in name]
