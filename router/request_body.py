"""The bodies of HTTP requests while they are read: each within its bound, and all that are large within another."""

from __future__ import annotations

import asyncio
from collections import Counter

from fastapi import Request
from starlette.requests import ClientDisconnect

from router.api_keys import CALLER, KEY_SHARE
from router.validation import BODY_BYTES_MAX
from tandem.errors import Cancelled, InvalidRequest, Overloaded

DISCONNECTED = "the client disconnected"
_DROPPED_BYTES_MAX = 8 * BODY_BYTES_MAX
_BODY_TIMEOUT_S = 30.0
_SMALL_BYTES = 64 * 1024  # as many as connections may have: so much of each is there anyway
_ROOM_TIMEOUT_S = 5.0  # a client whose body is large waits so long unread, and is told to come again
LARGE_BYTES_MAX = 256 << 20


class BodyTooLarge(InvalidRequest):
    """The body is larger than any request needs to be."""

    http_status = 413


class BodyTooSlow(InvalidRequest):
    """The body did not come in time: its client may be half gone."""

    http_status = 408


class Bodies:
    """Large bodies are read while there is memory for all of them; who comes then is not read until there is.

    So a flood of huge prompts holds up huge prompts alone, and where there are API keys those of its own key: no key
    has more than a quarter of the memory. Used on one event loop.
    """

    def __init__(self, *, large_bytes_max: int = LARGE_BYTES_MAX) -> None:
        self._large_bytes_max = large_bytes_max
        self._large_bytes = 0
        self._large_bytes_of: Counter[str] = Counter()  # by API key
        self._freed = asyncio.Event()

    async def read(self, request: Request) -> bytes:
        """The body. Raises BodyTooLarge, BodyTooSlow, Overloaded, and Cancelled when the client leaves."""
        told = request.headers.get("content-length", "")
        length = int(told) if told.isascii() and told.isdigit() else BODY_BYTES_MAX
        kept = length if _SMALL_BYTES < length <= BODY_BYTES_MAX else 0  # what is too large is not kept
        owner = CALLER.get().name
        await self._reserve(kept, owner)
        try:
            return await _read(request)
        finally:
            self._add(-kept, owner)
            self._freed.set()

    async def _reserve(self, num_bytes: int, owner: str) -> None:
        try:
            async with asyncio.timeout(_ROOM_TIMEOUT_S):
                while num_bytes and self._lacks(num_bytes, owner):
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            limit = self._lacks(num_bytes, owner)
            raise Overloaded(f"body: {limit}", retry_after_ms=round(_ROOM_TIMEOUT_S * 1000)) from None
        self._add(num_bytes, owner)

    def _lacks(self, num_bytes: int, owner: str) -> str:
        """Why there is no room for so many more; empty when there is."""
        own, most, share = self._large_bytes_of[owner], self._large_bytes_max, self._large_bytes_max // KEY_SHARE
        if owner and own and own + num_bytes > share:
            return f"large bodies of {own} bytes are being read of this key, at most {share} may be"
        if self._large_bytes + num_bytes > most:
            return f"large bodies of {self._large_bytes} bytes are being read, at most {most} may be"
        return ""

    def _add(self, num_bytes: int, owner: str) -> None:
        self._large_bytes += num_bytes
        self._large_bytes_of[owner] += num_bytes
        if not self._large_bytes_of[owner]:
            del self._large_bytes_of[owner]


async def _read(request: Request) -> bytes:
    """The body, as long as it is within its bound.

    What is over the bound is read and dropped, up to another bound: a client that is still sending when the
    connection closes would see a reset and not the error.
    """
    parts, length = [], 0
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for part in request.stream():
                length += len(part)
                if length <= BODY_BYTES_MAX:
                    parts.append(part)
                elif length > _DROPPED_BYTES_MAX:
                    break
                else:
                    parts.clear()
    except TimeoutError:
        raise BodyTooSlow("body", f"has not come in full within {_BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise Cancelled(DISCONNECTED) from None  # nobody reads the reply, but the metrics count it
    if length > BODY_BYTES_MAX:
        raise BodyTooLarge("body", f"has {length} bytes or more, at most {BODY_BYTES_MAX}")
    return b"".join(parts)
