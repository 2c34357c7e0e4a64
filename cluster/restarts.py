"""Whether and when something that died is started again: doubling back-off, and an end to it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Restarts:
    """At most `restarts_max` restarts of each name within `window_ms`; the first comes at once."""

    restarts_max: int
    window_ms: int = 600_000
    first_delay_ms: int = 500
    delay_max_ms: int = 30_000
    times: dict[str, deque[int]] = field(default_factory=dict)  # of past restarts, each at most restarts_max long

    def died(self, now_ms: int, name: str) -> int | None:
        """Milliseconds to wait before the restart, or None when `name` has died too often and stays down."""
        times = self.times.setdefault(name, deque())
        while times and now_ms - times[0] > self.window_ms:
            times.popleft()
        if len(times) >= self.restarts_max:
            return None
        delay_ms = min(self.delay_max_ms, self.first_delay_ms << (len(times) - 1)) if times else 0
        times.append(now_ms)
        return delay_ms
