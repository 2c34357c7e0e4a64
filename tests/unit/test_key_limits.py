"""The limits of an API key: what is let in, when to come again, and that nobody gets more than its rate."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api_keys import KeyEntry
from router.key_limits import MINUTE_MS, KeyLimits


def entry(requests: int | None = None, tokens: int | None = None, concurrent: int | None = None) -> KeyEntry:
    return KeyEntry(
        name="a", digest=b"d" * 32, requests_per_minute=requests, tokens_per_minute=tokens, concurrent=concurrent
    )


def begin(limits: KeyLimits, now_ms: int, key: KeyEntry, requests: int = 1, tokens: int = 1) -> tuple[str, int] | None:
    limited = limits.begin(now_ms, key, num_requests=requests, num_tokens=tokens)
    return None if limited is None else (limited.limit, limited.retry_after_ms)


def test_requests_over_the_rate_wait_exactly_as_long_as_told() -> None:
    limits, key = KeyLimits(), entry(requests=6)
    assert [begin(limits, 0, key) for _ in range(6)] == [None] * 6
    assert begin(limits, 0, key) == ("requests_per_minute", 10_000)
    assert begin(limits, 9_999, key) == ("requests_per_minute", 1)
    assert begin(limits, 10_000, key) is None
    assert begin(limits, 10_000, key) == ("requests_per_minute", 10_000)


def test_answer_tokens_are_owed_and_paid_off_before_the_next_request() -> None:
    limits, key = KeyLimits(), entry(tokens=600)
    assert begin(limits, 0, key, tokens=100) is None
    limits.produced(key, 1100)  # 600 over the bucket
    assert begin(limits, 0, key, tokens=100) == ("tokens_per_minute", 70_000)
    assert begin(limits, 70_000, key, tokens=100) is None


def test_a_prompt_larger_than_the_bucket_is_let_in_by_a_full_one() -> None:
    limits, key = KeyLimits(), entry(tokens=100)
    assert begin(limits, 0, key, tokens=1000) is None
    assert begin(limits, 0, key, tokens=1) == ("tokens_per_minute", math.ceil(901 * MINUTE_MS / 100))


def test_concurrency_counts_what_runs_and_what_is_refused_costs_nothing() -> None:
    limits, key = KeyLimits(), entry(requests=100, concurrent=2)
    assert begin(limits, 0, key, requests=2) is None
    assert begin(limits, 0, key) == ("concurrent", 1_000)
    assert begin(limits, 0, key, requests=3) == ("concurrent", 1_000)
    limits.ended(key, 1)
    assert begin(limits, 0, key) is None
    limits.ended(key, 2)
    assert [begin(limits, 0, key) for _ in range(2)] == [None, None]
    with pytest.raises(AssertionError, match="ended twice"):
        limits.ended(key, 3)


def test_a_limit_that_is_changed_holds_at_once() -> None:
    limits = KeyLimits()
    assert begin(limits, 0, entry(requests=100)) is None
    assert begin(limits, 0, entry(requests=1), requests=1) is None  # 99 are left of the old one, of the new one 1
    assert begin(limits, 0, entry(requests=1)) == ("requests_per_minute", 60_000)
    assert begin(limits, 0, entry()) is None


def test_a_clock_that_steps_back_fills_nothing() -> None:
    limits, key = KeyLimits(), entry(requests=1)
    assert begin(limits, 100_000, key) is None
    assert begin(limits, 50_000, key) == ("requests_per_minute", 60_000)


@given(
    rate=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 50), st.integers(0, 200)), max_size=60),
)
def test_nobody_gets_more_than_its_rate_and_one_debt(rate: int, steps: list[tuple[int, int, int]]) -> None:
    """Whatever is asked when: tokens given never exceed a bucket, the rate over the time, and the last debt."""
    limits, key, now_ms, taken, last = KeyLimits(), entry(tokens=rate), 0, 0, 0
    for after_ms, prompt, answer in steps:
        now_ms += after_ms
        limited = limits.begin(now_ms, key, num_requests=1, num_tokens=prompt)
        if limited is not None:
            assert limited.retry_after_ms >= 1
            again = limits.begin(now_ms + limited.retry_after_ms, key, num_requests=1, num_tokens=prompt)
            assert again is None, "who waits as long as told is let in"
            now_ms += limited.retry_after_ms
        limits.produced(key, answer)
        limits.ended(key, 1)
        taken, last = taken + prompt + answer, prompt + answer
        assert taken - last <= rate + rate * now_ms / MINUTE_MS + 1e-6
