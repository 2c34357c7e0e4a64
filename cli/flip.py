"""`tandem flip`: gives a worker another role; its weights and its cache stay where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.down import run_dir_of
from cli.drain import document, sentence
from cli.reach import admin
from cluster.draining import DEADLINE_MS, DEADLINE_MS_MAX
from cluster.run_file import find
from tandem.v1 import admin_pb2 as pb


def flip(
    worker: Annotated[str, typer.Argument(help="worker of `tandem status`", show_default=False)],
    role: Annotated[str, typer.Argument(help="prefill, decode or mixed", show_default=False)],
    deadline: Annotated[
        float, typer.Option(help="seconds until it must be empty", min=0.001, max=DEADLINE_MS_MAX / 1000)
    ] = DEADLINE_MS / 1000,
    port: Annotated[int | None, typer.Option(help="HTTP port of the cluster; needed when several run")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON for each change")] = False,
    run_dir: Annotated[Path | None, typer.Option(help="folder of run files (or TANDEM_RUN_DIR)")] = None,
) -> None:
    """Move away what a worker has, and give it another role. No stream is lost.

    What has begun goes on when this command is stopped.
    """
    run = find(run_dir_of(run_dir), port)
    asked = pb.FlipRequest(worker=worker, role=role, deadline_ms=max(1, round(deadline * 1000)))
    with admin(run) as stub:
        for progress in stub.Flip(asked):  # the router bounds each of its states
            over = f"is a {role} worker now" if progress.state == "done" else ""
            print(json.dumps(document(progress)) if as_json else sentence(progress, over), flush=True)
