"""The figures of the last minutes: each second has what happened in it, and the number of seconds is bounded."""

from __future__ import annotations

from router.metrics import Api, EdgeMetrics
from router.move import MoveOutcome, MoveReason, MoveRecord
from router.recent import SAMPLES_MAX, SECONDS_MAX, Recent
from router.stages import FirstToken
from tandem.request import RequestId, WorkerId


def test_a_second_has_what_happened_in_it_and_no_other() -> None:
    recent = Recent()
    for ttft_ms in (30.0, 10.0, 20.0):
        recent.first_token(ttft_ms)
    recent.tokens(5)
    recent.moved("drain", carried_out=True)
    recent.moved("drain", carried_out=False)
    first, second = recent.close_second(), recent.close_second()
    assert first.ttft is not None
    assert (first.ttft.num, first.ttft.p50_ms, first.ttft.p95_ms) == (3, 20.0, 30.0)
    assert (first.tokens, first.moves, first.moves_failed, first.tpot) == (5, (("drain", 1),), 1, None)
    assert (second.number, second.tokens, second.ttft, second.moves) == (1, 0, None, ())


def test_seconds_and_samples_are_bounded() -> None:
    recent = Recent()
    for _ in range(SAMPLES_MAX + 10):
        recent.first_token(1.0)
    closed = recent.close_second()
    assert closed.ttft is not None
    assert closed.ttft.num == SAMPLES_MAX + 10
    for _ in range(SECONDS_MAX + 5):
        recent.close_second()
    assert [each.number for each in recent.seconds()] == list(range(6, SECONDS_MAX + 6))


def test_the_edge_tells_of_tokens_first_tokens_answers_and_moves() -> None:
    metrics = EdgeMetrics()
    metrics.first_tokens(1)
    metrics.next_tokens(3, 0.01)
    metrics.resumed(2)
    metrics.first_token(FirstToken(ttft_ms=40.0, stages=()))
    metrics.answered(num_prompt_tokens=3, num_cached_tokens=0, tpot_s=0.012)
    metrics.answered(num_prompt_tokens=3, num_cached_tokens=0, tpot_s=None)
    metrics.ended(Api.CHAT, "stop", 1.0)
    for outcome in (MoveOutcome.MOVED, MoveOutcome.FAILED):
        record = MoveRecord(
            request_id=RequestId("r"),
            source=WorkerId("a"),
            target=WorkerId("b"),
            reason=MoveReason.BALANCE,
            why="",
            outcome=outcome,
        )
        metrics.moved(record)
    second = metrics.recent.close_second()
    assert (second.tokens, second.ended, second.moves, second.moves_failed) == (6, 1, (("balance", 1),), 1)
    assert second.ttft is not None
    assert second.tpot is not None
    assert (second.ttft.p50_ms, second.tpot.num, second.tpot.p50_ms) == (40.0, 1, 12.0)
