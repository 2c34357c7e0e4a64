"""Which frames an agent lets land, and when an attempt is quiet."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_transfer.agent_attempts import ENDED_FOR_S, MAX_ENDED_ATTEMPTS, Attempts, Verdict
from kv_transfer.messages import ExpectFrames, FrameHeader
from tandem.request import TransferId

T = TransferId("t")
NOW_S = 1000.0
EXPECT = ExpectFrames(
    transfer_id=T, epoch=1, source_incarnation=1, target_incarnation=2, blocks=(3, 4), generations=(5, 6), endpoint=""
)
FRAME = FrameHeader(
    transfer_id=T, epoch=1, source_incarnation=1, target_incarnation=2, sequence=0, source_blocks=(1, 2),
    source_generations=(0, 0), target_blocks=(3, 4), target_generations=(5, 6), num_bytes=2,
)  # fmt: skip


def _expecting() -> Attempts:
    attempts = Attempts()
    assert attempts.expect(EXPECT, source_agent=9) is None
    return attempts


def test_a_frame_lands_once_and_its_double_is_only_acknowledged() -> None:
    attempts = _expecting()
    assert attempts.take(FRAME, 7, source_agent=9).verdict is Verdict.TAKE
    assert attempts.take(FRAME, 7, source_agent=9).verdict is Verdict.BUSY
    assert attempts.landed(FRAME, 7)
    assert attempts.take(FRAME, 7, source_agent=9).verdict is Verdict.AGAIN
    assert attempts.take(FRAME, 8, source_agent=9).verdict is Verdict.REFUSE  # same sequence, other content


def test_what_is_not_granted_is_refused_with_the_reason() -> None:
    attempts = _expecting()
    for frame, agent, verdict in (
        (replace(FRAME, epoch=2), 9, Verdict.UNKNOWN),
        (replace(FRAME, transfer_id=TransferId("u")), 9, Verdict.UNKNOWN),
        (FRAME, 8, Verdict.REFUSE),
        (replace(FRAME, source_incarnation=3), 9, Verdict.REFUSE),
        (replace(FRAME, target_incarnation=3), 9, Verdict.REFUSE),
        (replace(FRAME, target_generations=(5, 5)), 9, Verdict.REFUSE),
        (replace(FRAME, target_blocks=(3, 5)), 9, Verdict.REFUSE),
    ):
        answer = attempts.take(frame, 7, source_agent=agent)
        assert answer.verdict is verdict
        assert answer.reason.startswith("not granted: ")


def test_a_second_expectation_adds_blocks() -> None:
    attempts = _expecting()
    assert attempts.expect(replace(EXPECT, blocks=(7,), generations=(1,)), source_agent=9) is None
    frame = replace(FRAME, target_blocks=(4, 7), target_generations=(6, 1))
    assert attempts.take(frame, 7, source_agent=9).verdict is Verdict.TAKE


def test_an_end_while_a_frame_arrives_is_quiet_only_afterwards_and_nothing_lands() -> None:
    attempts = _expecting()
    attempts.take(FRAME, 7, source_agent=9)
    assert not attempts.end(T, 1, NOW_S)
    assert not attempts.settle(T, 1, NOW_S)
    assert attempts.take(replace(FRAME, sequence=1), 7, source_agent=9).verdict is Verdict.REFUSE
    assert not attempts.landed(FRAME, 7)
    assert attempts.settle(T, 1, NOW_S)
    assert not attempts.settle(T, 1, NOW_S)
    assert attempts.end(T, 1, NOW_S)  # asked again: quiet, again
    assert attempts.expect(EXPECT, source_agent=9) == "the attempt has ended"


def test_ended_attempts_are_forgotten_in_the_end() -> None:
    attempts = Attempts()
    for number in range(MAX_ENDED_ATTEMPTS + 1):
        assert attempts.end(TransferId(str(number)), 1, NOW_S)
    assert attempts.take(replace(FRAME, transfer_id=TransferId("1")), 7, source_agent=9).verdict is Verdict.REFUSE
    assert attempts.take(replace(FRAME, transfer_id=TransferId("0")), 7, source_agent=9).verdict is Verdict.UNKNOWN


def test_ended_attempts_are_forgotten_when_none_of_their_frames_can_come() -> None:
    """An agent that lives long remembers no more than one that is two minutes old."""
    attempts = Attempts()
    for number in range(1000):
        assert attempts.end(TransferId(str(number)), 1, NOW_S + number)
    assert len(attempts._ended) == ENDED_FOR_S + 1
    for number, verdict in ((999, Verdict.REFUSE), (880, Verdict.REFUSE), (878, Verdict.UNKNOWN)):
        answer = attempts.take(replace(FRAME, transfer_id=TransferId(str(number))), 7, source_agent=9)
        assert answer.verdict is verdict


class AttemptsMachine(RuleBasedStateMachine):
    """Frames come and go, in and out, around an end: quiet is told once, and never while something is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts = _expecting()
        self.taking: set[int] = set()
        self.sending = 0
        self.ended = False
        self.quiet = False

    def _settled(self) -> None:
        if self.attempts.settle(T, 1, NOW_S):
            assert self.ended
            assert not self.quiet
            self.quiet = True

    @rule(sequence=st.integers(0, 5))
    def take(self, sequence: int) -> None:
        if self.attempts.take(replace(FRAME, sequence=sequence), 7, source_agent=9).verdict is Verdict.TAKE:
            assert not self.ended
            self.taking.add(sequence)

    @precondition(lambda self: self.taking)
    @rule(data=st.data(), whole=st.booleans())
    def finish(self, data: st.DataObject, whole: bool) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.taking)))
        self.taking.discard(sequence)
        if whole:
            assert self.attempts.landed(replace(FRAME, sequence=sequence), 7) is not self.ended
        else:
            self.attempts.dropped(replace(FRAME, sequence=sequence))
        self._settled()

    @rule()
    def send(self) -> None:
        if self.attempts.send(FRAME):
            assert not self.ended
            self.sending += 1

    @precondition(lambda self: self.sending)
    @rule()
    def sent(self) -> None:
        self.sending -= 1
        assert self.attempts.sent(FRAME) is not self.ended
        self._settled()

    @precondition(lambda self: not self.ended)
    @rule()
    def end(self) -> None:
        self.ended = True
        self.quiet = self.attempts.end(T, 1, NOW_S)

    @invariant()
    def quiet_is_told_exactly_when_nothing_is_under_way(self) -> None:
        assert self.quiet == (self.ended and not self.taking and not self.sending)


TestAttempts = AttemptsMachine.TestCase
TestAttempts.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
