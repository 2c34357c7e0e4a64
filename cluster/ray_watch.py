"""Whether the parts of a Ray on this machine live and answer, and what is to be done when one does not.

The control service (GCS) keeps its state in a file, so it is started again and finds it. The node's daemon (raylet)
takes its workers with it: without it this Ray is lost, and another one has to be started.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.restarts import Restarts


class Part(StrEnum):
    """A process of Ray that is looked after."""

    GCS = "gcs_server"
    RAYLET = "raylet"


# A part that is only busy must not be killed. Ray itself gives a silent raylet up after 25 s or more.
SILENT_MAX_MS = {Part.GCS: 10_000, Part.RAYLET: 30_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSeen:
    """One part as it was just found: whether its process lives, and when it last answered a call."""

    lives: bool
    heard_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartGcs:
    """The control service ended: start it again, on its old port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KillPart:
    """The part lives but answers nobody: end it, so that it can be replaced."""

    part: Part
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """This Ray cannot be mended."""

    reason: str


WatchAction = StartGcs | KillPart | Lost


@dataclass(slots=True, kw_only=True)
class RayWatch:
    """Takes a look at the parts now and then. Looks are promised each `look_ms`; time away counts against nobody."""

    gcs_restarts: Restarts
    look_ms: int = 500
    looked_ms: int | None = None
    forgiven_ms: int = 0  # what was not heard before this moment is no sign of anything
    gcs_due_ms: int | None = None  # its restart is planned

    def look(self, now_ms: int, seen: dict[Part, PartSeen]) -> list[WatchAction]:
        """What follows from the state of the parts at `now_ms` (monotonic milliseconds)."""
        if self.looked_ms is not None and now_ms - self.looked_ms > 4 * self.look_ms:
            self.forgiven_ms = now_ms
        self.looked_ms = now_ms
        raylet, gcs = seen.get(Part.RAYLET), seen.get(Part.GCS)
        if raylet is not None and not raylet.lives:
            return [Lost(reason="its raylet ended")]
        actions = self._gcs(now_ms, gcs) if gcs is not None else []
        return actions + [
            KillPart(part=part, reason=f"its {part} has not answered for {silent_ms} ms")
            for part, found in seen.items()
            if found.lives and (silent_ms := now_ms - max(found.heard_ms, self.forgiven_ms)) > SILENT_MAX_MS[part]
        ]

    def _gcs(self, now_ms: int, gcs: PartSeen) -> list[WatchAction]:
        if gcs.lives:
            self.gcs_due_ms = None
            return []
        if self.gcs_due_ms is None:
            delay_ms = self.gcs_restarts.died(now_ms, Part.GCS)
            if delay_ms is None:
                return [Lost(reason="its gcs_server dies again and again")]
            self.gcs_due_ms = now_ms + delay_ms
        if now_ms < self.gcs_due_ms:
            return []
        self.gcs_due_ms = None
        return [StartGcs()]
