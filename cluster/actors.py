"""The Ray actor around one worker. All that it does lives in cluster/worker_host.py, which knows nothing of Ray."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
from pathlib import Path

import ray

from cluster.worker_host import StartFailed, WorkerHost
from cluster.worker_settings import WorkerSettings
from tandem.log_lines import LogFormat, log_by

START_FAILED = "failed"
STARTED = "started"


class WorkerActor:
    """One worker process. Its methods run on threads of the actor and speak JSON and text only."""

    def __init__(self, settings: str) -> None:
        chosen = WorkerSettings.from_json(settings)
        if not chosen.bind_host:  # on a cluster of machines: the address of this one
            chosen = dataclasses.replace(chosen, bind_host=ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        _log_to(Path(chosen.log_file), chosen.config.log_level, LogFormat(chosen.config.log_format))
        self._host = WorkerHost(chosen)

    def start(self) -> str:
        """Starts the worker. JSON: {"started": facts}, or {"failed": reason}, which is meant for people."""
        try:
            started = self._host.start()
        except StartFailed as error:
            return json.dumps({START_FAILED: str(error)})
        info = started.info
        facts = {"pid": info.pid, "agent_pid": info.agent_pid}
        return json.dumps(
            {STARTED: {**facts, "timings_ms": started.timings_ms, "exact_reason": dict(info.labels)["exact_reason"]}}
        )

    def wait(self) -> str:
        """Why the worker ended, once it has."""
        return self._host.wait()

    def stop(self) -> None:
        """Ends the worker in order."""
        self._host.stop()


def _log_to(file: Path, level: str, log_format: LogFormat) -> None:
    """All logging of this process, and what a crash of the interpreter has to say, goes to the worker's own file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    faulthandler.enable(file.open("a"))
    log_by(logging.FileHandler(file), level, log_format)
