"""The model of the shared store that worlds use and a real Redis give the same answers to the same calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_server import redis_server

from benchmarks.local_redis import LocalRedis
from cluster.state import RedisStore, StoreRefused
from router.events import NewRequest, Usage
from router.transcripts import Ended, Keep, Kept, Write
from simulator.store import StoreModel
from tandem.request import RequestId, Sampling, Token

IDENTITIES = {"a": "m", "b": "m", "stranger": "other"}
HOLDERS = st.sampled_from(["a", "b"])
IDS = st.sampled_from([RequestId("r"), RequestId("s")])
KEYS = st.sampled_from(["", "k", "l"])
FENCES = st.integers(1, 6)
CALLS_MAX = 30


@dataclass(frozen=True)
class Open:
    holder: str


@dataclass(frozen=True)
class Renew:
    holder: str


@dataclass(frozen=True)
class Lapse:
    holder: str


@dataclass(frozen=True)
class Forget:
    """The server is started again, empty."""


@dataclass(frozen=True)
class Claim:
    holder: str
    write: Write


@dataclass(frozen=True)
class TakeOver:
    holder: str
    request_id: RequestId
    fence: int


@dataclass(frozen=True)
class Writes:
    holder: str
    writes: list[Write]


def entry(name: RequestId, key: str) -> tuple[NewRequest, Keep]:
    new = NewRequest(request_id=name, tokens=(1, 2, 3), sampling=Sampling())
    return new, Keep(form=b"{}", digest=b"d", key=key, resume_ms=7)


@st.composite
def writes(draw: st.DrawFn) -> Write:
    name, first, count = draw(IDS), draw(st.integers(0, 4)), draw(st.integers(0, 3))
    ended = None
    if draw(st.integers(0, 3)) == 0:
        usage = Usage(prompt_tokens=3, completion_tokens=first + count, cached_tokens=0)
        ended = Ended(num_tokens=first + count, usage=usage, code=draw(st.sampled_from(["", "cancelled"])))
    return Write(
        request_id=name,
        fence=draw(FENCES),
        entry=entry(name, draw(KEYS)) if draw(st.booleans()) else None,
        from_index=first,
        tokens=tuple(
            Token(request_id=name, epoch=0, index=index, token_id=index) for index in range(first, first + count)
        ),
        ended=ended,
        frees=draw(KEYS) if ended is not None and ended.code else "",
    )


@st.composite
def claims(draw: st.DrawFn) -> Claim:
    name, key = draw(IDS), draw(KEYS)
    write = Write(request_id=name, fence=draw(FENCES), entry=entry(name, key), from_index=0, tokens=(), ended=None)
    return Claim(draw(HOLDERS), write)


CALLS = st.one_of(
    st.builds(Open, st.sampled_from(sorted(IDENTITIES))),
    st.builds(Renew, HOLDERS),
    st.builds(Lapse, HOLDERS),
    st.builds(Forget),
    claims(),
    st.builds(TakeOver, HOLDERS, IDS, FENCES),
    st.builds(Writes, HOLDERS, st.lists(writes(), min_size=1, max_size=3)),
)


class Both:
    """Makes each call to both and compares the answers."""

    def __init__(self, url: str) -> None:
        self.raw = redis.asyncio.Redis.from_url(url)
        self.stores = {
            holder: RedisStore(url, prefix="t", holder=holder, identity=identity)
            for holder, identity in IDENTITIES.items()
        }
        self.model = StoreModel()
        self.boots: dict[str, str] = {}
        self.now_us = 0

    async def make(self, call: object) -> None:
        self.now_us += 1
        now_us, model = self.now_us, self.model
        match call:
            case Open(holder):
                try:
                    await self.stores[holder].open()
                    refused = ""
                except StoreRefused as error:
                    refused = str(error)
                assert bool(model.open(now_us, IDENTITIES[holder])) == bool(refused)
            case Renew(holder):
                boot = model.renew(now_us, IDENTITIES[holder], holder, f"boot-{now_us}")
                known, self.boots[holder] = self.boots.get(holder) == boot, boot
                assert await self.stores[holder].renew() == known
            case Lapse(holder):
                model.leave(holder)
                await self.raw.zrem("t:routers", holder)
            case Forget():
                model.clear()
                await self.raw.flushall()
            case Claim(holder, write):
                assert write.entry is not None
                key = write.entry[1].key
                expected = model.claim(now_us, holder, write, key)
                assert shown(await self.stores[holder].claim(write, key)) == shown(expected)
            case TakeOver(holder, request_id, fence):
                expected = model.take_over(now_us, holder, request_id, fence)
                assert shown(await self.stores[holder].take_over(request_id, fence)) == shown(expected)
            case Writes(holder, several):
                expected_verdicts = [model.write(now_us, holder, write) for write in several]
                assert await self.stores[holder].write(several) == expected_verdicts

    async def close(self) -> None:
        for store in self.stores.values():
            await store.leave()
        await self.raw.aclose()


def shown(answer: Kept | RequestId | None) -> object:
    """What of an answer must be the same."""
    if not isinstance(answer, Kept):
        return answer
    return answer.new, answer.keep, answer.tokens, answer.ended, answer.fence


@pytest.fixture(scope="module")
def server() -> Iterator[LocalRedis]:
    with redis_server() as running:
        yield running


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=st.lists(CALLS, max_size=CALLS_MAX))
def test_the_model_answers_as_redis_does(server: LocalRedis, calls: list[object]) -> None:
    async def main() -> None:
        both = Both(server.url)
        await both.raw.flushall()
        for call in calls:
            await both.make(call)
        await both.close()

    asyncio.run(main())
