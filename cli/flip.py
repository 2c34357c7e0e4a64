"""`tandem flip`: gives a worker another role; its weights and its cache stay where they are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cli.completion import roles, workers
from cli.drain import sentence
from cli.options import DEADLINE_S, AsJsonLines, Deadline, Port, RunDir, running_cluster, whole_ms
from cli.reach import admin
from cluster.documents import plain
from tandem.v1 import admin_pb2 as pb


def flip(
    worker: Annotated[
        str, typer.Argument(help="worker of `tandem status`", show_default=False, autocompletion=workers)
    ],
    role: Annotated[str, typer.Argument(help="prefill, decode or mixed", show_default=False, autocompletion=roles)],
    deadline: Deadline = DEADLINE_S,
    port: Port = None,
    as_json: AsJsonLines = False,
    run_dir: RunDir = None,
) -> None:
    """Move away what a worker has, and give it another role. No stream is lost.

    What has begun goes on when this command is stopped.
    """
    run = running_cluster(run_dir, port)
    asked = pb.FlipRequest(worker=worker, role=role, deadline_ms=whole_ms(deadline))
    with admin(run) as stub:
        for progress in stub.Flip(asked):  # the router bounds each of its states
            over = f"is a {role} worker now" if progress.state == "done" else ""
            print(json.dumps(plain(progress)) if as_json else sentence(progress, over), flush=True)
