"""What faults did to the streams of a checking load: lost, doubled and wrong tokens, gaps, moves, when all went on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.chaos_plan import Fault, FaultKind
from cluster.chaos_states import STATES

EXAMPLES_MAX = 20
TIMELINE_MAX = 50_000
GAP_TOLD_MS = 1_000  # a silence of a stream that the timeline tells of
IN_FLIGHT_MS = 1_000  # after a fault: tokens that were on their way when it struck have come by then
MANY_IN_FLIGHT = 8


class Harm(StrEnum):
    """What must not happen to a token."""

    LOST = "lost"
    DOUBLED = "doubled"
    WRONG = "wrong"


class Happened(StrEnum):
    """What the timeline tells of."""

    FAULT = "fault"
    UNMET = "unmet"  # a fault that found no victim, or whose state nobody entered
    MOVE = "move"
    GAP = "gap"
    HARM = "harm"
    LEAK = "leak"
    AUDIT = "audit"  # all was still, and everything was back


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the timeline."""

    at_ms: int
    what: Happened
    text: str

    def __str__(self) -> str:
        return f"{self.at_ms / 1000:8.2f} s  {self.what:5}  {self.text}"


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
    unsettled: set[int]  # streams of which all that came since may have been on its way before
    recovered_ms: int | None = None  # when all had gone on; None: not yet, or nothing was served since
    harm: Counter[Harm] = field(default_factory=Counter)
    gap_ms: int = 0  # the longest between two tokens of one stream that spans it, or begins just after it
    _so_far_ms: int = 0
    _serves: bool = False  # a token came that was not on its way
    _refused: bool = False  # somebody was told to come again, and nobody has been served since

    def heard(self, now_ms: int, stream: int, gap_ms: int, *, is_token: bool, refused: bool) -> None:
        """A sign of life of a stream after `gap_ms` without one: a token, or its end.

        A token that was on its way says nothing yet: the silence that follows it counts as this fault's.
        """
        since_ms = now_ms - self.at_ms
        if is_token:
            self._serves |= since_ms >= IN_FLIGHT_MS
            self._so_far_ms = max(self._so_far_ms, since_ms if self._refused else 0)
            self._refused = False
        self._refused |= refused
        if stream in self.unsettled:
            if stream in self.waits or (gap_ms >= GAP_TOLD_MS and since_ms - gap_ms <= IN_FLIGHT_MS):
                self._so_far_ms = max(self._so_far_ms, since_ms)
                self.gap_ms = max(self.gap_ms, gap_ms)
            self.waits.discard(stream)
            if not is_token or since_ms >= IN_FLIGHT_MS:
                self.unsettled.discard(stream)
        if self._serves and not self._refused and not self.unsettled:
            self.recovered_ms = self._so_far_ms

    def __str__(self) -> str:
        told = f"{self.fault} at {self.at_ms} ms ({self.where})"
        if self.recovered_ms is not None:
            return f"{told}: all went on after {self.recovered_ms} ms"
        return f"{told}: {len(self.waits)} streams did not go on" if self.waits else f"{told}: nothing was served since"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All strikes of one kind and victim, those in a state apart. Times are the worst, in milliseconds."""

    what: str
    num: int
    in_flight: int
    harm: Counter[Harm]
    recovered_ms: int | None  # None: one of them has not
    gap_ms: int


@dataclass(slots=True)
class Tally:
    """Hears what clients see, with the time in it. Times are milliseconds since the run began.

    A cluster that refuses everybody harms no stream: so no fault counts as got over before somebody is served again.
    """

    num_streams: int = 0
    num_tokens: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    num_refused: int = 0  # before a token, by a name that says to come again
    harm: Counter[Harm] = field(default_factory=Counter)
    worst_gap_ms: int = 0
    num_audits: int = 0  # moments in which all was still, and everything was back
    moves: Counter[str] = field(default_factory=Counter)  # by outcome
    leaks: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    unmet: list[Fault] = field(default_factory=list)
    timeline: list[Entry] = field(default_factory=list)
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _waited_for: list[Strike] = field(default_factory=list)  # strikes that streams still have to get over

    def opened(self, now_ms: int, stream: int, expected: Sequence[int]) -> None:
        """A client asks; the answer must be this."""
        self.num_streams += 1
        self._streams[stream] = _Stream(expected, heard_ms=now_ms)

    def came(self, now_ms: int, stream: int, index: int, tokens: Sequence[int]) -> None:
        """Tokens from `index` on."""
        self._heard(now_ms, stream, is_token=True)
        seen = self._streams[stream]
        self.num_tokens += len(tokens)
        for at, token in enumerate(tokens, start=index):
            if at < seen.num_seen:
                self._count(now_ms, Harm.DOUBLED, f"stream {stream}: token {at} came again")
                continue
            if at > seen.num_seen:
                self._count(now_ms, Harm.LOST, f"stream {stream}: token {at} came where {seen.num_seen} was due")
            if at >= len(seen.expected) or token != seen.expected[at]:
                due = seen.expected[at] if at < len(seen.expected) else "nothing"
                self._count(now_ms, Harm.WRONG, f"stream {stream}: token {at} is {token}, {due} was due")
            seen.num_seen = at + 1

    def ended(
        self, now_ms: int, stream: int, error: str = "", *, cancelled: bool = False, refused: bool = False
    ) -> None:
        """The stream is over: well, by its client's wish, refused at once, or with an error."""
        self._heard(now_ms, stream, refused=refused)
        seen = self._streams.pop(stream)
        if cancelled:
            self.num_cancelled += 1
        elif refused and not seen.num_seen:
            self.num_refused += 1
        elif error:
            told = f"stream {stream}: after {seen.num_seen} of {len(seen.expected)} tokens: {error}"
            self._count(now_ms, Harm.LOST, told)
        elif seen.num_seen < len(seen.expected):
            told = f"stream {stream}: ended after {seen.num_seen} of {len(seen.expected)} tokens"
            self._count(now_ms, Harm.LOST, told)
        else:
            self.num_finished += 1

    def struck(self, now_ms: int, fault: Fault, where: str) -> None:
        """A fault strikes."""
        strike = Strike(fault, now_ms, where, len(self._streams), set(self._streams), set(self._streams))
        self.strikes.append(strike)
        self._tell(now_ms, Happened.FAULT, f"{fault}: {where}, {strike.in_flight} streams in flight")
        self._waited_for.append(strike)

    def not_met(self, now_ms: int, fault: Fault, reason: str) -> None:
        """The fault could not strike."""
        self.unmet.append(fault)
        self._tell(now_ms, Happened.UNMET, f"{fault}: {reason}")

    def moved(self, now_ms: int, outcome: str, text: str) -> None:
        """A stream was moved between workers, or was to be."""
        self.moves[outcome] += 1
        self._tell(now_ms, Happened.MOVE, text)

    def leaked(self, now_ms: int, problem: str) -> None:
        """A worker holds what nobody has, or its audit found something."""
        self.leaks.append(problem)
        self._tell(now_ms, Happened.LEAK, problem)

    def audited(self, now_ms: int, text: str) -> None:
        """All was still, and everything was back."""
        self.num_audits += 1
        self._tell(now_ms, Happened.AUDIT, text)

    @property
    def num_in_flight(self) -> int:
        """Streams that are open now."""
        return len(self._streams)

    @property
    def num_hard(self) -> int:
        """SIGKILLs and SIGSTOPs that struck with MANY_IN_FLIGHT streams in flight, or more."""
        hard = (FaultKind.KILL, FaultKind.STOP)
        return sum(each.fault.kind in hard and each.in_flight >= MANY_IN_FLIGHT for each in self.strikes)

    def states(self) -> dict[str, Counter[FaultKind]]:
        """How often each state of STATES was struck, by kind."""
        struck = {state: Counter[FaultKind]() for state in STATES}
        for strike in self.strikes:
            if strike.fault.state:
                struck[strike.fault.state][strike.fault.kind] += 1
        return struck

    def rows(self) -> list[Row]:
        """By kind and victim, in the order of their first strikes."""
        groups: dict[str, list[Strike]] = {}
        for strike in self.strikes:
            in_state = " in a state" if strike.fault.state else ""
            groups.setdefault(f"{strike.fault.kind} {strike.fault.victim}{in_state}", []).append(strike)
        return [_row(what, strikes) for what, strikes in groups.items()]

    def failures(self, *, recovery_limit_ms: int, gap_limit_ms: int | None = None) -> list[str]:
        """Which promises were broken, one sentence each; empty: none."""
        gap = [] if gap_limit_ms is None or self.worst_gap_ms <= gap_limit_ms else [self.worst_gap_ms]
        late = [
            str(strike)
            for strike in self.strikes
            if strike.recovered_ms is None or strike.recovered_ms > recovery_limit_ms
        ]
        none = [f"none of {len(self.unmet)} faults struck anybody"] if self.unmet and not self.strikes else []
        return [
            *(f"{self.harm[harm]} {harm}" for harm in Harm if self.harm[harm]),
            *self.leaks,
            *late,
            *none,
            *(f"a stream was silent for {gap_ms} ms" for gap_ms in gap),
        ]

    def _heard(self, now_ms: int, stream: int, *, is_token: bool = False, refused: bool = False) -> None:
        """A sign of life of the stream."""
        seen = self._streams[stream]
        gap_ms, seen.heard_ms = now_ms - seen.heard_ms, now_ms
        if seen.num_seen:
            self.worst_gap_ms = max(self.worst_gap_ms, gap_ms)
        if gap_ms >= GAP_TOLD_MS:
            self._tell(now_ms, Happened.GAP, f"stream {stream} was silent for {gap_ms} ms after {seen.num_seen} tokens")
        for strike in self._waited_for:
            strike.heard(now_ms, stream, gap_ms, is_token=is_token, refused=refused)
        self._waited_for = [strike for strike in self._waited_for if strike.recovered_ms is None]

    def _tell(self, now_ms: int, what: Happened, text: str) -> None:
        if len(self.timeline) < TIMELINE_MAX:
            self.timeline.append(Entry(now_ms, what, text))

    def _count(self, now_ms: int, harm: Harm, example: str) -> None:
        self._tell(now_ms, Happened.HARM, f"{harm}: {example}")
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
