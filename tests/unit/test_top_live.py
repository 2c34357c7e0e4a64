"""`tandem top` as a process in a terminal of 80x24: its keys, a router that goes and comes back, and its end."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from operators_service import PORT, Telling, serving

from tandem.v1 import admin_pb2 as pb

DEADLINE_S = 60.0
READ_S = 0.05
COMMAND = [sys.executable, "-m", "cli.main", "top"]


def status() -> pb.StatusResponse:
    blocks = pb.BlockCountsStatus(total=10, free=5, owned=5)
    requests = [pb.RequestStatus(id=f"request-{number:02}", state="decoding", age_ms=number) for number in range(40)]
    return pb.StatusResponse(
        model="fake",
        http_address="http://here",
        workers=[pb.WorkerStatus(id="decode-0", role="decode", state="ready", kv_blocks=blocks)],
        requests=requests,
        routers=[pb.RouterStatus(id="router-0", pid=1, up=True)],
    )


class Terminal:
    """A process that believes to be in a terminal."""

    def __init__(self, *arguments: str, run_dir: Path) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.settings_before = termios.tcgetattr(slave)
        self._slave = slave
        environment = {**os.environ, "TANDEM_RUN_DIR": str(run_dir), "TERM": "xterm-256color", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment
        )  # fmt: skip
        self.shown = ""

    def until(self, pattern: str) -> None:
        """Reads on until that has been drawn since the last time."""
        until_s = time.monotonic() + DEADLINE_S
        while (found := re.search(pattern, self.shown, re.DOTALL)) is None:
            assert time.monotonic() < until_s, f"{pattern!r} was not drawn, but {self.shown[-3000:]!r}"
            self._read()
        self.shown = self.shown[found.end() :]

    def _read(self) -> None:
        ready, _, _ = select.select([self._master], [], [], READ_S)
        if ready:
            self.shown += os.read(self._master, 65536).decode(errors="replace")

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def ended(self) -> int:
        """The exit status; the terminal has to be as it was."""
        until_s = time.monotonic() + DEADLINE_S
        while (status := self.process.poll()) is None:
            assert time.monotonic() < until_s, f"it does not end, but shows {self.shown[-3000:]!r}"
            self._read()  # nobody who waits for its words to be read comes to an end
        self._read()
        assert termios.tcgetattr(self._slave) == self.settings_before
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@contextmanager
def terminal(*arguments: str, run_dir: Path) -> Iterator[Terminal]:
    shown = Terminal(*arguments, run_dir=run_dir)
    try:
        yield shown
    finally:
        shown.close()


@pytest.mark.timeout(240)
def test_keys_and_a_router_that_comes_back(tmp_path: Path) -> None:
    with terminal("--interval", "0.1", "--port", str(PORT), run_dir=tmp_path) as shown:
        shown.until("no cluster runs here at port")
        assert shown.ended() == 1
    telling = Telling(status())
    with terminal_over(telling, tmp_path) as shown:
        shown.until("decode-0.*request-39.*sort .age.")
        shown.press("s")
        shown.until("sort .tokens.")
        shown.press("\x1b[6~\x1b[6~")
        shown.until("request-00")
        shown.press("p")
        shown.until("paused: what is shown stands still")
        shown.press("p")
        assert telling.asked[0].last_minute
    with serving(telling, tmp_path):
        shown_again = Terminal("--interval", "0.1", run_dir=tmp_path)
        try:
            shown_again.until("decode-0")
            shown_again.process.send_signal(signal.SIGTERM)
            assert shown_again.ended() == 128 + signal.SIGTERM
        finally:
            shown_again.close()


@contextmanager
def terminal_over(telling: Telling, run_dir: Path) -> Iterator[Terminal]:
    """A live view, whose router is gone for a while when the test is done with it; it ends by a key."""
    with serving(telling, run_dir):
        shown = Terminal("--interval", "0.1", run_dir=run_dir)
        try:
            yield shown
        except BaseException:
            shown.close()
            raise
    try:
        shown.until("no answer for [0-9]+ s, trying again: no router of the cluster")
        telling.answer = status()
        telling.answer.routers[0].pid = 2
        with serving(telling, run_dir):
            shown.until("router-0 was started again: pid 1, now 2")
            shown.press("q")
            assert shown.ended() == 0
            shown.until(re.escape("\x1b[?1049l"))
    finally:
        shown.close()


def test_a_line_of_json_for_each_look_and_one_view_where_there_is_no_terminal(tmp_path: Path) -> None:
    environment = {**os.environ, "TANDEM_RUN_DIR": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "--interval", "0.1", "--once", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE_S, check=True)

    with serving(Telling(status()), tmp_path):
        [line] = run("--json").stdout.splitlines()
        document = json.loads(line)
        assert (document["error"], document["cluster"]["running"], document["workers"][0]["id"]) == ("", 40, "decode-0")
        plain = run().stdout
        assert "decode-0" in plain
        assert "request-00" in plain, "nothing is cut off"
        assert "\x1b" not in plain
