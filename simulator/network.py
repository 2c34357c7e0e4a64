"""A virtual clock, clocks that go wrong, and ordered streams that delay, stall and break, as gRPC streams do."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

from simulator.choices import Choices

M = TypeVar("M")


class Schedule:
    """What happens when. Things of one instant happen in the order in which they were scheduled.

    More than `events_max` events are an AssertionError: something spins.
    """

    def __init__(self, *, events_max: int) -> None:
        self.now_ms = 0
        self._events_max = events_max
        self.num_events = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0

    def after(self, delay_ms: int, do: Callable[[], None]) -> None:
        """Does it `delay_ms` from now."""
        self._number += 1
        at_ms = self.now_ms + delay_ms if delay_ms > 0 else self.now_ms
        heapq.heappush(self._heap, (at_ms, self._number, do))

    def run(self, *, until_ms: int, unless: Callable[[], bool] = lambda: False) -> None:
        """Lets time pass until `until_ms`, or until `unless` holds, which is asked whenever time passes."""
        heap = self._heap
        while heap and heap[0][0] <= until_ms:
            if heap[0][0] != self.now_ms and unless():
                return
            self.now_ms, _, do = heapq.heappop(heap)
            self.num_events += 1
            assert self.num_events <= self._events_max, f"{self.num_events} events and no rest: something spins"
            do()
        if not unless():
            self.now_ms = max(self.now_ms, until_ms)


class Clock:
    """What one process takes for the time: it starts from an offset, and runs `drift` thousandths too fast or slow."""

    def __init__(self, schedule: Schedule, *, offset_ms: int = 0, drift: int = 0) -> None:
        self._schedule = schedule
        self._offset_ms = offset_ms
        self._rate = 1_000 + drift

    @property
    def now_ms(self) -> int:
        return self._offset_ms + self._schedule.now_ms * self._rate // 1_000

    def true_ms(self, at_ms: int) -> int:
        """The first instant of the schedule at which this clock shows `at_ms` or more."""
        return -(-(at_ms - self._offset_ms) * 1_000 // self._rate)


class Stream(Generic[M]):
    """One direction of a connection: messages arrive in order, each once, until it breaks; then a suffix is lost.

    While it is held, as by a network that is down, nothing arrives; what was under way arrives when it is let go.
    """

    def __init__(self, schedule: Schedule, choices: Choices, *, delay_max_ms: int, arrive: Callable[[M], None]) -> None:
        self._schedule = schedule
        self._choices = choices
        self._delay_max_ms = delay_max_ms
        self._arrive = arrive
        self._last_ms = 0
        self._held: list[M] | None = None
        self._num_under_way = 0
        self._num_late = 0  # of those under way when it was cut: so many still arrive
        self.last: M | None = None  # the newest that was sent
        self.open = True

    def send(self, message: M) -> None:
        """Puts a message on the way; into a cut stream it is lost."""
        if not self.open:
            return
        self.last = message
        self._num_under_way += 1
        at_ms = max(self._last_ms, self._schedule.now_ms + self._choices.between(0, self._delay_max_ms))
        self._last_ms = at_ms
        self._schedule.after(at_ms - self._schedule.now_ms, lambda: self._arrived(message))

    def hold(self) -> None:
        """Nothing passes for now."""
        if self._held is None:
            self._held = []

    def let_go(self) -> None:
        """What was held up arrives."""
        held, self._held = self._held or [], None
        for message in held:
            self._arrived(message)

    def cut(self, *, num_late: int = 0) -> None:
        """The sender can send no more. Of what is on the way the first `num_late` still arrive, the rest is lost."""
        self.open = False
        self._num_late = num_late

    @property
    def num_under_way(self) -> int:
        """Messages that have been sent and have not arrived."""
        return self._num_under_way

    def _arrived(self, message: M) -> None:
        if self._held is not None:
            self._held.append(message)
            return
        self._num_under_way -= 1
        if not self.open:
            if self._num_late <= 0:
                return
            self._num_late -= 1
        self._arrive(message)
