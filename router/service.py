"""What both APIs share: requests checked, submitted and resumed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from router.answer import Answer, Answers, TokenStream
from router.api_keys import ANYBODY, CALLER, KEY_SHARE, Caller
from router.door import Door
from router.events import NewRequest
from router.flight import Flight
from router.journal import Journal
from router.metrics import Api, EdgeMetrics
from router.request import ENDED
from router.stages import ARRIVED, FirstToken
from router.token_stream import replay_of
from router.tokenizer import Tokenizer
from router.trace_context import TraceContext
from router.transcripts import Keep, Kept, Transcripts
from router.validation import (
    ANSWER_MARK,
    Limits,
    SamplingFields,
    check_cache_salt,
    check_num_choices,
    check_priority,
    check_prompt,
    check_request_id,
    check_resuming,
    check_sampling,
    check_slo,
    check_stops,
    show,
)
from tandem.errors import (
    DuplicateRequest,
    InvalidRequest,
    Overloaded,
    RequestLost,
    StoreAway,
    UnknownModel,
    UnknownRequest,
    error_of,
)
from tandem.request import RequestId

_ENCODE_HERE_CHARACTERS = 16_384  # about a millisecond
# Until it is written that a key is free: 20 ms, if the store is there.
KEY_PAUSES_S = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
_ENCODING_MAX = 64  # long texts on threads, or waiting for one


class Driver(Protocol):
    """What the edge needs of router.driver.Driver."""

    transcripts: Transcripts

    def submit(
        self,
        request: NewRequest,
        keep: Keep | None = None,
        *,
        fence: int | None = None,
        arrived_s: float | None = None,
    ) -> TokenStream:
        """Starts a request that came at this time. Raises the TandemError that it is refused with."""
        ...

    def written(self, request_id: RequestId) -> FirstToken | None:
        """The request's first token was handed to its client; how long that took, the first time."""
        ...

    def take_over(self, kept: Kept) -> TokenStream:
        """Goes on with a request that another router had."""
        ...

    def read_again(self, request_id: RequestId, *, sure: bool = True) -> TokenStream:
        """An answer from its first token on; `sure`: no other router has it. Raises UnknownRequest."""
        ...

    def leave(self, stream: TokenStream, reason: str) -> None:
        """The reader of this stream is gone."""
        ...

    def flight(self, request_id: RequestId) -> Flight | None:
        """All that is known of a request; None: there is no such request."""
        ...

    def cancel(self, request_id: RequestId, reason: str) -> bool:
        """Ends a request everywhere; False when it is not known."""
        ...

    def stop_at(self, request_id: RequestId, index: int) -> None:
        """The answer ends at token `index`, which is kept: a stop string was found."""
        ...


class Tracer(Protocol):
    """Who records requests that are over for their clients."""

    def ended(self, flight: Flight, trace: TraceContext | None) -> None:
        """`trace`: what the client's request was part of."""
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
    """One request of a client, of the right types and not yet checked. An empty `request_id`: make one.

    `idempotency_key`: the same again is the same request. `resume_ms`: so long it goes on when its client is cut off.
    `form`: what the edge needs to answer in the same form when the client comes back. `cache_salt` is the client's own:
    it sets its prefixes apart within those of its tenant.
    """

    api: Api
    request_id: str
    prompts: Sequence[Sequence[int]]
    fields: SamplingFields
    n: int = 1
    priority: int = 0
    caller: Caller = ANYBODY
    cache_salt: str = ""
    slo_class: str = ""
    ttft_target_ms: int = 0
    tpot_target_ms: int = 0
    idempotency_key: str = ""
    resume_ms: int = 0
    form: Mapping[str, object] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)  # our field -> what the client calls it


class _KeyIsFree(Exception):
    """The request that came with this idempotency key failed, or its client left before it began: its key is free.

    Whether it was so may be known here before it is written to the store, or a moment after the store was asked.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class _Back:
    """Who comes back for an answer, and what it knows of it: its number of tokens, and perhaps its key and its API."""

    caller: Caller
    from_index: int
    key: str
    api: Api | None

    def check(self, new: NewRequest, keep: Keep) -> None:
        """Raises UnknownRequest, or InvalidRequest, unless this is what it may have and means."""
        if not self.caller.may_touch(new.owner) or (self.key and keep.key not in (self.key, f"{new.owner}/{self.key}")):
            raise _unknown(new.request_id)
        known_api = json.loads(keep.form)["api"]
        if self.api is not None and known_api != self.api:
            raise InvalidRequest("last-event-id", f"is of a request to {known_api}")
        if self.from_index > new.sampling.max_tokens:
            most = f"the answer has {new.sampling.max_tokens} tokens at most"
            raise InvalidRequest("from_index", f"is {self.from_index}, {most}")


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
        journal: Journal | None = None,
        door: Door | None = None,
        not_ready: Callable[[], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.driver = driver
        self.tokenizer = tokenizer
        self.model = model
        self.metrics = metrics
        self.journal = journal
        self.door = Door() if door is None else door
        self.tracer: Tracer | None = None
        self.not_ready = not_ready
        self.clock = clock
        self.limits = Limits(
            vocab_size=tokenizer.vocab_size,
            context_tokens=model.context_tokens,
            eos_token_ids=tokenizer.eos_token_ids,
        )
        self._in_flight: dict[RequestId, Answers] = {}
        self._opening: dict[str, asyncio.Event] = {}  # by idempotency key: the same again waits for what becomes of it
        self._encoding: Counter[str] = Counter()  # by API key

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
        owner = CALLER.get().name
        if owner and self._encoding[owner] >= _ENCODING_MAX // KEY_SHARE:
            limit = _ENCODING_MAX // KEY_SHARE
            raise Overloaded(f"{limit} long prompts of this key are being tokenized", retry_after_ms=1000)
        if self._encoding.total() >= _ENCODING_MAX:
            raise Overloaded(f"{_ENCODING_MAX} long prompts are being tokenized", retry_after_ms=1000)
        self._encoding[owner] += 1
        try:
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        finally:
            self._encoding[owner] -= 1
            self._encoding += Counter()  # forgets who has none

    async def open(self, ask: Ask) -> Answers:
        """Checks and submits all answers that `ask` asks for; of a known idempotency key, resumes from the beginning.

        With more than one answer, each is a request of its own: id#0, id#1, ...

        Raises:
            TandemError: nothing runs then. InvalidRequest, PermissionDenied, DuplicateRequest, RateLimited, Overloaded,
                Unavailable.
        """
        stops = check_stops(ask.fields.stop)
        check_num_choices(ask.n, len(ask.prompts))
        check_priority(ask.priority)
        self.door.check_priority(ask.caller, ask.priority)
        check_cache_salt(ask.cache_salt)
        check_slo(ask.slo_class, ask.ttft_target_ms, ask.tpot_target_ms)
        check_resuming(ask.idempotency_key, ask.resume_ms, num_answers=ask.n * len(ask.prompts))
        request_id = check_request_id(ask.request_id) if ask.request_id else new_request_id(ask.api)
        keep = self._keep(ask, stops)
        if keep is None or not keep.key:
            return await self._begin(ask, request_id, stops, keep)
        while (opening := self._opening.get(keep.key)) is not None:
            await opening.wait()  # bounded, as the store's answer is
        self._opening[keep.key] = opening = asyncio.Event()
        try:
            for pause_s in KEY_PAUSES_S:
                try:
                    known = self.driver.transcripts.of_key(keep.key)
                    if known is not None:
                        return await self._same(known, keep, ask.caller)
                    return await self._begin(ask, request_id, stops, keep)
                except _KeyIsFree:
                    await asyncio.sleep(pause_s)
            raise StoreAway("what came with this idempotency key is over, which is not written yet: try again")
        finally:
            del self._opening[keep.key]
            opening.set()

    async def _begin(self, ask: Ask, request_id: RequestId, stops: tuple[str, ...], keep: Keep | None) -> Answers:
        """Claims and submits; of a key that another router knows, resumes."""
        runs = self.driver.transcripts.find(request_id)  # perhaps without a reader: a claim would take its place
        if request_id in self._in_flight or (runs is not None and runs.ended is None):
            raise DuplicateRequest(f"request_id: {request_id!r} is in flight")
        requests = self._requests(ask, request_id)
        num_tokens = sum(len(request.tokens) for request in requests)
        ids = [request.request_id for request in requests]
        self.door.begin(ask.caller, ids, num_tokens=num_tokens)
        form = None if keep is None else json.loads(keep.form)
        group = Answers(self, request_id, owner=ask.caller.name, num_prompts=len(ask.prompts), form=form)
        named = frozenset(ask.fields.stop_token_ids)
        self._in_flight[request_id] = group
        fence: int | None = None
        known: Kept | None = None
        try:
            if keep is not None and self.journal is not None and (keep.key or ask.request_id):
                claim = await self.journal.claim(requests[0], keep)
                if isinstance(claim, Kept):
                    known = claim
                else:
                    fence, known = claim, self.driver.transcripts.of_key(keep.key)  # it may have come here meanwhile
            for request in requests if known is None else ():
                stream = self.driver.submit(request, keep, fence=fence, arrived_s=ARRIVED.get())
                self.metrics.admitted(len(request.tokens))
                group.answers.append(Answer(self, ask.api, request, stream, stops=stops, named=named))
        except BaseException:
            group.close("another answer of the same request was refused")
            self.door.give_up(ask.caller, ids, num_tokens=num_tokens)
            raise
        if known is None or keep is None:
            return group
        self.forget(group)
        self.door.give_up(ask.caller, ids, num_tokens=num_tokens)
        return await self._same(known, keep, ask.caller)

    async def resume(
        self,
        request_id: str,
        from_index: int,
        caller: Caller = ANYBODY,
        *,
        key: str = "",
        api: Api | None = None,
        anew: bool = False,
    ) -> Answers:
        """The answer of a request that runs or ended lately, from token `from_index` on, wherever it was served.

        A reader of before is ended. What is not this caller's is not known to it; where it gives the idempotency `key`,
        neither is another request of the same id. `api`: where it was asked, where that matters. `anew`: it asks for an
        answer, not for how an earlier try failed: raises _KeyIsFree where it did.

        Raises InvalidRequest, UnknownRequest, RequestLost, Unavailable.
        """
        known = check_request_id(request_id)
        if from_index < 0:
            raise InvalidRequest("from_index", f"is {from_index}, must be at least 0")
        kept, stream = await self._find(known, _Back(caller=caller, from_index=from_index, key=key, api=api))
        if anew and kept.ended is not None and kept.ended.code:
            raise _KeyIsFree
        form = json.loads(kept.keep.form)
        group = Answers(self, known, owner=kept.new.owner, form=form, skip=from_index)
        answer = Answer(
            self,
            Api(form["api"]),
            kept.new,
            stream,
            stops=tuple(form["stops"]),
            named=frozenset(form["named"]),
            skip=from_index,
        )
        group.answers.append(answer)
        self.metrics.reopened()
        self._in_flight[known] = group
        return group

    async def _find(self, request_id: RequestId, back: _Back) -> tuple[Kept, TokenStream]:
        """Here, unless another router has it by now; from the router that had it; or of what is remembered of it.

        Whether it is what was asked for is checked before anything is taken from anybody.
        """
        here = self.driver.transcripts.find(request_id)
        if here is not None:
            back.check(here.new, here.keep)
        found, sure = None, here is not None and here.ended is not None
        if self.journal is not None and not sure:
            try:
                seen = await self.journal.look(request_id)
                if seen is not None:
                    back.check(seen.new, seen.keep)
                    found = await self.journal.take_over(seen)
                sure = True
            except StoreAway:
                if here is None:
                    raise
        here = self.driver.transcripts.find(request_id)  # it may have come or gone meanwhile
        if here is not None and (found is None or found.fence <= here.fence):
            back.check(here.new, here.keep)
            self._check_ahead(here, back.from_index)
            return here, self.driver.read_again(request_id, sure=sure)
        if found is None:
            raise _unknown(request_id)
        if found.ended is not None or (found.tokens and found.tokens[-1].finish is not None):
            self._check_ahead(found, back.from_index)
            return found, replay_of(found)
        stream = self.driver.take_over(found)  # which ends what this router had of it, and its account
        self.door.adopt(found.new.owner, request_id)
        try:
            self._check_ahead(found, back.from_index)
        except RequestLost as error:
            self.driver.cancel(request_id, error.message)  # what goes on from here is not what its client has
            raise
        return found, stream

    async def _same(self, known: Kept, keep: Keep, caller: Caller) -> Answers:
        """The request that came with the same idempotency key, or id, if it is the same."""
        if not keep.key:
            raise DuplicateRequest(f"request_id: {known.new.request_id!r} is in flight")
        if known.keep.digest != keep.digest:
            raise DuplicateRequest(f"idempotency_key: {show(keep.key)} came with another request before")
        return await self.resume(known.new.request_id, 0, caller, key=keep.key, anew=True)

    def _check_ahead(self, kept: Kept, from_index: int) -> None:
        """What a client has beyond what is kept is computed again, to the same tokens: only exact mode promises."""
        if from_index <= len(kept.tokens):
            return
        if kept.ended is not None and kept.ended.code:
            raise error_of(kept.ended.code, kept.ended.message)
        if kept.ended is not None:
            raise InvalidRequest("from_index", f"is {from_index}, the answer has {len(kept.tokens)} tokens")
        if not self.model.exact:
            raise RequestLost(
                f"from_index is {from_index}, {len(kept.tokens)} tokens are kept, and the others cannot be computed "
                "again to the same ones: the cluster is not exact"
            )

    def _keep(self, ask: Ask, stops: tuple[str, ...]) -> Keep | None:
        """What is kept of the request; None when nothing could bring its client back."""
        wanted = bool(ask.idempotency_key or ask.resume_ms or self.driver.transcripts.shared)
        if not wanted or ask.n * len(ask.prompts) > 1:
            return None
        form = {"api": ask.api, "stops": stops, "named": sorted(set(ask.fields.stop_token_ids)), **ask.form}
        asked = [[*ask.prompts[0]], repr(ask.fields), ask.priority, ask.cache_salt, {**form, "created_s": 0}]
        return Keep(
            form=json.dumps(form).encode(),
            digest=hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).digest(),
            key=ask.caller.own(ask.idempotency_key),
            resume_ms=ask.resume_ms,
        )

    def cancel(self, request_id: str, reason: str, only: str | None = None) -> bool:
        """Ends a request and all its answers; False when it is not known here.

        `only`: if it is this owner's, else it is not known either; None: whosesoever it is.
        """
        if only is not None and self.owner_of(request_id) != only:
            return False
        group = self._in_flight.get(RequestId(request_id))
        if group is None:
            return self.driver.cancel(RequestId(request_id), reason)
        found = [self.driver.cancel(answer.request_id, reason) for answer in group.answers if not answer.done]
        return any(found)

    def trace(self, request_id: RequestId, trace: TraceContext | None) -> None:
        """A client has its answer, or is gone: if its request is over, that is recorded."""
        flight = None if self.tracer is None else self.driver.flight(request_id)
        if self.tracer is not None and flight is not None and flight.request.state in ENDED:
            self.tracer.ended(flight, trace)

    def owner_of(self, request_id: str) -> str | None:
        """Whose a request here, or one of its answers, is: the name of its API key. None: no such request."""
        whole = RequestId(request_id.partition(ANSWER_MARK)[0])
        group = self._in_flight.get(whole)
        if group is not None:
            return group.owner
        kept = self.driver.transcripts.find(whole)
        return None if kept is None else kept.new.owner

    def end_unwelcome(self) -> None:
        """Ends what runs of callers whose keys have been revoked or have expired since they were let in."""
        for request_id, reason in self.door.unwelcome():
            self.driver.cancel(request_id, reason)

    def forget(self, group: Answers) -> None:
        """The id of a request whose client has its answer, or is gone, may be used again."""
        if self._in_flight.get(group.request_id) is group:
            del self._in_flight[group.request_id]

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
                    owner=ask.caller.name,
                    cache_salt=ask.caller.cache_salt(ask.cache_salt),
                    slo=check_slo(ask.slo_class, ask.ttft_target_ms, ask.tpot_target_ms),
                )
                requests.append(request)
        return requests


def _unknown(request_id: RequestId) -> UnknownRequest:
    """The same for what is not there and for what is somebody else's."""
    return UnknownRequest(f"no request of id {request_id!r} is known, that could be resumed")


def new_request_id(api: Api) -> RequestId:
    """A fresh id that tells where the request came in."""
    prefix = {Api.CHAT: "chatcmpl", Api.COMPLETIONS: "cmpl", Api.GRPC: "req"}[api]
    return RequestId(f"{prefix}-{uuid.uuid4().hex}")
