"""One attempt to move a running request from worker to worker, as the router keeps it, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.config import PLACEMENTS_MAX
from router.fleet import Worker
from tandem.request import RequestId, TransferId, WorkerId

MOVES_MAX = 62  # of one placement: each takes an epoch, and placements take their epochs in advance
EPOCHS_PER_PLACEMENT = 2 + MOVES_MAX
EPOCHS_PER_FENCE = PLACEMENTS_MAX * EPOCHS_PER_PLACEMENT


class MoveReason(StrEnum):
    """Why a request is moved."""

    OPERATOR = "operator"
    DRAIN = "drain"
    PRESSURE = "pressure"  # the source runs out of blocks
    PRIORITY = "priority"  # head-room for requests of a higher class
    BALANCE = "balance"
    DEFRAGMENT = "defragment"  # room for a long request that waits


class MoveOutcome(StrEnum):
    """How a move ended."""

    MOVING = "moving"  # it has not
    MOVED = "moved"
    FAILED = "failed"  # the request runs on where it was
    ENDED = "ended"  # the request itself ended, or was lost, meanwhile


@dataclass(slots=True, kw_only=True)
class Move:
    """A move under way."""

    transfer_id: TransferId
    epoch: int  # of the owner record while the source has the request
    source: Worker
    target: Worker
    reason: MoveReason
    why: str  # for people: the figures that led to it
    ticket: int  # of the MoveRequested that it answers
    began_ms: int
    deadline_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRecord:
    """A move for status and for whoever asked for it. Times are milliseconds; `at_ms` is when it began."""

    request_id: RequestId
    source: WorkerId
    target: WorkerId
    reason: MoveReason
    why: str
    outcome: MoveOutcome
    error: str = ""
    rounds: int = 0
    blocks_moved: int = 0
    blocks_reused: int = 0
    bytes_moved: int = 0
    tokens_recomputed: int = 0  # by the target, where the tail came as token ids
    precopy_ms: int = 0
    fence_ms: int = 0  # of the pause: from the fence until the source heard of the commit
    pause_ms: int = 0  # from the last token before to the first token after, as the router delivered them
    at_ms: int = 0
