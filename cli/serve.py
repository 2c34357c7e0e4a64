"""`tandem serve`: a cluster in the foreground."""

from __future__ import annotations

import typer

from cluster.config import Effective


def serve(effective: Effective) -> None:
    """Start a cluster here and serve until Ctrl-C or `tandem down`."""
    from cluster.supervisor import Supervisor  # brings Ray, which the other commands do without

    raise typer.Exit(Supervisor(effective.config, say=_say).run())


def _say(line: str) -> None:
    print(line, flush=True)
