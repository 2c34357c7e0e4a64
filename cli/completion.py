"""What a shell completes beside verbs and flags: names that a cluster here knows, if one answers at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from cli.options import running_cluster
from cli.reach import admin
from cli.sentences import EXPECTED
from cluster.run_file import RunFile
from router.request import ENDED
from tandem.messages import Role
from tandem.v1 import admin_pb2 as pb

ANSWER_S = 0.5  # whoever presses a key does not wait longer
NEWEST = 50  # requests
SILENT = (*EXPECTED, OSError, ValueError)


def workers(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Workers, with their role and state."""
    return _fitting(incomplete, _status(ctx), lambda status: [(each.id, _of(each)) for each in status.workers])


def running_requests(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Requests that run, the newest first."""
    return _fitting(incomplete, _status(ctx), lambda status: _requests(status, ended=False))


def requests(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Requests that are remembered, the newest first."""
    return _fitting(incomplete, _status(ctx, ended=True), lambda status: _requests(status, ended=True))


def log_parts(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Parts that have a log."""
    run = _cluster(ctx)
    found = [] if run is None else sorted(Path(run.log_dir).glob("*.log"))
    return [(path.stem, "") for path in found if path.stem.startswith(incomplete)]


def pool_sizes(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The beginnings of pools' sizes, such as decode=."""
    return [(f"{role}=", "number of workers") for role in Role if f"{role}=".startswith(incomplete)]


def roles(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Roles of a worker."""
    return [(role.value, "") for role in Role if role.startswith(incomplete)]


def _of(worker: pb.WorkerStatus) -> str:
    return f"{worker.role}, {worker.state}"


def _requests(status: pb.StatusResponse, *, ended: bool) -> list[tuple[str, str]]:
    wanted = [each for each in status.requests if ended or each.state not in ENDED]
    return [(each.id, each.state) for each in reversed(wanted[-NEWEST:])]


def _fitting(
    incomplete: str,
    status: pb.StatusResponse | None,
    names: Callable[[pb.StatusResponse], Iterable[tuple[str, str]]],
) -> list[tuple[str, str]]:
    return [] if status is None else [each for each in names(status) if each[0].startswith(incomplete)]


def _cluster(ctx: typer.Context) -> RunFile | None:
    """The cluster that the words so far mean; None: none, or not one alone."""
    try:
        return running_cluster(ctx.params.get("run_dir"), ctx.params.get("port"))
    except SILENT as error:
        _keep_quiet(error)
        return None


def _status(ctx: typer.Context, *, ended: bool = False) -> pb.StatusResponse | None:
    run = _cluster(ctx)
    if run is None:
        return None
    try:
        with admin(run, answer_s=ANSWER_S) as stub:
            asked = pb.StatusRequest(include_finished=ended)
            answer: pb.StatusResponse = stub.Status(asked, timeout=ANSWER_S)
    except SILENT as error:
        _keep_quiet(error)
        return None
    return answer


def _keep_quiet(error: Exception) -> None:
    """A shell shows what is printed here in the middle of the line that is being typed: so nothing is."""
    logging.getLogger(__name__).debug("nothing to complete: %s", error)
