"""`tandem drain`: empties a worker and ends it, or puts a fresh one in its place."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cli.completion import workers
from cli.options import DEADLINE_S, AsJsonLines, Deadline, Port, RunDir, running_cluster, whole_ms
from cli.reach import admin
from cluster.documents import plain
from tandem.v1 import admin_pb2 as pb


def drain(
    worker: Annotated[
        str, typer.Argument(help="worker of `tandem status`", show_default=False, autocompletion=workers)
    ],
    deadline: Deadline = DEADLINE_S,
    restart: Annotated[bool, typer.Option("--restart", help="start a fresh one in its place, and wait for it")] = False,
    port: Port = None,
    as_json: AsJsonLines = False,
    run_dir: RunDir = None,
) -> None:
    """Move everything away from a worker, then end it. The drain goes on when this command is stopped."""
    run = running_cluster(run_dir, port)
    asked = pb.DrainRequest(worker=worker, deadline_ms=whole_ms(deadline), restart=restart)
    with admin(run) as stub:
        for progress in stub.Drain(asked):  # the router bounds each of its states
            print(json.dumps(plain(progress)) if as_json else sentence(progress), flush=True)


def sentence(progress: pb.DrainProgress, over: str = "") -> str:
    """The progress, for people; `over`: what has come of it when it is done."""
    what = {
        "emptying": f"drains: {progress.requests} requests and {progress.blocks} blocks left",
        "leaving": "is empty and ends",
        "starting": "has left; a fresh one starts",
        "flipping": "is empty and gets its new role",
        "done": over or f"is done; incarnation {progress.incarnation}",
    }
    return f"{progress.elapsed_ms / 1000:7.1f} s  {progress.worker} {what[progress.state]}"
