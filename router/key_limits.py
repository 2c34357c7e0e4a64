"""How much each API key may ask: requests and tokens a minute as token buckets, and requests at once.

A bucket holds a minute's worth. Prompt tokens are taken when a request is let in, answer tokens as they are written:
nobody knows before how many there will be. So a bucket may go below zero, and the next request waits until it is full
enough again; over time no key gets more than its rate.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from router.api_keys import KeyEntry

MINUTE_MS = 60_000
CONCURRENT_RETRY_MS = 1_000  # when one of its own requests ends, nobody knows
KEYS_MAX = 65_536  # that are remembered; one that is forgotten starts with full buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class Limited:
    """The key may not ask this now. `limit` names which limit; come again after `retry_after_ms`."""

    limit: str
    reason: str
    retry_after_ms: int


@dataclass(slots=True)
class _Bucket:
    """Whole numbers: one request or token is MINUTE_MS units, so that each millisecond adds `per_minute` of them."""

    level: int
    at_ms: int

    def fill(self, now_ms: int, per_minute: int) -> None:
        gained = max(0, now_ms - self.at_ms) * per_minute
        self.level, self.at_ms = min(per_minute * MINUTE_MS, self.level + gained), now_ms

    def take(self, num: int) -> None:
        self.level -= num * MINUTE_MS

    def wait_ms(self, num: int, per_minute: int) -> int:
        """Until it holds so many: 0 when it does."""
        return max(0, -(-(num * MINUTE_MS - self.level) // per_minute))


@dataclass(slots=True, kw_only=True)
class _Usage:
    requests: _Bucket | None = None
    tokens: _Bucket | None = None
    running: int = 0


class KeyLimits:
    """The account of every key. A key whose limits change goes on with the levels it has, within the new bounds."""

    def __init__(self) -> None:
        self._usage: OrderedDict[str, _Usage] = OrderedDict()

    def begin(self, now_ms: int, key: KeyEntry, *, num_requests: int, num_tokens: int) -> Limited | None:
        """Takes the requests into account, all or none. `num_tokens`: of their prompts, each answer's own.

        What is more than a whole bucket holds is let in by a full one: it could never be otherwise.
        """
        usage = self._of(key.name)
        if key.concurrent is not None and usage.running + num_requests > key.concurrent:
            reason = f"{usage.running} requests of key {key.name!r} run, {num_requests} more would be over its limit"
            return Limited(
                limit="concurrent", reason=f"{reason} of {key.concurrent}", retry_after_ms=CONCURRENT_RETRY_MS
            )
        usage.requests = _filled(usage.requests, now_ms, key.requests_per_minute)
        usage.tokens = _filled(usage.tokens, now_ms, key.tokens_per_minute)
        for name, bucket, rate, cost in (
            ("requests", usage.requests, key.requests_per_minute, num_requests),
            ("tokens", usage.tokens, key.tokens_per_minute, num_tokens),
        ):
            if bucket is None or rate is None:
                continue
            wait_ms = bucket.wait_ms(min(cost, rate), rate)
            if wait_ms:
                return Limited(
                    limit=f"{name}_per_minute",
                    reason=f"key {key.name!r} has used up its {rate} {name} a minute",
                    retry_after_ms=wait_ms,
                )
        if usage.requests is not None:
            usage.requests.take(num_requests)
        if usage.tokens is not None:
            usage.tokens.take(num_tokens)
        usage.running += num_requests
        return None

    def give_back(self, key: KeyEntry, num_tokens: int) -> None:
        """Prompt tokens of requests that did not come to run. That they were asked counts."""
        usage = self._usage.get(key.name)
        if usage is not None and usage.tokens is not None:
            usage.tokens.take(-num_tokens)  # never more than a minute's worth: the next fill sees to it

    def adopt(self, key: KeyEntry) -> None:
        """A request of the key runs that was let in elsewhere."""
        self._of(key.name).running += 1

    def produced(self, key: KeyEntry, num_tokens: int) -> None:
        """Answer tokens of the key's requests were written."""
        usage = self._usage.get(key.name)
        if usage is not None and usage.tokens is not None:
            usage.tokens.take(num_tokens)

    def ended(self, key: KeyEntry, num_requests: int) -> None:
        """So many of its requests run no more."""
        usage = self._usage.get(key.name)
        if usage is not None:
            usage.running -= num_requests
            assert usage.running >= 0, f"requests of key {key.name} ended twice"

    def _of(self, name: str) -> _Usage:
        usage = self._usage.get(name)
        if usage is None:
            usage = self._usage[name] = _Usage()
            if len(self._usage) > KEYS_MAX:
                idle = next((each for each, of in self._usage.items() if of.running == 0 and each != name), None)
                if idle is not None:
                    del self._usage[idle]
        self._usage.move_to_end(name)
        return usage


def _filled(bucket: _Bucket | None, now_ms: int, per_minute: int | None) -> _Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return _Bucket(per_minute * MINUTE_MS, now_ms)
    bucket.fill(now_ms, per_minute)
    return bucket
