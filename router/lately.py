"""What a router's clients saw in the last minute: sums by the second, and the newest times, bounded in number."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

WINDOW_S = 60
TIMES_MAX = 1_000  # of each kind: the newest of a busy minute


class Counted(StrEnum):
    """What is summed."""

    TOKENS = "tokens"  # handed to clients
    REFUSED = "refused"  # requests, before any work was done for them
    RECOVERED = "recovered"  # attempts that were lost and made anew
    MOVED = "moved"  # running requests that changed their worker


class Timed(StrEnum):
    """What is timed."""

    TTFT = "ttft"
    TPOT = "tpot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lately:
    """The last `seconds` seconds, a minute but for the first one of a router; times in milliseconds, oldest first.

    `tokens_total`: since the router began.
    """

    seconds: float
    counts: dict[Counted, int]
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    tokens_total: int


@dataclass(slots=True)
class _Second:
    """The sums of one second."""

    second: int
    counts: dict[Counted, int] = field(default_factory=lambda: dict.fromkeys(Counted, 0))


class LastMinute:
    """Counts and times as they come; the time is in every call, in seconds of one clock."""

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._seconds: deque[_Second] = deque()
        self._times: dict[Timed, deque[tuple[float, float]]] = {kind: deque(maxlen=TIMES_MAX) for kind in Timed}
        self._tokens_total = 0

    def count(self, now_s: float, what: Counted, num: int = 1) -> None:
        """So many more of it."""
        second = int(now_s)
        if not self._seconds or self._seconds[-1].second < second:
            self._seconds.append(_Second(second))
            self._expire(now_s)
        self._seconds[-1].counts[what] += num
        if what is Counted.TOKENS:
            self._tokens_total += num

    def took(self, now_s: float, what: Timed, ms: float) -> None:
        """One more of these times."""
        self._times[what].append((now_s, ms))

    def look(self, now_s: float) -> Lately:
        """The last minute."""
        self._expire(now_s)
        since_s = now_s - WINDOW_S
        times = {kind: tuple(ms for at_s, ms in each if at_s > since_s) for kind, each in self._times.items()}
        return Lately(
            seconds=min(float(WINDOW_S), now_s - self._began_s),
            counts={what: sum(each.counts[what] for each in self._seconds) for what in Counted},
            ttft_ms=times[Timed.TTFT],
            tpot_ms=times[Timed.TPOT],
            tokens_total=self._tokens_total,
        )

    def _expire(self, now_s: float) -> None:
        while self._seconds and self._seconds[0].second <= now_s - WINDOW_S - 1:
            self._seconds.popleft()
