"""What faults did to the streams of a checking load: lost, doubled and wrong tokens, gaps, and how soon all went on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.chaos_plan import Fault

EXAMPLES_MAX = 20


class Harm(StrEnum):
    """What must not happen to a token."""

    LOST = "lost"
    DOUBLED = "doubled"
    WRONG = "wrong"


@dataclass(slots=True)
class _Stream:
    """One answer that a client reads, and what it must be."""

    expected: Sequence[int]
    num_seen: int = 0
    heard_ms: int = 0


@dataclass(slots=True)
class Strike:
    """One fault that struck, and what followed until the next one."""

    fault: Fault
    at_ms: int
    where: str
    in_flight: int
    waits: set[int]  # streams that have shown no sign of life since
    recovered_ms: int | None = None  # when all of them had
    harm: Counter[Harm] = field(default_factory=Counter)
    gap_ms: int = 0  # the longest between two tokens of one stream that spans it or follows


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All strikes of one kind and victim. Times are the worst, in milliseconds."""

    what: str
    num: int
    in_flight: int
    harm: Counter[Harm]
    recovered_ms: int | None  # None: one of them has not
    gap_ms: int


@dataclass(slots=True)
class Tally:
    """Hears what clients see, with the time in it. Times are milliseconds since the run began."""

    num_streams: int = 0
    num_tokens: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    num_refused: int = 0  # before a token, by a name that says to come again
    harm: Counter[Harm] = field(default_factory=Counter)
    worst_gap_ms: int = 0
    leaks: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    _streams: dict[int, _Stream] = field(default_factory=dict)

    def opened(self, now_ms: int, stream: int, expected: Sequence[int]) -> None:
        """A client asks; the answer must be this."""
        self.num_streams += 1
        self._streams[stream] = _Stream(expected, heard_ms=now_ms)

    def came(self, now_ms: int, stream: int, index: int, tokens: Sequence[int]) -> None:
        """Tokens from `index` on."""
        self._heard(now_ms, stream)
        seen = self._streams[stream]
        self.num_tokens += len(tokens)
        for at, token in enumerate(tokens, start=index):
            if at < seen.num_seen:
                self._count(Harm.DOUBLED, f"stream {stream}: token {at} came again")
                continue
            if at > seen.num_seen:
                self._count(Harm.LOST, f"stream {stream}: token {at} came where {seen.num_seen} was due")
            if at >= len(seen.expected) or token != seen.expected[at]:
                due = seen.expected[at] if at < len(seen.expected) else "nothing"
                self._count(Harm.WRONG, f"stream {stream}: token {at} is {token}, {due} was due")
            seen.num_seen = at + 1

    def ended(
        self, now_ms: int, stream: int, error: str = "", *, cancelled: bool = False, refused: bool = False
    ) -> None:
        """The stream is over: well, by its client's wish, refused at once, or with an error."""
        self._heard(now_ms, stream)
        seen = self._streams.pop(stream)
        if cancelled:
            self.num_cancelled += 1
        elif refused and not seen.num_seen:
            self.num_refused += 1
        elif error:
            self._count(Harm.LOST, f"stream {stream}: after {seen.num_seen} of {len(seen.expected)} tokens: {error}")
        elif seen.num_seen < len(seen.expected):
            self._count(Harm.LOST, f"stream {stream}: ended after {seen.num_seen} of {len(seen.expected)} tokens")
        else:
            self.num_finished += 1

    def struck(self, now_ms: int, fault: Fault, where: str) -> None:
        """A fault strikes."""
        self.strikes.append(Strike(fault, now_ms, where, len(self._streams), set(self._streams)))
        if not self._streams:
            self.strikes[-1].recovered_ms = 0

    def leaked(self, problem: str) -> None:
        """A worker holds what nobody has, or its audit found something."""
        self.leaks.append(problem)

    def rows(self) -> list[Row]:
        """By kind and victim, in the order of their first strikes."""
        groups: dict[str, list[Strike]] = {}
        for strike in self.strikes:
            groups.setdefault(f"{strike.fault.kind} {strike.fault.victim}", []).append(strike)
        return [_row(what, strikes) for what, strikes in groups.items()]

    def failures(self, *, recovery_limit_ms: int) -> list[str]:
        """Which promises were broken, one sentence each; empty: none."""
        late = [
            f"{strike.fault} at {strike.at_ms} ms ({strike.where}): {len(strike.waits)} streams did not go on"
            if strike.recovered_ms is None
            else f"{strike.fault} at {strike.at_ms} ms ({strike.where}): all went on after {strike.recovered_ms} ms"
            for strike in self.strikes
            if strike.recovered_ms is None or strike.recovered_ms > recovery_limit_ms
        ]
        return [*(f"{self.harm[harm]} {harm}" for harm in Harm if self.harm[harm]), *self.leaks, *late]

    def _heard(self, now_ms: int, stream: int) -> None:
        """A sign of life of the stream."""
        seen = self._streams[stream]
        gap_ms, seen.heard_ms = now_ms - seen.heard_ms, now_ms
        if seen.num_seen:
            self.worst_gap_ms = max(self.worst_gap_ms, gap_ms)
        for strike in self.strikes:
            if stream in strike.waits:
                strike.waits.discard(stream)
                strike.gap_ms = max(strike.gap_ms, gap_ms)
                if not strike.waits:
                    strike.recovered_ms = now_ms - strike.at_ms

    def _count(self, harm: Harm, example: str) -> None:
        self.harm[harm] += 1
        if self.strikes:
            self.strikes[-1].harm[harm] += 1
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(example)


def _row(what: str, strikes: Iterable[Strike]) -> Row:
    all_of = list(strikes)
    recovered = [each.recovered_ms for each in all_of]
    known = [each for each in recovered if each is not None]
    return Row(
        what=what,
        num=len(all_of),
        in_flight=sum(each.in_flight for each in all_of),
        harm=sum((each.harm for each in all_of), Counter()),
        recovered_ms=max(known) if len(known) == len(recovered) else None,
        gap_ms=max(each.gap_ms for each in all_of),
    )
