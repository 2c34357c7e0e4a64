"""A virtual clock, and ordered streams over it that delay and break, as gRPC streams do."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

from simulator.choices import Choices

M = TypeVar("M")


class Schedule:
    """What happens when. Things of one instant happen in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.num_events = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0

    def after(self, delay_ms: int, do: Callable[[], None]) -> None:
        """Does it `delay_ms` from now."""
        self._number += 1
        heapq.heappush(self._heap, (self.now_ms + max(0, delay_ms), self._number, do))

    def run(self, *, until_ms: int, unless: Callable[[], bool] = lambda: False) -> None:
        """Lets time pass until `until_ms`, or until `unless` holds."""
        while self._heap and self._heap[0][0] <= until_ms:
            if unless():
                return
            at_ms, _, do = heapq.heappop(self._heap)
            self.now_ms = at_ms
            self.num_events += 1
            do()
        if not unless():
            self.now_ms = max(self.now_ms, until_ms)


class Stream(Generic[M]):
    """One direction of a connection: messages arrive in order, each once, until it is cut; then none does."""

    def __init__(self, schedule: Schedule, choices: Choices, *, delay_max_ms: int, arrive: Callable[[M], None]) -> None:
        self._schedule = schedule
        self._choices = choices
        self._delay_max_ms = delay_max_ms
        self._arrive = arrive
        self._last_ms = 0
        self.open = True

    def send(self, message: M) -> None:
        """Puts a message on the way; into a cut stream it is lost."""
        if not self.open:
            return
        at_ms = max(self._last_ms, self._schedule.now_ms + self._choices.between(0, self._delay_max_ms))
        self._last_ms = at_ms
        self._schedule.after(at_ms - self._schedule.now_ms, lambda: self._arrived(message))

    def cut(self) -> None:
        """What is on the way is lost too."""
        self.open = False

    def _arrived(self, message: M) -> None:
        if self.open:
            self._arrive(message)
