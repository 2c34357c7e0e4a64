"""How a worker stands with all of its registries, and when that makes it end: asked to leave, refused, or forgotten."""

from __future__ import annotations

from dataclasses import dataclass, field

RECENT_MS = 15_000  # a registry that answered so lately may do so again: a router that is stuck is killed in this time


@dataclass(slots=True)
class _Word:
    """The last answer of one registry."""

    heard_ms: int
    refused: str = ""  # why it does not want the worker; empty: it does, or has not answered yet


@dataclass(slots=True, kw_only=True)
class Standing:
    """One worker before its registries. Times are milliseconds on the caller's clock.

    Without a word from any registry for `gone_ms` it is over, and when all that answer refuse it. A registry that is
    silent counts with its last answer for `recent_ms`, since its router may just be started again. Calls are promised
    each `look_ms`: when one comes much later it was the worker that stood still, and that time counts against nobody.
    """

    registries: tuple[str, ...]
    began_ms: int
    gone_ms: int
    recent_ms: int = RECENT_MS
    look_ms: int | None = None  # None: nothing is promised
    looked_ms: int | None = None
    _words: dict[str, _Word] = field(default_factory=dict)
    _leave: str = ""

    def __post_init__(self) -> None:
        if not self.registries:
            raise ValueError("registries: a worker needs one at least")
        self._words = {each: _Word(self.began_ms) for each in self.registries}

    def accepted(self, now_ms: int, registry: str) -> None:
        """The registry knows the worker."""
        self._forgive(now_ms)
        self._words[registry] = _Word(now_ms)

    def refused(self, now_ms: int, registry: str, reason: str) -> None:
        """The registry does not want the worker."""
        self._forgive(now_ms)
        self._words[registry] = _Word(now_ms, reason)

    def leave(self, registry: str) -> None:
        """The registry says that the worker was drained: nobody needs anything of it."""
        self._leave = f"{registry} asked the worker to leave"

    def over(self, now_ms: int) -> str:
        """Why the worker ends; empty while it is wanted, or may be."""
        self._forgive(now_ms)
        if self._leave:
            return self._leave
        silent_ms = now_ms - max(each.heard_ms for each in self._words.values())
        if silent_ms > self.gone_ms:
            return f"no registry for {silent_ms / 1000:.0f} s"
        refusals = [f"{name} refused: {word.refused}" for name, word in self._words.items() if word.refused]
        recent = [each for each in self._words.values() if now_ms - each.heard_ms <= self.recent_ms]
        if recent and all(each.refused for each in recent):
            return "; ".join(refusals)
        return ""

    def _forgive(self, now_ms: int) -> None:
        since_ms, self.looked_ms = self.looked_ms, now_ms
        if self.look_ms is None or since_ms is None:
            return
        away_ms = max(0, now_ms - since_ms - 2 * self.look_ms)
        for word in self._words.values():
            word.heard_ms += away_ms
