"""The options that many commands have, stated once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cluster.config import default_run_dir, refuse_unknown_variables
from cluster.draining import DEADLINE_MS, DEADLINE_MS_MAX
from cluster.run_file import RunFile, find

Port = Annotated[int | None, typer.Option(help="HTTP port of the cluster; needed when several run")]
RunDir = Annotated[Path | None, typer.Option(help="folder of run files (or TANDEM_RUN_DIR)")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="print a line of JSON for each change")]
DEADLINE_S, DEADLINE_S_MAX = DEADLINE_MS / 1000, DEADLINE_MS_MAX / 1000
Deadline = Annotated[float, typer.Option(help="seconds until it must be empty", min=0.001, max=DEADLINE_S_MAX)]


def whole_ms(seconds: float) -> int:
    """A deadline as the protocol has it, where 0 means the default."""
    return max(1, round(1000 * seconds))


def running_cluster(run_dir: Path | None, port: int | None) -> RunFile:
    """The cluster that the options mean. Raises NoCluster, ConfigError."""
    return find(run_dir_of(run_dir), port)


def run_dir_of(given: Path | None) -> Path:
    """Where to look for run files: the flag, the variable, the default. Raises ConfigError for an unknown variable."""
    refuse_unknown_variables(os.environ)
    variable = os.environ.get("TANDEM_RUN_DIR")
    return given or (Path(variable) if variable else default_run_dir(os.environ))
