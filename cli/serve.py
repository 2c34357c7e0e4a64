"""`tandem serve`: a cluster in the foreground."""

from __future__ import annotations

import sys

import typer

from cli.settings import with_settings
from cluster.config import Effective
from cluster.installation import clash


@with_settings
def serve(effective: Effective) -> None:
    """Start a cluster here and serve until Ctrl-C or `tandem down`."""
    hidden = clash()
    if hidden is not None:
        print(f"error: {hidden}", file=sys.stderr)
        raise typer.Exit(1)
    from cluster.supervisor import Supervisor  # brings Ray, which the other commands do without

    terminal = sys.stdout

    def say(line: str) -> None:
        print(line, file=terminal, flush=True)

    raise typer.Exit(Supervisor(effective.config, say=say).run())
