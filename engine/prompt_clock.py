"""How long a prompt waits and runs on the worker that reads it, for the stages of TTFT."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.messages import FirstTokenTimes


@dataclass(slots=True, kw_only=True)
class PromptClock:
    """Of one assignment. `heard_s`: when it was read off its stream, on whichever clock the stream's owner has."""

    received_ms: int
    heard_s: float
    began_ms: int | None = None  # when the first step with it began

    def runs(self, now_ms: int) -> None:
        """A step that has a part of it begins."""
        if self.began_ms is None:
            self.began_ms = now_ms

    def times(self, now_ms: int) -> FirstTokenTimes:
        """Its first token is drawn."""
        began_ms = now_ms if self.began_ms is None else self.began_ms
        return FirstTokenTimes(
            queue_ms=float(began_ms - self.received_ms),
            prefill_ms=float(now_ms - began_ms),
            heard_s=self.heard_s,
        )
