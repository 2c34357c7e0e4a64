"""A real `tandem serve` for the length of a test: started, asked, ended, and checked to leave no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from cli.status import ask
from cluster.documents import plain
from cluster.member_access import access_here
from cluster.run_file import find
from tandem.client import Client
from tandem.cluster_access import ClusterAccess

TANDEM = [sys.executable, "-m", "cli.main"]
START_S = 90.0
STOP_S = 40.0
COMMAND_S = 90.0


class Served:
    """`with Served(["--model", "fake"], run_dir=tmp_path) as cluster:` runs a cluster on free ports."""

    def __init__(self, arguments: Sequence[str], *, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._arguments = ["--port", "0", "--grpc-port", "0", "--run-dir", str(run_dir), *arguments]
        self.lines: list[str] = []
        self.url = ""
        self._seen = threading.Condition()

    def __enter__(self) -> Served:
        self.start()
        self.wait_for(lambda line: "is ready at" in line, START_S)
        [line] = [line for line in self.lines if "ready" in line]
        self.url = next(word for word in line.split() if word.startswith("http"))
        return self

    def start(self) -> None:
        """Starts the command, without waiting."""
        self.process = subprocess.Popen(
            [*TANDEM, "serve", *self._arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._seen:
                self.lines.append(line.rstrip())
                self._seen.notify_all()

    def wait_for(self, wanted: Callable[[str], bool], timeout_s: float) -> str:
        """The first line printed, now or within the time, that is wanted."""
        deadline_s = time.monotonic() + timeout_s
        with self._seen:
            while True:
                found = [line for line in self.lines if wanted(line)]
                if found:
                    return found[0]
                if self.process.poll() is not None or not self._seen.wait(min(1.0, deadline_s - time.monotonic())):
                    assert self.process.poll() is None, "it ended:\n" + "\n".join(self.lines)
                    assert time.monotonic() < deadline_s, "not in time:\n" + "\n".join(self.lines)

    @property
    def port(self) -> int:
        """The HTTP port."""
        return int(self.url.rsplit(":", 1)[1])

    def complete(self, prompt: str, *, max_tokens: int, **fields: object) -> dict[str, Any]:
        """One completion."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        content: dict[str, Any] = answer.json()
        return content

    def chat(self, messages: Sequence[dict[str, str]], *, max_tokens: int) -> str:
        """The text of a greedy chat completion."""
        body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def command(self, *arguments: str, timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        """Runs another command of the command line against this cluster."""
        return tandem(*arguments, "--port", str(self.port), "--run-dir", str(self.run_dir), timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """What `tandem status --json` prints, without a process for it."""
        return plain(ask(find(self.run_dir, self.port)))

    def status_printed(self) -> dict[str, Any]:
        """What `tandem status --json` prints, by that command."""
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def status_when(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 30.0) -> dict[str, Any]:
        """The first status that is as wanted."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            status = self.status()
            if wanted(status):
                return status
            assert time.monotonic() < deadline_s, f"never as wanted: {json.dumps(status, indent=1)}"

    def workers(self) -> dict[str, dict[str, Any]]:
        """The workers of the status, by id."""
        return {worker["id"]: worker for worker in self.status()["workers"]}

    def greedy(self, prompt: Sequence[int], num: int) -> list[int]:
        """`num` tokens over gRPC."""
        with Client(str(self.status()["grpc_address"]), timeout_s=60) as client:
            return list(client.generate(prompt, temperature=0.0, max_tokens=num).token_ids)

    @property
    def access(self) -> ClusterAccess:
        """What members of this cluster show each other."""
        return access_here(find(self.run_dir, self.port))

    def tree(self) -> list[psutil.Process]:
        """The supervisor and all processes below it."""
        supervisor = psutil.Process(self.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def ended(self) -> int:
        """Waits for the supervisor to end; its exit status."""
        code = self.process.wait(STOP_S)
        self._reader.join(5)
        return code

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            tree = self.tree()
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_S)
            finally:
                for process in alive(tree):
                    process.kill()
                self.process.wait(STOP_S)
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


def tandem(*arguments: str, timeout_s: float = COMMAND_S, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the command line to its end."""
    return subprocess.run(
        [*TANDEM, *arguments], capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **environment}
    )


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Waits for the condition to hold."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "never came true"
        threading.Event().wait(0.05)


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. A zombie does not."""
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
