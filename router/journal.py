"""One router's side of the store that routers share: requests claimed and taken over there, and written behind.

A shell: what is to be written, and whose a request is, router/transcripts.py and the store's fences say. A store that
does not answer stops nothing that runs: requests go on, and what it lacks is written when it is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from router.events import NewRequest
from router.transcripts import Behind, Keep, Kept, Seen, Transcripts, Verdict, Write
from tandem.errors import DuplicateRequest, StoreAway
from tandem.request import RequestId

log = logging.getLogger(__name__)

PERIOD_S = 0.02
LEASE_S = 1.0  # between two renewals; the lease is three times as long
BACKOFF_S = 0.5
HAND_OVER_S = 2.0
TAKES_MAX = 3


class StoreDown(RuntimeError):
    """The store does not answer; the message says how."""


class RequestStore(Protocol):
    """Transcripts that all routers of a cluster see. Every call is bounded in time; it raises StoreDown."""

    async def claim(self, write: Write, key: str) -> Kept | RequestId | None:
        """Writes a request that begins, unless its key or its id is known.

        None: it is this router's. A Kept: the request that came with this key. An id: it is being served elsewhere.
        """
        ...

    async def look(self, request_id: RequestId) -> Seen | None:
        """What was asked under this id; None when it is not known. Changes nothing."""
        ...

    async def take_over(self, request_id: RequestId, fence: int, mark: bytes = b"") -> Kept | None:
        """The request, for this router to go on with under a fence above all before, and at least `fence`; unless it
        has ended, or is this router's already. None when it is not known, or not the one of this mark any more."""
        ...

    async def write(self, writes: Sequence[Write]) -> list[Verdict | Behind]:
        """Writes what is lacking, and says of each what came of it."""
        ...

    async def renew(self) -> bool:
        """Renews this router's lease. False: the store did not have it, and so may lack anything."""
        ...


class Requests(Protocol):
    """What the journal needs of router.driver.Driver."""

    transcripts: Transcripts

    def next_fence(self) -> int:
        """A fence for a request that begins here."""
        ...

    def withdraw(self, new: NewRequest, keep: Keep, fence: int) -> None:
        """A request that was being claimed under this fence does not begin."""
        ...

    def renew(self, write: Write, above: int) -> None:
        """The request that this write is of goes on here under a fence above this one."""
        ...

    def let_go(self, request_id: RequestId, *, began_apart: bool) -> None:
        """Another router has the request; `began_apart`: it had it before it could be known here."""
        ...


class Journal:
    """All calls are from the driver's event loop. What is delivered is written every `period_s` seconds.

    `problem` says why the store is not used; empty when all is well."""

    def __init__(self, driver: Requests, store: RequestStore, *, period_s: float = PERIOD_S) -> None:
        self.problem = ""
        self._since_s = 0.0  # when the problem began
        self._period_s = period_s
        self._driver = driver
        self._store = store
        self._claiming: set[RequestId] = set()

    @property
    def away_s(self) -> float:
        """For how long the store has not answered; 0 while it does."""
        return asyncio.get_running_loop().time() - self._since_s if self.problem else 0.0

    async def claim(self, new: NewRequest, keep: Keep) -> int | Kept | None:
        """Claims the request for this router: its fence; None when the store is away; or who came with the key before.

        Raises DuplicateRequest when the id is being served at another router.
        """
        fence = self._driver.next_fence()
        write = Write(request_id=new.request_id, fence=fence, entry=(new, keep), from_index=0, tokens=(), ended=None)
        self._claiming.add(new.request_id)
        try:
            known = await self._store.claim(write, keep.key)
        except StoreDown as error:
            self._is_down(error)
            return None  # better served twice than not at all
        except asyncio.CancelledError:
            self._driver.withdraw(new, keep, fence)
            raise
        finally:
            self._claiming.discard(new.request_id)
        if isinstance(known, str):
            raise DuplicateRequest(f"a request of id {known!r} is being served")
        return fence if known is None else known

    async def look(self, request_id: RequestId) -> Seen | None:
        """What was asked under this id; None when nobody knows it. Raises StoreAway."""
        try:
            return await self._store.look(request_id)
        except StoreDown as error:
            self._is_down(error)
            raise StoreAway(f"the shared store does not answer, try again: {error}") from None

    async def take_over(self, seen: Seen) -> Kept | None:
        """The request that was seen, to go on with it here; None when nobody knows it any more. Raises StoreAway.

        One that the store calls this router's, and that is not here, has most likely ended here while the store was
        answering. It is asked again, since the answer is older than that end; a fence is never begun with twice.
        """
        request_id = seen.new.request_id
        for _ in range(TAKES_MAX):
            fence = self._driver.next_fence()
            try:
                kept = await self._store.take_over(request_id, fence, seen.mark)
            except StoreDown as error:
                self._is_down(error)
                raise StoreAway(f"the shared store does not answer, try again: {error}") from None
            was_ours = kept is not None and kept.ended is None and kept.fence < fence
            if kept is None or not was_ours or self._driver.transcripts.find(request_id) is not None:
                return kept
            await asyncio.sleep(self._period_s)
        assert kept is not None
        return replace(kept, fence=fence)  # its end was never written, and is forgotten here

    async def run(self) -> None:
        """Writes and renews, for ever."""
        loop = asyncio.get_running_loop()
        renew_s = loop.time()
        while True:
            try:
                if loop.time() >= renew_s:
                    renew_s = loop.time() + LEASE_S
                    if not await self._store.renew():
                        self._driver.transcripts.lost()
                await self.flush()
            except StoreDown as error:
                self._is_down(error)
                renew_s = loop.time()
                await asyncio.sleep(BACKOFF_S)
                continue
            if self.problem:
                log.warning("the shared store answers again")
                self.problem = ""
            await asyncio.sleep(self._period_s)

    async def flush(self) -> None:
        """Writes what the store lacks, once. Raises StoreDown."""
        transcripts = self._driver.transcripts
        writes = transcripts.pending()
        if not writes:
            return
        for write, verdict in zip(writes, await self._store.write(writes), strict=True):
            if isinstance(verdict, Behind):
                if write.request_id not in self._claiming:  # else it is over: a new life of the id is about to begin
                    log.warning("request=%s goes on under a fence above %d", write.request_id, verdict.fence)
                    self._driver.renew(write, verdict.fence)
            elif not transcripts.answered(write, verdict):
                log.warning("request=%s another router has it", write.request_id)
                self._driver.let_go(write.request_id, began_apart=write.entry is not None)

    async def hand_over(self) -> None:
        """Writes all that the store lacks, for whoever comes after; what cannot be in time is computed again there.

        A write that was under way when `run` ended may have arrived or not: what followed it is then written anew.
        """
        with suppress(StoreDown, TimeoutError):
            async with asyncio.timeout(HAND_OVER_S):
                while self._driver.transcripts.pending():
                    await self.flush()

    def _is_down(self, error: StoreDown) -> None:
        if not self.problem:
            log.warning("the shared store does not answer, requests go on without it: %s", error)
            self._since_s = asyncio.get_running_loop().time()
        self.problem = str(error)
