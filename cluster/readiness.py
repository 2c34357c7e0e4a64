"""Whether the cluster serves, as pairs of workers have shown lately; and which pair to ask next when nobody did.

Health is what was done, not what was said: a pair counts when a request went through it, prefill, transfer and decode.
Where clients do not ask, a canary does: a few tokens, one pair after another, one at a time. Reference: a health check
that answers while nothing works is the complaint that users of such systems have most often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields

from router.fleet import Worker, WorkerState
from tandem.messages import Role
from tandem.request import Incarnation, Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadinessConfig:
    """Bounds of the canaries. Raises ValueError naming the key when a value cannot be used."""

    lately_ms: int = 10_000  # the cluster is ready for so long after a pair was given what it served
    quiet_ms: int = 3_000  # after so long without, the next pair is asked
    pair_ms: int = 60_000  # a pair that clients do not use is asked so often, while others are busy
    again_ms: int = 500  # between two canaries at least
    timeout_ms: int = 4_000  # of a canary

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) < 1:
                raise ValueError(f"{each.name}: is {getattr(self, each.name)}, must be at least 1")
        if self.lately_ms <= self.quiet_ms:
            raise ValueError(f"lately_ms: is {self.lately_ms}, must be more than quiet_ms, {self.quiet_ms}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStatus:
    """What is known of a pair. `served_ms` None: it has not served yet. `error`: of its last canary, if that failed."""

    pair: Pair
    served_ms: int | None
    error: str


@dataclass(slots=True)
class _Tried:
    """The last canary of a pair."""

    at_ms: int
    error: str = ""


@dataclass(slots=True)
class Readiness:
    """Feed it `look` often, and `ended` when the canary that it asked for is over. Times are of one steady clock.

    `served_ms` tells when a pair was last given a request that it served (router/fleet.py).
    """

    served_ms: Callable[[Pair], int | None]
    config: ReadinessConfig = field(default_factory=ReadinessConfig)
    num_sent: int = 0
    num_failed: int = 0
    _pairs: tuple[Pair, ...] = ()
    _lacks: str = "no worker has registered"
    _tried: dict[Pair, _Tried] = field(default_factory=dict)
    _full_ms: dict[Pair, int] = field(default_factory=dict)  # it had served, and then had no room for a canary
    _asked: Pair | None = None
    _asked_ms: int | None = None

    def look(self, now_ms: int, workers: Iterable[Worker]) -> Pair | None:
        """Takes the workers that there are; the pair to send a canary through now, or None."""
        self._pairs, self._lacks = pairs_of(workers)
        known = set(self._pairs)
        self._tried = {pair: tried for pair, tried in self._tried.items() if pair in known}
        self._full_ms = {pair: at_ms for pair, at_ms in self._full_ms.items() if pair in known}
        if self._asked is not None or not self._pairs:
            return None
        if self._asked_ms is not None and now_ms - self._asked_ms < self.config.again_ms:
            return None
        pair = min(self._pairs, key=self._known_ms)
        served = [at_ms for each in self._pairs if (at_ms := self.served_ms(each)) is not None]
        quiet = not served or now_ms - max(served) >= self.config.quiet_ms
        if not quiet and now_ms - self._known_ms(pair) < self.config.pair_ms:
            return None
        self._asked, self._asked_ms = pair, now_ms
        self.num_sent += 1
        return pair

    def ended(self, now_ms: int, *, error: str, full: bool = False) -> None:
        """The canary is over. `error` empty: it came through. `full`: for want of memory, which says nothing."""
        pair, self._asked = self._asked, None
        assert pair is not None, "no canary was asked for"
        self._tried[pair] = _Tried(now_ms, error)
        self.num_failed += bool(error) and not full
        if full and self._proven(pair, now_ms):
            self._full_ms[pair] = now_ms

    def not_ready(self, now_ms: int) -> str:
        """Why the cluster does not serve, for people; empty when it does."""
        if not self._pairs:
            return self._lacks
        if any(self._proven(pair, now_ms) for pair in self._pairs):
            return ""
        pair = max(self._pairs, key=lambda each: self._tried[each].at_ms if each in self._tried else -1)
        tried = self._tried.get(pair)
        last = f"; the last canary, {named(pair)}: {tried.error}" if tried is not None and tried.error else ""
        served = [at_ms for each in self._pairs if (at_ms := self.served_ms(each)) is not None]
        since = f"for {now_ms - max(served)} ms" if served else "yet"
        return f"no pair of workers has moved a block and written a token {since}{last}"

    def status(self) -> list[PairStatus]:
        """All pairs, in a steady order."""
        errors = {pair: tried.error for pair, tried in self._tried.items()}
        return [
            PairStatus(pair=each, served_ms=self.served_ms(each), error=errors.get(each, "")) for each in self._pairs
        ]

    def _proven(self, pair: Pair, now_ms: int) -> bool:
        """Whether it has served lately, or could not be asked since then for want of memory."""
        served_ms = self.served_ms(pair)
        if served_ms is None:
            return False
        return now_ms - max(served_ms, self._full_ms.get(pair, served_ms)) <= self.config.lately_ms

    def _known_ms(self, pair: Pair) -> float:
        """When something was last heard of the pair, good or bad."""
        tried, served_ms = self._tried.get(pair), self.served_ms(pair)
        return max(float("-inf") if tried is None else tried.at_ms, float("-inf") if served_ms is None else served_ms)


def pairs_of(workers: Iterable[Worker]) -> tuple[tuple[Pair, ...], str]:
    """The pairs that requests may go through, as placement has it (router/placement.py), or why there are none.

    While no worker of one kind is ready, those of the other kind serve alone.
    """
    ready: dict[Role, list[Incarnation]] = {role: [] for role in Role}
    for worker in workers:
        if worker.state is WorkerState.READY:
            ready[worker.info.role].append(worker.key)
    prefill, decode, mixed = (sorted(ready[role]) for role in (Role.PREFILL, Role.DECODE, Role.MIXED))
    alone = mixed if mixed or (prefill and decode) else prefill or decode
    targets = decode or mixed
    pairs = [(source, target) for source in prefill for target in targets] + [(each, each) for each in alone]
    return tuple(pairs), "" if pairs else "no worker is ready"


def named(pair: Pair) -> str:
    """The pair for people."""
    (source, _), (target, _) = pair
    return f"{source} alone" if pair[0] == pair[1] else f"{source} -> {target}"
