"""The stages of TTFT: each as it was measured, together TTFT, whatever was told and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.stages import FirstToken, Stage, StageBook
from tandem.messages import FirstTokenTimes
from tandem.request import RequestId

NAME = RequestId("r")


def times(queue_ms: float, prefill_ms: float, hold_ms: float) -> FirstTokenTimes:
    return FirstTokenTimes(queue_ms=queue_ms, prefill_ms=prefill_ms, hold_ms=hold_ms)


def shown(first: FirstToken | None) -> dict[str, float]:
    assert first is not None
    return {stage.value: round(stage_ms, 6) for stage, stage_ms in first.stages}


def test_each_stage_is_what_was_measured_and_the_rest_is_one_of_its_own() -> None:
    book = StageBook(8)
    book.submitted(NAME, arrived_s=1.000, at_s=1.004)
    book.assigned(NAME, 1.010)
    book.told(NAME, times(20, 50, 73))
    book.came(NAME, 1.085)
    assert book.find(NAME) is None
    first = book.written(NAME, 1.087)
    assert first is not None
    assert first.ttft_ms == pytest.approx(87)
    assert shown(first) == {
        "edge": 4, "line": 6, "retry": 0, "wire": 2, "queue": 20, "prefill": 50, "deliver": 2, "other": 3,
    }  # fmt: skip
    assert book.find(NAME) is first
    assert book.written(NAME, 2.0) is None, "it counts once"


def test_an_attempt_that_gave_no_token_is_a_stage_and_its_times_are_not_the_next_ones() -> None:
    book = StageBook(8)
    book.submitted(NAME, arrived_s=0.0, at_s=0.0)
    book.assigned(NAME, 0.001)
    book.told(NAME, times(500, 500, 1000))
    book.assigned(NAME, 3.001)
    book.told(NAME, times(1, 8, 9))
    book.came(NAME, 3.011)
    found = shown(book.written(NAME, 3.011))
    assert (found["retry"], found["queue"], found["prefill"], found["wire"]) == (3000, 1, 8, 1)
    book.assigned(NAME, 9.0)  # it is placed again while it decodes
    assert book.find(NAME) is not None


def test_what_a_worker_does_not_tell_nobody_makes_up() -> None:
    book = StageBook(8)
    book.submitted(NAME, arrived_s=0.0, at_s=0.0)
    book.assigned(NAME, 0.0)
    book.came(NAME, 0.1)
    assert shown(book.written(NAME, 0.1))["other"] == 100


def test_the_oldest_is_forgotten_and_a_name_used_again_begins_anew() -> None:
    book = StageBook(2)
    for number in range(3):
        book.submitted(RequestId(f"r{number}"), arrived_s=0.0, at_s=0.0)
        book.came(RequestId(f"r{number}"), 0.0)
    assert book.written(RequestId("r0"), 1.0) is None
    assert book.written(RequestId("r2"), 1.0) is not None
    book.submitted(RequestId("r2"), arrived_s=5.0, at_s=5.0)
    assert book.find(RequestId("r2")) is None
    assert book.written(RequestId("r2"), 6.0) is None, "its first token has not come"


moments = st.floats(0, 100, allow_nan=False)
lengths = st.floats(-1000, 100_000, allow_nan=False)


@given(moments, moments, st.lists(moments, max_size=3), moments, moments, st.tuples(lengths, lengths, lengths))
def test_stages_are_never_negative_and_always_add_up(
    arrived_s: float,
    submitted_s: float,
    assigned_s: list[float],
    came_s: float,
    written_s: float,
    told: tuple[float, float, float],
) -> None:
    """Clocks may jump, and a worker may say anything."""
    book = StageBook(8)
    book.submitted(NAME, arrived_s=arrived_s, at_s=submitted_s)
    for at_s in assigned_s:
        book.assigned(NAME, at_s)
    book.told(NAME, times(*told))
    book.came(NAME, came_s)
    first = book.written(NAME, written_s)
    assert first is not None
    assert first.ttft_ms >= 0
    assert [stage for stage, _ in first.stages] == list(Stage)
    assert all(stage_ms >= 0 for _, stage_ms in first.stages)
    assert sum(stage_ms for _, stage_ms in first.stages) == pytest.approx(first.ttft_ms)
