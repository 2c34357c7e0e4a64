"""What the process that holds Ray tells its supervisor, and the line of JSON that each of it travels as."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from tandem.request import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class RayUp:
    """Ray runs, and takes workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayLost:
    """Ray could not be started or joined, or has lost a part without which it is of no use. The process ends."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RayMended:
    """A part of Ray had died and was started again; the workers went on."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUp:
    """A worker has registered with the router and runs."""

    worker_id: WorkerId
    pid: int
    incarnation: int
    timings_ms: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDown:
    """A worker's process ended, or is of no use any more. `started` False: it never ran."""

    worker_id: WorkerId
    incarnation: int
    started: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerWaits:
    """No machine of the Ray cluster has room for a worker; it starts once one has."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolsAlive:
    """The process takes commands."""


PoolEvent = RayUp | RayLost | RayMended | WorkerUp | WorkerDown | WorkerWaits | PoolsAlive
_KINDS: dict[str, type[PoolEvent]] = {
    kind.__name__: kind for kind in (RayUp, RayLost, RayMended, WorkerUp, WorkerDown, WorkerWaits, PoolsAlive)
}


def to_line(event: PoolEvent) -> str:
    """The event as one line, without its end."""
    return json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)})


def from_line(line: str) -> PoolEvent:
    """Reads `to_line` back. Raises ValueError, KeyError or TypeError for anything else."""
    fields = json.loads(line)
    return _KINDS[fields.pop("event")](**fields)
