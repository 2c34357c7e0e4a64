"""A fake cluster that a test may treat badly: asked cheaply for its state, held to its baseline, leaving no trace."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import httpx
import psutil
from served import STOP_S, Served, alive

from cluster.chaos_processes import listening_ports
from cluster.documents import plain
from tandem.cluster_access import ClusterAccess
from tandem.v1 import admin_pb2, admin_pb2_grpc, worker_pb2_grpc

SETTLE_S = 30.0
POLL_S = 0.1
BLOCK_STATES = ("free", "cached", "owned", "exported", "granted", "quarantined")
ENDED = ("finished", "cancelled", "failed")


class ClusterUnderTest(Served):
    """`tandem serve --model fake` with `arguments`, on free ports. Its end fails when a process outlives it."""

    def __init__(self, *arguments: str, run_dir: Path) -> None:
        super().__init__(["--model", "fake", *arguments], run_dir=run_dir)
        self.grpc_address = ""

    def __enter__(self) -> ClusterUnderTest:
        super().__enter__()
        ready = next(line for line in self.lines if "is ready at" in line)
        self.grpc_address = ready.split("(gRPC ", 1)[1].split(")", 1)[0]
        return self

    def document(self) -> dict[str, Any]:
        """What `tandem status --json` prints, without a process for it."""
        with grpc.insecure_channel(self.grpc_address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            answer = stub.Status(admin_pb2.StatusRequest(include_finished=True), timeout=10, wait_for_ready=True)
        return plain(answer)

    def settled(self, timeout_s: float = SETTLE_S) -> dict[str, Any]:
        """The first state in which nothing is under way: see `unsettled`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            document = self.document()
            left = unsettled(document)
            if not left:
                return document
            assert time.monotonic() < deadline_s, f"not at its baseline after {timeout_s} s:\n" + "\n".join(left)
            time.sleep(POLL_S)

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        """One HTTP request; `body` is sent as it is when it is bytes, else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(f"{self.url}{path}", content=content, headers=headers, timeout=60)

    def mishaps(self) -> list[str]:
        """Lines of all logs that speak of a bug: an error, or a traceback."""
        logs = sorted(self.run_dir.glob("*.logs/*.log"))
        lines = [f"{log.name}: {line}" for log in logs for line in log.read_text(errors="replace").splitlines()]
        return [line for line in lines if any(word in line for word in (" ERROR ", " CRITICAL ", "Traceback"))]

    def control_port(self, worker_id: str) -> int:
        """Where the worker's own gRPC server listens: Ray has one in the same process."""
        pid = next(each["pid"] for each in self.document()["workers"] if each["id"] == worker_id)
        listening = listening_ports(psutil.Process(pid).net_connections("tcp"))
        return next(port for port in listening if "hello" in _refusal(port, self.access))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tree = self.tree() if self.process.poll() is None else []
        if tree:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(STOP_S)
        left = alive(tree)
        super().__exit__(kind, error, trace)
        for process in left:
            process.kill()
        assert not left, f"outlived the cluster: {left}"


def _refusal(port: int, access: ClusterAccess) -> str:
    """What a worker's server says to a router that does not introduce itself."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
        try:
            list(stub.Connect(iter([]), timeout=10, metadata=access.metadata))
        except grpc.RpcError as error:
            return str(error)
    return ""


def unsettled(document: dict[str, Any]) -> list[str]:
    """What is still under way, or wrong, in a state: workers not ready, blocks held, requests, audits."""
    found = []
    for worker in document["workers"]:
        name, blocks = worker["id"], worker["kv_blocks"]
        if worker["state"] not in ("ready", "left"):
            found.append(f"{name} is {worker['state']}: {worker['reason']}")
        if sum(blocks[state] for state in BLOCK_STATES) != blocks["total"]:
            found.append(f"{name}: the counts do not sum to the pool: {blocks}")
        if blocks["free"] + blocks["cached"] != blocks["total"]:
            found.append(f"{name} holds blocks: {blocks}")
        if worker["running"] or worker["waiting"]:
            found.append(f"{name}: {worker['running']} running, {worker['waiting']} waiting")
        found += [f"{name}: audit: {line}" for line in worker["audit"]]
    running = [request for request in document["requests"] if request["state"] not in ENDED]
    return found + [f"request {request['id']} is {request['state']}" for request in running]
