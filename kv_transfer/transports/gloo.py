"""Frames over torch.distributed's gloo: one two-rank group for one direction between two agents, and one pair epoch.

A group is built directly, over the link of the two agents (meeting.py), never with new_group: a pair that breaks or
hangs takes only itself down, and is made anew under the next pair epoch. torch is imported when the first group is
made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, cast

from kv_transfer.gate import Damage
from kv_transfer.seal import frame_tag
from kv_transfer.transports.channel import ChannelLost
from kv_transfer.transports.meeting import Meeting, meeting_store
from kv_transfer.transports.memory import CopyFrame, MappedPool, bytes_at, hash_frame
from kv_transfer.transports.pair import Group, PairSource, PairTarget, Work, first_line
from kv_transfer.transports.pull import flip_bit

if TYPE_CHECKING:
    import torch


CONNECT_ROUNDS = 5  # gloo waits so many times its timeout for the other end to connect


def load() -> None:
    """Imports torch, which takes a second or two, ahead of the first group."""
    import torch.distributed  # noqa: F401


def make_group(meeting: Meeting, rank: int, *, host: str, timeout_s: float) -> Group:
    """One end of a pair. `host` is this end's own address.

    Blocks until the other end joins, bounded by the meeting and then by `timeout_s`. Raises ChannelLost, and what the
    meeting raises.
    """
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s / CONNECT_ROUNDS)
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    try:
        return cast(Group, ProcessGroupGloo(meeting_store(meeting), rank, 2, options))
    except RuntimeError as error:
        raise ChannelLost(f"the pair was not joined: {first_line(error)}") from None


def source_end(group: Group, pool: MappedPool, *, copy_frame: CopyFrame, timeout_s: float) -> PairSource:
    """The end that frames leave from. An operation that takes longer than `timeout_s` ends the pair."""
    return PairSource(group, HostMemory(pool, copy_frame), HostWaiter(timeout_s))


def target_end(
    group: Group, pool: MappedPool, *, copy_frame: CopyFrame, timeout_s: float, damage: Damage | None = None
) -> PairTarget:
    """The end that frames arrive at; `timeout_s` as above."""
    memory, waiter = HostMemory(pool, copy_frame), HostWaiter(timeout_s)
    return PairTarget(group, memory, waiter, post_timeout_s=timeout_s, damage=damage)


class HostWaiter:
    """A wait that comes to its end closes all connections of the group."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)

    def wait(self, work: Work) -> None:
        """Lets other threads run meanwhile."""
        work.wait(self._timeout)

    def drop(self, works: Iterable[Work]) -> None:
        """Nothing to do: with the group and its operations the connections are gone."""


class HostMemory:
    """Blocks of a mapped pool; the checksum is xxh3-64 of the frame's bytes."""

    def __init__(self, pool: MappedPool, copy_frame: CopyFrame) -> None:
        self._pool = pool
        self._copy_frame = copy_frame
        self.block_bytes = pool.block_bytes
        self.check = pool.check

    def staging(self, num_bytes: int) -> torch.Tensor:
        """Not pinned: nothing but the CPU reads it."""
        import torch

        return torch.empty(num_bytes, dtype=torch.uint8)

    def in_place(self, first: int, num_blocks: int) -> torch.Tensor:
        """Without a copy."""
        return tensor_at(self._pool.base + first * self.block_bytes, num_blocks * self.block_bytes)

    def gather(self, frame: torch.Tensor, blocks: Sequence[int]) -> int:
        """Copy and hash in one pass."""
        return self._copy_frame(frame.data_ptr(), range(len(blocks)), self._pool.base, blocks, self.block_bytes)

    def land(self, blocks: Sequence[int], frame: torch.Tensor, announced: int) -> int:
        """Copy and hash in one pass: nothing reads granted blocks before they check, and no operation writes them."""
        return self._copy_frame(self._pool.base, blocks, frame.data_ptr(), range(len(blocks)), self.block_bytes)

    def checksum(self, frame: torch.Tensor) -> int:
        """One pass."""
        return hash_frame(frame.data_ptr(), (0,), frame.numel())

    def tag(self, frame: torch.Tensor, key: bytes) -> bytes:
        """One pass."""
        return frame_tag(key, memoryview(bytes_at(frame.data_ptr(), frame.numel())))

    def damage(self, frame: torch.Tensor) -> None:
        """The first byte."""
        flip_bit(frame.data_ptr())


def tensor_at(address: int, num_bytes: int) -> torch.Tensor:
    """The memory there as a tensor of bytes, without a copy."""
    import torch

    return torch.frombuffer(bytes_at(address, num_bytes), dtype=torch.uint8)
