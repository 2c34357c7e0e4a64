"""`tandem migrate`: moves a running request to another worker."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cli.completion import running_requests, workers
from cli.options import AsJson, Port, RunDir, running_cluster
from cli.reach import admin
from cluster.documents import plain
from tandem.errors import CommandError
from tandem.v1 import admin_pb2 as pb

TIMEOUT_S = 120.0  # the router bounds the move itself


class Refused(CommandError, RuntimeError):
    """What was asked for did not come about; the message is for people."""


def migrate(
    request: Annotated[
        str,
        typer.Argument(
            help="id of a running request, or how it ends", show_default=False, autocompletion=running_requests
        ),
    ],
    to: Annotated[
        str, typer.Option(help="worker that it goes to; the router chooses without it", autocompletion=workers)
    ] = "",
    port: Port = None,
    as_json: AsJson = False,
    run_dir: RunDir = None,
) -> None:
    """Move a running request to another worker while it is answered; its tokens stay the same."""
    run = running_cluster(run_dir, port)
    with admin(run) as stub:
        move = stub.Migrate(pb.MigrateRequest(request_id=request, to=to), timeout=TIMEOUT_S)
    if as_json:
        print(json.dumps(plain(move), indent=2))
    elif move.outcome == "moved":
        print(sentence(move))
    if move.outcome != "moved":
        raise Refused(sentence(move))


def sentence(move: pb.MoveStatus) -> str:
    """How the move went, for people."""
    source = getattr(move, "from")
    if move.outcome == "moved":
        return (
            f"{move.request} moved from {source} to {move.to}: {move.blocks} blocks in {move.rounds} rounds, "
            f"{move.bytes / 1e6:.1f} MB in {move.precopy_ms} ms, pause {move.pause_ms} ms"
        )
    went = "runs on at" if move.outcome == "failed" else "ended at"
    return f"{move.request} was not moved to {move.to} and {went} {source}: {move.error}"
