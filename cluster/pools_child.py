"""The process that holds Ray as its supervisor sees it: started, heard, told, killed and stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.pool_events import PoolEvent, from_line
from cluster.worker_settings import WorkerSettings
from tandem.request import WorkerId

ENDING_S = 10.0  # for Ray's own end, once the workers have stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolsEnded:
    """The process is gone, and with it its workers. Nothing of it is heard after this."""

    code: int


class PoolsChild:
    """One process with one Ray. Create it on the main thread: it dies with the thread that started it."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        threads: int,
        is_again: bool,
        log_file: Path,
        post: Callable[[PoolEvent | PoolsEnded], None],
    ) -> None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "cluster.pools_process",
                    "--parent-pid", str(os.getpid()),
                    "--threads", str(threads),
                    "--config-json", config.without_store().model_dump_json(),
                    "--log-file", str(log_file),
                    *(["--again"] if is_again else []),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._listen, args=(post,), name="pools", daemon=True).start()

    def _listen(self, post: Callable[[PoolEvent | PoolsEnded], None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(json.JSONDecodeError):  # it was killed while it wrote its last one
                post(from_line(line))
        post(PoolsEnded(code=self.process.wait()))

    def start(self, settings: WorkerSettings) -> None:
        """Creates a worker; WorkerUp follows, or WorkerDown, and after WorkerUp some day WorkerDown."""
        self._tell(command="start", settings=settings.to_json())

    def retire(self, worker_id: WorkerId) -> None:
        """Asks a worker that runs to end in order. WorkerDown follows when it has; `kill` ends one that does not."""
        self._tell(command="retire", worker_id=worker_id)

    def kill(self, worker_id: WorkerId) -> None:
        """Ends a worker's process at once, also one that is stopped or stuck. WorkerDown follows."""
        self._tell(command="kill", worker_id=worker_id)

    def end_now(self) -> None:
        """Ends the process itself, also when it hangs. PoolsEnded follows."""
        self.process.kill()

    def stop(self, timeout_s: float) -> None:
        """Stops all workers in order, and Ray; by force whatever takes longer."""
        self._tell(command="stop", timeout_s=timeout_s)
        try:
            self.process.wait(timeout_s + ENDING_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _tell(self, **command: str | float) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it is gone: PoolsEnded follows
