"""The processes of Ray on this machine: found, asked whether they answer, killed, and the GCS started again."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.processes import lives
from cluster.ray_watch import Part, PartSeen

ASK_PERIOD_S = 2.0
ASK_TIMEOUT_S = 5.0
START_GRACE_MS = 20_000  # it reads its state before it answers, perhaps on a machine that is much too busy
PORT_FLAG = "--gcs_server_port="
MUTE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)  # any other answer is one


class RayParts:
    """The parts that were found. `addresses` says where a part answers; one that has none is only seen to live."""

    def __init__(self, processes: dict[Part, psutil.Process], addresses: dict[Part, str], *, log_file: Path) -> None:
        self._processes = processes
        self._log_file = log_file
        self._closing = threading.Event()
        now_ms = _now_ms()
        self._heard_ms = dict.fromkeys(processes, now_ms)
        self._addresses = addresses
        # Now, while it lives: a process that is gone has no command line.
        self._gcs_command = (
            _on_port(processes[Part.GCS].cmdline(), addresses[Part.GCS]) if Part.GCS in processes else []
        )
        self._gcs_environment = processes[Part.GCS].environ() if Part.GCS in processes else {}
        self._restarted: subprocess.Popen[bytes] | None = None
        for part in addresses:
            threading.Thread(target=self._ask, args=(part,), name=f"asks {part}", daemon=True).start()

    def seen(self) -> dict[Part, PartSeen]:
        """Every part as it is now. One that nobody asks counts as just heard."""
        found = {}
        for part, process in self._processes.items():
            heard_ms = self._heard_ms[part] if part in self._addresses else _now_ms()
            found[part] = PartSeen(lives=lives(process), heard_ms=heard_ms)
        return found

    def start_gcs(self) -> None:
        """Starts the control service anew, where it was: with the same port and the same file of state."""
        if self._restarted is not None:
            self._restarted.wait()  # it ended: only now its entry in the table of processes goes
        with self._log_file.open("ab") as log:
            self._restarted = subprocess.Popen(
                self._gcs_command, env=self._gcs_environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes[Part.GCS] = psutil.Process(self._restarted.pid)
        self._heard_ms[Part.GCS] = _now_ms() + START_GRACE_MS

    def kill(self, part: Part) -> None:
        """Ends the part at once, also when it is stopped."""
        try:
            self._processes[part].kill()
        except psutil.NoSuchProcess:
            return

    def close(self) -> None:
        """Asks no more."""
        self._closing.set()

    def _ask(self, part: Part) -> None:
        with grpc.insecure_channel(self._addresses[part], options=[("grpc.max_reconnect_backoff_ms", 1000)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not self._closing.wait(ASK_PERIOD_S):
                try:
                    stub.Check(health_pb2.HealthCheckRequest(), timeout=ASK_TIMEOUT_S)
                except grpc.RpcError as error:
                    if error.code() in MUTE:
                        continue
                self._heard_ms[part] = _now_ms()


def raylet_of(node_id: str) -> psutil.Process | None:
    """The raylet on this machine that serves the node, or None when this process cannot see it."""
    return _first(process for process in psutil.process_iter() if _is_raylet(process, node_id))


def child_named(part: Part) -> psutil.Process | None:
    """The child of this process that is this part."""
    return _first(process for process in psutil.Process().children() if process.name() == part)


def _first(processes: Iterable[psutil.Process]) -> psutil.Process | None:
    return next(iter(processes), None)


def _is_raylet(process: psutil.Process, node_id: str) -> bool:
    try:
        return process.name() == Part.RAYLET and f"--node_id={node_id}" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _on_port(command: list[str], address: str) -> list[str]:
    """The command with the port that was chosen when it first ran: everybody knows the service by it."""
    port = address.rsplit(":", 1)[1]
    return [f"{PORT_FLAG}{port}" if word.startswith(PORT_FLAG) else word for word in command]


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
