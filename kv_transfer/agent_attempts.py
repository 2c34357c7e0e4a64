"""What an agent knows of each attempt at a transfer: which frames may land, what is under way, when it is quiet.

Only attempts that the worker expects take frames, only from the agent that the worker named, only into blocks that it
granted, generation for generation. Frames that are late, doubled or from an earlier incarnation have no effect.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum

from kv_transfer.messages import ExpectFrames, FrameHeader
from tandem.request import TransferId

MAX_ENDED_ATTEMPTS = 4096  # that are remembered, so that their late frames are refused at once
ENDED_FOR_S = 120.0  # so long: later than any frame that was under way
MAX_OPEN_ATTEMPTS = 16384

AttemptKey = tuple[TransferId, int]


class Verdict(StrEnum):
    """What becomes of a frame that was announced."""

    TAKE = "take"
    AGAIN = "again"  # it is here already: acknowledge it again, touch nothing
    BUSY = "busy"  # the same frame is being taken over another link: ask again when that is over
    UNKNOWN = "unknown"  # the worker has not (yet) said that it expects this attempt
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The verdict on one frame; `reason` says why it is refused, in a sentence for the source."""

    verdict: Verdict
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class _Attempt:
    source_incarnation: int | None = None  # None until the worker expects frames: an attempt that only sends
    target_incarnation: int | None = None
    source_agent: int | None = None
    granted: dict[int, int] = field(default_factory=dict)  # block -> generation
    landed: dict[int, tuple[tuple[int, ...], int]] = field(default_factory=dict)  # sequence -> blocks, checksum
    taking: set[int] = field(default_factory=set)
    sending: int = 0
    ended: bool = False

    @property
    def quiet(self) -> bool:
        return not self.taking and self.sending == 0


class Attempts:
    """All attempts of one agent. Not thread-safe: the agent holds a lock around each call."""

    def __init__(self) -> None:
        self._open: dict[AttemptKey, _Attempt] = {}
        self._ended: OrderedDict[AttemptKey, float] = OrderedDict()  # when

    def expect(self, command: ExpectFrames, *, source_agent: int) -> str | None:
        """Frames of this attempt may come. A second call adds blocks. Returns why not, or None."""
        key = (command.transfer_id, command.epoch)
        if key in self._ended:
            return "the attempt has ended"
        attempt = self._open.get(key)
        if attempt is None:
            if len(self._open) >= MAX_OPEN_ATTEMPTS:
                return f"{len(self._open)} attempts are open, at most {MAX_OPEN_ATTEMPTS} may be"
            attempt = self._open[key] = _Attempt()
        attempt.source_incarnation = command.source_incarnation
        attempt.target_incarnation = command.target_incarnation
        attempt.source_agent = source_agent
        attempt.granted.update(zip(command.blocks, command.generations, strict=True))
        return None

    def take(self, header: FrameHeader, checksum: int, *, source_agent: int) -> Answer:
        """Whether the announced frame may land. After TAKE, `landed` or `dropped` must follow."""
        key = (header.transfer_id, header.epoch)
        attempt = self._open.get(key)
        if key in self._ended or (attempt is not None and attempt.ended):
            return Answer(verdict=Verdict.REFUSE, reason="not granted: the attempt has ended")
        if attempt is None or attempt.source_incarnation is None:
            return Answer(verdict=Verdict.UNKNOWN, reason="not granted: the attempt is not expected")
        reason = _mismatch(attempt, header, source_agent)
        if reason is not None:
            return Answer(verdict=Verdict.REFUSE, reason=f"not granted: {reason}")
        before = attempt.landed.get(header.sequence)
        if before is not None:
            if before == (header.target_blocks, checksum):
                return Answer(verdict=Verdict.AGAIN)
            return Answer(verdict=Verdict.REFUSE, reason="another frame of this sequence has landed")
        if header.sequence in attempt.taking:
            return Answer(verdict=Verdict.BUSY, reason="the same frame is being taken over another link")
        attempt.taking.add(header.sequence)
        return Answer(verdict=Verdict.TAKE)

    def landed(self, header: FrameHeader, checksum: int) -> bool:
        """The frame that was taken is in its blocks and checks. False: the attempt ended meanwhile, say nothing."""
        attempt = self._open[(header.transfer_id, header.epoch)]
        attempt.taking.discard(header.sequence)
        if attempt.ended:
            return False
        attempt.landed[header.sequence] = (header.target_blocks, checksum)
        return True

    def dropped(self, header: FrameHeader) -> None:
        """The frame that was taken did not arrive whole; it may be announced again."""
        self._open[(header.transfer_id, header.epoch)].taking.discard(header.sequence)

    def send(self, header: FrameHeader) -> bool:
        """A frame starts to be read here. After True, `sent` must follow. False: the attempt has ended."""
        key = (header.transfer_id, header.epoch)
        attempt = self._open.get(key)
        if key in self._ended or (attempt is not None and attempt.ended):
            return False
        if attempt is None:
            attempt = self._open[key] = _Attempt()
        attempt.sending += 1
        return True

    def sent(self, header: FrameHeader) -> bool:
        """The frame is not read any more. False: the attempt ended meanwhile, say nothing of the frame."""
        attempt = self._open[(header.transfer_id, header.epoch)]
        attempt.sending -= 1
        assert attempt.sending >= 0, f"a frame of {header.transfer_id} ended twice"
        return not attempt.ended

    def is_ended(self, transfer_id: TransferId, epoch: int) -> bool:
        """Whether the worker takes no more part in this attempt."""
        attempt = self._open.get((transfer_id, epoch))
        return (transfer_id, epoch) in self._ended or (attempt is not None and attempt.ended)

    def end(self, transfer_id: TransferId, epoch: int, now_s: float) -> bool:
        """The worker takes no more part in this attempt, known or not. True: it is quiet; False: `settle` will say."""
        key = (transfer_id, epoch)
        attempt = self._open.get(key)
        if attempt is not None and not attempt.quiet:
            attempt.ended = True
            return False
        self._open.pop(key, None)
        self._remember(key, now_s)
        return True

    def settle(self, transfer_id: TransferId, epoch: int, now_s: float) -> bool:
        """Whether an attempt that was ended, with operations under way, has just become quiet. True once."""
        key = (transfer_id, epoch)
        attempt = self._open.get(key)
        if attempt is None or not attempt.ended or not attempt.quiet:
            return False
        del self._open[key]
        self._remember(key, now_s)
        return True

    def _remember(self, key: AttemptKey, now_s: float) -> None:
        self._ended[key] = now_s
        self._ended.move_to_end(key)
        while len(self._ended) > MAX_ENDED_ATTEMPTS or next(iter(self._ended.values())) < now_s - ENDED_FOR_S:
            self._ended.popitem(last=False)


def _mismatch(attempt: _Attempt, header: FrameHeader, source_agent: int) -> str | None:
    if header.source_incarnation != attempt.source_incarnation:
        return f"source incarnation {header.source_incarnation}, expected {attempt.source_incarnation}"
    if header.target_incarnation != attempt.target_incarnation:
        return f"target incarnation {header.target_incarnation}, expected {attempt.target_incarnation}"
    if source_agent != attempt.source_agent:
        return f"source agent {source_agent}, expected {attempt.source_agent}"
    for block, generation in zip(header.target_blocks, header.target_generations, strict=True):
        granted = attempt.granted.get(block)
        if granted is None:
            return f"block {block} is not among the granted"
        if granted != generation:
            return f"block {block} has generation {granted}, the frame names {generation}"
    return None
