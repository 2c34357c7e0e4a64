"""Workloads and figures: traces are read and scaled as stated, percentiles and goodput are what they claim."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.figures import Outcome, Slo, is_good, percentile, summary
from benchmarks.workload import BadWorkload, Scale, from_trace, poisson, random_prompts, uniform


def test_mooncake_rows_keep_their_arrivals(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(
        '{"timestamp": 1000, "input_length": 800, "output_length": 50, "hash_ids": [0]}\n'
        '{"timestamp": 4000, "input_length": 80000, "output_length": 5000, "hash_ids": [0]}\n'
    )
    first, second = from_trace(trace, num_requests=5, scale=Scale(length=0.1), seed=0)
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0, 80, 5)
    assert (second.arrival_s, second.prompt_tokens, second.output_tokens) == (3, 1024, 128)


def test_azure_rows_are_stretched_to_the_rate(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,100,10\n2023-11-16 18:17:04.4799600,100,10\n2023-11-16 18:17:05.9799600,100,10\n"
    )
    rows = from_trace(trace, num_requests=3, scale=Scale(rate=0.5), seed=0)
    assert [round(row.arrival_s, 3) for row in rows] == [0, 1.5, 6]


def test_length_only_traces_need_a_rate(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n74,9\n")
    with pytest.raises(BadWorkload, match="state a rate"):
        from_trace(trace, num_requests=1, scale=Scale(), seed=0)
    assert from_trace(trace, num_requests=1, scale=Scale(rate=2), seed=0)[0].prompt_tokens == 74


def test_unknown_columns_are_named(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("a,b\n1,2\n")
    with pytest.raises(BadWorkload, match=r"\['a', 'b'\]"):
        from_trace(trace, num_requests=1, scale=Scale(), seed=0)


def test_poisson_has_its_rate_and_its_seed() -> None:
    times = poisson(4000, rate=5, seed=1)
    assert times == poisson(4000, rate=5, seed=1) != poisson(4000, rate=5, seed=2)
    assert times[-1] == pytest.approx(800, rel=0.05)


def test_prompts_share_nothing() -> None:
    offered = uniform(num_requests=10, rate=1, prompt_tokens=64, output_tokens=8, spread=0.5, seed=3)
    prompts = random_prompts(offered, vocab_size=49152, seed=3)
    assert [len(prompt) for prompt in prompts] == [one.prompt_tokens for one in offered]
    assert len({prompt[:16] for prompt in prompts}) == 10


def test_percentile_interpolates() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile([1, 2, 3], 1.0) == 3
    assert math.isnan(percentile([], 0.5))


def outcome(*times: float, error: str = "") -> Outcome:
    return Outcome(sent_s=10, token_times_s=list(times), error=error)


def test_times_of_one_request() -> None:
    one = outcome(10.5, 10.6, 10.9)
    assert one.ttft_ms == pytest.approx(500)
    assert one.tpot_ms == pytest.approx(200)
    assert one.itls_ms == pytest.approx([100, 300])
    assert outcome(11).tpot_ms is None


def test_goodput_is_joint_and_counts_refusals_as_misses() -> None:
    slo = Slo(ttft_ms=600, tpot_ms=150)
    slow_tokens, slow_start = outcome(10.5, 10.6, 10.9), outcome(11, 11.1)
    good, refused = outcome(10.5, 10.6, 10.7), outcome(error="RESOURCE_EXHAUSTED: full")
    assert [is_good(one, slo) for one in (slow_tokens, slow_start, good, refused)] == [False, False, True, False]
    figures = summary([slow_tokens, slow_start, good, refused], slo=slo)
    assert figures["good_share"] == 0.25
    assert figures["errors"] == {"RESOURCE_EXHAUSTED: full": 1}
    assert figures["completed"] == 3
