"""A driver for tests of the edge: it answers with the tokens of a script, under the rules of router/driver.py.

Tokens wait for `gate` where a test sets one, so that a request can be held in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from router.answer import TokenStream
from router.events import NewRequest, Usage
from router.flight import Flight
from router.stages import FirstToken, StageBook
from router.transcripts import Keep, Kept, Transcripts
from tandem.errors import Cancelled, DuplicateRequest, TandemError, UnknownRequest
from tandem.request import FinishReason, RequestId, Token

Script = Callable[[NewRequest], list[int]]


@dataclass
class Running:
    """One request and what became of it."""

    request: NewRequest
    cancelled: str = ""
    stopped_at: int | None = None
    delivered: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedStream:
    """As router.driver.RequestStream."""

    def __init__(self, batches: AsyncIterator[tuple[Token, ...]], running: Running) -> None:
        self.request_id = running.request.request_id
        self.usage: Usage | None = None
        self._batches = batches
        self._running = running

    async def __anext__(self) -> tuple[Token, ...]:
        batch = await anext(self._batches)
        if batch[-1].finish is not None:
            num_prompt = len(self._running.request.tokens)
            self.usage = Usage(
                prompt_tokens=num_prompt, completion_tokens=self._running.delivered, cached_tokens=num_prompt // 2
            )
        return batch


class ScriptedDriver:
    """Gives `script(request)` as the answer: to max_tokens, or to the first stop token."""

    def __init__(self, script: Script, *, batch: int = 1) -> None:
        self.transcripts = Transcripts(shared=False)
        self._stages = StageBook(1000)
        self.script = script
        self.batch = batch
        self.requests: dict[str, Running] = {}
        self.refuse_with: TandemError | None = None
        self.fail_with: Exception | None = None
        self.fail_after = 0
        self.hold_after: int | None = None  # deliver so many tokens, then wait to be cancelled

    def submit(
        self,
        request: NewRequest,
        keep: Keep | None = None,
        *,
        fence: int | None = None,
        arrived_s: float | None = None,
    ) -> ScriptedStream:
        """As router.driver.Driver.submit."""
        if self.refuse_with is not None:
            raise self.refuse_with
        known = self.requests.get(request.request_id)
        if known is not None and not known.cancelled and known.stopped_at is None:
            raise DuplicateRequest(f"request_id: {request.request_id!r} is known")
        running = self.requests[request.request_id] = Running(request)
        now_s = time.monotonic()
        self._stages.submitted(request.request_id, arrived_s=now_s if arrived_s is None else arrived_s, at_s=now_s)
        return ScriptedStream(self._stream(running), running)

    def take_over(self, kept: Kept) -> ScriptedStream:
        """As router.driver.Driver.take_over; a script has nothing to go on from."""
        raise UnknownRequest(kept.new.request_id)

    def read_again(self, request_id: RequestId, *, sure: bool = True) -> ScriptedStream:
        """As router.driver.Driver.read_again; a script keeps nothing."""
        raise UnknownRequest(request_id)

    def leave(self, stream: TokenStream, reason: str) -> None:
        """As router.driver.Driver.leave."""
        self.cancel(stream.request_id, reason)

    def written(self, request_id: RequestId) -> FirstToken | None:
        """As router.driver.Driver.written."""
        return self._stages.written(request_id, time.monotonic())

    def flight(self, request_id: RequestId) -> Flight | None:
        """As router.driver.Driver.flight; a script remembers nothing."""
        return None

    def cancel(self, request_id: RequestId, reason: str) -> bool:
        """As router.driver.Driver.cancel."""
        running = self.requests.get(request_id)
        if running is None or running.cancelled:
            return False
        running.cancelled = reason
        running.wake.set()
        return True

    def stop_at(self, request_id: RequestId, index: int) -> None:
        """As router.driver.Driver.stop_at."""
        self.requests[request_id].stopped_at = index

    async def _stream(self, running: Running) -> AsyncIterator[tuple[Token, ...]]:
        tokens = self._tokens(running.request)
        while running.delivered < len(tokens):
            if self.fail_with is not None and running.delivered >= self.fail_after:
                raise self.fail_with
            if self.hold_after is not None and running.delivered >= self.hold_after:
                await running.wake.wait()
            await asyncio.sleep(0)
            if running.cancelled:
                raise Cancelled(running.cancelled)
            batch = tuple(tokens[running.delivered : running.delivered + self.batch])
            running.delivered += len(batch)
            self._stages.came(running.request.request_id, time.monotonic())
            yield batch

    def _tokens(self, request: NewRequest) -> list[Token]:
        sampling = request.sampling
        ids = self.script(request)[: sampling.max_tokens]
        tokens = []
        for index, token_id in enumerate(ids):
            finish = None
            if token_id in sampling.stop_token_ids and index >= sampling.min_tokens:
                finish = FinishReason.STOP
            elif index + 1 == len(ids):
                finish = FinishReason.LENGTH
            asked = sampling.logprobs
            tokens.append(
                Token(
                    request_id=request.request_id,
                    epoch=1,
                    index=index,
                    token_id=token_id,
                    logprob=None if asked is None else -0.5,
                    top=tuple((token_id + k, -0.5 - k) for k in range(asked or 0)),
                    finish=finish,
                )
            )
            if finish is not None:
                break
        return tokens
