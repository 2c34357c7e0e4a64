"""Who has not been heard for too long. Time in which the listener itself was away counts against nobody."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Speaker:
    heard_ms: int
    bound_ms: int


@dataclass(slots=True, kw_only=True)
class Silence:
    """Those who are to be heard, each within its own bound. Looks are promised each `look_ms`.

    When one comes much later, the listener was stopped, or the machine asleep: what was said is still to be read.
    """

    look_ms: int
    _speakers: dict[str, _Speaker] = field(default_factory=dict)
    _looked_ms: int | None = None

    def expect(self, now_ms: int, name: str, bound_ms: int) -> None:
        """From now on `name` is to be heard within each `bound_ms`."""
        self._speakers[name] = _Speaker(now_ms, bound_ms)

    def heard(self, now_ms: int, name: str) -> None:
        """`name` has given a sign of life."""
        speaker = self._speakers.get(name)
        if speaker is not None:
            speaker.heard_ms = max(speaker.heard_ms, now_ms)

    def forget(self, name: str) -> None:
        """`name` is not expected any more."""
        self._speakers.pop(name, None)

    def look(self, now_ms: int) -> list[tuple[str, int]]:
        """Who is silent for too long, and for how many milliseconds; each is said once."""
        since_ms, self._looked_ms = self._looked_ms, now_ms
        away_ms = 0 if since_ms is None else now_ms - since_ms - 2 * self.look_ms
        if away_ms > 0:
            for speaker in self._speakers.values():
                speaker.heard_ms += away_ms
        silent = [
            (name, now_ms - each.heard_ms)
            for name, each in self._speakers.items()
            if now_ms - each.heard_ms > each.bound_ms
        ]
        for name, _ in silent:
            del self._speakers[name]
        return silent
