"""What both APIs share: requests checked and submitted, their tokens turned into text, stops, ends and measures."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from router.detokenizer import StopStrings, text_stream
from router.events import NewRequest, Usage
from router.metrics import Api, EdgeMetrics
from router.tokenizer import Tokenizer
from router.validation import (
    ANSWER_MARK,
    Limits,
    SamplingFields,
    check_num_choices,
    check_priority,
    check_prompt,
    check_request_id,
    check_sampling,
    check_stops,
    show,
)
from tandem.errors import DuplicateRequest, InvalidRequest, Overloaded, RequestLost, TandemError, UnknownModel
from tandem.request import FinishReason, RequestId, Sampling, Token

_ENCODE_HERE_CHARACTERS = 16_384  # about a millisecond
_ENCODING_MAX = 64  # long texts on threads, or waiting for one
_MERGE_QUEUE_MAX = 256  # pieces of all answers of one request that wait for its client


class TokenStream(Protocol):
    """What the edge needs of router.driver.RequestStream: tokens in order, ended by the one with `finish`.

    Raises TandemError when the request fails.
    """

    usage: Usage | None

    async def __anext__(self) -> tuple[Token, ...]:
        """The tokens that came since the last call."""
        ...


class Driver(Protocol):
    """What the edge needs of router.driver.Driver."""

    def submit(self, request: NewRequest) -> TokenStream:
        """Starts a request. Raises the TandemError that it is refused with."""
        ...

    def cancel(self, request_id: RequestId, reason: str) -> bool:
        """Ends a request everywhere; False when it is not known."""
        ...

    def stop_at(self, request_id: RequestId, index: int) -> None:
        """The answer ends at token `index`, which is kept: a stop string was found."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What /v1/models and ListModels say."""

    id: str
    context_tokens: int
    created_s: int
    dtype: str = ""
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a client, of the right types and not yet checked. An empty `request_id`: make one."""

    api: Api
    request_id: str
    prompts: Sequence[Sequence[int]]
    fields: SamplingFields
    n: int = 1
    priority: int = 0
    names: Mapping[str, str] = field(default_factory=dict)  # our field -> what the client calls it


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
    """The answer to one prompt, piece by piece. Iterate to the end, or `close` it."""

    def __init__(self, service: Service, api: Api, request: NewRequest, stops: tuple[str, ...], named: frozenset[int]):
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
        self._started_s = self._last_s = service.clock()
        self._stream = service.driver.submit(request)
        service.metrics.admitted(self.num_prompt_tokens)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Piece:
        """The next piece; StopAsyncIteration after the one with `finish`. Raises TandemError when the request fails."""
        if self.done:
            raise StopAsyncIteration
        try:
            batch = await self._stream.__anext__()
        except StopAsyncIteration:
            error = RequestLost("the answer's stream ended without a finish")
            self._end(error.code)
            raise error from None
        except TandemError as error:
            self._end(error.code)
            raise
        self._measure(len(batch))
        piece = self._take(batch)
        if piece.finish is not None:
            self._end(piece.finish.value)
        return piece

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, found in a prefix cache; 0 until the answer has ended."""
        usage = self._stream.usage
        return 0 if usage is None else usage.cached_tokens

    def close(self, reason: str) -> None:
        """Cancels the request everywhere unless it has ended."""
        if not self.done:
            self._service.driver.cancel(self.request_id, reason)
            self._end("cancelled")

    def _end(self, outcome: str) -> None:
        self.done = True
        self._service.metrics.ended(self._api, outcome, self._service.clock() - self._started_s)

    def _measure(self, num_tokens: int) -> None:
        now_s = self._service.clock()
        if self.num_tokens == 0:
            self._service.metrics.first_tokens(num_tokens, now_s - self._started_s)
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
    """All answers of one client's request: `n` for each prompt, in order. `close` it in every case."""

    def __init__(self, service: Service, request_id: RequestId, num_prompts: int) -> None:
        self.request_id = request_id
        self.num_prompts = num_prompts
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
        """Cancels what has not ended and lets the id go."""
        for answer in self.answers:
            answer.close(reason)
        self._service.forget(self.request_id)

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


class Service:
    """The edge's one door to the driver. All calls are from the event loop that the driver runs on.

    `not_ready` says why requests cannot be served now; empty when they can.
    """

    def __init__(
        self,
        *,
        driver: Driver,
        tokenizer: Tokenizer,
        model: ServedModel,
        metrics: EdgeMetrics,
        not_ready: Callable[[], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.driver = driver
        self.tokenizer = tokenizer
        self.model = model
        self.metrics = metrics
        self.not_ready = not_ready
        self.clock = clock
        self.limits = Limits(
            vocab_size=tokenizer.vocab_size,
            context_tokens=model.context_tokens,
            eos_token_ids=tokenizer.eos_token_ids,
        )
        self._in_flight: dict[RequestId, Answers] = {}
        self._encoding = 0

    def check_model(self, name: str) -> None:
        """Raises UnknownModel unless `name` is the model served; empty is taken for it."""
        if name not in ("", self.model.id):
            raise UnknownModel("model", f"{show(name)} is not served here; this is {self.model.id!r}")

    async def encode(self, text: str, name: str = "prompt") -> tuple[int, ...]:
        """The ids of `text`; long texts are tokenized on a thread, so that nobody's tokens wait for them.

        Raises InvalidRequest, naming `name`, when the text is longer than any prompt can be.
        """
        return await self._encode(text, name, add_special_tokens=True)

    async def encode_chat(self, turns: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The ids of the prompt that the chat template makes of `turns`. Raises InvalidRequest as `encode` does."""
        return await self._encode(self.tokenizer.render_chat(turns), "messages", add_special_tokens=False)

    async def _encode(self, text: str, name: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(name, f"has a lone surrogate at character {error.start}, which no text has") from None
        most = self.tokenizer.characters_max(self.limits.context_tokens)
        if most and len(text) > most:
            raise InvalidRequest(
                name,
                f"has {len(text)} characters, more than the {self.limits.context_tokens} tokens of the model's context "
                f"can spell ({most})",
            )
        if len(text) <= _ENCODE_HERE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if self._encoding >= _ENCODING_MAX:
            raise Overloaded(f"{_ENCODING_MAX} long prompts are being tokenized", retry_after_ms=1000)
        self._encoding += 1
        try:
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        finally:
            self._encoding -= 1

    def open(self, ask: Ask) -> Answers:
        """Checks and submits all answers that `ask` asks for.

        With more than one answer, each is a request of its own: id#0, id#1, ...

        Raises:
            TandemError: nothing runs then. InvalidRequest, DuplicateRequest, Overloaded, Unavailable.
        """
        stops = check_stops(ask.fields.stop)
        check_num_choices(ask.n, len(ask.prompts))
        check_priority(ask.priority)
        request_id = check_request_id(ask.request_id) if ask.request_id else new_request_id(ask.api)
        if request_id in self._in_flight:
            raise DuplicateRequest(f"request_id: {request_id!r} is in flight")
        requests = self._requests(ask, request_id)
        group = Answers(self, request_id, len(ask.prompts))
        named = frozenset(ask.fields.stop_token_ids)
        self._in_flight[request_id] = group
        try:
            for request in requests:
                group.answers.append(Answer(self, ask.api, request, stops, named))
        except BaseException:
            group.close("another answer of the same request was refused")
            raise
        return group

    def cancel(self, request_id: str, reason: str) -> bool:
        """Ends a request and all its answers; False when it is not known."""
        group = self._in_flight.get(RequestId(request_id))
        if group is None:
            return self.driver.cancel(RequestId(request_id), reason)
        found = [self.driver.cancel(answer.request_id, reason) for answer in group.answers if not answer.done]
        return any(found)

    def forget(self, request_id: RequestId) -> None:
        """The id of a request whose client has its answer, or is gone, may be used again."""
        self._in_flight.pop(request_id, None)

    def _requests(self, ask: Ask, request_id: RequestId) -> list[NewRequest]:
        many = ask.n * len(ask.prompts) > 1
        requests = []
        for number, prompt in enumerate(ask.prompts):
            name = "prompt" if len(ask.prompts) == 1 else f"prompt.{number}"
            tokens = check_prompt(prompt, self.limits, ask.names.get("prompt", name))
            for choice in range(ask.n):
                own_id = f"{request_id}{ANSWER_MARK}{number * ask.n + choice}" if many else request_id
                sampling = check_sampling(
                    ask.fields,
                    limits=self.limits,
                    num_prompt_tokens=len(tokens),
                    request_id=own_id,
                    choice=choice,
                    names=ask.names,
                )
                request = NewRequest(
                    request_id=RequestId(own_id),
                    tokens=tokens,
                    sampling=sampling,
                    priority=ask.priority,
                    model=self.model.id,
                )
                requests.append(request)
        return requests


def new_request_id(api: Api) -> RequestId:
    """A fresh id that tells where the request came in."""
    prefix = {Api.CHAT: "chatcmpl", Api.COMPLETIONS: "cmpl", Api.GRPC: "req"}[api]
    return RequestId(f"{prefix}-{uuid.uuid4().hex}")
