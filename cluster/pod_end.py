"""What is done before a pod ends: requests of a router's pod run to their end, a worker's pod is emptied."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from tandem.tls import Tls
from tandem.v1 import admin_pb2 as pb
from tandem.v1 import admin_pb2_grpc

LOOK_S = 0.5
ANSWER_S = 5.0
SPARE_S = 5.0  # beyond a drain's own deadline, for its answer
GOING = ("joining", "ready", "suspect")  # states in which a worker can be drained, or is about to
LEFT = ("starting", "done")  # states of a drain in which nothing of the old worker is left

Metadata = tuple[tuple[str, str], ...]


def wait_until_idle(
    num_running: Callable[[], int], *, settle_s: float, within_s: float, say: Callable[[str], None]
) -> bool:
    """Lets new connections stop, then waits until no request runs. False: some run still when the time is over."""
    time.sleep(settle_s)
    until_s = time.monotonic() + within_s
    told = 0
    while (num := num_running()) > 0:
        if num != told:
            told = num
            say(f"{num} requests run")
        if time.monotonic() >= until_s:
            return False
        time.sleep(LOOK_S)
    return True


def requests_of(answer: pb.StatusResponse) -> int:
    """Requests in flight at all routers that answered."""
    return sum(router.num_requests for router in answer.routers)


def workers_at(answer: pb.StatusResponse, host: str) -> list[str]:
    """The workers whose services are at this address, unless they are over or drain already."""
    return [
        worker.id
        for worker in answer.workers
        if worker.state in GOING and worker.control.rpartition(":")[0].strip("[]") == host
    ]


def addresses_of(routers: str) -> list[str]:
    """Every address that the name in `host:port` stands for: one a pod. Raises OSError when it stands for none."""
    host, _, port = routers.rpartition(":")
    found = {str(info[4][0]) for info in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)}
    return [f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in sorted(found)]


class PodLeaves:
    """Drains the workers of one pod, whichever of several clusters they belong to. `say` prints a line."""

    def __init__(self, *, tls: Tls | None, metadata: Metadata, say: Callable[[str], None]) -> None:
        self._tls = tls
        self._metadata = metadata
        self._say = say

    def leave(self, host: str, addresses: list[str], *, within_s: float) -> list[str]:
        """Returns what went wrong, in sentences. A fresh worker takes the place of each that is drained, elsewhere."""
        until_s = time.monotonic() + within_s
        failures = []
        for address in addresses:
            with self._admin(address) as stub:
                try:
                    answer = stub.Status(pb.StatusRequest(local=True), timeout=ANSWER_S, metadata=self._metadata)
                except grpc.RpcError as error:
                    failures.append(f"the router at {address} does not answer: {error.details()}")
                    continue
                for worker in workers_at(answer, host):
                    failures += self._drain(stub, worker, until_s)
        return failures

    def _drain(self, stub: admin_pb2_grpc.AdminStub, worker: str, until_s: float) -> list[str]:
        left_s = max(1.0, until_s - time.monotonic())
        asked = pb.DrainRequest(worker=worker, deadline_ms=round(left_s * 1000), restart=True)
        progress: Iterator[pb.DrainProgress] = stub.Drain(asked, timeout=left_s + SPARE_S, metadata=self._metadata)
        try:
            for now in progress:
                self._say(f"{worker} is {now.state}: {now.requests} requests and {now.blocks} blocks left")
                if now.state in LEFT:
                    return []
        except grpc.RpcError as error:
            return [f"{worker} is not drained: {error.details()}"]
        return []

    @contextmanager
    def _admin(self, address: str) -> Iterator[admin_pb2_grpc.AdminStub]:
        if self._tls is None:
            channel = grpc.insecure_channel(address)
        else:
            channel = grpc.secure_channel(address, self._tls.channel_credentials, options=self._tls.channel_options)
        with channel:
            yield admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
