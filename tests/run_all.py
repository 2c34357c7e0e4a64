"""Runs all tests: what needs the clock or real clusters in front, and what only computes beside it, when there is time.

The tests of clusters wait for processes, deadlines and one another, and leave a fifth of two cores idle. What computes
takes that, at the lowest priority: it is told of when it is over, and may not hold anything up.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

WANTED = "not gpu and not long"
END_S = 10.0
PATIENCE_S = 1200  # with a test that runs only when nobody else does


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when any of it failed."""
    parser = argparse.ArgumentParser(prog="python tests/run_all.py", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes for what is no cluster")
    parser.add_argument("--clusters", type=int, default=2, help="processes for clusters")
    parser.add_argument("--beside", action="append", default=[], help="a command that runs beside the tests, too")
    options = parser.parse_args(arguments)
    front = [
        pytest(f"{WANTED} and not computes", options.jobs, "worksteal", "tests", "--ignore=tests/integration"),
        pytest(f"{WANTED} and not computes", options.clusters, "loadfile", "tests/integration"),
    ]
    patient = ("tests", "-o", f"timeout={PATIENCE_S}")
    behind = [*map(shlex.split, options.beside), pytest(f"{WANTED} and computes", options.jobs, "worksteal", *patient)]
    with tempfile.TemporaryFile("w+") as output:
        beside = start_behind(behind, output)
        try:
            failed = [subprocess.run(command, check=False).returncode != 0 for command in front]
            beside.wait()
        finally:
            end(beside)
        output.seek(0)
        print(output.read(), flush=True)
    return int(any(failed) or beside.returncode != 0)


def pytest(wanted: str, processes: int, dist: str, *arguments: str) -> list[str]:
    """The command for the tests with these markers."""
    several = ["-n", str(processes), "--dist", dist] if processes > 1 else []
    return [sys.executable, "-m", "pytest", "-m", wanted, *several, *arguments]


def start_behind(commands: Sequence[Sequence[str]], output: IO[str]) -> subprocess.Popen[bytes]:
    """Begins all these, one after the other, at the lowest priority; status 0 when none has failed."""
    script = "; ".join(f"{shlex.join(command)} || failed=1" for command in commands)
    return subprocess.Popen(
        ["/bin/sh", "-c", f"failed=0; {script}; exit $failed"],
        stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=give_way,
    )  # fmt: skip


def give_way() -> None:
    """This process and its children run when nobody else wants to."""
    os.nice(19)
    with suppress(OSError):  # where each session is a scheduling group of its own, what counts is the group's
        Path("/proc/self/autogroup").write_text("19")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends it with all that it has started, if it still runs."""
    if process.poll() is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
