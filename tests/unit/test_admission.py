"""Admission of handoffs: rows, room, growth foreseen from the lengths of past answers."""

from __future__ import annotations

import pytest

from decode_worker.admission import Admission, Decision, Load, Verdict
from decode_worker.config import AdmissionConfig, DecodeConfig

BLOCK = 16


def admission(num_blocks: int = 100, **settings: int | float) -> Admission:
    return Admission(AdmissionConfig(**settings), num_blocks=num_blocks, block_size=BLOCK)  # type: ignore[arg-type]


def load(salt: int, num_tokens: int, *, generated: int = 0, left: int = 100) -> Load:
    return Load(salt=salt, num_tokens=num_tokens, num_generated=generated, num_left_max=left)


def decide(gate: Admission, wanted: Load, available: int, others: list[Load]) -> Decision:
    needed = -(-wanted.num_tokens // BLOCK)
    return gate.decide(wanted=wanted, num_new_blocks=needed, num_available=available, others=others)


def test_alone_on_the_worker_only_the_prompt_must_fit() -> None:
    assert decide(admission(10), load(1, 159, left=9_999), 10, []).verdict is Verdict.ADMIT


def test_prompt_that_can_never_fit_is_refused() -> None:
    decision = decide(admission(10), load(1, 160), 10, [])
    assert (decision.verdict, decision.reason) == (Verdict.REFUSE, "needs 11 blocks, the pool has 10")


def test_rows_are_bounded() -> None:
    decision = decide(admission(max_requests=2), load(3, 16), 90, [load(1, 16), load(2, 16)])
    assert (decision.verdict, decision.reason) == (Verdict.WAIT, "2 requests are here, at most 2 may")


def test_watermark_is_kept_while_others_run() -> None:
    gate = admission(100, watermark_share=0.05)
    assert decide(gate, load(2, 160, left=0), 16, [load(1, 16, left=0)]).verdict is Verdict.ADMIT
    assert decide(gate, load(2, 160, left=0), 15, [load(1, 16, left=0)]).verdict is Verdict.WAIT


def test_growth_that_fits_at_its_worst_needs_no_draws() -> None:
    decision = decide(admission(), load(2, 160, left=160), 80, [load(1, 160, left=320)])
    assert decision.verdict is Verdict.ADMIT
    assert dict(decision.scores)["growth"] == 30


def test_long_limits_and_short_answers_are_admitted_by_the_past() -> None:
    gate = admission()
    wanted, others = load(9, 160, left=4_000), [load(salt, 160, left=4_000) for salt in range(4)]
    assert decide(gate, wanted, 50, others).verdict is Verdict.WAIT, "nothing is known: 256 tokens each do not fit"
    for _ in range(50):
        gate.finished(40)
    decision = decide(gate, wanted, 50, others)
    assert (decision.verdict, decision.reason) == (Verdict.ADMIT, "0 of 20 draws overflow")


def test_long_answers_of_the_past_make_it_wait() -> None:
    gate = admission()
    for _ in range(50):
        gate.finished(1_500)
    decision = decide(gate, load(9, 160, left=4_000), 50, [load(salt, 160, left=4_000) for salt in range(4)])
    assert decision.verdict is Verdict.WAIT
    assert dict(decision.scores)["bad_draws"] == 20


def test_what_ends_soon_makes_room_for_what_comes() -> None:
    """Memory peaks in time: a request near its end gives its blocks back before the others have grown."""
    gate = admission()
    for _ in range(50):
        gate.finished(500)
    near_end = [load(salt, 1_000, generated=495, left=100) for salt in range(4)]
    assert decide(gate, load(9, 160, left=600), 25, near_end).verdict is Verdict.ADMIT
    fresh = [load(salt, 1_000, generated=5, left=600) for salt in range(4)]
    assert decide(gate, load(9, 160, left=600), 25, fresh).verdict is Verdict.WAIT


def test_answer_longer_than_all_of_the_past_is_expected_to_go_on() -> None:
    gate = admission(alpha=0.0)
    gate.finished(10)
    others = [load(salt, 1_000, generated=800, left=5_000) for salt in range(3)]
    assert decide(gate, load(9, 160, left=20), 12, others).verdict is Verdict.WAIT


def test_same_situation_gets_the_same_answer() -> None:
    gates = [admission(), admission()]
    for gate in gates:
        for length in range(1, 400, 7):
            gate.finished(length)
    others = [load(salt, 100 + salt, generated=salt, left=500) for salt in range(20)]
    for available in range(20, 90, 3):
        first, second = (decide(gate, load(99, 64, left=500), available, others) for gate in gates)
        assert first == second


def test_more_room_never_turns_a_yes_into_a_no() -> None:
    gate = admission(1_000)
    for length in range(1, 400, 7):
        gate.finished(length)
    others = [load(salt, 100 + salt, generated=salt, left=500) for salt in range(20)]
    verdicts = [decide(gate, load(99, 64, left=500), available, others).verdict for available in range(20, 700, 5)]
    first = verdicts.index(Verdict.ADMIT)
    assert set(verdicts[:first]) == {Verdict.WAIT}
    assert set(verdicts[first:]) == {Verdict.ADMIT}
    assert first > 0


def test_history_is_bounded_and_forgets_the_oldest() -> None:
    gate = admission(history_max=10)
    for _ in range(10):
        gate.finished(2_000)
    for _ in range(10):
        gate.finished(5)
    others = [load(salt, 160, left=4_000) for salt in range(4)]
    assert decide(gate, load(9, 160, left=4_000), 50, others).verdict is Verdict.ADMIT


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="num_draws is 0, must be at least 1"):
        AdmissionConfig(num_draws=0)
    with pytest.raises(ValueError, match=r"alpha is 1.0, must be at least 0 and less than 1"):
        AdmissionConfig(alpha=1.0)
    with pytest.raises(ValueError, match="early_offers_max is 0, must be at least 1"):
        DecodeConfig(early_offers_max=0)
