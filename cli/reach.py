"""Which router a command speaks to: the first that answers, so that one that hangs holds nobody up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from cluster.run_file import NoCluster, RunFile
from tandem.v1 import admin_pb2_grpc

ANSWER_S = 3.0  # for a router to say that it speaks gRPC


@contextmanager
def admin(run: RunFile) -> Iterator[admin_pb2_grpc.AdminStub]:
    """The operators' service of a router that is alive, over its internal port. Raises NoCluster when none is."""
    for address in run.internal.values():
        with grpc.insecure_channel(address) as channel:
            if _answers(channel):
                yield admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
                return
    raise NoCluster(f"no router of the cluster at port {run.port} answers within {ANSWER_S:g} s")


def _answers(channel: grpc.Channel) -> bool:
    try:
        grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
    except grpc.FutureTimeoutError:
        return False
    return True
