"""The door of a router: who comes in with which key, and how much of each key's allowance is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from router.api_keys import ANYBODY, Caller, KeyRing, bearer
from router.key_limits import KeyLimits
from tandem.errors import PermissionDenied, RateLimited, Unauthenticated


class Door:
    """Without a ring of keys it is open. Limits are kept by this router alone; each further router grants them anew.

    `clock` gives Unix time, by which keys expire; `now_ms` a time that only goes forward, by which buckets fill.
    """

    def __init__(
        self,
        ring: KeyRing | None = None,
        *,
        clock: Callable[[], float] = time.time,
        now_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    ) -> None:
        self.ring = ring
        self._clock = clock
        self._now_ms = now_ms
        self._limits = KeyLimits()

    def enter(self, authorization: Sequence[str]) -> Caller:
        """Who shows these `authorization` headers. Raises Unauthenticated."""
        if self.ring is None:
            return ANYBODY
        return self.ring.caller(bearer(authorization), self._clock())

    def enter_operator(self, authorization: Sequence[str]) -> Caller:
        """The same for what is for operators alone. Raises Unauthenticated, PermissionDenied."""
        caller = self.enter(authorization)
        if not caller.is_operator:
            raise PermissionDenied(f"authorization: key {caller.name!r} is no operator's")
        return caller

    def begin(self, caller: Caller, *, num_requests: int, num_tokens: int) -> None:
        """Counts requests that are about to run; `end` must follow. Raises RateLimited.

        Raises Unauthenticated for a caller who did not come in by this door: a way around it would stay unnoticed.
        """
        if self.ring is None:
            return
        if caller.entry is None:
            raise Unauthenticated("authorization: is missing; this cluster asks for API keys")
        limited = self._limits.begin(self._now_ms(), caller.entry, num_requests=num_requests, num_tokens=num_tokens)
        if limited is not None:
            raise RateLimited(f"{limited.limit}: {limited.reason}", retry_after_ms=limited.retry_after_ms)

    def produced(self, caller: Caller, num_tokens: int) -> None:
        """Tokens of an answer went out."""
        if caller.entry is not None:
            self._limits.produced(caller.entry, num_tokens)

    def end(self, caller: Caller, num_requests: int) -> None:
        """What `begin` counted runs no more."""
        if caller.entry is not None:
            self._limits.ended(caller.entry, num_requests)

    def objection(self, caller: Caller) -> str | None:
        """Why somebody who is inside must leave, or None: the key was revoked or has expired since."""
        if self.ring is None:
            return None
        reason = self.ring.objection(caller, self._clock())
        return None if reason is None else f"the API key {caller.name!r} {reason}"
