"""The file that tells other commands where a running cluster is: one a cluster, named after its HTTP port."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from tandem.errors import CommandError

LOG_DIRS_KEPT = 8


class NoCluster(CommandError, LookupError):
    """No running cluster, or not one alone, is meant; the message says what to give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """What is written down of a running cluster."""

    pid: int  # of the supervisor
    started_s: float  # when the supervisor's process began, by the machine's clock: tells a re-used pid
    host: str
    port: int
    grpc_port: int
    model: str
    log_dir: str
    join_token_file: str = ""  # as what this machine's commands speak to the members
    tls_ca: str = ""  # files, where the router speaks TLS; with them this machine's commands do
    tls_cert: str = ""
    tls_key: str = ""
    tls_name: str = ""
    internal: Mapping[str, str] = field(default_factory=dict)  # of each router: where this machine's commands ask it
    router_pids: Mapping[str, int] = field(default_factory=dict)  # of the routers that are up

    @property
    def grpc_address(self) -> str:
        """Where this machine reaches the router's gRPC services."""
        return f"{reachable(self.host)}:{self.grpc_port}"

    def alive(self) -> bool:
        """Whether the supervisor that wrote it still runs."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started_s and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def reachable(host: str) -> str:
    """The address to dial for a server that listens at `host`, in brackets for IPv6."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def path_of(run_dir: Path, port: int) -> Path:
    """The run file of the cluster at this HTTP port."""
    return run_dir / f"{port}.json"


def write(run_dir: Path, run: RunFile) -> None:
    """Writes the file whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = path_of(run_dir, run.port)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(asdict(run)))
    draft.replace(path)


def remove(run_dir: Path, run: RunFile) -> None:
    """Removes the file if it is still this cluster's."""
    found = _read(path_of(run_dir, run.port))
    if found is not None and found.pid == run.pid:
        path_of(run_dir, run.port).unlink(missing_ok=True)


def find(run_dir: Path, port: int | None = None) -> RunFile:
    """The running cluster at `port`, or the only one. Raises NoCluster with a hint otherwise."""
    found = [run for path in sorted(run_dir.glob("*.json")) if (run := _read(path)) is not None and run.alive()]
    if port is not None:
        found = [run for run in found if run.port == port]
    if not found:
        at = "" if port is None else f" at port {port}"
        raise NoCluster(f"no cluster runs here{at} (looked in {run_dir}); start one with `tandem serve`")
    if len(found) > 1:
        ports = ", ".join(str(run.port) for run in found)
        raise NoCluster(f"several clusters run here, at ports {ports}: choose one with --port")
    return found[0]


def fresh_log_dir(run_dir: Path, port: int) -> Path:
    """An empty folder for the logs of a cluster that starts now. Of those that have ended the newest few are kept."""
    mine = log_dir_of(run_dir, port)
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.rmtree(mine, ignore_errors=True)
    ended = [
        path
        for path in run_dir.glob("*.logs")
        if (run := _read(path.with_suffix(".json"))) is None or not run.alive()
    ]  # fmt: skip
    for path in sorted(ended, key=lambda each: each.stat().st_mtime)[:-LOG_DIRS_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    mine.mkdir()
    return mine


def log_dir_of(run_dir: Path, port: int) -> Path:
    """The folder of the logs of the cluster at this HTTP port."""
    return run_dir / f"{port}.logs"


def _read(path: Path) -> RunFile | None:
    """The content of a run file, or None for one that is gone or of another version."""
    try:
        return RunFile(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
