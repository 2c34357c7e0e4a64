"""Frames over torch.distributed's gloo: one two-rank group for one direction between two agents, and one pair epoch.

A group is built directly, over the link of the two agents (meeting.py), never with new_group: a pair that breaks or
hangs takes only itself down, and is made anew under the next pair epoch. A frame is one message of all its blocks. It
leaves straight from the pool where its blocks are neighbours, else from a staging buffer; it arrives in staging and is
scattered only when it checks, so that a hung operation never has a hand on a block. torch is imported when the first
group is made.
"""

from __future__ import annotations

import ctypes
import queue
import re
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, cast

from kv_transfer.messages import FrameHeader
from kv_transfer.transports.channel import ChannelLost, FrameCorrupt, SourceEnd, TargetEnd
from kv_transfer.transports.meeting import Meeting, meeting_store
from kv_transfer.transports.memory import CopyFrame, MappedPool, bytes_at, hash_frame
from kv_transfer.transports.pull import check_frame, flip_bit

if TYPE_CHECKING:
    import torch

SOURCE_RANK, TARGET_RANK = 0, 1
MAX_FRAME_BYTES = 64 << 20
STAGING_SLOTS = 3  # one filling, one on the wire, one being checked


class Work(Protocol):
    """One operation under way."""

    def wait(self, timeout: timedelta) -> bool: ...


class Group(Protocol):
    """What is used of torch's process group."""

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work: ...
    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work: ...


def load() -> None:
    """Imports torch, which takes a second or two, ahead of the first group."""


def make_group(meeting: Meeting, rank: int, *, host: str, timeout_s: float) -> Group:
    """One end of a pair. `host` is this end's own address.

    Blocks until the other end joins, bounded by the meeting and then by `timeout_s`. Raises ChannelLost, and what the
    meeting raises.
    """
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    try:
        return cast(Group, ProcessGroupGloo(meeting_store(meeting), rank, 2, options))
    except RuntimeError as error:
        raise ChannelLost(f"the pair was not joined: {_first_line(error)}") from None


class GlooSource(SourceEnd):
    """The sending rank. One thread uses it."""

    needs_go = True

    def __init__(self, group: Group, pool: MappedPool, *, copy_frame: CopyFrame, timeout_s: float) -> None:
        self._group: Group | None = group
        self._pool = pool
        self._copy_frame = copy_frame
        self._timeout = timedelta(seconds=timeout_s)
        self._prepared: dict[tuple[str, int, int], torch.Tensor] = {}
        self._staged: dict[tuple[str, int, int], torch.Tensor] = {}
        self._free: list[torch.Tensor] = []
        self._sends: dict[tuple[str, int, int], Work] = {}

    def prepare(self, header: FrameHeader) -> int:
        """Hashes the blocks where they lie when they are neighbours, else while gathering them."""
        check_frame(header, self._pool.block_bytes)
        self._pool.check(header.source_blocks)
        base, size, blocks = self._pool.base, self._pool.block_bytes, header.source_blocks
        key = _key(header)
        if all(after == before + 1 for before, after in pairwise(blocks)):
            start = base + blocks[0] * size
            self._prepared[key] = tensor_at(start, header.num_bytes)
            return hash_frame(start, (0,), header.num_bytes)
        buffer = self._buffer(header.num_bytes)
        self._staged[key] = buffer
        self._prepared[key] = buffer[: header.num_bytes]
        return self._copy_frame(buffer.data_ptr(), range(len(blocks)), base, blocks, size)

    def push(self, header: FrameHeader) -> None:
        """Sends the frame; what the socket does not take at once goes on in gloo's own thread."""
        if self._group is None:
            raise ChannelLost("the channel is closed")
        key = _key(header)
        try:
            self._sends[key] = self._group.send([self._prepared[key]], TARGET_RANK, 0)
        except RuntimeError as error:
            raise ChannelLost(f"send: {_first_line(error)}") from None

    def finish(self, header: FrameHeader) -> None:
        """Reaps the send, which is over when the target has the frame, and takes the staging buffer back."""
        key = _key(header)
        work = self._sends.pop(key, None)
        try:
            if work is not None:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise ChannelLost(f"send: {_first_line(error)}") from None
        self._prepared.pop(key, None)
        buffer = self._staged.pop(key, None)
        if buffer is not None:
            self._free.append(buffer)

    def close(self) -> None:
        """Drops the group: its connections close, and the peer's receives fail."""
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
        return _staging(num_bytes)


class GlooTarget(TargetEnd):
    """The receiving rank. `post` on one thread, `take` on another."""

    def __init__(
        self,
        group: Group,
        pool: MappedPool,
        *,
        timeout_s: float,
        corrupt_every: int = 0,
    ) -> None:
        self._group: Group | None = group
        self._pool = pool
        self._timeout_s = timeout_s
        self._corrupt_every = corrupt_every
        self._num_frames = 0
        self._slots: queue.Queue[torch.Tensor | None] = queue.Queue()
        for _ in range(STAGING_SLOTS):
            self._slots.put(None)  # made when first needed
        self._posted: queue.Queue[tuple[Work, torch.Tensor]] = queue.Queue()

    def post(self, header: FrameHeader) -> None:
        """Waits for a staging slot and posts the receive into it."""
        check_frame(header, self._pool.block_bytes)
        if header.num_bytes > MAX_FRAME_BYTES:
            raise ValueError(f"num_bytes: is {header.num_bytes}, at most {MAX_FRAME_BYTES} are taken at once")
        self._pool.check(header.target_blocks)
        try:
            slot = self._slots.get(timeout=self._timeout_s)
        except queue.Empty:
            raise ChannelLost(f"no staging slot within {self._timeout_s:g} s") from None
        group = self._group
        if group is None:
            raise ChannelLost("the channel is closed")
        if slot is None or slot.numel() < header.num_bytes:
            slot = _staging(header.num_bytes)
        try:
            work = group.recv([slot[: header.num_bytes]], SOURCE_RANK, 0)
        except RuntimeError as error:
            raise ChannelLost(f"receive: {_first_line(error)}") from None
        self._posted.put((work, slot))

    def take(self, header: FrameHeader, checksum: int) -> None:
        """Waits for the bytes in staging, checks them, and only then scatters them into the target blocks."""
        work, slot = self._posted.get_nowait()
        try:
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise ChannelLost(f"receive: {_first_line(error)}") from None
        try:
            size, start = self._pool.block_bytes, slot.data_ptr()
            self._num_frames += 1
            if self._corrupt_every and self._num_frames % self._corrupt_every == 0:
                flip_bit(start)
            found = hash_frame(start, (0,), header.num_bytes)
            if found != checksum:
                raise FrameCorrupt(f"checksum {found:016x}, announced {checksum:016x}")
            for at, block in enumerate(header.target_blocks):
                ctypes.memmove(self._pool.base + block * size, start + at * size, size)
        finally:
            self._slots.put(slot)

    def close(self) -> None:
        """Drops the group. A receive that still waits has only staging to write, and ends by its own timeout."""
        self._group = None
        with suppress(queue.Empty):  # what nobody takes any more would keep the pair's connections open
            while True:
                self._posted.get_nowait()


def _key(header: FrameHeader) -> tuple[str, int, int]:
    return header.transfer_id, header.epoch, header.sequence


def tensor_at(address: int, num_bytes: int) -> torch.Tensor:
    """The memory there as a tensor of bytes, without a copy."""
    import torch

    return torch.frombuffer(bytes_at(address, num_bytes), dtype=torch.uint8)


def _staging(num_bytes: int) -> torch.Tensor:
    import torch

    return torch.empty(num_bytes, dtype=torch.uint8)


def _first_line(error: Exception) -> str:
    # "[file:line] what happened. Advice to read other logs": the middle is what an operator needs.
    return re.sub(r"^\[[^\]]*\] ", "", str(error)).partition("\n")[0].partition(". This is")[0][:200]
