"""Which workers there shall be, and where each is in its life: started, up, doomed, leaving, or given up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from tandem.messages import Role
from tandem.request import WorkerId

KILL_AGAIN_MS = 5_000  # a worker that was to be killed and has not ended


class Left(Enum):
    """What follows when a worker is drained, or has ended after that."""

    RETIRE = "retire"  # it still runs: ask it to end
    REPLACE = "replace"  # it is gone, and another one comes in its place
    FORGET = "forget"  # it is gone, and none comes


@dataclass(slots=True)
class Leaving:
    """A worker that was drained: by when its process must have ended, and whether another one comes in its place."""

    until_ms: int
    restart: bool


class Roster:
    """All workers of a cluster, by their roles. Times are milliseconds on the caller's clock."""

    def __init__(self, roles: Iterable[tuple[WorkerId, Role]]) -> None:
        self.roles = dict(roles)
        self.starts = dict.fromkeys(self.roles, 0)  # of each worker: its incarnation
        self.running: dict[WorkerId, int] = {}  # incarnation of each worker that is up
        self.leaving: dict[WorkerId, Leaving] = {}
        self.given_up: set[WorkerId] = set()  # died too often
        self._doomed: set[WorkerId] = set()  # to be killed, and not ended yet

    @property
    def wanted(self) -> set[WorkerId]:
        """Workers that shall run."""
        return self.roles.keys() - self.given_up

    @property
    def is_whole(self) -> bool:
        """Whether all that shall run are up, and nobody waits for the end of one."""
        return self.wanted == self.running.keys() and not self._doomed

    @property
    def none_is_left(self) -> bool:
        """Whether all were given up; workers of any role serve alone if they must."""
        return not self.wanted

    def grow(self, role: Role, num: int) -> list[WorkerId]:
        """The role shall have so many workers that stay: those that are new, by the lowest numbers that are free."""
        staying = [
            each
            for each in self.wanted
            if self.roles[each] is role and (each not in self.leaving or self.leaving[each].restart)
        ]
        added: list[WorkerId] = []
        number = 0
        while len(staying) + len(added) < num:
            name = WorkerId(f"{role.value}-{number}")
            number += 1
            if name in self.roles:
                continue
            self.roles[name] = role
            self.starts.setdefault(name, 0)  # one of that name may have been here before: its incarnations go on
            added.append(name)
        return added

    def flip(self, worker_id: WorkerId, role: Role) -> None:
        """It has this role from now on, and when it is started again."""
        if worker_id in self.roles:
            self.roles[worker_id] = role

    def start(self, worker_id: WorkerId) -> int:
        """The worker is started, once more; the incarnation that it gets."""
        self.starts[worker_id] += 1
        return self.starts[worker_id]

    def up(self, worker_id: WorkerId, incarnation: int) -> None:
        """It runs."""
        self.running[worker_id] = incarnation

    def down(self, worker_id: WorkerId) -> Left | None:
        """Its process is gone; None: it was not drained."""
        self.running.pop(worker_id, None)
        self._doomed.discard(worker_id)
        leaving = self.leaving.pop(worker_id, None)
        return None if leaving is None else self._gone(worker_id, restart=leaving.restart)

    def all_down(self) -> dict[WorkerId, Left]:
        """All processes are gone; what follows for those that were drained."""
        self.running.clear()
        self._doomed.clear()
        leaving, self.leaving = self.leaving, {}
        return {worker_id: self._gone(worker_id, restart=each.restart) for worker_id, each in leaving.items()}

    def doom(self, worker_id: WorkerId) -> None:
        """It is to be killed: until it has ended, somebody waits for that."""
        self._doomed.add(worker_id)

    def drained(
        self, worker_id: WorkerId, incarnation: int, *, restart: bool, until_ms: int, is_gone: bool
    ) -> Left | None:
        """Nothing of this incarnation is needed any more: it ends, and that is no crash.

        `is_gone`: no process of the worker runs or starts, for its end was heard of before. None: nothing is to be
        done, since another one has taken its place meanwhile, as was wanted, or the worker is not known any more.
        """
        if worker_id not in self.roles:
            return None
        if is_gone or worker_id in self.given_up:
            return self._gone(worker_id, restart=restart)
        if restart and incarnation != self.starts[worker_id]:
            return None
        self.leaving[worker_id] = Leaving(until_ms, restart)
        return Left.RETIRE

    def overdue(self, now_ms: int) -> list[WorkerId]:
        """Who was drained, has not ended in time, and is to be killed; said again now and then."""
        late = [worker_id for worker_id, leaving in self.leaving.items() if now_ms >= leaving.until_ms]
        for worker_id in late:
            self.leaving[worker_id].until_ms = now_ms + KILL_AGAIN_MS
            self.doom(worker_id)
        return late

    def _gone(self, worker_id: WorkerId, *, restart: bool) -> Left:
        self.given_up.discard(worker_id)
        if restart:
            return Left.REPLACE
        del self.roles[worker_id]
        return Left.FORGET
