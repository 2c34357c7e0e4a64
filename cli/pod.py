"""`tandem pod`: what the pods of a Kubernetes cluster run around a cluster of Tandem; helm/tandem calls it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Port, RunDir, running_cluster
from cli.status import ask
from cluster.config import ConfigError
from cluster.member_access import key_metadata
from cluster.pod_end import PodLeaves, addresses_of, requests_of, wait_until_idle
from cluster.run_file import NoCluster
from tandem.errors import CommandError
from tandem.tls import load_tls

pod = typer.Typer(
    name="pod", add_completion=False, help="For Kubernetes: before and after a pod serves.", no_args_is_help=True
)

Within = Annotated[float, typer.Option(help="seconds that it may take", min=0)]


class PodError(CommandError, RuntimeError):
    """It could not be done; the message says why."""


@pod.callback()
def group() -> None:
    """What helm/tandem runs around `tandem serve`."""


@pod.command()
def room(
    workers: Annotated[int, typer.Option(help="workers that want a CPU each", min=1)],
    within: Within = 3600,
    address: Annotated[str, typer.Option(help="address of the Ray cluster (or TANDEM_ADDRESS)")] = "",
) -> None:
    """Wait until a Ray cluster has room for the workers; one that scales itself is asked for it."""
    from cluster.ray_room import wait_for_room  # brings Ray
    from cluster.ray_session import RayError

    address = address or os.environ.get("TANDEM_ADDRESS", "")
    if not address:
        raise ConfigError("address: is empty; give the host:port of a Ray cluster, or set TANDEM_ADDRESS")
    try:
        wait_for_room(address, workers, within_s=within, say=_say)
    except RayError as error:
        raise PodError(str(error)) from None
    _say(f"there is room for {workers} workers")


@pod.command()
def idle(
    settle: Annotated[float, typer.Option(help="seconds until no new connection comes", min=0)] = 5,
    within: Within = 120,
    port: Port = None,
    run_dir: RunDir = None,
) -> None:
    """Before the cluster here is stopped: wait until its requests have ended."""
    run = running_cluster(run_dir, port)

    def num_running() -> int:
        try:
            return requests_of(ask(run))
        except NoCluster as error:  # its routers are gone, and with them its requests
            _say(str(error))
            return 0

    if not wait_until_idle(num_running, settle_s=settle, within_s=within, say=_say):
        raise PodError(f"requests still run after {within:g} s")


@pod.command()
def leave(
    host: Annotated[str, typer.Option(help="address of this pod: that of the workers to be drained")],
    routers: Annotated[str, typer.Option(help="host:port of gRPC; a name may stand for several pods")],
    within: Within = 120,
    tls_ca: Annotated[Path | None, typer.Option(help="PEM authority of the routers' certificates")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate to show")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of it")] = None,
    tls_name: Annotated[str, typer.Option(help="name in the routers' certificates")] = "",
) -> None:
    """Before this pod ends: move everything away from the workers in it, and have others take their place.

    With API keys it needs an operator's, in TANDEM_API_KEY.
    """
    tls = None if tls_ca is None else load_tls(ca=tls_ca, cert=tls_cert, key=tls_key, name=tls_name)
    try:
        addresses = addresses_of(routers)
    except (OSError, ValueError) as error:
        raise PodError(f"routers: {routers}: {error}") from None
    failures = PodLeaves(tls=tls, metadata=key_metadata(), say=_say).leave(host, addresses, within_s=within)
    if failures:
        raise PodError("; ".join(failures))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
