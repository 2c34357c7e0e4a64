"""The answer of one request on its way from the driver to its reader."""

from __future__ import annotations

import asyncio

from router.events import Usage
from router.transcripts import Kept
from tandem.errors import TandemError, error_of
from tandem.request import RequestId, Token


class RequestStream:
    """The answer of one request: an async iterator of batches of tokens, in order, each index once.

    Ends after the batch whose last token has `finish` (or after stop_at); raises TandemError when the request fails.
    `usage` is there once it has ended well. For one reader.
    """

    def __init__(self, request_id: RequestId) -> None:
        self.request_id = request_id
        self.usage: Usage | None = None
        self.num_replayed = 0  # tokens of before this reader came
        self.sure = True  # that no other router had the request when this reader came
        self._buffer: list[Token] = []
        self._ended = False
        self._error: TandemError | None = None
        self._wake = asyncio.Event()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> tuple[Token, ...]:
        # The wait is bounded by the request's deadline, which the core keeps.
        while not self._buffer and not self._ended:
            self._wake.clear()
            await self._wake.wait()
        if self._buffer:
            batch, self._buffer = tuple(self._buffer), []
            return batch
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    @property
    def num_buffered(self) -> int:
        """Tokens that the reader has not taken yet."""
        return len(self._buffer)

    @property
    def ended(self) -> bool:
        """Whether nothing will be added any more."""
        return self._ended

    @property
    def error(self) -> TandemError | None:
        """What the request failed with, when it has."""
        return self._error

    def push(self, tokens: tuple[Token, ...]) -> None:
        """More tokens came."""
        self._buffer.extend(tokens)
        self._wake.set()

    def replay(self, tokens: tuple[Token, ...]) -> None:
        """Tokens of before this reader came."""
        self.num_replayed = len(tokens)
        self.push(tokens)

    def end(self, usage: Usage | None, error: TandemError | None) -> None:
        """Nothing more will come. The first call counts."""
        if not self._ended:
            self._ended, self.usage, self._error = True, usage, error
            self._wake.set()


def replay_of(kept: Kept) -> RequestStream:
    """The stream of what is known of an answer; over, if that has ended."""
    stream = RequestStream(kept.new.request_id)
    stream.replay(kept.tokens)
    if kept.ended is not None:
        error = error_of(kept.ended.code, kept.ended.message) if kept.ended.code else None
        stream.end(kept.ended.usage, error)
    return stream
