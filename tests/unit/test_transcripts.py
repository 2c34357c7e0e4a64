"""Transcripts against a store that is a plain model of the real one: what it holds is what was said."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.events import NewRequest, Usage
from router.transcripts import Ended, Keep, Transcripts, Verdict, Write
from tandem.request import RequestId, Sampling, Token

WELL = Usage(prompt_tokens=1, completion_tokens=0, cached_tokens=0)


def new(name: str = "r") -> NewRequest:
    return NewRequest(request_id=RequestId(name), tokens=(1,), sampling=Sampling())


def token(index: int, name: str = "r") -> Token:
    return Token(request_id=RequestId(name), epoch=1, index=index, token_id=100 + index)


def tokens(first: int, last: int, name: str = "r") -> tuple[Token, ...]:
    return tuple(token(index, name) for index in range(first, last))


def keep(*, key: str = "", resume_ms: int = 0) -> Keep:
    return Keep(form=b"{}", key=key, resume_ms=resume_ms)


def test_what_is_written_is_what_was_delivered_and_in_order() -> None:
    kept = Transcripts(shared=True)
    kept.begin(new(), keep(), fence=5)
    kept.deliver(RequestId("r"), tokens(0, 2))
    (first,) = kept.pending()
    assert (first.entry, first.from_index, first.tokens, first.ended) == ((new(), keep()), 0, tokens(0, 2), None)
    kept.deliver(RequestId("r"), tokens(2, 3))  # while the write is under way
    assert kept.answered(first, Verdict.WRITTEN)
    (second,) = kept.pending()
    assert (second.entry, second.from_index, second.tokens) == (None, 2, tokens(2, 3))
    kept.end(0, RequestId("r"), Ended(num_tokens=3, usage=WELL))
    (third,) = kept.pending()
    assert third.ended is not None
    assert kept.answered(third, Verdict.WRITTEN)
    assert kept.pending() == []
    kept.expire(1)
    assert kept.find(RequestId("r")) is None, "the store remembers what ended"


def test_a_stop_takes_back_what_came_after_it() -> None:
    kept = Transcripts(shared=True)
    kept.begin(new(), keep(), fence=5)
    kept.deliver(RequestId("r"), tokens(0, 6))
    assert kept.answered(kept.pending()[0], Verdict.WRITTEN)
    kept.end(0, RequestId("r"), Ended(num_tokens=4, usage=WELL))
    (last,) = kept.pending()
    assert (last.from_index, last.tokens) == (4, ())
    found = kept.find(RequestId("r"))
    assert found is not None
    assert found.tokens == tokens(0, 4)


def test_fenced_is_forgotten_and_only_in_the_life_that_was_written() -> None:
    kept = Transcripts(shared=True)
    kept.begin(new(), keep(key="k"), fence=5)
    (write,) = kept.pending()
    kept.begin(new(), keep(key="k"), fence=6)
    assert kept.answered(write, Verdict.FENCED), "it was of an earlier life of the id"
    (write,) = kept.pending()
    assert not kept.answered(write, Verdict.FENCED)
    assert kept.find(RequestId("r")) is None
    assert kept.of_key("k") is None


def test_renewed_is_written_anew_under_the_later_fence() -> None:
    kept = Transcripts(shared=True)
    for name in ("runs", "ended"):
        kept.begin(new(name), keep(), fence=5)
        kept.deliver(RequestId(name), tokens(0, 2, name))
        assert all(kept.answered(write, Verdict.WRITTEN) for write in kept.pending())
    kept.end(0, RequestId("ended"), Ended(num_tokens=2, usage=WELL))
    (late,) = kept.pending()
    for name in ("runs", "ended"):
        kept.renew(RequestId(name), 7)
    assert kept.answered(late, Verdict.FENCED), "it was of the life before"
    ended, runs = kept.pending()
    assert (ended.fence, ended.entry, ended.tokens) == (7, (new("ended"), keep()), tokens(0, 2, "ended"))
    assert ended.ended is not None
    assert (runs.fence, runs.entry, runs.tokens, runs.ended) == (7, (new("runs"), keep()), tokens(0, 2, "runs"), None)


def test_who_does_not_come_back_is_overdue() -> None:
    kept = Transcripts(shared=False)
    kept.begin(new("a"), keep(resume_ms=100), fence=1)
    kept.begin(new("b"), keep(), fence=2)
    assert not kept.left(0, RequestId("b")), "its client did not ask to be waited for"
    assert kept.left(0, RequestId("a"))
    assert kept.overdue(99) == []
    assert kept.overdue(100) == [("a", 100)]
    kept.read(RequestId("a"))
    assert kept.overdue(1000) == []


def test_what_ended_is_bounded_in_time_and_tokens() -> None:
    kept = Transcripts(shared=False, keep_ms=1000, tokens_max=10)
    for number in range(4):
        name = f"r{number}"
        kept.begin(new(name), keep(key=name), fence=number)
        kept.deliver(RequestId(name), tokens(0, 4, name))
        kept.end(number, RequestId(name), Ended(num_tokens=4, usage=WELL))
    assert [kept.of_key(f"r{number}") is not None for number in range(4)] == [False, False, True, True]
    kept.expire(1002)
    assert [kept.of_key(f"r{number}") is not None for number in range(4)] == [False, False, False, True]
    kept.expire(5000)
    assert len(kept) == 0


def test_what_was_asked_counts_beside_what_was_answered() -> None:
    """Requests of long prompts that fail at once cost nothing but the memory that they are remembered in."""
    kept = Transcripts(shared=False, tokens_max=1000)
    for number in range(10):
        long = replace(new(f"r{number}"), tokens=(1,) * 400)
        kept.begin(long, keep(), fence=number)
        kept.end(number, long.request_id, Ended(num_tokens=0, usage=None, code="cancelled"))
    assert len(kept) == 2
    kept.expire(1_000_000)
    assert len(kept) == 0


def test_a_round_of_writes_is_bounded_in_prompts_too() -> None:
    """A store that came back empty gets thousands of long prompts: as one call it would never be done in time."""
    kept = Transcripts(shared=True)
    for number in range(200):
        kept.begin(replace(new(f"r{number}"), tokens=(1,) * 8192), keep(), fence=number)
    rounds = 0
    while writes := kept.pending():
        assert sum(len(write.entry[0].tokens) for write in writes if write.entry is not None) <= 80_000
        assert all(kept.answered(write, Verdict.WRITTEN) for write in writes)
        rounds += 1
    assert rounds >= 20


def test_a_closing_router_ends_nothing() -> None:
    kept = Transcripts(shared=True)
    kept.begin(new(), keep(), fence=5)
    kept.close()
    kept.end(0, RequestId("r"), Ended(num_tokens=0, usage=None, code="stopping"))
    (write,) = kept.pending()
    assert write.ended is None


@dataclass
class Record:
    """What the store holds of one request."""

    fence: int
    tokens: list[Token] = field(default_factory=list)
    ended: Ended | None = None


class StoredTranscripts(RuleBasedStateMachine):
    """One router's transcripts and a store that forgets, answers twice or not at all, and lets another router in."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Transcripts(shared=True)
        self.store: dict[str, Record] = {}
        self.said: dict[str, list[Token]] = {}
        self.over: set[str] = set()
        self.taken: set[str] = set()
        self.now_ms = 0
        self.fence = 0

    def apply(self, write: Write) -> Verdict:
        record = self.store.get(write.request_id)
        if record is not None and record.fence > write.fence:
            return Verdict.FENCED
        if write.entry is not None:
            record = self.store[write.request_id] = Record(write.fence)
        if record is None or record.fence != write.fence:
            return Verdict.MISSING
        if write.from_index != len(record.tokens) and not (
            write.ended is not None and not write.tokens and write.from_index < len(record.tokens)
        ):
            return Verdict.MISSING
        record.tokens += write.tokens
        record.ended = write.ended or record.ended
        return Verdict.WRITTEN

    @rule()
    def begin(self) -> None:
        self.fence += 1
        name = f"r{self.fence}"
        self.said[name] = []
        self.kept.begin(new(name), keep(), fence=self.fence)

    @precondition(lambda self: self.said)
    @rule(data=st.data(), count=st.integers(1, 5))
    def deliver(self, data: st.DataObject, count: int) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.said) - self.over - self.taken) or [""]))
        if name:
            more = tokens(len(self.said[name]), len(self.said[name]) + count, name)
            self.kept.deliver(RequestId(name), more)
            self.said[name] += more

    @precondition(lambda self: self.said)
    @rule(data=st.data(), drop=st.integers(0, 2))
    def end(self, data: st.DataObject, drop: int) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.said) - self.over - self.taken) or [""]))
        if name:
            self.over.add(name)
            del self.said[name][max(0, len(self.said[name]) - drop) :]
            self.kept.end(self.now_ms, RequestId(name), Ended(num_tokens=len(self.said[name]), usage=WELL))

    @rule(times=st.integers(1, 2), lost=st.booleans())
    def flush(self, times: int, lost: bool) -> None:
        """The write arrives once or, for an answer was lost and it was sent again, twice; its answer may be lost."""
        writes = self.kept.pending()
        verdicts = [[self.apply(write) for write in writes] for _ in range(times)][-1]
        if not lost:
            for write, verdict in zip(writes, verdicts, strict=True):
                assert self.kept.answered(write, verdict) or write.request_id in self.taken

    @rule()
    def forget_all(self) -> None:
        self.store.clear()
        self.kept.lost()

    @precondition(lambda self: self.store)
    @rule(data=st.data())
    def take_over(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.store)))
        if self.store[name].ended is None:
            self.store[name].fence += 1000
            self.taken.add(name)

    @rule(ms=st.integers(1, 100))
    def wait(self, ms: int) -> None:
        self.now_ms += ms
        self.kept.expire(self.now_ms)

    @invariant()
    def what_the_store_holds_was_said(self) -> None:
        for name, record in self.store.items():
            held = record.tokens if record.ended is None else record.tokens[: record.ended.num_tokens]
            said = self.said[name]
            if record.ended is None and name in self.over:
                held = held[: len(said)]  # a stop took the rest back, and the end is still to be written
            assert held == said[: len(held)]

    def teardown(self) -> None:
        for _ in range(3 * len(self.said) + 3):
            for write in self.kept.pending():
                self.kept.answered(write, self.apply(write))
        for name, said in self.said.items():
            record = self.store.get(name)
            if name in self.taken or record is None:
                continue
            held = record.tokens if record.ended is None else record.tokens[: record.ended.num_tokens]
            assert held == said, "what is written behind arrives in the end"
            assert (record.ended is not None) == (name in self.over)


TestStoredTranscripts = StoredTranscripts.TestCase
