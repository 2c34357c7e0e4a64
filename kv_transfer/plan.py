"""Which blocks travel in which frame: the window that a source sends through, and the sizes of frames."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


def frame_blocks(block_bytes: int, max_frame_bytes: int) -> int:
    """Blocks in a full frame of at most `max_frame_bytes`; at least one, however large a block is."""
    return max(1, max_frame_bytes // block_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Blocks [first, first + num) of the request's block table, under way `tries` times so far."""

    sequence: int
    first: int
    num: int
    tries: int = 1


class SendWindow:
    """Cuts the blocks of a request into frames as they become ready, and keeps at most `credits` frames in flight.

    A failed frame goes again, ahead of new ones, under the same sequence and with the same blocks: the target's
    agent acknowledges a doubled one without writing it twice, and the digest does not change. What became ready while
    no credit was left travels together in larger frames.

    How many blocks there are may be known only later: a request that runs meanwhile has grown by then. Until `close`
    the window is never complete.
    """

    def __init__(self, *, num_blocks: int | None, num_reused: int, credits: int, blocks_per_frame: int) -> None:
        self.num_blocks: int | None = None
        self._num_reused = num_reused
        self._next = num_reused
        self._credits = credits
        self._blocks_per_frame = blocks_per_frame
        self._num_frames = 0
        self._in_flight: dict[int, Frame] = {}
        self._again: deque[Frame] = deque()
        self._checksums: dict[int, int] = {}
        if num_blocks is not None:
            self.close(num_blocks)

    def close(self, num_blocks: int) -> None:
        """There are so many blocks and no more."""
        assert self.num_blocks is None, f"closed at {self.num_blocks} blocks already"
        assert self._num_reused <= num_blocks, f"{self._num_reused} of {num_blocks} blocks reused"
        assert self._next <= num_blocks, f"{self._next} of {num_blocks} blocks sent"
        self.num_blocks = num_blocks

    @property
    def num_frames(self) -> int:
        """Frames cut so far."""
        return self._num_frames

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Sequences of the frames that the agent has."""
        return tuple(self._in_flight)

    @property
    def complete(self) -> bool:
        """Whether every block has been acknowledged."""
        return self.num_blocks is not None and self.num_acked == self.num_blocks

    @property
    def num_acked(self) -> int:
        """Blocks that are at the target, those that it had already included."""
        return self._next - sum(frame.num for frame in (*self._in_flight.values(), *self._again))

    @property
    def checksums(self) -> dict[int, int]:
        """Checksum by sequence of the acknowledged frames."""
        return dict(self._checksums)

    def due(self, num_ready: int) -> list[Frame]:
        """The frames to send now, when the first `num_ready` blocks of the request are final. They are in flight."""
        ready = num_ready if self.num_blocks is None else min(num_ready, self.num_blocks)
        frames = []
        while len(self._in_flight) < self._credits:
            if self._again:
                frame = self._again.popleft()
            elif self._next < ready:
                num = min(self._blocks_per_frame, ready - self._next)
                frame = Frame(sequence=self._num_frames, first=self._next, num=num)
                self._num_frames += 1
                self._next += num
            else:
                break
            self._in_flight[frame.sequence] = frame
            frames.append(frame)
        return frames

    def acked(self, sequence: int, checksum: int) -> Frame | None:
        """The target has the frame; None when it is not in flight (late or doubled)."""
        frame = self._in_flight.pop(sequence, None)
        if frame is None:  # an acknowledgement may come after the frame was given up for lost
            frame = next((waiting for waiting in self._again if waiting.sequence == sequence), None)
            if frame is None:
                return None
            self._again.remove(frame)
        self._checksums[sequence] = checksum
        return frame

    def failed(self, sequence: int) -> Frame | None:
        """The frame did not arrive: it waits to go again. None when it is not in flight."""
        frame = self._in_flight.pop(sequence, None)
        if frame is not None:
            again = Frame(sequence=sequence, first=frame.first, num=frame.num, tries=frame.tries + 1)
            self._again.append(again)
        return frame
