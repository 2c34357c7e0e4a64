"""What lately happened to this router's requests, second by second: the figures that operators' charts are drawn from.

It reads no clock: whoever closes the seconds says when one is over.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS_MAX = 300
SAMPLES_MAX = 1024  # of one kind in one second; what comes beyond is counted, and not in the spread


@dataclass(frozen=True, slots=True)
class Spread:
    """How some durations of one second lie. `num` counts all of them."""

    num: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    """One second. `number` counts from the first one; a spread is None when nothing of its kind happened."""

    number: int
    tokens: int  # delivered to clients
    ended: int  # requests, in whatever way
    ttft: Spread | None  # of the requests whose first token came in it
    tpot: Spread | None  # of the requests that had all of their answer in it
    moves: tuple[tuple[str, int], ...]  # that were carried out, by reason
    moves_failed: int


class Recent:
    """The second under way, and up to SECONDS_MAX before it."""

    def __init__(self) -> None:
        self._closed: deque[Second] = deque(maxlen=SECONDS_MAX)
        self._number = 0
        self._clear()

    def _clear(self) -> None:
        self._ttft_ms, self._num_ttft = list[float](), 0
        self._tpot_ms, self._num_tpot = list[float](), 0
        self._tokens = self._ended = self._moves_failed = 0
        self._moves = Counter[str]()

    def tokens(self, num: int) -> None:
        """Tokens came to clients."""
        self._tokens += num

    def first_token(self, ttft_ms: float) -> None:
        """A client has its first token."""
        self._num_ttft += 1
        if len(self._ttft_ms) < SAMPLES_MAX:
            self._ttft_ms.append(ttft_ms)

    def answered(self, tpot_ms: float) -> None:
        """A client has all of its answer."""
        self._num_tpot += 1
        if len(self._tpot_ms) < SAMPLES_MAX:
            self._tpot_ms.append(tpot_ms)

    def ended(self) -> None:
        """A request is over."""
        self._ended += 1

    def moved(self, reason: str, *, carried_out: bool) -> None:
        """A move is over."""
        if carried_out:
            self._moves[reason] += 1
        else:
            self._moves_failed += 1

    def close_second(self) -> Second:
        """The second under way is over, and another one begins."""
        closed = Second(
            number=self._number,
            tokens=self._tokens,
            ended=self._ended,
            ttft=_spread(self._ttft_ms, self._num_ttft),
            tpot=_spread(self._tpot_ms, self._num_tpot),
            moves=tuple(sorted(self._moves.items())),
            moves_failed=self._moves_failed,
        )
        self._closed.append(closed)
        self._number += 1
        self._clear()
        return closed

    def seconds(self) -> Sequence[Second]:
        """Those that are over, oldest first."""
        return tuple(self._closed)


def _spread(samples_ms: list[float], num: int) -> Spread | None:
    if not samples_ms:
        return None
    samples_ms.sort()
    last = len(samples_ms) - 1
    return Spread(num, samples_ms[last // 2], samples_ms[round(0.95 * last)])
