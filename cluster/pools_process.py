"""The process that holds Ray: `python -m cluster.pools_process`. Ray may hang or crash it; the supervisor goes on.

It tells its supervisor events as lines of JSON on stdout, takes commands as lines of JSON on stdin, and ends when stdin
does. Should it be killed, its reaper ends what is left of a local Ray.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from cluster.config import ClusterConfig
from cluster.pool_events import PoolEvent, PoolsAlive, RayLost, RayMended, RayUp, WorkerDown, WorkerUp, to_line
from cluster.pools import Pools, PoolsEvent
from cluster.processes import (
    adopt_orphans,
    bury_orphans,
    descendants,
    die_with_parent,
    is_heard,
    kill_all,
    wait_gone,
)
from cluster.ray_session import RayError, RaySession
from cluster.reaper import Reaper
from cluster.worker_settings import WorkerSettings
from tandem.log_lines import LogFormat, log_by
from tandem.request import WorkerId

log = logging.getLogger(__name__)

LOOK_S = 0.5
REAPER_PERIOD_S = 1.0
BURIAL_PERIOD_S = 3.0  # far longer than those who wait for a child of their own take
REJOIN_PERIOD_S = 1.0
STOP = "stop"

Command = dict[str, str | float]


class PoolsProcess:
    """One Ray and its workers, from the first command to the last. `say` tells the supervisor."""

    def __init__(
        self, config: ClusterConfig, *, threads: int, log_file: Path, say: Callable[[PoolEvent], None]
    ) -> None:
        self._config = config
        self._threads = threads
        self._say = say
        self._inbox: queue.SimpleQueue[PoolsEvent | Command] = queue.SimpleQueue()
        self._session = RaySession(config, threads=threads, log_file=log_file)
        self._stopping = threading.Event()
        self._reaper = Reaper()
        self._reaped_s = 0.0
        self._zombies: set[int] = set()
        self._buried_s = 0.0

    def run(self, *, is_again: bool) -> int:
        """Serves until it is told to stop. 0 after an orderly stop, 1 when Ray is lost or did not start."""
        threading.Thread(target=self._listen, name="commands", daemon=True).start()
        try:
            self._open(is_again)
            pools = Pools(self._session, threads=self._threads, post=self._inbox.put)
            self._say(RayUp())
            self._watch(pools)
        except Exception as error:  # whatever it is: nobody goes on here, and the supervisor must not wait for us
            if not isinstance(error, RayError):
                log.exception("the holder of Ray ends")
            self._say(RayLost(reason=str(error) or type(error).__name__))
            kill_all(descendants())  # nothing of it is of use, and Ray's own goodbye would wait for what is gone
            self._session.forget()
            return 1
        self._session.close()
        self._reaper.dismiss()
        kill_all(wait_gone(descendants(), 2.0))
        return 0

    def _open(self, is_again: bool) -> None:
        """A Ray of somebody else's that was lost may be back in a while."""
        until_s = time.monotonic() + (self._config.start_timeout_s if is_again and not self._session.is_local else 0)
        while True:
            try:
                return self._session.open(is_again=is_again)
            except RayError as error:
                if time.monotonic() >= until_s or self._stopping.wait(REJOIN_PERIOD_S):
                    raise
                log.warning("%s; it is tried again", error)

    def _watch(self, pools: Pools) -> None:
        looked_s = 0.0
        while True:
            if time.monotonic() - looked_s >= LOOK_S:
                looked_s = time.monotonic()
                self._look(pools)
            try:
                item = self._inbox.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            match item:
                case WorkerUp():
                    pools.watch(item)
                    self._say(item)
                case WorkerDown():
                    pools.bury(item)
                    self._say(item)
                case _:
                    if item["command"] == STOP:
                        pools.stop(float(item["timeout_s"]))
                        return
                    self._obey(pools, item)

    def _look(self, pools: Pools) -> None:
        """What is due now and then."""
        self._say(PoolsAlive())
        for what in self._session.look():
            self._say(RayMended(what=what))
        for waits in pools.waiting():
            self._say(waits)
        if time.monotonic() - self._reaped_s > REAPER_PERIOD_S:
            self._reaped_s = time.monotonic()
            self._reaper.update()
        if time.monotonic() - self._buried_s > BURIAL_PERIOD_S:
            self._buried_s = time.monotonic()
            self._zombies = bury_orphans(self._zombies)

    def _obey(self, pools: Pools, command: Command) -> None:
        match command["command"]:
            case "start":
                pools.start(WorkerSettings.from_json(str(command["settings"])))
            case "retire":
                pools.retire(WorkerId(str(command["worker_id"])))
            case "kill":
                pools.kill(WorkerId(str(command["worker_id"])))
            case unknown:
                raise ValueError(f"there is no command {unknown!r}")

    def _listen(self) -> None:
        gone = {"command": STOP, "timeout_s": float(self._config.stop_timeout_s)}  # nobody is left to ask
        for command in itertools.chain(map(json.loads, sys.stdin), [gone]):
            if command["command"] == STOP:
                self._stopping.set()
            self._inbox.put(command)


def main() -> int:
    """The process's entry."""
    parser = argparse.ArgumentParser(prog="python -m cluster.pools_process", description=__doc__)
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--log-file", type=Path, required=True)
    parser.add_argument("--again", action="store_true")
    flags = parser.parse_args()
    die_with_parent(flags.parent_pid)
    adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor's affair
    config = ClusterConfig.model_validate_json(flags.config_json)
    say = _speaker(_own_stdout())
    log_by(logging.StreamHandler(sys.stderr), config.log_level, LogFormat(config.log_format))
    process = PoolsProcess(config, threads=flags.threads, log_file=flags.log_file, say=say)
    code = process.run(is_again=flags.again)
    if code:
        os._exit(code)  # past Ray's handlers, which wait for a Ray that is lost
    return code


def _own_stdout() -> TextIO:
    """Stdout for our lines alone: what Ray and its children print goes where errors go."""
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return ours


def _speaker(out: TextIO) -> Callable[[PoolEvent], None]:
    def say(event: PoolEvent) -> None:
        if isinstance(event, PoolsAlive) and not is_heard(out.fileno()):
            return  # the supervisor stands still: Ray is looked after all the same
        with suppress(BrokenPipeError):  # a supervisor that is gone is noticed on stdin
            out.write(to_line(event) + "\n")
            out.flush()

    return say


if __name__ == "__main__":
    sys.exit(main())
