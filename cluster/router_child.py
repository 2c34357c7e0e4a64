"""The router's process as its supervisor sees it: started, heard, told and stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from tandem.request import WorkerId

INCARNATIONS_PER_ROUTER = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSaid:
    """A line of JSON from the router process: what happened, and the rest of it."""

    generation: int
    event: str
    fields: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterEnded:
    """The router process is gone."""

    generation: int
    code: int


class RouterChild:
    """One router process. Create it on the main thread: it dies with the thread that started it."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        generation: int,
        log_file: Path,
        post: Callable[[RouterSaid | RouterEnded], None],
    ) -> None:
        self.generation = generation
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "cluster.router_process",
                    "--parent-pid", str(os.getpid()),
                    "--base-incarnation", str(generation * INCARNATIONS_PER_ROUTER),
                    "--config-json", config.model_dump_json(),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._listen, args=(post,), name="router", daemon=True).start()

    def _listen(self, post: Callable[[RouterSaid | RouterEnded], None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            fields = json.loads(line)
            post(RouterSaid(generation=self.generation, event=fields.pop("event"), fields=fields))
        post(RouterEnded(generation=self.generation, code=self.process.wait()))

    def tell_ended(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        """Says that a worker's process is gone, so that nobody waits for its heartbeats."""
        assert self.process.stdin is not None
        line = {"ended": worker_id, "incarnation": incarnation, "reason": reason}
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it is gone itself: RouterEnded follows

    def stop(self, timeout_s: float) -> None:
        """Asks it to end, and ends it when it does not."""
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
