"""`tandem down`: stops a cluster from outside."""

from __future__ import annotations

import json

from cli.options import AsJson, Port, RunDir, running_cluster
from cluster.stop import stop_cluster


def down(
    port: Port = None,
    as_json: AsJson = False,
    run_dir: RunDir = None,
) -> None:
    """Stop a running cluster and wait until nothing of it is left."""
    run = running_cluster(run_dir, port)
    told = stop_cluster(run)
    print(json.dumps({"port": run.port, "pid": run.pid, "said": told}) if as_json else told)
