"""The frames that wait to leave for one peer: by priority, then in order, and none waits behind others for ever."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from kv_transfer.messages import FrameHeader

MAX_QUEUED_FRAMES = 8192
AGE_MS = 1_000  # a frame that has waited so long counts as urgent, from when it came
URGENT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One frame, with what it is served by."""

    header: FrameHeader
    priority: int
    since_ms: int
    number: int  # order of arrival


class FrameQueue:
    """Lower priority numbers first. Not thread-safe."""

    def __init__(self) -> None:
        self._by_priority: dict[int, deque[Waiting]] = {}
        self._num = 0
        self._next_number = 0

    def __len__(self) -> int:
        return self._num

    def put(self, header: FrameHeader, priority: int, *, now_ms: int) -> bool:
        """False: the queue is full."""
        if self._num >= MAX_QUEUED_FRAMES:
            return False
        waiting = Waiting(header=header, priority=priority, since_ms=now_ms, number=self._next_number)
        self._next_number += 1
        self._by_priority.setdefault(priority, deque()).append(waiting)
        self._num += 1
        return True

    def put_back(self, waiting: Waiting) -> None:
        """Ahead of all others of its priority: it was served before them."""
        self._by_priority.setdefault(waiting.priority, deque()).appendleft(waiting)
        self._num += 1

    def peek(self, *, now_ms: int) -> Waiting | None:
        """What leaves next."""
        heads = (each[0] for each in self._by_priority.values())
        return min(heads, key=lambda head: (urgency(head, now_ms=now_ms), head.number), default=None)

    def take(self, waiting: Waiting) -> None:
        """Removes what `peek` gave."""
        frames = self._by_priority[waiting.priority]
        assert frames[0] is waiting, "only a head leaves"
        frames.popleft()
        if not frames:
            del self._by_priority[waiting.priority]
        self._num -= 1

    def clear(self) -> list[Waiting]:
        """Removes all and says which they were."""
        removed = [waiting for frames in self._by_priority.values() for waiting in frames]
        self._by_priority.clear()
        self._num = 0
        return removed


def urgency(waiting: Waiting, *, now_ms: int) -> int:
    """Its priority, or URGENT once it has waited for AGE_MS."""
    return URGENT if now_ms - waiting.since_ms >= AGE_MS else waiting.priority
