"""How a client goes on when its stream breaks: what to call next, from which token on, when, and when to give up."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import RequestLost, Stopping, StoreAway, TandemError, Unavailable, UnknownRequest

FIRST_PAUSE_S = 0.05
PAUSE_S_MAX = 1.0
UNKNOWN_S = 5.0  # a store that was away may know nothing yet of a request that runs


@dataclass(frozen=True, slots=True)
class Begin:
    """Send the request (again): the same idempotency key makes it the same request."""


@dataclass(frozen=True, slots=True)
class Attach:
    """Ask for the stream from this token on."""

    from_index: int


@dataclass(slots=True, kw_only=True)
class Resuming:
    """One stream over all its calls. Times are seconds of one steady clock.

    A break is answered for `resume_s`, until a message comes; 0: it is the stream's end. A request may wait in a queue
    for as long as it likes before its first token: that is no break.
    """

    resume_s: float
    num_tokens: int = 0
    finished: bool = False
    broken: TandemError | None = None  # why the stream first broke since it was heard last
    broken_s: float = 0.0  # and when
    unknown_s: float | None = None  # since when no router knows it
    pause_s: float = FIRST_PAUSE_S

    def next_call(self) -> Begin | Attach:
        """What to call now."""
        return Attach(self.num_tokens) if self.num_tokens else Begin()

    def heard(self, index: int, num_tokens: int, *, finished: bool) -> bool:
        """A message came, with tokens from `index` on. Whether it says anything new."""
        if index + num_tokens < self.num_tokens or (index < self.num_tokens and num_tokens):
            return False
        self.num_tokens = max(self.num_tokens, index + num_tokens)
        self.broken, self.unknown_s, self.pause_s = None, None, FIRST_PAUSE_S
        self.finished = self.finished or finished
        return True

    def failed(self, now_s: float, error: TandemError, *, said: bool) -> float:
        """The call ended with an error: the seconds to wait before the next one. Raises what the stream ends with.

        `said`: a router said so; otherwise the connection broke.
        """
        if not self.resume_s:
            raise error
        unknown = isinstance(error, UnknownRequest)
        passing = isinstance(error, Stopping | StoreAway) or (isinstance(error, Unavailable) and not said)
        if not passing and not unknown:
            raise error
        if unknown:
            self.unknown_s = now_s if self.unknown_s is None else self.unknown_s
            if now_s - self.unknown_s + self.pause_s > UNKNOWN_S:
                raise self._lost(error)
        if self.broken is None:
            self.broken, self.broken_s = error, now_s
        if now_s - self.broken_s + self.pause_s > self.resume_s:
            raise self.broken
        pause_s, self.pause_s = self.pause_s, min(2 * self.pause_s, PAUSE_S_MAX)
        return pause_s

    def _lost(self, error: TandemError) -> TandemError:
        """What a stream ends with that nobody knows any more."""
        if not self.num_tokens:
            return error
        why = f": {self.broken.message}" if self.broken is not None and self.broken is not error else ""
        return RequestLost(f"the stream broke after {self.num_tokens} tokens, and no router can resume it{why}")
