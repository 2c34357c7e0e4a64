"""A real cluster on this machine for the length of a measurement: starts `tandem serve`, reads its status, ends it."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.config import default_run_dir
from cluster.run_file import RunFile, find

TANDEM = str(Path(sys.executable).parent / "tandem")
START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 60.0
UNLENT_PORTS = (15_000, 30_000)  # below those that Linux gives to connections, from 32768 on
PORT_TRIES = 100


def free_port() -> int:
    """A port that nothing listens on now, and that the kernel lends to nobody while a server there is down."""
    drawn = random.SystemRandom()  # so that two runs at once do not draw the same ones
    for _ in range(PORT_TRIES):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port := drawn.randint(*UNLENT_PORTS)))
            return port
    raise OSError(f"no free port among {PORT_TRIES} of {UNLENT_PORTS[0]} to {UNLENT_PORTS[1]}")


class LocalCluster:
    """`with LocalCluster(["--prefill", "1"]) as cluster:` runs a cluster on ports of its own."""

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.grpc_port = free_port()
        self._arguments = [*arguments, "--port", str(self.port), "--grpc-port", str(self.grpc_port)]
        self._process: subprocess.Popen[str] | None = None
        self._lines: list[str] = []
        self._ready = threading.Event()
        self.ready_s = 0.0

    @property
    def grpc_address(self) -> str:
        """host:port of tandem.v1.Inference."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def pid(self) -> int:
        """The supervisor's."""
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        """Base of the HTTP endpoints."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> LocalCluster:
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [TANDEM, "serve", *self._arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        deadline = start + START_DEADLINE_S
        while not self._ready.wait(0.05):
            if self._process.poll() is not None or time.perf_counter() > deadline:
                self._stop()
                raise RuntimeError("the cluster did not become ready:\n" + "".join(self._lines[-40:]))
        self.ready_s = time.perf_counter() - start
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.append(line)
            if "ready" in line and "http" in line:
                self._ready.set()

    def run_file(self) -> RunFile:
        """What `serve` wrote down of it."""
        return find(default_run_dir(os.environ), self.port)

    def status(self) -> dict[str, Any]:
        """What `tandem status --json` prints."""
        answer = subprocess.run(
            [TANDEM, "status", "--json", "--port", str(self.port)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        document: dict[str, Any] = json.loads(answer.stdout)
        return document

    def output(self) -> str:
        """What the cluster has printed so far."""
        return "".join(self._lines)

    def _stop(self) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_DEADLINE_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
