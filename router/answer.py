"""An answer on its way to a client: tokens turned into text, stops found, ends measured; replayed where resumed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from router.detokenizer import StopStrings, text_stream
from router.events import NewRequest, Usage
from router.metrics import Api
from router.trace_context import TRACE
from tandem.errors import Cancelled, RequestLost, TandemError
from tandem.request import FinishReason, RequestId, Sampling, Token

if TYPE_CHECKING:
    from router.service import Service

_WHOLE = frozenset(reason.value for reason in FinishReason)
_MERGE_QUEUE_MAX = 256  # pieces of all answers of one request that wait for its client


class TokenStream(Protocol):
    """What the edge needs of router.driver.RequestStream: tokens in order, ended by the one with `finish`.

    Raises TandemError when the request fails.
    """

    request_id: RequestId
    usage: Usage | None

    async def __anext__(self) -> tuple[Token, ...]:
        """The tokens that came since the last call."""
        ...


@dataclass(slots=True, kw_only=True)
class Piece:
    """What one batch of tokens added to an answer.

    `text` may lag behind the tokens while a character or a stop string is incomplete. `offsets` has, for each token,
    the length of the answer's text before it; only when logprobs were asked for. `stop_reason` is the stop string or
    the stop token id that ended the answer, when one did that the client named.
    """

    index: int
    text: str
    tokens: tuple[Token, ...]
    offsets: tuple[int, ...] = ()
    finish: FinishReason | None = None
    stop_reason: str | int | None = None


class Answer:
    """The answer to one prompt, piece by piece. Iterate to the end, or `close` it.

    `skip`: the client has so many tokens already: they are read again, for the text after them depends on them, and not
    given again.
    """

    def __init__(
        self,
        service: Service,
        api: Api,
        request: NewRequest,
        stream: TokenStream,
        *,
        stops: tuple[str, ...],
        named: frozenset[int],
        skip: int = 0,
    ) -> None:
        self.request_id = request.request_id
        self.num_prompt_tokens = len(request.tokens)
        self.num_tokens = 0
        self.done = False
        self._service = service
        self._api = api
        self._sampling: Sampling = request.sampling
        self._named_stop_ids = named
        self._text = text_stream(service.tokenizer, request.tokens)
        self._stops = StopStrings(stops) if stops else None
        self._text_length = 0
        self._skip = skip
        self._started_s = self._first_s = self._last_s = service.clock()
        self._ttft_s: float | None = None  # since it came to the edge
        self._slo = request.slo
        self._trace = TRACE.get()
        self._stream = stream
        self._unwritten = False  # the first token was given to who writes it, and is not known to be written

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Piece:
        """The next piece; StopAsyncIteration after the one with `finish`. Raises TandemError when the request fails."""
        self._written()
        if self.done:
            raise StopAsyncIteration
        piece: Piece | None = None
        while piece is None:
            try:
                batch = await self._stream.__anext__()
            except StopAsyncIteration:
                error = RequestLost("the answer's stream ended without a finish")
                self._end(error.code)
                raise error from None
            except TandemError as error:
                self._end(error.code)
                raise
            known = batch[: max(0, self._skip - self.num_tokens)]
            piece = self._take_again(known) if known else None
            if piece is None and len(known) < len(batch):
                fresh = batch[len(known) :]
                self._measure(len(fresh))
                piece = self._take(fresh)
        if piece.finish is not None:
            self._end(piece.finish.value)
        return piece

    def _take_again(self, known: tuple[Token, ...]) -> Piece | None:
        """Follows tokens that the client has; a piece only where they end the answer."""
        piece = self._take(known)
        if piece.finish is None:
            return None
        return replace(piece, index=self.num_tokens, text="", tokens=(), offsets=())

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, found in a prefix cache; 0 until the answer has ended."""
        usage = self._stream.usage
        return 0 if usage is None else usage.cached_tokens

    def close(self, reason: str) -> None:
        """Its reader is gone: the request is cancelled everywhere, unless it has ended or may be resumed."""
        self._written()
        if not self.done:
            self._service.driver.leave(self._stream, reason)
            self._end("cancelled")

    def _end(self, outcome: str) -> None:
        self.done = True
        metrics = self._service.metrics
        metrics.ended(self._api, outcome, self._service.clock() - self._started_s)
        num_gaps = self.num_tokens - 1
        tpot_s = None if self._skip or num_gaps < 1 else (self._last_s - self._first_s) / num_gaps
        whole = outcome in _WHOLE
        if whole:
            metrics.answered(
                num_prompt_tokens=self.num_prompt_tokens, num_cached_tokens=self.num_cached_tokens, tpot_s=tpot_s
            )
        if not self._skip and outcome != Cancelled.code:
            ttft_s = self._first_s - self._started_s if self._ttft_s is None else self._ttft_s
            metrics.judged(self._slo, ttft_s=ttft_s, tpot_s=tpot_s or 0.0, whole=whole)
        self._service.trace(self.request_id, self._trace)

    def _written(self) -> None:
        """Whoever asks for more, or for no more, has handed on what there was."""
        if self._unwritten:
            self._unwritten = False
            first = self._service.driver.written(self.request_id)
            if first is not None:
                self._ttft_s = first.ttft_ms / 1000
                self._service.metrics.first_token(first)

    def _measure(self, num_tokens: int) -> None:
        now_s = self._service.clock()
        if self.num_tokens == 0:
            self._unwritten = True
            self._first_s = now_s
            self._service.metrics.first_tokens(num_tokens)
        elif self.num_tokens == self._skip:
            self._service.metrics.resumed(num_tokens)
        else:
            self._service.metrics.next_tokens(num_tokens, now_s - self._last_s)
        self._last_s = now_s

    def _take(self, batch: tuple[Token, ...]) -> Piece:
        if self._stops is None and self._sampling.logprobs is None and len(batch) == 1:
            return self._take_plain(batch)
        index, parts, offsets = self.num_tokens, [], []
        for number, token in enumerate(batch):
            offsets.append(self._text_length)
            text = self._text_of(token)
            self._text_length += len(text)
            self.num_tokens += 1
            sent, stop = self._pass_stops(text, token)
            parts.append(sent)
            if stop is not None:
                if token.finish is None:
                    self._service.driver.stop_at(self.request_id, token.index)
                return Piece(
                    index=index, text="".join(parts), tokens=batch[: number + 1], offsets=tuple(offsets),
                    finish=FinishReason.STOP, stop_reason=stop,
                )  # fmt: skip
        last = batch[-1]
        return Piece(
            index=index, text="".join(parts), tokens=batch, offsets=tuple(offsets),
            finish=last.finish, stop_reason=self._stop_token(last),
        )  # fmt: skip

    def _take_plain(self, batch: tuple[Token, ...]) -> Piece:
        """The common case, short: one token, no stop strings, no logprobs."""
        token = batch[0]
        index = self.num_tokens
        self.num_tokens = index + 1
        if token.finish is None:
            return Piece(index=index, text=self._text.step(token.token_id), tokens=batch)
        return Piece(
            index=index,
            text=self._text_of(token),
            tokens=batch,
            finish=token.finish,
            stop_reason=self._stop_token(token),
        )

    def _text_of(self, token: Token) -> str:
        """The text that the token completes; the last token's includes what is left. A stop token has no text."""
        if token.finish is None:
            return self._text.step(token.token_id)
        own = "" if token.finish is FinishReason.STOP else self._text.step(token.token_id)
        return own + self._text.flush()

    def _pass_stops(self, text: str, token: Token) -> tuple[str, str | None]:
        if self._stops is None or self.num_tokens <= self._sampling.min_tokens:
            return text, None
        sent, stop = self._stops.feed(text)
        if stop is None and token.finish is not None:
            sent += self._stops.flush()
        return sent, stop

    def _stop_token(self, last: Token) -> int | None:
        named = last.finish is FinishReason.STOP and last.token_id in self._named_stop_ids
        return last.token_id if named else None


class Answers:
    """All answers of one client's request: `n` for each prompt, in order. `close` it in every case.

    `owner`: the name of the API key that asked. `form`: how the edge answers, where the request is kept for a client
    that comes back; else None. `skip`: so many tokens the client has.
    """

    def __init__(
        self,
        service: Service,
        request_id: RequestId,
        *,
        owner: str = "",
        num_prompts: int = 1,
        form: Mapping[str, object] | None = None,
        skip: int = 0,
    ) -> None:
        self.request_id = request_id
        self.owner = owner
        self.num_prompts = num_prompts
        self.form = form
        self.skip = skip
        self.answers: list[Answer] = []
        self._service = service

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        each = len(self.answers) // self.num_prompts
        return sum(answer.num_prompt_tokens for answer in self.answers[::each])

    @property
    def num_cached_tokens(self) -> int:
        """Of all prompts, as `num_prompt_tokens` counts them."""
        each = len(self.answers) // self.num_prompts
        return sum(answer.num_cached_tokens for answer in self.answers[::each])

    @property
    def num_tokens(self) -> int:
        """Of all answers so far."""
        return sum(answer.num_tokens for answer in self.answers)

    def close(self, reason: str) -> None:
        """Its client is gone, or has all of it: see Answer.close. The id may be used again."""
        for answer in self.answers:
            answer.close(reason)
        self._service.forget(self)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of all answers as they come, each with its answer's number. Raises the first error of any."""
        if len(self.answers) == 1:
            async for piece in self.answers[0]:
                yield 0, piece
            return
        queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue(_MERGE_QUEUE_MAX)
        tasks = [asyncio.create_task(_pump(number, answer, queue)) for number, answer in enumerate(self.answers)]
        try:
            left = len(tasks)
            while left:
                number, item = await queue.get()
                if item is None:
                    left -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield number, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(number: int, answer: Answer, queue: asyncio.Queue[tuple[int, Piece | Exception | None]]) -> None:
    try:
        async for piece in answer:
            await queue.put((number, piece))
        await queue.put((number, None))
    except Exception as error:  # of whatever kind: it is raised where the pieces are read, which would wait for ever
        await queue.put((number, error))
