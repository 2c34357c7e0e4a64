"""One connection to Ray: a local Ray that is started, looked after, mended and ended here, or one that is joined."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import ray
import ray.exceptions

from cluster.config import ClusterConfig
from cluster.lean_ray import without_unused_parts
from cluster.ray_parts import RayParts, child_named, raylet_of
from cluster.ray_watch import KillPart, Lost, Part, RayWatch, StartGcs
from cluster.restarts import Restarts
from cluster.worker_settings import worker_environment

log = logging.getLogger(__name__)

SLOT = "tandem_worker"  # a resource of a local Ray: as many as there may be workers, whatever the machine has
WORKERS_MAX = 3 * 64
OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes: nothing of ours goes through it
TEMP_ROOT = Path("/tmp")  # Ray's sockets lie below it: their paths must be short
TEMP_PREFIX = "tandem-ray-"

# docs/ray.md says why each is what it is. A variable that is set already stays as it is.
SETTINGS = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
    "RAY_worker_niceness": "0",
}
LOCAL_SETTINGS = {
    "RAY_gcs_storage": "rocksdb",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ROTATION_MAX_BYTES": str(16 << 20),
    "RAY_ROTATION_BACKUP_COUNT": "1",
    "RAY_maximum_gcs_destroyed_actor_cached_count": "64",
    "RAY_maximum_gcs_dead_worker_cached_count": "64",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
}


class RayError(RuntimeError):
    """Ray cannot be started, joined or used any more; the message says what to change."""


class RaySession:
    """Ray for this process. Methods are for one thread."""

    def __init__(self, config: ClusterConfig, *, threads: int, log_file: Path) -> None:
        self._config = config
        self._threads = threads
        self._log_file = log_file
        self._temp_dir = ""
        self._temp_lock: int | None = None  # held for as long as the folder is in use
        self._parts: RayParts | None = None
        self._watch = RayWatch(gcs_restarts=Restarts(restarts_max=config.max_restarts))

    @property
    def is_local(self) -> bool:
        """Whether this Ray was started here and ends with this process."""
        return not self._config.address

    def open(self, *, is_again: bool) -> None:
        """Starts a local Ray, or joins the one at `address`. Raises RayError.

        `is_again`: the cluster ran before, so that a Ray that has lost machines is good enough.
        """
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        for name, value in {**SETTINGS, **(LOCAL_SETTINGS if self.is_local else {})}.items():
            os.environ.setdefault(name, value)
        try:
            if self.is_local:
                self._open_local()
            else:
                ray.init(address=self._config.address, log_to_driver=False, configure_logging=False)
                if not is_again:
                    self._check_resources()
        except RayError:
            raise
        except Exception as error:  # Ray raises that very class when its node is not up within its 30 s
            if self.is_local:
                raise RayError(f"Ray did not start: {error}") from error
            hint = "a cluster that asks for a token needs RAY_AUTH_MODE=token"
            raise RayError(f"Ray at {self._config.address}: {error} ({hint})") from error
        self._parts = self._find_parts()

    def _open_local(self) -> None:
        # Inherited by every worker; a runtime environment would cost each a process of its own to set up.
        os.environ.update(worker_environment(self._threads))
        sweep(TEMP_ROOT)
        self._temp_dir = tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=TEMP_ROOT)
        self._temp_lock = _lock(Path(self._temp_dir))
        storage = Path(self._temp_dir) / "gcs"
        storage.mkdir()
        os.environ["RAY_gcs_storage_path"] = str(storage)
        with without_unused_parts():
            ray.init(
                address="local",
                # Logical, and what Ray starts processes for in advance; a worker takes a slot, and pools may grow.
                num_cpus=self._config.num_workers,
                resources={SLOT: WORKERS_MAX},
                num_gpus=0,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=self._temp_dir,
            )

    def _check_resources(self) -> None:
        free, total = self.free_cpus()
        if free < self._config.num_workers:
            raise RayError(
                f"the Ray cluster at {self._config.address} has {free:g} of {total:g} CPUs free, "
                f"{self._config.num_workers} workers need one each; lower --prefill, --decode or --mixed"
            )

    def free_cpus(self) -> tuple[float, float]:
        """CPUs of the whole Ray cluster: free, and in all."""
        free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        total = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        return float(free), float(total)

    # ---- its parts ---------------------------------------------------------------------------------------------------

    def _find_parts(self) -> RayParts:
        """Of a local Ray both parts, which are asked; of another one the raylet, if it can be seen from here."""
        context = ray.get_runtime_context()
        node_id = context.get_node_id()
        found: dict[Part, psutil.Process | None] = {Part.RAYLET: raylet_of(node_id)}
        addresses: dict[Part, str] = {}
        if self.is_local:
            [node] = [each for each in ray.nodes() if each["NodeID"] == node_id]  # type: ignore[no-untyped-call]
            found[Part.GCS] = child_named(Part.GCS)
            raylet_address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
            addresses = {Part.GCS: context.gcs_address, Part.RAYLET: raylet_address}
        processes = {part: process for part, process in found.items() if process is not None}
        addresses = {part: address for part, address in addresses.items() if part in processes}
        return RayParts(processes, addresses, log_file=self._log_file)

    def look(self) -> list[str]:
        """Looks after the parts. Returns what was mended. Raises RayError when this Ray is lost."""
        if self._parts is None:
            return []
        mended = []
        for action in self._watch.look(time.monotonic_ns() // 1_000_000, self._parts.seen()):
            match action:
                case Lost(reason=reason):
                    raise RayError(reason)
                case KillPart(part=part, reason=reason):
                    log.warning("%s: it is killed", reason)
                    self._parts.kill(part)
                case StartGcs():
                    self._parts.start_gcs()
                    mended.append("its gcs_server ended and is started again; the workers go on")
        return mended

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends a local Ray or leaves the other one."""
        if self._parts is not None:
            self._parts.close()
        with suppress(ray.exceptions.RayError):
            ray.shutdown()
        if self._parts is not None and self.is_local:
            self._parts.kill(Part.GCS)  # Ray does not know of one that was started again
        self.forget()

    def forget(self) -> None:
        """Leaves a Ray that is lost: removes its files, and asks it nothing."""
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
