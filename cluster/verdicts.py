"""Which worker is ended because routers hold it for dead, and which router is, because it alone says so of most.

A worker goes on the word of more than half of the routers that are up. One that fewer hold for dead is of no use to
those, so it goes after a while, too; unless they say so of most workers, or of one after the other: then it is they who
are cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem.request import WorkerId

MINORITY_MS = 30_000
LONE_MS = 600_000  # a router alone ends one worker in this time; the next one costs its own process


@dataclass(frozen=True, slots=True, kw_only=True)
class KillWorker:
    """End the worker's process; another one takes its place."""

    worker_id: WorkerId
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartRouter:
    """End the router's process; another one takes its place, and hears of the workers anew."""

    router: str
    reason: str


Action = KillWorker | RestartRouter


@dataclass(frozen=True, slots=True)
class _Claim:
    """A router holds a worker for dead."""

    since_ms: int
    reason: str


@dataclass(slots=True, kw_only=True)
class Verdicts:
    """All that routers say of the death of workers. Times are milliseconds on the caller's clock."""

    minority_ms: int = MINORITY_MS
    lone_ms: int = LONE_MS
    _up: set[str] = field(default_factory=set)
    _claims: dict[tuple[WorkerId, int], dict[str, _Claim]] = field(default_factory=dict)
    _killed_ms: dict[tuple[WorkerId, int], int] = field(default_factory=dict)
    _lone_ms: dict[str, int] = field(default_factory=dict)  # when a router's word was enough, against the others'

    def up(self, router: str) -> None:
        """The router serves, and has a vote."""
        self._up.add(router)

    def down(self, router: str) -> None:
        """The router's process is gone, and what it said with it."""
        self._up.discard(router)
        self._lone_ms.pop(router, None)
        for claims in self._claims.values():
            claims.pop(router, None)

    def dead(self, now_ms: int, router: str, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        """The router holds a worker for dead. It does so until it, or the worker, is started again."""
        self._claims.setdefault((worker_id, incarnation), {}).setdefault(router, _Claim(now_ms, reason))

    def judge(self, now_ms: int, running: Mapping[WorkerId, int]) -> list[Action]:
        """What follows for the workers that run, by their incarnations. A kill that has no effect is said again."""
        self._forget(now_ms, running)
        actions: list[Action] = []
        cut_off: dict[str, str] = {}
        for key, claims in self._claims.items():
            if key in self._killed_ms or key not in running.items():
                continue
            voices = [router for router in claims if router in self._up]
            if not voices:
                continue
            first = claims[voices[0]]
            if 2 * len(voices) > len(self._up):
                actions.append(self._kill(now_ms, key, first.reason))
                continue
            held_ms = now_ms - min(claims[router].since_ms for router in voices)
            if held_ms < self.minority_ms:
                continue
            suspects = [
                router for router in voices if router in self._lone_ms or self._claims_most(router, len(running))
            ]
            if not suspects:
                said = f"{first.reason} (said {', '.join(voices)} for {held_ms / 1000:.0f} s, and no other router)"
                actions.append(self._kill(now_ms, key, said))
                self._lone_ms |= dict.fromkeys(voices, now_ms)
            for router in suspects:
                what = "one worker after the other" if router in self._lone_ms else "most workers"
                cut_off[router] = f"it alone holds {what} for dead since {held_ms / 1000:.0f} s"
        for router, reason in cut_off.items():
            self.down(router)  # it is heard again once it is back
            actions.append(RestartRouter(router=router, reason=reason))
        return actions

    def _forget(self, now_ms: int, running: Mapping[WorkerId, int]) -> None:
        """Drops what is over: the latest incarnation of each worker stays."""
        latest = dict(running)
        for worker_id, incarnation in self._claims:
            latest[worker_id] = max(incarnation, latest.get(worker_id, 0))
        self._claims = {key: claims for key, claims in self._claims.items() if key in latest.items() and claims}
        self._killed_ms = {
            key: at_ms
            for key, at_ms in self._killed_ms.items()
            if key in self._claims and now_ms - at_ms < self.minority_ms
        }
        self._lone_ms = {name: at_ms for name, at_ms in self._lone_ms.items() if now_ms - at_ms < self.lone_ms}

    def _kill(self, now_ms: int, key: tuple[WorkerId, int], reason: str) -> KillWorker:
        self._killed_ms[key] = now_ms
        return KillWorker(worker_id=key[0], incarnation=key[1], reason=reason)

    def _claims_most(self, router: str, num_running: int) -> bool:
        return 2 * sum(router in claims for claims in self._claims.values()) > num_running
