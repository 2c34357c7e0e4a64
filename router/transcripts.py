"""What was asked and what was answered, kept while a client may come back for it, and what of it a shared store lacks.

A request whose stream broke goes on for as long as its client asked for; one that ended is remembered for a while.
Where routers share a store, all of it is written there behind the deliveries: tokens are a function of the prompt, the
parameters and their position (exact mode), so what the store lacks when a router dies is only computed again. Who may
write is settled by a fence: a router that takes a request over raises it, and the one before is refused from then on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from router.events import NewRequest, Usage
from tandem.errors import Cancelled, TandemError
from tandem.request import RequestId, Token

WRITE_TOKENS_MAX = 4096  # in one round: a store that was away gets what it missed in pieces
PROMPT_TOKENS_AS_ONE = 16  # of a prompt are written as fast as one of an answer, which may have logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What is kept of a request beside what the workers need.

    `form`: how the edge answers, the edge's own words. `digest`: of what was asked; the same `key` must mean the same.
    `key`: the client's idempotency key, or empty. `resume_ms`: so long the request goes on without a reader.
    """

    form: bytes
    digest: bytes = b""
    key: str = ""
    resume_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a request ended: well, with its usage, or with an error. The answer has `num_tokens` tokens."""

    num_tokens: int
    usage: Usage | None
    code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A transcript as a client that comes back finds it."""

    new: NewRequest
    keep: Keep
    tokens: tuple[Token, ...]
    ended: Ended | None
    fence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request as the store shows it to who asks whose it is. `mark`: the store knows this very one by it."""

    new: NewRequest
    keep: Keep
    mark: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """What the store lacks of one request. `entry`: the request itself, where the store has not got it.

    `tokens` begin at `from_index`; `ended` comes with the last of them. `frees`: the idempotency key of a request that
    failed, which means the next one from now on; or empty.
    """

    request_id: RequestId
    fence: int
    entry: tuple[NewRequest, Keep] | None
    from_index: int
    tokens: tuple[Token, ...]
    ended: Ended | None
    frees: str = ""


class Verdict(StrEnum):
    """What the store did with a write."""

    WRITTEN = "written"
    MISSING = "missing"  # it has not got what the write goes on from
    FENCED = "fenced"  # another router has the request


@dataclass(frozen=True, slots=True)
class Behind:
    """The store did nothing with a write: this very router has the request under this later fence, and it runs.

    It asked for that, to take the request over, and did not hear the answer.
    """

    fence: int


@dataclass(slots=True)
class _Transcript:
    new: NewRequest
    keep: Keep
    fence: int
    tokens: list[Token] = field(default_factory=list)
    ended: Ended | None = None
    ended_ms: int = 0
    left_ms: int | None = None  # since when nobody reads it
    entry_written: bool = False
    num_written: int = 0
    end_written: bool = False
    withdrawn: bool = False  # nobody knows whether the store has it: its end is written there if it does

    @property
    def num_kept(self) -> int:
        """Tokens that are remembered: of the prompt, too."""
        return len(self.new.tokens) + len(self.tokens)

    @property
    def is_written(self) -> bool:
        return self.entry_written and self.end_written and self.num_written >= len(self.tokens)


class Transcripts:
    """All transcripts of one router. `shared`: a store takes them, and remembers those that ended.

    Of those that ended at most `tokens_max` tokens, prompts included, are remembered here, for `keep_ms` milliseconds,
    newest first.
    """

    def __init__(self, *, shared: bool, keep_ms: int = 60_000, tokens_max: int = 2_000_000) -> None:
        self.shared = shared
        self._keep_ms = keep_ms
        self._tokens_max = tokens_max
        self._running: dict[RequestId, _Transcript] = {}
        self._ended: OrderedDict[RequestId, _Transcript] = OrderedDict()
        self._keys: dict[str, RequestId] = {}
        self._ended_tokens = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)

    # ---- a request's life ------------------------------------------------------------------------------------------

    def begin(
        self, new: NewRequest, keep: Keep, *, fence: int, tokens: Sequence[Token] = (), written: bool = False
    ) -> None:
        """A request is served here from now on. `tokens`: delivered before; `written`: the store has all of that."""
        self._forget(new.request_id)
        transcript = _Transcript(new, keep, fence, list(tokens), entry_written=written)
        transcript.num_written = len(tokens) if written else 0
        self._running[new.request_id] = transcript
        if keep.key:
            self._keys[keep.key] = new.request_id

    def deliver(self, request_id: RequestId, tokens: Sequence[Token]) -> None:
        """More of the answer."""
        transcript = self._running.get(request_id)
        if transcript is not None:
            transcript.tokens += tokens

    def end(self, now_ms: int, request_id: RequestId, ended: Ended) -> None:
        """The request is over. A router that ends does not end its requests: they are to be had from the store."""
        if self._closed:
            return
        transcript = self._running.pop(request_id, None)
        if transcript is None:
            return
        del transcript.tokens[ended.num_tokens :]
        transcript.num_written = min(transcript.num_written, ended.num_tokens)
        transcript.ended, transcript.ended_ms = ended, now_ms
        if ended.code:
            self._free_key(transcript)  # who asks for the same again does not want the failure again
        self._ended[request_id] = transcript
        self._ended_tokens += transcript.num_kept
        while self._ended_tokens > self._tokens_max and len(self._ended) > 1:
            self._forget(next(iter(self._ended)))

    def refuse(self, now_ms: int, request_id: RequestId, error: TandemError) -> None:
        """The request is not taken in. A store that has it already hears that it is over, and frees its id and key."""
        transcript = self._running.get(request_id)
        if transcript is not None and transcript.entry_written:
            self.end(now_ms, request_id, Ended(num_tokens=0, usage=None, code=error.code, message=error.message))
        else:
            self._forget(request_id)

    def withdraw(self, now_ms: int, new: NewRequest, keep: Keep, fence: int) -> None:
        """A request that was being claimed under this fence does not begin, whether or not the store has it by now."""
        if new.request_id not in self._running:
            self.begin(new, keep, fence=fence, written=True)
            self._running[new.request_id].withdrawn = True
            self.refuse(now_ms, new.request_id, Cancelled("its client left before it began"))

    def close(self) -> None:
        """The router ends: what runs is left as it is."""
        self._closed = True

    # ---- readers ---------------------------------------------------------------------------------------------------

    def left(self, now_ms: int, request_id: RequestId) -> bool:
        """Its reader is gone. Whether the request goes on without one for a while."""
        transcript = self._running.get(request_id)
        if transcript is None or not transcript.keep.resume_ms:
            return False
        transcript.left_ms = now_ms
        return True

    def read(self, request_id: RequestId) -> None:
        """Somebody reads it again."""
        transcript = self._running.get(request_id)
        if transcript is not None:
            transcript.left_ms = None

    def overdue(self, now_ms: int) -> list[tuple[RequestId, int]]:
        """Requests whose clients did not come back, and the milliseconds that they were waited for."""
        return [
            (request_id, each.keep.resume_ms)
            for request_id, each in self._running.items()
            if each.left_ms is not None and now_ms - each.left_ms >= each.keep.resume_ms
        ]

    def find(self, request_id: RequestId) -> Kept | None:
        """The transcript, when it is known here."""
        each = self._running.get(request_id) or self._ended.get(request_id)
        if each is None:
            return None
        return Kept(new=each.new, keep=each.keep, tokens=tuple(each.tokens), ended=each.ended, fence=each.fence)

    def of_key(self, key: str) -> Kept | None:
        """The transcript of the request that came with this idempotency key, when it is known here."""
        request_id = self._keys.get(key)
        return None if request_id is None else self.find(request_id)

    def expire(self, now_ms: int) -> None:
        """Forgets what ended long ago, and what the store has of what ended."""
        for request_id, each in list(self._ended.items()):
            if now_ms - each.ended_ms >= self._keep_ms or (self.shared and each.is_written):
                self._forget(request_id)

    # ---- the store -------------------------------------------------------------------------------------------------

    def pending(self) -> list[Write]:
        """What the store lacks, as much as WRITE_TOKENS_MAX tokens at most, those that ended first."""
        writes: list[Write] = []
        room = WRITE_TOKENS_MAX
        for request_id, each in (*self._ended.items(), *self._running.items()):
            if room <= 0:
                break
            fresh = tuple(each.tokens[each.num_written : each.num_written + room])
            whole = each.num_written + len(fresh) == len(each.tokens)
            ended = each.ended if whole and not each.end_written else None
            if fresh or ended is not None or not each.entry_written:
                entry = None if each.entry_written else (each.new, each.keep)
                room -= len(fresh) + 1 + (0 if entry is None else len(each.new.tokens) // PROMPT_TOKENS_AS_ONE)
                writes.append(
                    Write(
                        request_id=request_id,
                        fence=each.fence,
                        entry=entry,
                        from_index=each.num_written,
                        tokens=fresh,
                        ended=ended,
                        frees=each.keep.key if ended is not None and ended.code else "",
                    )
                )
        return writes

    def answered(self, write: Write, verdict: Verdict) -> bool:
        """The store has answered. False: the request is not this router's any more, and is forgotten."""
        each = self._running.get(write.request_id) or self._ended.get(write.request_id)
        if each is None or each.fence != write.fence:
            return True  # another life of the same id began meanwhile
        match verdict:
            case Verdict.WRITTEN:
                each.entry_written = True
                each.num_written = min(write.from_index + len(write.tokens), len(each.tokens))
                each.end_written = each.end_written or write.ended is not None
            case Verdict.MISSING if each.withdrawn:
                self._forget(write.request_id)
            case Verdict.MISSING:
                self._unwrite(each)
            case Verdict.FENCED:
                self._forget(write.request_id)
                return False
        return True

    def lost(self) -> None:
        """The store has forgotten everything: all of it is written anew."""
        for each in (*self._running.values(), *self._ended.values()):
            if each.withdrawn:
                self._forget(each.new.request_id)
            else:
                self._unwrite(each)

    def renew(self, request_id: RequestId, fence: int) -> None:
        """It goes on under a later fence, and is written anew under that."""
        each = self._running.get(request_id) or self._ended[request_id]
        each.fence = fence
        self._unwrite(each)

    def let_go(self, request_id: RequestId) -> None:
        """Another router has the request."""
        self._forget(request_id)

    @staticmethod
    def _unwrite(each: _Transcript) -> None:
        each.entry_written = each.end_written = False
        each.num_written = 0

    def _forget(self, request_id: RequestId) -> None:
        each = self._running.pop(request_id, None)
        if each is None:
            each = self._ended.pop(request_id, None)
            self._ended_tokens -= 0 if each is None else each.num_kept
        if each is not None:
            self._free_key(each)

    def _free_key(self, each: _Transcript) -> None:
        if self._keys.get(each.keep.key) == each.new.request_id:
            del self._keys[each.keep.key]
