"""Which worker is ended because routers hold it for dead, and which router is, because it alone says so of most.

A worker goes on the word of more than half of the routers that are up. One that fewer hold for dead is of no use to
those, so it goes after a while, too; unless they say so of most workers: then it is they who are cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem.request import WorkerId

MINORITY_MS = 30_000


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
    _up: set[str] = field(default_factory=set)
    _claims: dict[tuple[WorkerId, int], dict[str, _Claim]] = field(default_factory=dict)
    _killed_ms: dict[tuple[WorkerId, int], int] = field(default_factory=dict)

    def up(self, router: str) -> None:
        """The router serves, and has a vote."""
        self._up.add(router)

    def down(self, router: str) -> None:
        """The router's process is gone, and what it said with it."""
        self._up.discard(router)
        for claims in self._claims.values():
            claims.pop(router, None)

    def dead(self, now_ms: int, router: str, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        """The router holds a worker for dead. It does so until it, or the worker, is started again."""
        self._claims.setdefault((worker_id, incarnation), {}).setdefault(router, _Claim(now_ms, reason))

    def judge(self, now_ms: int, running: Mapping[WorkerId, int]) -> list[Action]:
        """What follows for the workers that run, by their incarnations. A kill that has no effect is said again."""
        current = set(running.items())
        self._claims = {key: claims for key, claims in self._claims.items() if key in current and claims}
        self._killed_ms = {
            key: at_ms for key, at_ms in self._killed_ms.items() if key in current and now_ms - at_ms < self.minority_ms
        }
        actions: list[Action] = []
        cut_off: dict[str, str] = {}
        for key, claims in self._claims.items():
            if key in self._killed_ms:
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
            suspects = [router for router in voices if self._claims_most(router, len(running))]
            if not suspects:
                said = f"{first.reason} (said {', '.join(voices)} for {held_ms / 1000:.0f} s, and no other router)"
                actions.append(self._kill(now_ms, key, said))
            for router in suspects:
                cut_off[router] = f"it alone holds most workers for dead since {held_ms / 1000:.0f} s"
        for router, reason in cut_off.items():
            self.down(router)  # it is heard again once it is back
            actions.append(RestartRouter(router=router, reason=reason))
        return actions

    def _kill(self, now_ms: int, key: tuple[WorkerId, int], reason: str) -> KillWorker:
        self._killed_ms[key] = now_ms
        return KillWorker(worker_id=key[0], incarnation=key[1], reason=reason)

    def _claims_most(self, router: str, num_running: int) -> bool:
        return 2 * sum(router in claims for claims in self._claims.values()) > num_running
