"""Mooncake and NIXL beside our transports, when they can be installed: in an environment of their own."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".rivals" / "transfer"
PYTHON = FOLDER / "bin" / "python"
# Without what they depend on: NIXL's names a torch build with gigabytes of CUDA, and neither needs it here.
PACKAGES = ("mooncake-transfer-engine-non-cuda==0.3.13.post1", "nixl-cu12==1.5.1", "numpy==2.2.6")
KINDS = {"mooncake": "Mooncake 0.3.13 over TCP", "nixl": "NIXL 1.5.1 over UCX"}
# What a wheel expects of the system, and the package that has it (Debian's name).
SYSTEM_PACKAGES = {"libibverbs.so.1": "libibverbs1"}
INSTALL_TIMEOUT_S = 600
ANSWER_TIMEOUT_S = 60.0


class NoRival(Exception):
    """It cannot be installed or does not run; the message says why."""


def install() -> None:
    """Builds the environment once. Raises NoRival."""
    done = FOLDER / ".installed"
    if done.exists():
        return
    commands = (
        [sys.executable, "-m", "venv", str(FOLDER)],
        [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", *PACKAGES],
    )
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            raise NoRival(f"not installed: {(error.stderr.strip() or str(error)).splitlines()[-1]}") from None
        except subprocess.TimeoutExpired:
            raise NoRival(f"not installed within {INSTALL_TIMEOUT_S} s") from None
    done.touch()


class Rival:
    """Two processes that one rival moves blocks between. Raises NoRival."""

    def __init__(self, kind: str, *, pool_bytes: int, block_bytes: int) -> None:
        self.name = KINDS[kind]
        arguments = [str(PYTHON), "-P", str(ROOT / "benchmarks" / "rival_transfer.py"), kind, str(pool_bytes)]
        self._process = subprocess.Popen(
            [*arguments, str(block_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=FOLDER,
            start_new_session=True,
        )
        try:
            self._answer()
        except NoRival:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        """To both processes. They poll while they wait: between turns they stand still, and leave the cores alone."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def move(self, frame_bytes: int, num_frames: int) -> None:
        """So many frames of scattered blocks, one after another."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(f"{frame_bytes} {num_frames}\n".encode())
            self._process.stdin.flush()
        except OSError as error:
            raise NoRival(f"ended: {error}") from None
        self._answer()
        self._signal(signal.SIGSTOP)

    def _answer(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        line = pipe.readline() if select.select([pipe], [], [], ANSWER_TIMEOUT_S)[0] else b""
        if not line:
            raise NoRival(f"no answer within {ANSWER_TIMEOUT_S:g} s, or it ended ({self._process.poll()})")
        answer = json.loads(line)
        if "error" in answer:
            raise NoRival(answer["error"])

    def close(self) -> None:
        """Ends both processes."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended itself
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def start_all(*, pool_bytes: int, block_bytes: int) -> tuple[list[Rival], list[str]]:
    """Those that run, and a sentence on each that does not."""
    rivals, missing = [], []
    try:
        install()
    except NoRival as error:
        return [], [f"{name}: {error}." for name in KINDS.values()]
    for kind, name in KINDS.items():
        try:
            rivals.append(Rival(kind, pool_bytes=pool_bytes, block_bytes=block_bytes))
        except NoRival as error:
            needed = [package for library, package in SYSTEM_PACKAGES.items() if library in str(error)]
            hint = f" (apt install {' '.join(needed)})" if needed else ""
            missing.append(f"{name}: does not run here: {error}{hint}.")
    return rivals, missing
