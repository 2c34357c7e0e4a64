"""The order of prefills: who is about to be late, then the shortest, steadily and without starving anybody."""

from __future__ import annotations

from random import Random

import pytest

from prefill_worker.config import PrefillConfig, QueueConfig
from prefill_worker.queue import Lane, PrefillCost, PrefillQueue, Prompt
from tandem.request import RequestId


def prompt(
    name: str, remaining: int, *, received_ms: int = 0, started: bool = False, recomputed: bool = False
) -> Prompt:
    return Prompt(
        request_id=RequestId(name),
        remaining_tokens=remaining,
        total_tokens=remaining,
        received_ms=received_ms,
        started=started,
        recomputed=recomputed,
    )


def order(queue: PrefillQueue, now_ms: int, *prompts: Prompt) -> list[str]:
    return [str(place.request_id) for place in queue.rank(now_ms, prompts)]


def queue(**settings: float) -> PrefillQueue:
    return PrefillQueue(QueueConfig(token_ms=1.0, **settings))  # type: ignore[arg-type]


def test_shortest_remaining_work_goes_first() -> None:
    assert order(queue(), 0, prompt("long", 900), prompt("short", 10), prompt("middle", 300)) == [
        "short",
        "middle",
        "long",
    ]


def test_equal_work_is_first_come_first_served() -> None:
    assert order(queue(), 10, prompt("b", 50, received_ms=5), prompt("a", 50, received_ms=1)) == ["a", "b"]


def test_who_is_about_to_be_late_goes_before_the_shortest() -> None:
    """900 ms of work and a margin of a quarter, due at 5000: at 3000 the slack is 875 ms, less than the guard."""
    places = queue().rank(3_000, [prompt("short", 10, received_ms=2_990), prompt("urgent", 900)])
    assert [place.lane for place in places] == [Lane.URGENT, Lane.ON_TIME]
    assert places[0].request_id == "urgent"
    assert "slack is 875 ms" in places[0].reason


def test_earliest_due_first_among_the_urgent() -> None:
    assert order(queue(), 4_500, prompt("b", 100, received_ms=200), prompt("a", 300, received_ms=100)) == ["a", "b"]


def test_what_is_late_comes_last_by_aged_work() -> None:
    late = [prompt("new", 100, received_ms=0), prompt("old", 300, received_ms=-5_000)]
    assert order(queue(), 6_000, *late, prompt("fresh", 2_000, received_ms=6_000)) == ["fresh", "old", "new"]


def test_starving_prompt_goes_first_at_last() -> None:
    ranked = queue().rank(40_000, [prompt("young", 5, received_ms=39_999), prompt("starving", 900)])
    assert (ranked[0].request_id, ranked[0].lane) == ("starving", Lane.URGENT)


def test_small_gain_does_not_switch() -> None:
    line = queue()
    running = prompt("running", 1_000, started=True)
    line.rank(0, [running])
    line.ran(0, [running.request_id])
    assert order(line, 1, running, prompt("newer", 950))[0] == "running"
    assert order(line, 1, running, prompt("newer", 850))[0] == "newer"


def test_suspension_ends_after_its_bound() -> None:
    line = queue(suspend_ms=500)
    long = prompt("long", 1_000, started=True)
    line.rank(0, [long])
    line.ran(0, [long.request_id])
    shorts = [prompt(f"s{i}", 10, received_ms=i) for i in range(3)]
    assert order(line, 100, long, *shorts)[-1] == "long"
    line.ran(100, [shorts[0].request_id])
    ranked = line.rank(600, [long, *shorts])
    assert (ranked[0].request_id, ranked[0].lane) == ("long", Lane.RESUMED)
    assert "stood still for 600 ms" in ranked[0].reason


def test_suspensions_are_counted_and_bounded() -> None:
    line = queue(suspensions_max=2)
    long = prompt("long", 1_000, started=True)
    for turn in range(2):
        line.rank(turn, [long])
        line.ran(turn, [long.request_id])
        line.rank(turn, [long, prompt("short", 10)])
        line.ran(turn, [RequestId("short")])
    ranked = line.rank(3, [long, prompt("other", 10)])
    assert (ranked[0].request_id, ranked[0].reason) == ("long", "it was suspended 2 times")


def test_running_request_that_lost_its_blocks_goes_first() -> None:
    assert order(queue(), 0, prompt("short", 1), prompt("victim", 500, recomputed=True))[0] == "victim"


def test_nobody_starves_under_a_stream_of_short_prompts() -> None:
    """One engine at 1 token a millisecond, more work than it can do: the long prompt still ends."""
    line, random = queue(starve_ms=10_000), Random(1)
    left = {"long": 3_000}
    came = {"long": 0}
    now_ms, num = 0, 0
    while "long" in left:
        assert now_ms < 60_000, "the long prompt starves"
        num += 1
        left[f"s{num}"] = random.randrange(100, 400)
        came[f"s{num}"] = now_ms
        prompts = [prompt(name, tokens, received_ms=came[name], started=False) for name, tokens in left.items()]
        first = line.rank(now_ms, prompts)[0].request_id
        line.ran(now_ms, [first])
        left[first] -= 200
        if left[first] <= 0:
            del left[first]
        now_ms += 200


def test_cost_follows_what_is_measured() -> None:
    cost = PrefillCost(token_ms=1.0, pair_ms=0.01)
    assert cost.predict_ms(100, 100) == 100 + 0.01 * 100 * 100 / 2
    assert cost.predict_ms(50, 100) == 50 + 0.01 * 50 * 150 / 2
    for _ in range(100):
        cost.observe([(100, 100)], 300)
    assert cost.predict_ms(100, 100) == pytest.approx(300, rel=0.01)
    cost.observe([], 50)
    assert cost.predict_ms(100, 100) == pytest.approx(300, rel=0.01)


def test_order_is_a_permutation_for_any_prompts() -> None:
    random = Random(7)
    line = queue()
    for now_ms in range(0, 20_000, 500):
        prompts = [
            prompt(
                f"r{i}", random.randrange(1, 5_000), received_ms=now_ms - random.randrange(9_000), started=i % 2 == 0
            )
            for i in range(random.randrange(8))
        ]
        ranked = line.rank(now_ms, prompts)
        assert sorted(place.request_id for place in ranked) == sorted(each.request_id for each in prompts)
        line.ran(now_ms, [place.request_id for place in ranked[:2]])


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="ttft_slo_ms is 0, must be positive"):
        QueueConfig(ttft_slo_ms=0)
    with pytest.raises(ValueError, match="guard_ms is -1, must not be negative"):
        QueueConfig(guard_ms=-1)
    with pytest.raises(ValueError, match="max_queued is 0, must be at least 1"):
        PrefillConfig(max_queued=0)
