"""The two ends of a channel over a torch.distributed group of two: what gloo and NCCL have in common.

A frame is one message of all its blocks. It leaves straight from the pool where its blocks are neighbours, else from
a staging buffer. It arrives in staging, so that a hung operation never has a hand on a block, and is checked by the one
pass that copies it on into its granted blocks, or before.
"""

from __future__ import annotations

import hmac
import queue
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from kv_transfer.gate import Damage
from kv_transfer.messages import FrameHeader
from kv_transfer.transports.channel import ChannelLost, FrameCorrupt, FrameForged, SourceEnd, TargetEnd
from kv_transfer.transports.pull import check_frame

if TYPE_CHECKING:
    import torch

SOURCE_RANK, TARGET_RANK = 0, 1
MAX_FRAME_BYTES = 64 << 20
STAGING_SLOTS = 3  # one filling, one on the wire, one being checked


class Work(Protocol):
    """One operation under way."""

    def is_completed(self) -> bool: ...
    def wait(self, timeout: timedelta) -> bool: ...


class Group(Protocol):
    """What is used of torch's process group."""

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work: ...
    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work: ...


class Waiter(Protocol):
    """How operations of one kind of group end."""

    def wait(self, work: Work) -> None:
        """Until it is over, bounded. Raises RuntimeError when it failed or takes too long."""

    def drop(self, works: Iterable[Work]) -> None:
        """The group is about to be dropped with these, which may be under way."""


class FrameMemory(Protocol):
    """A pool's blocks as frames, in memory that the group can reach."""

    block_bytes: int

    def check(self, blocks: Sequence[int]) -> None:
        """Raises ValueError when the pool has no such block."""

    def staging(self, num_bytes: int) -> torch.Tensor:
        """A new buffer of bytes."""

    def in_place(self, first: int, num_blocks: int) -> torch.Tensor:
        """Blocks that are neighbours, where they lie."""

    def gather(self, frame: torch.Tensor, blocks: Sequence[int]) -> int:
        """Copies the blocks into a frame and gives its checksum."""

    def land(self, blocks: Sequence[int], frame: torch.Tensor, announced: int) -> int:
        """Copies a frame into the blocks and gives the checksum of what it holds.

        When that is not the one announced, what the blocks hold means nothing.
        """

    def checksum(self, frame: torch.Tensor) -> int:
        """Of what the frame holds now."""

    def tag(self, frame: torch.Tensor, key: bytes) -> bytes:
        """The keyed tag of what the frame holds now: see kv_transfer/seal.py."""

    def damage(self, frame: torch.Tensor) -> None:
        """Flips a bit: a fault to test with."""


class PairSource(SourceEnd):
    """The sending rank. One thread uses it."""

    needs_go = True

    def __init__(self, group: Group, memory: FrameMemory, waiter: Waiter) -> None:
        self._group: Group | None = group
        self._memory = memory
        self._waiter = waiter
        self._prepared: dict[tuple[str, int, int], torch.Tensor] = {}
        self._staged: dict[tuple[str, int, int], torch.Tensor] = {}
        self._free: list[torch.Tensor] = []
        self._sends: dict[tuple[str, int, int], Work] = {}

    def prepare(self, header: FrameHeader) -> int:
        """Hashes the blocks where they lie when they are neighbours, else while gathering them."""
        check_frame(header, self._memory.block_bytes)
        blocks = header.source_blocks
        self._memory.check(blocks)
        key = _key(header)
        if all(after == before + 1 for before, after in pairwise(blocks)):
            self._prepared[key] = self._memory.in_place(blocks[0], len(blocks))
            return self._memory.checksum(self._prepared[key])
        buffer = self._buffer(header.num_bytes)
        self._staged[key] = buffer
        self._prepared[key] = buffer[: header.num_bytes]
        return self._memory.gather(self._prepared[key], blocks)

    def tag(self, header: FrameHeader) -> bytes:
        """One more pass over the bytes, where the link needs it."""
        return self._memory.tag(self._prepared[_key(header)], self.tag_key) if self.tag_key else b""

    def push(self, header: FrameHeader) -> None:
        """Sends the frame; what the connection does not take at once goes on in the group's own thread or stream."""
        if self._group is None:
            raise ChannelLost("the channel is closed")
        key = _key(header)
        try:
            self._sends[key] = self._group.send([self._prepared[key]], TARGET_RANK, 0)
        except RuntimeError as error:
            raise ChannelLost(f"send: {first_line(error)}") from None

    def finish(self, header: FrameHeader) -> None:
        """Reaps the send, which is over when the target has the frame, and takes the staging buffer back."""
        key = _key(header)
        work = self._sends.pop(key, None)
        try:
            if work is not None:
                self._waiter.wait(work)
        except RuntimeError as error:
            raise ChannelLost(f"send: {first_line(error)}") from None
        self._prepared.pop(key, None)
        buffer = self._staged.pop(key, None)
        if buffer is not None:
            self._free.append(buffer)

    def close(self) -> None:
        """Drops the group: its connections close, and the peer's receives fail."""
        self._waiter.drop(self._sends.values())
        self._group = None
        self._sends.clear()
        self._prepared.clear()
        self._staged.clear()

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        for at, buffer in enumerate(self._free):
            if buffer.numel() >= num_bytes:
                return self._free.pop(at)
        if self._free:
            self._free.pop()  # too small: let it go rather than hold ever more
        return self._memory.staging(num_bytes)


class PairTarget(TargetEnd):
    """The receiving rank. `post` on one thread, `take` on another.

    `post_timeout_s` is how long a frame waits for staging.
    """

    def __init__(
        self, group: Group, memory: FrameMemory, waiter: Waiter, *, post_timeout_s: float, damage: Damage | None = None
    ) -> None:
        self._group: Group | None = group
        self._memory = memory
        self._waiter = waiter
        self._post_timeout_s = post_timeout_s
        self._damage = damage or Damage()
        self._slots: queue.Queue[torch.Tensor | None] = queue.Queue()
        for _ in range(STAGING_SLOTS):
            self._slots.put(None)  # made when first needed
        self._posted: queue.Queue[tuple[Work, torch.Tensor]] = queue.Queue()

    def post(self, header: FrameHeader) -> None:
        """Waits for a staging slot and posts the receive into it."""
        check_frame(header, self._memory.block_bytes)
        if header.num_bytes > MAX_FRAME_BYTES:
            raise ValueError(f"num_bytes: is {header.num_bytes}, at most {MAX_FRAME_BYTES} are taken at once")
        self._memory.check(header.target_blocks)
        try:
            slot = self._slots.get(timeout=self._post_timeout_s)
        except queue.Empty:
            raise ChannelLost(f"no staging slot within {self._post_timeout_s:g} s") from None
        group = self._group
        if group is None:
            raise ChannelLost("the channel is closed")
        if slot is None or slot.numel() < header.num_bytes:
            slot = self._memory.staging(header.num_bytes)
        try:
            work = group.recv([slot[: header.num_bytes]], SOURCE_RANK, 0)
        except RuntimeError as error:
            raise ChannelLost(f"receive: {first_line(error)}") from None
        self._posted.put((work, slot))

    def take(self, header: FrameHeader, checksum: int, tag: bytes = b"") -> None:
        """Waits for the bytes in staging, and has them in the target blocks, checked."""
        work, slot = self._posted.get_nowait()
        try:
            self._waiter.wait(work)
        except RuntimeError as error:
            raise ChannelLost(f"receive: {first_line(error)}") from None
        frame = slot[: header.num_bytes]
        try:
            if self._damage.due():
                self._memory.damage(frame)
            if self.tag_key:
                self._check_tag(frame, checksum, tag)
            found = self._memory.land(header.target_blocks, frame, checksum)
            if found != checksum:
                raise FrameCorrupt(f"checksum {found:016x}, announced {checksum:016x}")
        finally:
            self._slots.put(slot)

    def _check_tag(self, frame: torch.Tensor, checksum: int, tag: bytes) -> None:
        """Before anything of the frame is in a block."""
        if hmac.compare_digest(self._memory.tag(frame, self.tag_key), tag):
            return
        found = self._memory.checksum(frame)
        if found != checksum:
            raise FrameCorrupt(f"checksum {found:016x}, announced {checksum:016x}")
        raise FrameForged(
            "the tag of its bytes is missing" if not tag else "its bytes are not those of the peer: forged"
        )

    def close(self) -> None:
        """Drops the group. A receive that still waits has only staging to write, and ends by its own timeout."""
        posted = []
        with suppress(queue.Empty):  # what nobody takes any more would keep the pair's connections open
            while True:
                posted.append(self._posted.get_nowait()[0])
        self._waiter.drop(posted)
        self._group = None


def first_line(error: Exception) -> str:
    """The middle of "[file:line] what happened. Advice to read other logs", which an operator needs."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error)).partition("\n")[0].partition(". This is")[0][:200]


def _key(header: FrameHeader) -> tuple[str, int, int]:
    return header.transfer_id, header.epoch, header.sequence
