"""What routers tell one another of drains, by way of their supervisor: one of them drains, the others help.

A drain is asked of one router, which watches over it. The others give its worker nothing new, move their own requests
away, and say how many they still have there. When the router that watches ends, the worker takes work again.

A flip ends with a word of the supervisor to all of them, the one that watches included: the worker's new role.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.draining import last_of_its_kind
from tandem.messages import Role
from tandem.request import WorkerId


class DrainWord(StrEnum):
    """What is said of a drain, by a router to the supervisor or the other way."""

    DRAINING = "draining"  # the worker gets nothing new from now on
    PART = "drain_part"  # by a router that helps: how many requests it has there
    ELSEWHERE = "drain_elsewhere"  # to the one that watches: how many the others have there
    GIVE_UP = "drain_give_up"  # to the one that wants to watch: it may not
    TAKEN_BACK = "taken_back"  # the worker takes work again
    LEFT = "drained"  # the worker is empty, and its process ends
    FLIP = "flip"  # by the one that watches: the worker can have its new role
    FLIPPED = "flipped"  # to all: it has that role, and takes work


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Say this to a router."""

    router: str
    word: DrainWord
    worker_id: WorkerId
    incarnation: int
    requests: int = 0
    reason: str = ""
    role: Role | None = None


@dataclass(slots=True)
class _Drain:
    """One that is under way. `parts`: requests of each router that helps; None: it has not answered yet."""

    incarnation: int
    watcher: str
    parts: dict[str, int | None] = field(default_factory=dict)

    @property
    def num_elsewhere(self) -> int:
        """Requests of routers that help; one that has not answered counts as having one."""
        return sum(1 if each is None else each for each in self.parts.values())


@dataclass(slots=True, kw_only=True)
class DrainRelay:
    """All drains that are under way, and the routers that are up.

    `flipped`: incarnations that have another role than they registered with, which a router that is new has to hear.
    """

    flipped: dict[WorkerId, tuple[int, Role]] = field(default_factory=dict)
    _up: list[str] = field(default_factory=list)
    _drains: dict[WorkerId, _Drain] = field(default_factory=dict)

    def up(self, router: str) -> list[Tell]:
        """A router serves: it hears of the roles that have changed, and helps with what is under way."""
        self._up.append(router)
        told = [self._flipped_to(router, worker_id) for worker_id in self.flipped]
        for worker_id, drain in self._drains.items():
            drain.parts[router] = None
            told += [self._elsewhere(worker_id, drain), _draining(router, worker_id, drain)]
        return told

    def down(self, router: str) -> list[Tell]:
        """A router's process is gone: nobody waits for it, and what it watched over is taken back."""
        self._up = [each for each in self._up if each != router]
        told = []
        for worker_id, drain in list(self._drains.items()):
            if drain.watcher == router:
                told += self._over(worker_id, drain, DrainWord.TAKEN_BACK, f"{router}, which drained it, has ended")
            elif drain.parts.pop(router, 0) != 0:
                told.append(self._elsewhere(worker_id, drain))
        return told

    def begun(
        self,
        router: str,
        worker_id: WorkerId,
        incarnation: int,
        *,
        restart: bool,
        becomes: Role | None = None,
        roles: Mapping[WorkerId, Role],
    ) -> list[Tell]:
        """A router drains a worker. `roles`: of all workers that run and do not leave.

        Two routers may begin at the same time what only one may: the later one has to give up.
        """
        known = self._drains.get(worker_id)
        refusal = ""
        if known is not None:
            refusal = f"{worker_id} is draining already, watched by {known.watcher}"
        elif not restart and worker_id in roles:
            others = {role for name, role in roles.items() if name != worker_id and name not in self._drains}
            refusal = last_of_its_kind(worker_id, roles[worker_id], others, becomes)
        if refusal:
            told = [
                Tell(
                    router=router, word=DrainWord.GIVE_UP, worker_id=worker_id, incarnation=incarnation, reason=refusal
                )
            ]  # fmt: skip
            return told if known is None else [*told, _draining(router, worker_id, known)]
        drain = _Drain(incarnation, router, {each: None for each in self._up if each != router})
        self._drains[worker_id] = drain
        helpers = [_draining(each, worker_id, drain) for each in drain.parts]
        return [self._elsewhere(worker_id, drain), *helpers]

    def part(self, router: str, worker_id: WorkerId, incarnation: int, num_requests: int) -> list[Tell]:
        """A router that helps says how many requests it has on the worker."""
        drain = self._drains.get(worker_id)
        if drain is None or drain.incarnation != incarnation or router not in drain.parts:
            return []
        drain.parts[router] = num_requests
        return [self._elsewhere(worker_id, drain)]

    def taken_back(self, router: str, worker_id: WorkerId, incarnation: int, reason: str) -> list[Tell]:
        """The router that watches has given the drain up."""
        return self._ended(router, worker_id, incarnation, DrainWord.TAKEN_BACK, reason)

    def left(self, router: str, worker_id: WorkerId, incarnation: int) -> list[Tell]:
        """The router that watches says that the worker is empty, and leaves."""
        return self._ended(router, worker_id, incarnation, DrainWord.LEFT, "drained")

    def flip(self, router: str, worker_id: WorkerId, incarnation: int, role: Role) -> list[Tell]:
        """The router that watches says that the worker can have its new role. Nothing to tell: it does not get it."""
        if self._watched(router, worker_id, incarnation) is None:
            return []
        del self._drains[worker_id]
        self.flipped[worker_id] = incarnation, role
        return [self._flipped_to(each, worker_id) for each in self._up]

    def ended(self, worker_id: WorkerId, incarnation: int) -> None:
        """The worker's process is gone, which all routers are told anyway. The next one registers with its role."""
        if worker_id in self.flipped and self.flipped[worker_id][0] <= incarnation:
            del self.flipped[worker_id]
        drain = self._drains.get(worker_id)
        if drain is not None and drain.incarnation == incarnation:
            del self._drains[worker_id]

    def _ended(self, router: str, worker_id: WorkerId, incarnation: int, word: DrainWord, reason: str) -> list[Tell]:
        drain = self._watched(router, worker_id, incarnation)
        return [] if drain is None else self._over(worker_id, drain, word, reason)

    def _watched(self, router: str, worker_id: WorkerId, incarnation: int) -> _Drain | None:
        """The drain of that incarnation, if it is that router that watches over it."""
        drain = self._drains.get(worker_id)
        return drain if drain is not None and (drain.watcher, drain.incarnation) == (router, incarnation) else None

    def _over(self, worker_id: WorkerId, drain: _Drain, word: DrainWord, reason: str) -> list[Tell]:
        del self._drains[worker_id]
        return [
            Tell(router=each, word=word, worker_id=worker_id, incarnation=drain.incarnation, reason=reason)
            for each in drain.parts
        ]

    def _flipped_to(self, router: str, worker_id: WorkerId) -> Tell:
        incarnation, role = self.flipped[worker_id]
        return Tell(
            router=router, word=DrainWord.FLIPPED, worker_id=worker_id, incarnation=incarnation, role=role
        )  # fmt: skip

    def _elsewhere(self, worker_id: WorkerId, drain: _Drain) -> Tell:
        return Tell(
            router=drain.watcher,
            word=DrainWord.ELSEWHERE,
            worker_id=worker_id,
            incarnation=drain.incarnation,
            requests=drain.num_elsewhere,
        )


def _draining(router: str, worker_id: WorkerId, drain: _Drain) -> Tell:
    return Tell(router=router, word=DrainWord.DRAINING, worker_id=worker_id, incarnation=drain.incarnation)
