"""One router's process as its supervisor sees it: started, heard, told and stopped."""

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

from cluster.router_settings import RouterSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSaid:
    """A line of JSON from a router process: what happened, and the rest of it. `generation`: which start of it."""

    router: str
    generation: int
    event: str
    fields: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterEnded:
    """A router process is gone."""

    router: str
    generation: int
    code: int


class RouterChild:
    """One router process. Create it on the main thread: it dies with the thread that started it."""

    def __init__(
        self,
        settings: RouterSettings,
        *,
        generation: int,
        log_file: Path,
        post: Callable[[RouterSaid | RouterEnded], None],
    ) -> None:
        self.router = settings.router_id
        self.generation = generation
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "cluster.router_process",
                    "--parent-pid", str(os.getpid()),
                    "--router-id", settings.router_id,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                pass_fds=[settings.listener],
            )  # fmt: skip
        self._write(settings.to_json())  # not as an argument, which everybody on the machine can read
        threading.Thread(target=self._listen, args=(post,), name=self.router, daemon=True).start()

    def _listen(self, post: Callable[[RouterSaid | RouterEnded], None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(json.JSONDecodeError):  # it was killed while it wrote its last one
                fields = json.loads(line)
                event = fields.pop("event")
                post(RouterSaid(router=self.router, generation=self.generation, event=event, fields=fields))
        post(RouterEnded(router=self.router, generation=self.generation, code=self.process.wait()))

    def tell(self, word: str, **fields: object) -> None:
        """One command: a word and what belongs to it."""
        self._write(json.dumps({"word": word, **fields}))

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it is gone itself: RouterEnded follows

    def ask_to_end(self) -> None:
        """Begins an orderly stop."""
        self.process.terminate()

    def end(self, timeout_s: float) -> None:
        """Waits for the stop that was asked for, and ends what does not."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()

    def kill(self) -> None:
        """Ends it at once, also when it is stopped or stuck."""
        self.process.kill()
