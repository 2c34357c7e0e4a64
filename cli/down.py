"""`tandem down`: stops a cluster from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from cluster.config import default_run_dir
from cluster.run_file import find
from cluster.stop import stop_cluster


def down(
    port: Annotated[int | None, typer.Option(help="HTTP port of the cluster; needed when several run")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    run_dir: Annotated[Path | None, typer.Option(help="folder of run files (or TANDEM_RUN_DIR)")] = None,
) -> None:
    """Stop a running cluster and wait until nothing of it is left."""
    run = find(run_dir_of(run_dir), port)
    told = stop_cluster(run)
    print(json.dumps({"port": run.port, "pid": run.pid, "said": told}) if as_json else told)


def run_dir_of(given: Path | None) -> Path:
    """Where to look for run files: the flag, the variable, the default."""
    variable = os.environ.get("TANDEM_RUN_DIR")
    return given or (Path(variable) if variable else default_run_dir(os.environ))
