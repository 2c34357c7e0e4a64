"""A router's operators' service that answers what a test says, and the run file by which commands find it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil

from cluster.run_file import RunFile, write
from tandem.v1 import admin_pb2 as pb
from tandem.v1 import admin_pb2_grpc

PORT = 8123  # of a cluster that is only a file


class Telling(admin_pb2_grpc.AdminServicer):
    """Tells `answer`, which a test may exchange, and remembers what it was asked."""

    def __init__(self, answer: pb.StatusResponse) -> None:
        self.answer = answer
        self.asked: list[pb.StatusRequest] = []

    def Status(self, request: pb.StatusRequest, context: object) -> pb.StatusResponse:
        """The answer."""
        self.asked.append(request)
        return self.answer


@contextmanager
def serving(telling: Telling, run_dir: Path) -> Iterator[None]:
    """The service at a free port, and its run file with the pid of this process."""
    server = grpc.server(ThreadPoolExecutor(2))
    admin_pb2_grpc.add_AdminServicer_to_server(telling, server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    token = run_dir / "token"
    if not token.exists():
        token.write_text("x" * 43)
        token.chmod(0o600)
    (run_dir / "logs").mkdir(exist_ok=True)
    run = RunFile(
        pid=os.getpid(), started_s=psutil.Process().create_time(), host="127.0.0.1", port=PORT, grpc_port=1, model="m",
        log_dir=str(run_dir / "logs"), join_token_file=str(token), internal={"router-0": address},
    )  # fmt: skip
    write(run_dir, run)
    try:
        yield
    finally:
        server.stop(None).wait()
