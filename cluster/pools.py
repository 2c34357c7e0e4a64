"""The pools of workers on Ray: a local Ray or an existing one, actors created, watched, stopped and killed."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from cluster.actors import START_FAILED, STARTED, WorkerActor
from cluster.config import ClusterConfig
from cluster.worker_settings import WorkerSettings, worker_environment
from tandem.request import WorkerId

log = logging.getLogger(__name__)

# Ray keeps going without its control service for so long; its own default of a minute would end the workers with it.
GCS_PATIENCE_S = 86_400
OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes: nothing of ours goes through it


TEMP_ROOT = Path("/tmp")  # Ray's sockets lie below it: their paths must be short
TEMP_PREFIX = "tandem-ray-"


class PoolError(RuntimeError):
    """Ray cannot be started or does not fit; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUp:
    """A worker has registered with the router and runs."""

    worker_id: WorkerId
    pid: int
    incarnation: int
    timings_ms: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDown:
    """A worker's process ended, or is of no use any more. `started` False: it never ran."""

    worker_id: WorkerId
    incarnation: int
    started: bool
    reason: str


PoolEvent = WorkerUp | WorkerDown


class _Member:
    """One actor, from its creation to its end."""

    def __init__(self, settings: WorkerSettings, actor: Any) -> None:
        self.settings = settings
        self.actor = actor
        self.pid = 0
        self.retiring = False
        self.is_down = False  # WorkerDown was posted


class Pools:
    """All workers of one cluster. Methods are for one thread; `post` is called on threads of Ray.

    On those threads nothing of Ray may be called: so whoever takes the events calls `watch` after WorkerUp and `bury`
    after WorkerDown.
    """

    def __init__(self, config: ClusterConfig, *, threads: int, post: Callable[[PoolEvent], None]) -> None:
        self._config = config
        self._threads = threads
        self._post = post
        self._members: dict[WorkerId, _Member] = {}
        self._posting = threading.Lock()  # a worker's end may come in two ways at once
        self._temp_dir = ""
        self._temp_lock: int | None = None  # held for as long as the folder is in use

    @property
    def is_local(self) -> bool:
        """Whether this Ray was started here and ends with this process."""
        return not self._config.address

    def open(self) -> None:
        """Starts a local Ray, or joins the one at `address`. Raises PoolError."""
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(GCS_PATIENCE_S))
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: workers would come after everything else
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            if self.is_local:
                self._open_local()
            else:
                ray.init(address=self._config.address, log_to_driver=False, configure_logging=False)
                self._check_resources()
        except PoolError:
            raise
        except Exception as error:  # Ray raises that very class when its node is not up within its 30 s
            if self.is_local:
                raise PoolError(f"Ray did not start: {error}") from error
            hint = "a cluster that asks for a token needs RAY_AUTH_MODE=token"
            raise PoolError(f"Ray at {self._config.address}: {error} ({hint})") from error

    def _open_local(self) -> None:
        # Inherited by every worker; a runtime environment would cost each a process of its own to set up.
        os.environ.update(worker_environment(self._threads))
        sweep(TEMP_ROOT)
        self._temp_dir = tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=TEMP_ROOT)
        self._temp_lock = _lock(Path(self._temp_dir))
        ray.init(
            address="local",
            num_cpus=self._config.num_workers,  # logical: a laptop's two cores hold three workers
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=self._temp_dir,
        )

    def _check_resources(self) -> None:
        free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        total = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        if free < self._config.num_workers:
            raise PoolError(
                f"the Ray cluster at {self._config.address} has {free:g} of {total:g} CPUs free, "
                f"{self._config.num_workers} workers need one each; lower --prefill, --decode or --mixed"
            )

    def start(self, settings: WorkerSettings) -> None:
        """Creates a worker; WorkerUp follows, or WorkerDown, and after WorkerUp some day WorkerDown."""
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_concurrency": 4}
        if not self.is_local:
            options["runtime_env"] = {"env_vars": worker_environment(self._threads)}
            options["scheduling_strategy"] = "SPREAD"
        actor: Any = ray.remote(WorkerActor).options(**options).remote(settings.to_json())
        member = _Member(settings, actor)
        self._members[settings.worker_id] = member
        actor.start.remote().future().add_done_callback(lambda done: self._started(member, done))

    def watch(self, up: WorkerUp) -> None:
        """Sees to it that WorkerDown comes when the worker ends."""
        member = self._members[up.worker_id]
        member.pid = up.pid
        member.actor.wait.remote().future().add_done_callback(lambda done: self._ended(member, done))

    def bury(self, down: WorkerDown) -> None:
        """Gives back what a worker that ended still holds: its process may live, of no use to anybody."""
        member = self._members.pop(down.worker_id)
        with suppress(ray.exceptions.RayError):
            ray.kill(member.actor, no_restart=True)

    def _started(self, member: _Member, done: Future[str]) -> None:
        worker_id, incarnation = member.settings.worker_id, member.settings.incarnation
        try:
            answer = json.loads(done.result())
        except ray.exceptions.RayError as error:
            answer = {START_FAILED: _first_line(error)}
        if START_FAILED in answer:
            reason = answer[START_FAILED]
            self._post(WorkerDown(worker_id=worker_id, incarnation=incarnation, started=False, reason=reason))
            return
        facts = answer[STARTED]
        self._post(
            WorkerUp(
                worker_id=worker_id,
                pid=facts["pid"],
                incarnation=incarnation,
                timings_ms=facts["timings_ms"],
            )
        )

    def _ended(self, member: _Member, done: Future[str]) -> None:
        try:
            reason = done.result()
        except ray.exceptions.RayError as error:
            reason = _first_line(error)
        if not member.retiring:  # else it ends its parts in order first
            self._down(member, reason)

    def _down(self, member: _Member, reason: str) -> None:
        with self._posting:
            posted, member.is_down = member.is_down, True
        if not posted:
            name, incarnation = member.settings.worker_id, member.settings.incarnation
            self._post(WorkerDown(worker_id=name, incarnation=incarnation, started=True, reason=reason))

    def retire(self, worker_id: WorkerId) -> None:
        """Asks a worker that runs to end in order. WorkerDown follows when it has; `kill` ends one that does not."""
        member = self._members.get(worker_id)
        if member is None:
            return
        member.retiring = True

        def stopped(done: Future[None]) -> None:
            error = done.exception()
            self._down(member, _first_line(error) if isinstance(error, Exception) else "stopped")

        member.actor.stop.remote().future().add_done_callback(stopped)

    def kill(self, worker_id: WorkerId) -> None:
        """Ends a worker's process at once, also one that is stopped or stuck. WorkerDown follows."""
        member = self._members.get(worker_id)
        if member is not None:
            self._kill(member)

    def _kill(self, member: _Member) -> None:
        if self.is_local and member.pid:
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
        with suppress(ray.exceptions.RayError):
            ray.kill(member.actor, no_restart=True)

    def stop(self, timeout_s: float) -> None:
        """Stops all workers in order, those that do not within `timeout_s` by force, and lets go of Ray."""
        members = list(self._members.values())
        refs = [member.actor.stop.remote() for member in members]
        with suppress(ray.exceptions.RayError):
            ray.wait(refs, num_returns=len(refs), timeout=timeout_s) if refs else None
        for member in members:
            self._kill(member)

    def close(self) -> None:
        """Ends a local Ray or leaves the other one."""
        ray.shutdown()
        if self._temp_dir:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
        if self._temp_lock is not None:
            os.close(self._temp_lock)
            self._temp_lock = None


def sweep(root: Path) -> None:
    """Removes the folders of supervisors that were killed: nobody else does."""
    for folder in root.glob(f"{TEMP_PREFIX}*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed or its process ends; None: another one holds it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # somebody else's, or gone
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
