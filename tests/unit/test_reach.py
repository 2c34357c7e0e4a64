"""Commands speak to a router that is alive, whichever of them hangs or is gone."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cli import reach
from cluster.processes import pick_port
from cluster.run_file import NoCluster, RunFile
from tandem.v1 import admin_pb2 as pb
from tandem.v1 import admin_pb2_grpc


class Only(admin_pb2_grpc.AdminServicer):
    """A router that only tells its model."""

    def Status(self, request: pb.StatusRequest, context: object) -> pb.StatusResponse:
        """A model."""
        return pb.StatusResponse(model="here")


def run_of(token: Path, *addresses: str) -> RunFile:
    internal = {f"router-{number}": address for number, address in enumerate(addresses)}
    return RunFile(
        pid=1, started_s=0.0, host="127.0.0.1", port=8000, grpc_port=1, model="m", log_dir="l", internal=internal,
        join_token_file=str(token),
    )  # fmt: skip


def test_the_first_that_answers_is_asked(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("x" * 43)
    token.chmod(0o600)
    gone = f"127.0.0.1:{pick_port('127.0.0.1', 0, '--port')}"
    server = grpc.server(ThreadPoolExecutor(1))
    admin_pb2_grpc.add_AdminServicer_to_server(Only(), server)  # type: ignore[no-untyped-call]
    here = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with socket.create_server(("127.0.0.1", 0)) as stopped:  # the kernel takes connections for it, as for a process
            hangs = f"127.0.0.1:{stopped.getsockname()[1]}"
            with reach.admin(run_of(token, gone, hangs, here), answer_s=1.0) as stub:
                assert stub.Status(pb.StatusRequest(), timeout=5).model == "here"
            with pytest.raises(NoCluster, match="no router of the cluster at port 8000 answers"):
                with reach.admin(run_of(token, gone, hangs), answer_s=1.0):
                    raise AssertionError("nobody is there")
    finally:
        server.stop(None).wait()
