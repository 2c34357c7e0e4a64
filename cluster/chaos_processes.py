"""The processes of a cluster on this machine, from outside: signals to them, what they take, and its Redis."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from cluster.chaos_audit import Footprint

LOOK_S = 0.02
GONE_TIMEOUT_S = 5.0
# What a process is called, by a word of its command line; the first that fits.
NAMES = (
    ("kv_transfer.agent", "agent"),
    ("cluster.router", "router"),
    ("ray::WorkerActor", "worker"),
    ("redis-server", "redis"),
    ("cluster.reaper", "reaper"),
    ("cluster.pools", "pools"),
    ("raylet", "Ray"),
    ("gcs_server", "Ray"),
    ("ray", "Ray"),
)


def is_stopped(process: psutil.Process) -> bool:
    """Whether SIGSTOP has struck it. Raises psutil.NoSuchProcess."""
    return bool(process.status() == psutil.STATUS_STOPPED)


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended; a zombie has."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def until_struck(process: psutil.Process, timeout_s: float) -> bool:
    """Waits until the process is stopped or gone; False: it is neither in time."""
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        with suppress(psutil.NoSuchProcess):
            if is_stopped(process):
                return True
        if is_gone(process):
            return True
        await asyncio.sleep(LOOK_S)
    return False


async def stay_stopped(processes: Sequence[psutil.Process], for_ms: int) -> None:
    """Wakes the processes after a while, also when the run is interrupted; ends when all are gone."""
    until_s = time.monotonic() + for_ms / 1000
    try:
        while time.monotonic() < until_s and not all(is_gone(each) for each in processes):
            await asyncio.sleep(min(LOOK_S * 5, max(0.0, until_s - time.monotonic())))
    finally:
        for process in processes:
            send(process, signal.SIGCONT)


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Sends a signal, if the process still runs."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def listening_ports(connections: Iterable[Any]) -> set[int]:
    """The ports at which one of these connections, as psutil tells them, listens."""
    return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}


# ---- Redis ---------------------------------------------------------------------------------------------------------


def store_process(store: str) -> psutil.Process:
    """The process that listens at redis://host:port/db. Raises LookupError when none of this machine does."""
    port = urlsplit(store).port
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if port in listening_ports(process.net_connections("tcp")):
                return process
    raise LookupError(f"store: nobody on this machine listens at {store}, so it cannot be struck from here")


def command_of(store: str) -> list[str]:
    """The command that starts this Redis as it is; asked of it, since it overwrites its command line."""
    import redis

    with redis.Redis.from_url(store, socket_timeout=GONE_TIMEOUT_S) as client:
        executable = str(client.info("server")["executable"])
        config: dict[str, str] = client.config_get("*")
    command = [executable, "--daemonize", "no"]
    for name in ("bind", "port", "dir", "dbfilename", "save", "appendonly"):
        if name in config:
            value = str(config[name])
            command += [f"--{name}", *([value] if name in ("save", "dir") else value.split())]
    return command


async def restart_store(process: psutil.Process, command: Sequence[str], down_ms: int) -> subprocess.Popen[bytes]:
    """Kills this Redis and starts it again after a while: empty, or from its dump, as it is set.

    Also when the run is interrupted meanwhile: the cluster is not left without it.
    """
    send(process, signal.SIGKILL)
    try:
        await until_struck(process, GONE_TIMEOUT_S)
        await asyncio.sleep(down_ms / 1000)
    finally:
        started = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )  # fmt: skip
    return started


# ---- what they take ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What one process takes."""

    name: str  # such as router, worker or agent; those of Ray's own making have one name
    pid: int
    age_s: float
    num_files: int  # open
    heap_bytes: int  # of no file; in proportion where pages are shared
    shared_bytes: int  # of memory files such as pools of KV, in proportion


def taken(supervisor_pid: int) -> list[Taken]:
    """What each process takes of those below the supervisor, and itself."""
    found = []
    with suppress(psutil.NoSuchProcess):
        supervisor = psutil.Process(supervisor_pid)
        found = [_taken("supervisor", supervisor)]
        found += [_taken(name_of(each), each) for each in supervisor.children(recursive=True)]
    return [each for each in found if each is not None]


def footprints(supervisor_pid: int) -> dict[str, Footprint]:
    """The same, by name."""
    found: dict[str, Footprint] = {}
    for each in taken(supervisor_pid):
        before = found.get(each.name, Footprint(num_processes=0, num_files=0))
        found[each.name] = Footprint(
            num_processes=before.num_processes + 1, num_files=before.num_files + each.num_files
        )
    return found


def name_of(process: psutil.Process) -> str:
    """What NAMES calls it; other: nothing there fits, or it has ended."""
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        line = ""
    return next((name for word, name in NAMES if word in line), "other")


def _taken(name: str, process: psutil.Process) -> Taken | None:
    """None: it has ended meanwhile."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        lines = (line.split() for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:])
        kb = {words[0].rstrip(":"): int(words[1]) for words in lines}
        return Taken(
            name=name,
            pid=process.pid,
            age_s=time.time() - process.create_time(),
            num_files=process.num_fds(),
            heap_bytes=kb["Pss_Anon"] << 10,
            shared_bytes=kb["Pss_Shmem"] << 10,
        )
    except (psutil.Error, OSError, KeyError):
        return None
