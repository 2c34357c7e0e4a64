"""The last minute of a router: sums by the second, bounded times, and what its metrics feed it with."""

from __future__ import annotations

from router.events import Cause, Recovering
from router.lately import TIMES_MAX, Counted, LastMinute, Timed
from router.metrics import Api, EdgeMetrics
from router.move import MoveOutcome, MoveReason, MoveRecord
from router.stages import FirstToken
from tandem.errors import Overloaded
from tandem.request import RequestId, WorkerId


def test_what_is_older_than_a_minute_is_forgotten() -> None:
    last = LastMinute(0.0)
    last.count(1.0, Counted.TOKENS, 5)
    last.took(1.0, Timed.TTFT, 40.0)
    last.count(50.9, Counted.TOKENS, 7)
    last.count(51.0, Counted.REFUSED)
    last.took(51.0, Timed.TPOT, 9.0)
    early = last.look(51.0)
    assert (early.seconds, early.counts[Counted.TOKENS], early.counts[Counted.REFUSED]) == (51.0, 12, 1)
    assert (early.ttft_ms, early.tpot_ms) == ((40.0,), (9.0,))
    late = last.look(62.0)
    assert (late.seconds, late.counts[Counted.TOKENS], late.tokens_total) == (60.0, 7, 12)
    assert (late.ttft_ms, late.tpot_ms) == ((), (9.0,))
    over = last.look(200.0)
    assert set(over.counts.values()) == {0}
    assert over.tokens_total == 12


def test_times_are_bounded_and_the_newest_stay() -> None:
    last = LastMinute(0.0)
    for number in range(TIMES_MAX + 10):
        last.took(1.0, Timed.TTFT, float(number))
    times = last.look(2.0).ttft_ms
    assert (len(times), times[0], times[-1]) == (TIMES_MAX, 10.0, float(TIMES_MAX + 9))


def test_the_edge_counts_what_its_clients_see() -> None:
    now = [100.0]
    metrics = EdgeMetrics(clock=lambda: now[0])
    now[0] = 110.0
    metrics.first_tokens(1)
    metrics.next_tokens(2, 0.01)
    metrics.resumed(3)
    metrics.first_token(FirstToken(ttft_ms=50.0, stages=()))
    metrics.answered(num_prompt_tokens=1, num_cached_tokens=0, tpot_s=0.02)
    metrics.answered(num_prompt_tokens=1, num_cached_tokens=0, tpot_s=None)
    metrics.refused(Api.HTTP, Overloaded("full", retry_after_ms=1))
    metrics.noted(Recovering(request_id=RequestId("r"), cause=Cause.OVERDUE))
    for outcome in (MoveOutcome.MOVED, MoveOutcome.FAILED):
        metrics.moved(
            MoveRecord(
                request_id=RequestId("r"), source=WorkerId("a"), target=WorkerId("b"), reason=MoveReason.BALANCE,
                why="", outcome=outcome,
            )
        )  # fmt: skip
    lately = metrics.lately()
    assert lately.counts == {Counted.TOKENS: 6, Counted.REFUSED: 1, Counted.RECOVERED: 1, Counted.MOVED: 1}
    assert (lately.seconds, lately.ttft_ms, lately.tpot_ms, lately.tokens_total) == (10.0, (50.0,), (20.0,), 6)
