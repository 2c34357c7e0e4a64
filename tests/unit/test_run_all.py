"""The command that runs all tests: what it starts beside them gives way, tells of failures, and ends with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import run_all


@pytest.mark.parametrize(("commands", "status"), [([["true"], ["true"]], 0), ([["false"], ["true"]], 1)])
def test_what_runs_behind_runs_to_its_end_and_one_failure_is_enough(commands: list[list[str]], status: int) -> None:
    with tempfile.TemporaryFile("w+") as output:
        begun = run_all.start_behind([*commands, ["echo", "the last"]], output)
        assert begun.wait(30) == status
        output.seek(0)
        assert output.read() == "the last\n"


def test_what_runs_behind_gives_way_and_ends_with_all_that_it_started() -> None:
    with tempfile.TemporaryFile("w+") as output:
        begun = run_all.start_behind([["sh", "-c", "sleep 100 & sleep 100; true"]], output)
        process = psutil.Process(begun.pid)
        while len(process.children(recursive=True)) < 3:  # sh, and both of its own
            assert begun.poll() is None
        everyone = [process, *process.children(recursive=True)]
        assert {each.nice() for each in everyone} == {19}
        run_all.end(begun)
        assert psutil.wait_procs(everyone, timeout=10)[1] == []


def test_who_runs_it_ends_all_of_it(tmp_path: Path) -> None:
    """By an interrupt, as from a terminal: the front hears of it itself, what runs behind has a session of its own."""
    script = (
        "import run_all, sys\n"
        "run_all.pytest = lambda *a: ['sh', '-c', 'echo $PPID; sleep 100']\n"
        f"sys.exit(run_all.main(['--beside', 'sh -c \"echo $$ > {tmp_path / 'pid'}; sleep 100\"']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(run_all.__file__).parent)}
    running = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # whoever runs this may ignore it
    )  # fmt: skip
    assert running.stdout is not None
    running.stdout.readline()
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert running.poll() is None
    behind = psutil.Process(int((tmp_path / "pid").read_text()))
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(30) != 0
    running.stdout.close()
    assert psutil.wait_procs([behind], timeout=10)[1] == []
