"""Nodes of a Ray of somebody else's on this machine: each `ray start --block` with all its processes, to be killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import psutil
from served import alive, wait_until

from cluster.processes import pick_port

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
UP_S = 90.0
OBJECT_STORE_BYTES = 80 << 20


class RayNode:
    """One node, up when this returns: two that start at once on one machine get in each other's way.

    The first one has no `address`: it is the head, with the GCS.
    """

    def __init__(self, host: str, *, num_cpus: int, address: str = "", **environment: str) -> None:
        self.host = host
        self.address = address or f"{host}:{pick_port(host, 0, 'port')}"
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        here = ["--head", "--port", self.address.rsplit(":", 1)[1], "--include-dashboard", "false"]
        self._log = (self._folder / "start.log").open("w")
        self.process = subprocess.Popen(
            [
                *RAY, "start", "--block", "--disable-usage-stats",
                *(["--address", address] if address else here),
                "--node-ip-address", host,
                "--num-cpus", str(num_cpus),
                "--object-store-memory", str(OBJECT_STORE_BYTES),
                "--min-worker-port", "0", "--max-worker-port", "0",
                *([] if address else ["--temp-dir", str(self._folder)]),
            ],
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **environment},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        wait_until(self._is_up, UP_S)

    def _is_up(self) -> bool:
        said = Path(self._log.name).read_text()
        assert self.process.poll() is None, said
        return "--block" in said

    def tree(self) -> list[psutil.Process]:
        """All its processes, workers included."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def kill(self) -> None:
        """As when the machine loses its power: all processes at once."""
        tree = self.tree() if self.process.poll() is None else []
        for process in tree:
            process.suspend()  # so that none sees another one die
        for process in tree:
            process.kill()
        self.process.wait(10)
        wait_until(lambda: not alive(tree), 10)

    def __enter__(self) -> RayNode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def own_address() -> str:
    """The address of this machine that Ray takes for its own: not the loopback, which other machines do not reach."""
    import ray.util

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
