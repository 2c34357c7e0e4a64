"""The router processes of one cluster: started, heard, told, and ended when they are stuck."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.drain_relay import Tell
from cluster.own_secrets import OwnSecrets
from cluster.processes import hold_port
from cluster.router_child import RouterChild, RouterEnded, RouterSaid
from cluster.router_settings import RouterSettings
from cluster.run_file import reachable
from cluster.silence import Silence
from tandem.request import WorkerId

LOOK_MS = 1000  # the supervisor looks at least so often
STUCK_MS = 15_000  # a router says something each second: so long without a word, and it is stuck


class Routers:
    """All routers. They share `listener`, the HTTP socket, and each has a port of its own for workers and routers.

    `start` on the main thread; `post` is called on threads of the children. Raises OSError when a port cannot be had.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        listener: socket.socket,
        grpc_held: socket.socket,
        log_dir: Path,
        secrets: OwnSecrets,
        post: Callable[[RouterSaid | RouterEnded], None],
    ) -> None:
        self._config = config
        self._listener = listener
        self._log_dir = log_dir
        self._secrets = secrets
        self._post = post
        self._children: dict[str, RouterChild] = {}
        self._generations: dict[str, int] = {}
        self._silence = Silence(look_ms=LOOK_MS)
        self._ready: dict[str, set[WorkerId]] = {}  # of each router that is up: workers that it holds ready
        self.names = [f"router-{number}" for number in range(config.routers)]
        held = {name: hold_port(config.host, 0, "--host") for name in self.names}
        self._held = [grpc_held, *held.values()]
        self.internal = {name: f"{reachable(config.host)}:{each.getsockname()[1]}" for name, each in held.items()}

    def start(self, name: str) -> None:
        """Starts a router, or starts it again."""
        self._generations[name] = generation = self._generations.get(name, 0) + 1
        settings = RouterSettings(
            router_id=name,
            config=self._config,
            listener=self._listener.fileno(),
            join_token=self._secrets.join_token,
            internal=self.internal,
        )
        self._children[name] = RouterChild(
            settings, generation=generation, log_file=self.log_file(name), post=self._post
        )  # fmt: skip
        self._silence.expect(_now_ms(), name, 1000 * self._config.start_timeout_s)

    def log_file(self, name: str) -> Path:
        """Where a router writes its log."""
        return self._log_dir / f"{name}.log"

    # ---- what they say -----------------------------------------------------------------------------------------------

    def is_current(self, event: RouterSaid | RouterEnded) -> bool:
        """Whether it comes from the process that runs now, or ran last."""
        child = self._children.get(event.router)
        return child is not None and child.generation == event.generation

    def heard(self, name: str) -> None:
        """A router has given a sign of life."""
        self._silence.heard(_now_ms(), name)

    def listening(self, name: str) -> None:
        """A router serves. From now on it is to be heard."""
        self._ready[name] = set()
        self._silence.expect(_now_ms(), name, STUCK_MS)

    def ended(self, name: str) -> None:
        """A router's process is gone."""
        self._ready.pop(name, None)
        self._silence.forget(name)
        self._children.pop(name, None)

    def holds(self, name: str, worker_id: WorkerId, *, ready: bool) -> None:
        """A router holds a worker ready, or does so no more."""
        if name in self._ready:
            (self._ready[name].add if ready else self._ready[name].discard)(worker_id)

    def lost(self, worker_id: WorkerId) -> None:
        """A worker's process is gone."""
        for each in self._ready.values():
            each.discard(worker_id)

    def ready(self) -> set[WorkerId]:
        """Workers that all routers hold ready; none unless all are up."""
        return set.intersection(*(self._ready.get(name, set()) for name in self.names))

    @property
    def num_running(self) -> int:
        """Processes, also those that are not up yet."""
        return len(self._children)

    @property
    def pids(self) -> dict[str, int]:
        """Of the routers that are up."""
        return {name: self._children[name].process.pid for name in self.names if name in self._ready}

    # ---- what they are told ------------------------------------------------------------------------------------------

    def tell_ended(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        """Says to all that a worker's process is gone, so that nobody waits for its heartbeats."""
        for child in self._children.values():
            child.tell("ended", id=worker_id, incarnation=incarnation, reason=reason)

    def relay(self, told: Iterable[Tell]) -> None:
        """Says what the others say of drains."""
        for each in told:
            child = self._children.get(each.router)
            if child is not None:
                child.tell(
                    each.word.value,
                    id=each.worker_id,
                    incarnation=each.incarnation,
                    requests=each.requests,
                    reason=each.reason,
                    role=each.role.value if each.role is not None else "",
                )

    def kill(self, name: str) -> None:
        """Ends a router at once. RouterEnded follows."""
        child = self._children.get(name)
        if child is not None:
            child.kill()

    def kill_stuck(self) -> list[tuple[str, float]]:
        """Ends the routers that are stuck or stopped; says which, and for how many seconds they were silent."""
        found = self._silence.look(_now_ms())
        for name, _ in found:
            self.kill(name)
        return [(name, silent_ms / 1000) for name, silent_ms in found]

    def stop(self, timeout_s: float) -> None:
        """Ends all in order, at the same time, and by force those that do not within `timeout_s`."""
        self._listener.close()  # nobody waits for a connection that nobody will take
        until_s = time.monotonic() + timeout_s
        for child in self._children.values():
            child.ask_to_end()
        for child in self._children.values():
            child.end(max(0.1, until_s - time.monotonic()))
        for held in self._held:
            held.close()


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
