"""Frames leave by priority, then in order, and none waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.frame_queue import AGE_MS, MAX_QUEUED_FRAMES, FrameQueue, Waiting
from kv_transfer.messages import FrameHeader
from tandem.request import TransferId


def frame(sequence: int) -> FrameHeader:
    return FrameHeader(
        transfer_id=TransferId("t"), epoch=1, source_incarnation=1, target_incarnation=2, sequence=sequence,
        source_blocks=(1,), source_generations=(1,), target_blocks=(1,), target_generations=(1,), num_bytes=1,
    )  # fmt: skip


def next_of(queue: FrameQueue, now_ms: int) -> Waiting:
    waiting = queue.peek(now_ms=now_ms)
    assert waiting is not None
    queue.take(waiting)
    return waiting


def order(queue: FrameQueue, now_ms: int) -> list[int]:
    return [next_of(queue, now_ms).header.sequence for _ in range(len(queue))]


def test_urgent_frames_go_first_and_each_kind_in_order() -> None:
    queue = FrameQueue()
    for sequence, priority in enumerate((1, 0, 2, 1, 0)):
        assert queue.put(frame(sequence), priority, now_ms=0)
    assert order(queue, 0) == [1, 4, 0, 3, 2]
    assert queue.peek(now_ms=0) is None


def test_a_frame_that_went_back_goes_before_its_like_and_after_what_is_urgent() -> None:
    queue = FrameQueue()
    for sequence in range(3):
        queue.put(frame(sequence), 1, now_ms=0)
    first, second = next_of(queue, 0), next_of(queue, 0)
    queue.put(frame(9), 0, now_ms=1)
    for waiting in (second, first):
        queue.put_back(waiting)
    assert order(queue, 1) == [9, 0, 1, 2]


def test_a_frame_that_waited_long_goes_before_younger_urgent_ones() -> None:
    queue = FrameQueue()
    queue.put(frame(0), 1, now_ms=0)
    for sequence in range(1, 4):
        queue.put(frame(sequence), 0, now_ms=10)
    assert next_of(queue, AGE_MS - 1).header.sequence == 1
    assert next_of(queue, AGE_MS).header.sequence == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 300)), min_size=1, max_size=60))
def test_under_urgent_load_every_frame_leaves_soon_after_its_age(arrivals: list[tuple[int, int]]) -> None:
    """One leaves whenever one comes: a frame waits no longer than its age and the queue that it found."""
    queue, now_ms, came, left = FrameQueue(), 0, {}, {}
    queue.put(frame(10_000), 2, now_ms=0)
    came[10_000] = (0, 1)
    for sequence, (priority, gap_ms) in enumerate(arrivals):
        now_ms += gap_ms
        queue.put(frame(sequence), priority, now_ms=now_ms)
        came[sequence] = (now_ms, len(queue))
        left[next_of(queue, now_ms).header.sequence] = now_ms
    for sequence, (since_ms, found) in came.items():
        assert left.get(sequence, now_ms) - since_ms <= AGE_MS + 300 * found


def test_the_queue_is_bounded_and_can_be_cleared() -> None:
    queue = FrameQueue()
    for sequence in range(MAX_QUEUED_FRAMES):
        assert queue.put(frame(sequence), sequence % 2, now_ms=0)
    assert not queue.put(frame(0), 0, now_ms=0)
    assert len(queue.clear()) == MAX_QUEUED_FRAMES
    assert len(queue) == 0
    assert queue.put(frame(0), 0, now_ms=0)
