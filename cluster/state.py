"""The state that the routers of a cluster share in Redis: transcripts under fences, idempotency keys, leases.

Each change is one Lua script, and so happens whole or not at all. A record has one holder, the router that serves the
request, and a fence; who takes it over raises the fence, and whatever the holder before still writes is refused.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from cluster import journal_wire as wire
from router.journal import LEASE_S, StoreDown
from router.transcripts import Behind, Kept, Seen, Verdict, Write
from tandem.request import RequestId

CALL_TIMEOUT_S = 1.0
CONNECTIONS_MAX = 8  # calls open as many while the store is away, and the pool keeps them
RUNNING_MS = 1_800_000  # a record is forgotten so long after its last write
ENDED_MS = 300_000
LEASE_MS = round(3 * LEASE_S * 1000)

_NOW = """
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local function lives(holder)
  local until_us = redis.call('ZSCORE', prefix .. 'routers', holder)
  return until_us and tonumber(until_us) > now_us
end
local function stranger(identity) -- the identity of another cluster that lives here, or nil
  local known = redis.call('GET', prefix .. 'cluster')
  redis.call('ZREMRANGEBYSCORE', prefix .. 'routers', '-inf', now_us)
  if known and known ~= identity and redis.call('ZCARD', prefix .. 'routers') > 0 then return known end
  redis.call('SET', prefix .. 'cluster', identity)
end
"""

# ARGV: prefix, identity, holder. The identity of another cluster that lives, or ''; the store's time in microseconds.
_OPEN = (
    "local prefix = ARGV[1]\n"
    + _NOW
    + """
return {stranger(ARGV[2]) or '', string.format('%.0f', now_us)}
"""
)

# ARGV: prefix, identity, holder, lease in ms, a boot id to set where there is none. As _OPEN's first; the boot id.
_RENEW = (
    "local prefix = ARGV[1]\n"
    + _NOW
    + """
local other = stranger(ARGV[2])
if other then return {other, ''} end
redis.call('ZADD', prefix .. 'routers', now_us + ARGV[4] * 1000, ARGV[3])
redis.call('SET', prefix .. 'boot', ARGV[5], 'NX')
return {'', redis.call('GET', prefix .. 'boot')}
"""
)

# ARGV: prefix, holder, request id, fence, entry, key or '', life in ms. {} when claimed; {'taken'}; {'known', entry}.
_CLAIM = (
    "local prefix = ARGV[1]\n"
    + _NOW
    + """
local key = prefix .. 'key:' .. ARGV[6]
if ARGV[6] ~= '' then
  local known = redis.call('GET', key)
  local entry = known and redis.call('HGET', prefix .. 'request:' .. known, 'entry')
  if entry then return {'known', entry} end
end
local record, tokens = prefix .. 'request:' .. ARGV[3], prefix .. 'tokens:' .. ARGV[3]
local had = redis.call('HMGET', record, 'holder', 'end', 'fence')
if had[1] and not had[2] and had[1] ~= ARGV[2] and lives(had[1]) then return {'taken'} end
if had[1] == ARGV[2] and tonumber(had[3]) >= tonumber(ARGV[4]) then return {} end -- carried out late, or twice
redis.call('DEL', record, tokens)
redis.call('HSET', record, 'holder', ARGV[2], 'fence', ARGV[4], 'entry', ARGV[5], 'n', 0, 'at',
           string.format('%.0f', now_us))
redis.call('PEXPIRE', record, ARGV[7])
if ARGV[6] ~= '' then redis.call('SET', key, ARGV[3], 'PX', ARGV[7]) end
return {}
"""
)

# ARGV: prefix, holder, request id, least fence, entry or ''. {} when unknown, or of another entry; {entry, fence, end
# or '', age in ms, tokens...}.
_TAKE_OVER = (
    "local prefix = ARGV[1]\n"
    + _NOW
    + """
local record, tokens = prefix .. 'request:' .. ARGV[3], prefix .. 'tokens:' .. ARGV[3]
local had = redis.call('HMGET', record, 'entry', 'fence', 'end', 'holder', 'at', 'n')
if not had[1] or (ARGV[5] ~= '' and had[1] ~= ARGV[5]) then return {} end
if had[3] and tonumber(had[6]) > 0 and redis.call('EXISTS', tokens) == 0 then return {} end -- they were evicted
local fence = tonumber(had[2])
if not had[3] and had[4] ~= ARGV[2] then
  fence = math.max(fence + 1, tonumber(ARGV[4]))
  redis.call('HSET', record, 'holder', ARGV[2], 'fence', string.format('%.0f', fence))
end
local answer = {had[1], string.format('%.0f', fence), had[3] or '',
                string.format('%.0f', (now_us - tonumber(had[5])) / 1000)}
for _, piece in ipairs(redis.call('LRANGE', tokens, 0, -1)) do answer[#answer + 1] = piece end
return answer
"""
)

# ARGV: prefix, holder, life in ms, life when ended in ms, then for each write: request id, fence, entry or '', key
# or '', first index, number of tokens, tokens, end or '', key to free or ''. A verdict for each, or the fence of the
# running life that this very router has, where that is a later one; {'failed', why} where the store cannot. A life of
# an id that is over gives way to a later one, as does one of this very router: a claim that it gave up, since the store
# stood still, may be carried out late.
_WRITE = (
    "local prefix = ARGV[1]\n"
    + _NOW
    + """
local verdicts = {}
local function write(id, fence, entry, key, from, count, blob, ending, frees)
  local record, tokens = prefix .. 'request:' .. id, prefix .. 'tokens:' .. id
  local had = redis.call('HMGET', record, 'fence', 'n', 'end', 'holder')
  local mine = had[1] and tonumber(had[1]) == fence and had[4] == ARGV[2]
  if had[1] and not mine then
    local over = had[3] or had[4] == ARGV[2] or not lives(had[4])
    if had[4] == ARGV[2] and not had[3] and tonumber(had[1]) > fence then return tonumber(had[1]) end
    if tonumber(had[1]) >= fence or not over then return 'fenced' end
  end
  if entry ~= '' then
    local at = mine and redis.call('HGET', record, 'at') or string.format('%.0f', now_us)
    redis.call('DEL', record, tokens)
    redis.call('HSET', record, 'holder', ARGV[2], 'fence', string.format('%.0f', fence), 'entry', entry, 'n', 0,
               'at', at)
    if key ~= '' then
      local known = redis.call('GET', prefix .. 'key:' .. key)
      if not known or redis.call('EXISTS', prefix .. 'request:' .. known) == 0 then
        redis.call('SET', prefix .. 'key:' .. key, id, 'PX', ARGV[3])
      end
    end
    had = {fence, 0}
  elseif not mine then
    return 'missing'
  end
  local n = tonumber(had[2])
  if n > 0 and redis.call('EXISTS', tokens) == 0 then return 'missing' end -- evicted
  if from ~= n and not (ending ~= '' and count == 0 and from < n) then return 'missing' end
  if count > 0 then
    redis.call('RPUSH', tokens, blob)
    redis.call('HSET', record, 'n', n + count)
  end
  local life_ms = ARGV[3]
  if ending ~= '' then
    redis.call('HSET', record, 'end', ending)
    life_ms = ARGV[4]
    if frees ~= '' and redis.call('GET', prefix .. 'key:' .. frees) == id then
      redis.call('DEL', prefix .. 'key:' .. frees)
    end
  end
  redis.call('PEXPIRE', record, life_ms)
  redis.call('PEXPIRE', tokens, life_ms)
  return 'written'
end
for at = 5, #ARGV, 9 do
  local done, verdict = pcall(write, ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2], ARGV[at + 3],
                              tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5]), ARGV[at + 6], ARGV[at + 7],
                              ARGV[at + 8])
  if not done then verdict = {'failed', type(verdict) == 'table' and verdict.err or verdict} end
  verdicts[#verdicts + 1] = verdict
end
return verdicts
"""
)


class StoreRefused(ValueError):
    """The store cannot be this cluster's; the message is for people."""


class RedisStore:
    """A RequestStore (router/journal.py) in Redis.

    `holder` names this router process alone. `identity`: what must be the same for one router to go on where another
    stopped: model, dtype, exactness.
    """

    def __init__(self, url: str, *, prefix: str, holder: str, identity: str) -> None:
        self._prefix = f"{prefix}:"
        self._holder = holder
        self._identity = identity
        self._boot = ""
        self._is_member = False  # the store has said that no other cluster lives there
        # More calls than connections wait for one another: a burst is no sign that the store is away.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            socket_timeout=CALL_TIMEOUT_S,
            socket_connect_timeout=CALL_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),  # of a connection that broke while it waited in the pool
            max_connections=CONNECTIONS_MAX,
            timeout=CALL_TIMEOUT_S,
        )
        self._redis = redis.asyncio.Redis.from_pool(pool)
        scripts = (_OPEN, _RENEW, _CLAIM, _TAKE_OVER, _WRITE)
        self._open, self._renew, self._claim, self._take_over, self._write = map(self._redis.register_script, scripts)

    async def open(self) -> int:
        """The store's time in microseconds. Raises StoreRefused when another cluster lives there, or StoreDown."""
        other, now_us = await self._call(self._open, self._identity, self._holder)
        self._is_member = not other
        if other:
            raise StoreRefused(self._refusal(other))
        return int(now_us)

    def _refusal(self, other: bytes) -> str:
        return (
            f"redis: the keys {self._prefix}* are those of a cluster that serves {other.decode()}, this one serves "
            f"{self._identity}; choose another database or --redis-prefix"
        )

    async def leave(self) -> None:
        """This router serves nothing any more: what it had may be taken over, and its ids are free. Hangs up."""
        with suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._redis.zrem(f"{self._prefix}routers", self._holder)
        await self._redis.aclose()

    async def renew(self) -> bool:
        """See RequestStore."""
        fresh = secrets.token_hex(8)  # for a store that has forgotten: not the id of before
        other, named = await self._call(self._renew, self._identity, self._holder, LEASE_MS, fresh)
        self._is_member = not other
        if other:
            raise StoreDown(self._refusal(other))
        boot = named.decode()
        known = bool(self._boot == boot)
        self._boot = boot
        return known

    async def claim(self, write: Write, key: str) -> Kept | RequestId | None:
        """See RequestStore."""
        assert write.entry is not None, "a claim says what was asked"
        entry = wire.encode_entry(*write.entry)
        found = await self._ask(self._claim, self._holder, write.request_id, write.fence, entry, key, RUNNING_MS)
        if not found:
            return None
        if found[0] == b"taken":
            return write.request_id
        new, keep = self._read(wire.decode_entry, found[1])
        return Kept(new=new, keep=keep, tokens=(), ended=None, fence=0)

    async def look(self, request_id: RequestId) -> Seen | None:
        """See RequestStore."""
        try:
            async with asyncio.timeout(2 * CALL_TIMEOUT_S):
                entry = await self._redis.hget(f"{self._prefix}request:{request_id}", "entry")
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreDown(f"{type(error).__name__}: {error}") from None
        if entry is None:
            return None
        new, keep = self._read(wire.decode_entry, entry)
        return Seen(new=new, keep=keep, mark=bytes(entry))  # type: ignore[arg-type]  # it is not decoded

    async def take_over(self, request_id: RequestId, fence: int, mark: bytes = b"") -> Kept | None:
        """See RequestStore."""
        found = await self._ask(self._take_over, self._holder, request_id, fence, mark)
        if not found:
            return None
        entry, fence, ending, age_ms, *pieces = found
        new, keep = self._read(wire.decode_entry, entry)
        ended = self._read(wire.decode_end, ending) if ending else None
        tokens = self._read(lambda content: wire.decode_tokens(request_id, content), pieces)
        left_ms = max(1, new.deadline_ms - int(age_ms)) if new.deadline_ms else 0
        return Kept(
            new=replace(new, deadline_ms=left_ms),
            keep=keep,
            tokens=tokens if ended is None else tokens[: ended.num_tokens],
            ended=ended,
            fence=int(fence),
        )

    async def write(self, writes: Sequence[Write]) -> list[Verdict | Behind]:
        """See RequestStore."""
        words: list[str | int | bytes] = [self._holder, RUNNING_MS, ENDED_MS]
        for each in writes:
            entry = b"" if each.entry is None else wire.encode_entry(*each.entry)
            ending = b"" if each.ended is None else wire.encode_end(each.ended)
            blob = wire.encode_tokens(each.tokens) if each.tokens else b""
            key = "" if each.entry is None else each.entry[1].key
            words += [each.request_id, each.fence, entry, key, each.from_index, len(each.tokens), blob, ending]
            words.append(each.frees)
        answers = await self._ask(self._write, *words)
        failed = [each[1].decode(errors="replace") for each in answers if isinstance(each, list)]
        if failed and len(failed) == len(answers):
            raise StoreDown(failed[0])
        return [_verdict(each) for each in answers]

    async def _ask(self, script: AsyncScript, *words: str | int | bytes) -> Any:
        """A call about requests: never to another cluster's, also of a router that came while the store was away."""
        if not self._is_member:
            try:
                await self.open()
            except StoreRefused as error:
                raise StoreDown(str(error)) from None
        return await self._call(script, *words)

    async def _call(self, script: AsyncScript, *words: str | int | bytes) -> Any:
        call: Awaitable[Any] = script(args=[self._prefix, *words])
        try:
            async with asyncio.timeout(2 * CALL_TIMEOUT_S):
                return await call
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreDown(f"{type(error).__name__}: {error}") from None

    @staticmethod
    def _read(decode: Any, content: Any) -> Any:
        try:
            return decode(content)
        except ValueError as error:
            raise StoreDown(f"what the store holds cannot be read: {error}") from None


def _verdict(answer: bytes | int | list[bytes]) -> Verdict | Behind:
    """What could not be written is missing: the others are not held up by it, and it is written anew."""
    if isinstance(answer, list):
        return Verdict.MISSING
    return Behind(answer) if isinstance(answer, int) else Verdict(answer.decode())


def identity_of(*, model: str, dtype: str, exact: bool) -> str:
    """What routers must have in common to go on with one another's requests."""
    return json.dumps({"model": model, "dtype": dtype, "exact": exact}, sort_keys=True)
