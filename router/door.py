"""The door of a router: who comes in with which key, and how much of each key's allowance is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from router.api_keys import ANYBODY, Caller, KeyRing, bearer
from router.key_limits import KeyLimits
from tandem.errors import DuplicateRequest, PermissionDenied, RateLimited, Unauthenticated
from tandem.request import RequestId


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
        self._inside: dict[RequestId, Caller] = {}  # who asked each request that runs

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

    def check_operator(self, caller: Caller) -> None:
        """The same for who has come in already, now or a while ago. Raises Unauthenticated, PermissionDenied."""
        ring = self.ring
        if ring is None:
            return
        if caller.entry is None:
            raise Unauthenticated("authorization: is missing; this cluster asks for API keys")
        objection = ring.objection(caller, self._clock())
        if objection is not None:
            raise Unauthenticated(f"authorization: the API key {caller.name!r} {objection}")
        if not ring.entries[caller.name].operator:
            raise PermissionDenied(f"authorization: key {caller.name!r} is no operator's")

    def check_priority(self, caller: Caller, priority: int) -> None:
        """Raises PermissionDenied when the caller's key may not ask for this."""
        most = None if caller.entry is None else caller.entry.priority_max
        if most is not None and priority > most:
            raise PermissionDenied(f"priority: is {priority}, key {caller.name!r} may ask for {most} at most")

    def begin(self, caller: Caller, request_ids: Sequence[RequestId], *, num_tokens: int) -> None:
        """Counts requests that are about to run, all or none; `ended` must follow for each. Raises RateLimited.

        Raises Unauthenticated for a caller who did not come in by this door: a way around it would stay unnoticed; and
        DuplicateRequest for an id that runs, also when its client is gone: its account must not become another one's.
        """
        if self.ring is None:
            return
        if caller.entry is None:
            raise Unauthenticated("authorization: is missing; this cluster asks for API keys")
        for request_id in request_ids:
            if request_id in self._inside:
                raise DuplicateRequest(f"a request of id {request_id!r} is being served")
        limited = self._limits.begin(self._now_ms(), caller.entry, num_requests=len(request_ids), num_tokens=num_tokens)
        if limited is not None:
            raise RateLimited(f"{limited.limit}: {limited.reason}", retry_after_ms=limited.retry_after_ms)
        self._inside.update(dict.fromkeys(request_ids, caller))

    def give_up(self, caller: Caller, request_ids: Sequence[RequestId], *, num_tokens: int) -> None:
        """Requests that were begun do not come to run: their prompts cost nothing."""
        for request_id in request_ids:
            self.ended(request_id)
        if caller.entry is not None:
            self._limits.give_back(caller.entry, num_tokens)

    def adopt(self, owner: str, request_id: RequestId) -> None:
        """Counts a request that another router let in and that goes on here, whatever its owner's limits."""
        entry = None if self.ring is None else self.ring.entries.get(owner)
        if entry is not None:
            self._limits.adopt(entry)
            self._inside[request_id] = Caller(entry=entry)

    def produced(self, request_id: RequestId, num_tokens: int) -> None:
        """Tokens of an answer came, whether or not anybody reads them."""
        caller = self._inside.get(request_id)
        if caller is not None and caller.entry is not None:
            self._limits.produced(caller.entry, num_tokens)

    def ended(self, request_id: RequestId) -> None:
        """The request runs no more. Idempotent."""
        caller = self._inside.pop(request_id, None)
        if caller is not None and caller.entry is not None:
            self._limits.ended(caller.entry, 1)

    def unwelcome(self) -> list[tuple[RequestId, str]]:
        """Requests that must end, and why: their keys were revoked or have expired since they were let in."""
        ring, now_s = self.ring, self._clock()
        if ring is None:
            return []
        found = []
        for request_id, caller in self._inside.items():
            reason = ring.objection(caller, now_s)
            if reason is not None:
                found.append((request_id, f"the API key {caller.name!r} {reason}"))
        return found
