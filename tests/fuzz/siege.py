"""A cluster on the model `fake` that is shot at: what it was before, who asks it meanwhile, and what must be after.

The same processes in the same incarnations, every block free or cached, right tokens, open files and memory as before.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
from cluster_under_test import ClusterUnderTest
from grpc_calls import Peer

from engine.fake_runner import expected_tokens
from tandem.client import Client
from tandem.request import Sampling

PROMPT = list(range(40))
NUM_TOKENS = 12
EXPECTED = expected_tokens(PROMPT, Sampling(), NUM_TOKENS, 256)
ARGUMENTS = ("--prefill", "1", "--decode", "2", "--kv-memory", "4MiB")
CALM_S = 30.0  # until the open files are back
FILES_MORE = 8  # that may stay open: keep-alive, a channel that is dialled again
MEMORY_MORE = 1.25
MEMORY_MORE_BYTES = 96 << 20  # what allocators and caches keep after their first large load
PROBE_S = 0.1


@dataclass(slots=True)
class Asker:
    """Asks well and often while others do not; `slowest_s` is how long an answer took at most."""

    address: str
    num: int = 0
    slowest_s: float = 0.0
    problem: str = ""
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Asker:
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def _ask(self) -> None:
        try:
            with Client(self.address, timeout_s=60) as client:
                while not self._over.wait(PROBE_S):
                    began_s = time.monotonic()
                    found = list(client.generate(PROMPT, temperature=0.0, max_tokens=NUM_TOKENS).token_ids)
                    self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
                    self.num += 1
                    if found != EXPECTED:
                        self.problem = f"{found}, expected {EXPECTED}"
                        return
        except Exception as error:  # told where the siege ends
            self.problem = f"{type(error).__name__}: {error}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        assert self._thread is not None
        self._thread.join(90)
        if kind is None:
            assert not self.problem, self.problem
            assert self.num > 0, "nobody was served meanwhile"


class Siege(ClusterUnderTest):
    """`with Siege(run_dir=...) as cluster:`; `before` at the beginning of an attack, `after` at its end."""

    def __init__(self, *, run_dir: Path) -> None:
        super().__init__(*ARGUMENTS, run_dir=run_dir)

    def __enter__(self) -> Siege:
        super().__enter__()
        return self

    def asker(self) -> Asker:
        """Somebody to ask well meanwhile."""
        return Asker(self.grpc_address)

    def before(self) -> None:
        """Notes what there is."""
        self.settled()
        self._who = self._incarnations()
        self._processes = self._of_cluster()
        self._files = {name: process.num_fds() for name, process in self._processes.items()}
        self._memory = {name: process.memory_info().rss for name, process in self._processes.items()}
        self.num_mishaps = len(self.mishaps())

    def after(self) -> str:
        """Fails unless all is as before; else a sentence on what memory has become."""
        self.settled()
        assert self._incarnations() == self._who
        assert self.greedy(PROMPT, NUM_TOKENS) == EXPECTED
        deadline_s = time.monotonic() + CALM_S
        while more := self._more_files():
            assert time.monotonic() < deadline_s, f"open files: {more}"
            time.sleep(PROBE_S)
        memory = {name: process.memory_info().rss for name, process in self._processes.items()}
        for name, now in memory.items():
            limit = self._memory[name] * MEMORY_MORE + MEMORY_MORE_BYTES
            assert now <= limit, f"{name}: {self._memory[name] >> 20} MiB became {now >> 20} MiB"
        router = (self._memory["router"] >> 20, memory["router"] >> 20)
        return f"router {router[0]} -> {router[1]} MiB"

    def peers(self) -> list[Peer]:
        """The workers' own servers."""
        found = []
        for worker in self.document()["workers"]:
            address = f"127.0.0.1:{self.control_port(worker['id'])}"
            found.append(
                Peer(
                    name=worker["id"],
                    address=address,
                    incarnation=worker["incarnation"],
                    shown=self.access.metadata,
                )
            )
        return found

    def _incarnations(self) -> dict[str, tuple[int, int, int]]:
        return {
            each["id"]: (each["pid"], each["agent_pid"], each["incarnation"]) for each in self.document()["workers"]
        }

    def _of_cluster(self) -> dict[str, psutil.Process]:
        document = self.document()
        found = {"router": psutil.Process(document["router_pid"])}
        for worker in document["workers"]:
            found[worker["id"]] = psutil.Process(worker["pid"])
            found[f"{worker['id']}'s agent"] = psutil.Process(worker["agent_pid"])
        return found

    def _more_files(self) -> dict[str, tuple[int, int]]:
        now = {name: process.num_fds() for name, process in self._processes.items()}
        return {name: (self._files[name], num) for name, num in now.items() if num > self._files[name] + FILES_MORE}
