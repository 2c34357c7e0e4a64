"""The shared state in a real Redis: fences, claims, take-overs, leases, and a Redis that is away or empty."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import redis
from redis_server import redis_server

from benchmarks.local_redis import LocalRedis
from cluster.config import check_url, without_password
from cluster.state import CONNECTIONS_MAX, RedisStore, StoreRefused
from router.events import NewRequest, Usage
from router.journal import StoreDown
from router.transcripts import Behind, Ended, Keep, Kept, Verdict, Write
from tandem.request import FinishReason, RequestId, Sampling, Token

DEADLINE_S = 30
KEEP = Keep(form=b'{"api": "grpc"}', digest=b"d", key="", resume_ms=7)
Case = Callable[[LocalRedis, RedisStore, RedisStore], Awaitable[None]]


def store(server: LocalRedis, holder: str, *, identity: str = "m") -> RedisStore:
    return RedisStore(server.url, prefix="t", holder=holder, identity=identity)


def run(case: Case) -> None:
    """Two routers' stores on one server, both alive."""

    async def main() -> None:
        with redis_server() as server:
            first, second = store(server, "a"), store(server, "b")
            for each in (first, second):
                await each.open()
                await each.renew()
            await case(server, first, second)
            await first.leave()
            await second.leave()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def new(name: str = "r") -> NewRequest:
    sampling = Sampling(temperature=0.7, seed=2**63, logprobs=2, logit_bias=((3, -1.5),), stop_token_ids=(9,))
    return NewRequest(request_id=RequestId(name), tokens=(1, 2, 3), sampling=sampling, deadline_ms=60_000, priority=2)


def tokens(first: int, last: int) -> tuple[Token, ...]:
    return tuple(
        Token(
            request_id=RequestId("r"),
            epoch=0,
            index=index,
            token_id=index + 100,
            logprob=-0.1 * index,
            top=((1, -0.5), (2, -0.75)),
            finish=FinishReason.LENGTH if index == 99 else None,
        )
        for index in range(first, last)
    )


def write(
    fence: int, first: int, last: int, *, entry: bool = False, ended: Ended | None = None, name: str = "r"
) -> Write:
    return Write(
        request_id=RequestId(name),
        fence=fence,
        entry=(new(name), KEEP) if entry else None,
        from_index=first,
        tokens=tokens(first, last),
        ended=ended,
    )


async def verdict(of: RedisStore, what: Write) -> Verdict | Behind:
    (only,) = await of.write([what])
    return only


def test_taken_over_whole_and_the_one_before_is_fenced() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        assert await first.claim(write(5, 0, 0, entry=True), "") is None
        assert await verdict(first, write(5, 0, 3)) is Verdict.WRITTEN
        assert await verdict(first, write(5, 3, 4)) is Verdict.WRITTEN
        kept = await second.take_over(RequestId("r"), 1 << 52)
        assert kept is not None
        assert (kept.keep, kept.tokens, kept.ended) == (KEEP, tokens(0, 4), None)
        assert kept.new.sampling == new().sampling
        assert 50_000 < kept.new.deadline_ms <= 60_000
        assert kept.fence > 5
        assert kept.fence == 1 << 52
        assert await verdict(first, write(5, 4, 5)) is Verdict.FENCED
        assert await verdict(first, write(5, 0, 5, entry=True)) is Verdict.FENCED, "nor by writing all of it anew"
        assert await verdict(second, write(kept.fence, 4, 6)) is Verdict.WRITTEN
        again = await second.take_over(RequestId("r"), 1 << 52)
        assert again is not None
        assert (again.fence, again.tokens) == (kept.fence, tokens(0, 6)), "who has it keeps its fence"

    run(case)


def test_gaps_and_what_is_missing_are_written_anew() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        assert await verdict(first, write(5, 0, 2)) is Verdict.MISSING
        assert await verdict(first, write(5, 0, 2, entry=True)) is Verdict.WRITTEN
        assert await verdict(first, write(5, 3, 4)) is Verdict.MISSING
        assert await verdict(first, write(5, 1, 4)) is Verdict.MISSING
        assert await verdict(first, write(5, 0, 4, entry=True)) is Verdict.WRITTEN
        kept = await second.take_over(RequestId("r"), 1 << 52)
        assert kept is not None
        assert kept.tokens == tokens(0, 4)

    run(case)


def test_a_claim_whose_answer_was_lost_does_not_fence_its_own_router() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        assert await first.claim(write(5, 0, 0, entry=True), "") is None
        assert await verdict(first, write(6, 0, 2, entry=True)) is Verdict.WRITTEN, "it began under a later fence"
        assert await verdict(second, write(7, 0, 2, entry=True)) is Verdict.FENCED

    run(case)


def test_a_router_whose_own_take_over_fenced_it_is_told_the_fence_and_goes_on_above() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        later = 1 << 52
        assert await verdict(first, write(5, 0, 2, entry=True)) is Verdict.WRITTEN
        assert await second.take_over(RequestId("r"), 6) is not None
        assert await first.take_over(RequestId("r"), later) is not None, "and the answer is lost"
        assert await verdict(first, write(5, 2, 3)) == Behind(later)
        assert await verdict(first, write(5, 0, 3, entry=True)) == Behind(later)
        assert await verdict(second, write(6, 2, 3)) is Verdict.FENCED, "it is another router's"
        assert await verdict(first, write(later + 1, 0, 3, entry=True)) is Verdict.WRITTEN
        ended = Ended(num_tokens=3, usage=Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=0))
        assert await verdict(first, write(later + 1, 3, 3, ended=ended)) is Verdict.WRITTEN
        assert await verdict(first, write(5, 2, 3)) is Verdict.FENCED, "that life is over"

    run(case)


def test_a_request_that_was_not_claimed_is_known_by_its_key_once_it_is_written() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        late = replace(write(5, 0, 2, entry=True), entry=(new(), replace(KEEP, key="key")))
        assert await verdict(first, late) is Verdict.WRITTEN
        known = await second.claim(write(6, 0, 0, entry=True), "key")
        assert isinstance(known, Kept)
        assert known.new.request_id == "r"

    run(case)


def test_what_ended_stays_as_it_ended() -> None:
    usage = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)

    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        assert await verdict(first, write(5, 0, 4, entry=True)) is Verdict.WRITTEN
        ended = Ended(num_tokens=2, usage=usage)  # a stop string was found in what came before
        assert await verdict(first, write(5, 2, 2, ended=ended)) is Verdict.WRITTEN
        kept = await second.take_over(RequestId("r"), 1 << 52)
        assert kept is not None
        assert (kept.ended, kept.tokens, kept.fence) == (ended, tokens(0, 2), 5)

    run(case)


def test_an_id_is_served_once_and_a_key_means_one_request() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        assert await first.claim(write(5, 0, 0, entry=True), "key") is None
        assert await second.claim(write(6, 0, 0, entry=True), "") == "r"
        known = await second.claim(write(6, 0, 0, entry=True, name="s"), "key")
        assert isinstance(known, Kept)
        assert (known.new.request_id, known.keep.digest) == ("r", b"d")
        ended = Ended(num_tokens=0, usage=None, code="cancelled", message="x")
        assert await verdict(first, write(5, 0, 0, ended=ended)) is Verdict.WRITTEN
        assert await second.claim(write(6, 0, 0, entry=True), "") is None, "the id is free again"
        assert await verdict(first, write(5, 0, 0, entry=True)) is Verdict.FENCED

    run(case)


def test_a_dead_routers_id_is_free_but_not_a_living_ones() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        dead = store(server, "dead")
        await dead.open()  # never renews: it has no lease
        assert await dead.claim(write(5, 0, 0, entry=True), "") is None
        assert await second.claim(write(6, 0, 0, entry=True), "") is None
        await dead.leave()

    run(case)


def test_a_restart_that_forgets_is_noticed_and_another_cluster_refused() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        assert await first.renew()
        stranger = store(server, "c", identity="other")
        with pytest.raises(StoreRefused, match="serves m, this one serves other"):
            await stranger.open()
        server.kill()
        with pytest.raises(StoreDown):
            await first.renew()
        server.start()
        assert not await first.renew()
        assert await first.renew()
        assert await second.take_over(RequestId("r"), 1 << 52) is None
        await stranger.leave()

    run(case)


def test_a_server_that_stands_still_is_given_up_in_time() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        server.process.suspend()
        async with asyncio.timeout(5):
            with pytest.raises(StoreDown):
                await first.take_over(RequestId("r"), 1 << 52)
        server.process.resume()
        assert await first.take_over(RequestId("r"), 1 << 52) is None

    run(case)


def test_a_claim_that_a_stopped_server_carries_out_late_takes_no_request_from_its_own_router() -> None:
    """The router has given the call up, and serves the request under a later fence."""

    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        assert await first.claim(write(4, 0, 0, entry=True, name="s"), "") is None  # the server knows the script
        server.process.suspend()
        with pytest.raises(StoreDown):
            await first.claim(write(5, 0, 0, entry=True), "")
        server.process.resume()
        with redis.Redis.from_url(server.url) as looking:
            while looking.hget("t:request:r", "fence") != b"5":
                await asyncio.sleep(0.01)
        await first.renew()
        assert await verdict(first, write(6, 0, 2, entry=True)) is Verdict.WRITTEN
        assert await first.claim(write(5, 0, 0, entry=True), "") is None, "and when it comes later still"
        assert await verdict(first, write(6, 2, 3)) is Verdict.WRITTEN
        kept = await second.take_over(RequestId("r"), 1)
        assert kept is not None
        assert kept.tokens == tokens(0, 3)
        assert await verdict(first, write(7, 0, 3, entry=True)) is Verdict.FENCED, "another router has it now"

    run(case)


def test_more_calls_than_connections_wait_for_one_another() -> None:
    """A burst of claims is no sign that the store is away: served without one, a key would mean two requests."""

    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        names = [f"r{number}" for number in range(16 * CONNECTIONS_MAX)]
        burst = [first.claim(write(5, 0, 0, entry=True, name=name), "") for name in names]
        assert await asyncio.gather(*burst) == [None] * len(names)
        ahead = [asyncio.create_task(first.take_over(RequestId(name), 1)) for name in names]
        await asyncio.sleep(0.001)
        for task in ahead[::2]:
            task.cancel()  # clients that leave give their turns to others
        left = await asyncio.gather(*ahead[1::2])
        assert [each.new.request_id for each in left if each is not None] == names[1::2]

    run(case)


def test_a_key_that_cannot_be_written_holds_up_no_other_request() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        both = [write(5, 0, 2, entry=True, name="odd"), write(5, 0, 2, entry=True)]
        with redis.Redis.from_url(server.url) as raw:
            raw.set("t:request:odd", "not a record")
            assert await first.write(both) == [Verdict.MISSING, Verdict.WRITTEN]
            with pytest.raises(StoreDown, match="WRONGTYPE"):
                await first.write(both[:1])
            raw.delete("t:request:odd")
        assert await first.write(both) == [Verdict.WRITTEN, Verdict.WRITTEN]

    run(case)


def test_tokens_that_were_evicted_are_written_anew_or_computed_again() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        assert await verdict(first, write(5, 0, 2, entry=True)) is Verdict.WRITTEN
        with redis.Redis.from_url(server.url) as raw:
            raw.delete("t:tokens:r")
            assert await verdict(first, write(5, 2, 3)) is Verdict.MISSING
            assert await verdict(first, write(5, 0, 3, entry=True)) is Verdict.WRITTEN
            raw.delete("t:tokens:r")
            kept = await second.take_over(RequestId("r"), 6)
            assert kept is not None
            assert kept.tokens == ()
            ended = Ended(num_tokens=3, usage=Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=0))
            assert await verdict(second, write(6, 0, 3, entry=True, ended=ended)) is Verdict.WRITTEN
            raw.delete("t:tokens:r")
        assert await first.take_over(RequestId("r"), 7) is None, "an answer without its tokens is none"

    run(case)


def test_a_key_whose_request_is_forgotten_means_the_next_one() -> None:
    """Also where that could not be claimed, since the store was away when it came."""

    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        assert await first.claim(write(5, 0, 0, entry=True, name="s"), "key") is None
        with redis.Redis.from_url(server.url) as raw:
            raw.delete("t:request:s")
        late = replace(write(6, 0, 2, entry=True), entry=(new(), replace(KEEP, key="key")))
        assert await verdict(first, late) is Verdict.WRITTEN
        known = await second.claim(write(7, 0, 0, entry=True, name="u"), "key")
        assert isinstance(known, Kept)
        assert known.new.request_id == "r"

    run(case)


def test_a_router_that_came_while_the_store_was_away_takes_nothing_of_another_cluster() -> None:
    async def case(server: LocalRedis, first: RedisStore, second: RedisStore) -> None:
        assert await first.claim(write(5, 0, 0, entry=True), "") is None
        stranger = store(server, "c", identity="other")
        for call in (
            stranger.take_over(RequestId("r"), 6),
            stranger.renew(),
            stranger.claim(write(6, 0, 0, entry=True, name="s"), ""),
            stranger.write([write(6, 0, 2, entry=True, name="s")]),
        ):
            with pytest.raises(StoreDown, match="serves m, this one serves other"):
                await call
        for each in (first, second):
            assert await each.renew()
            await each.leave()
        assert not await stranger.renew(), "nobody of that cluster lives"
        assert await stranger.claim(write(6, 0, 0, entry=True, name="s"), "") is None
        await stranger.leave()

    run(case)


def test_addresses() -> None:
    assert check_url("redis://u:secret@host:6379/3")
    assert without_password("redis://u:secret@host:6379/3") == "redis://u:***@host:6379/3"
    assert without_password("redis://host:6379/3") == "redis://host:6379/3"
    assert without_password("unix:///socket?db=1&password=secret&x=y") == "unix:///socket?db=1&password=***&x=y"
    for odd in ("#", "/", "?", "@", ":"):  # urlsplit takes these for the end of the address
        assert without_password(f"redis://u:sec{odd}ret@host/3") == "redis://u:***@host/3"
    for wrong in ("http://x", "redis://", "localhost:6379"):
        with pytest.raises(ValueError, match="must be redis"):
            check_url(wrong)
