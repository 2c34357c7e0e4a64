"""The reaper: `python -m cluster.reaper`. It outlives a holder of Ray that was killed, and ends what is left.

Most processes of a cluster die with their parents by themselves; Ray's own do not. The process that holds Ray, which
dies with its supervisor, tells its reaper now and then which processes there are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress

import psutil

from cluster.processes import descendants, is_heard, kill_all, wait_gone

GRACE_S = 4.0  # for those that end by themselves


class Reaper:
    """The holder's end. Create it before anything that it shall reap."""

    def __init__(self) -> None:
        self._known: list[tuple[int, float]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.reaper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def update(self) -> None:
        """Tells it what runs now."""
        known = []
        for process in descendants():
            with suppress(psutil.NoSuchProcess):
                if process.pid != self._process.pid:
                    known.append((process.pid, process.create_time()))
        if known != self._known and self._is_heard():  # the newest is all that counts: the next look says it
            self._known = known
            self._write(json.dumps(known))

    def _is_heard(self) -> bool:
        assert self._process.stdin is not None
        return is_heard(self._process.stdin.fileno())

    def dismiss(self) -> None:
        """Nothing is left to reap."""
        assert self._process.stdin is not None
        if not self._is_heard():  # it stands still, and would reap once it went on
            self._process.kill()
        self._write("[]")
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


def main() -> None:
    """Reads one JSON list of [pid, time of creation] a line; at the end of stdin ends those of the last, and theirs."""
    last: list[tuple[int, float]] = []
    for line in sys.stdin:
        with suppress(json.JSONDecodeError):  # the holder was killed while it wrote the last line
            last = json.loads(line)
    left = []
    for pid, created_s in last:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created_s:
                left += [process, *process.children(recursive=True)]
    kill_all(wait_gone(left, GRACE_S))


if __name__ == "__main__":
    main()
