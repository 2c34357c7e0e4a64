"""The events that every core of a worker understands, whatever its role."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.request import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed: deadlines, leases and retries are due. The time itself comes beside each event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerGone:
    """The worker incarnation cannot be reached any more, or is known to be dead."""

    worker_id: WorkerId
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterGone:
    """The router session ended: everything that it assigned is over."""

    session: int
