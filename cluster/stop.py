"""Stops a cluster from another process: asks its supervisor, waits for all of its processes, ends what is left."""

from __future__ import annotations

import psutil

from cluster.processes import kill_all, wait_gone
from cluster.run_file import RunFile

ORDERLY_S = 45.0


def stop_cluster(run: RunFile) -> str:
    """Ends the cluster and says how it went."""
    try:
        supervisor = psutil.Process(run.pid)
        tree = [supervisor, *supervisor.children(recursive=True)]
        supervisor.terminate()
    except psutil.NoSuchProcess:
        return f"the cluster at port {run.port} was gone already"
    left = wait_gone(tree, ORDERLY_S)
    if not left:
        return f"stopped the cluster at port {run.port}"
    kill_all(left)
    return f"stopped the cluster at port {run.port}; {len(left)} processes had to be killed"
