"""Frames between pools that one process can both reach: the target copies straight from the source's blocks."""

from __future__ import annotations

import ctypes

from kv_transfer.gate import Damage
from kv_transfer.messages import FrameHeader
from kv_transfer.transports.channel import FrameCorrupt, SourceEnd, TargetEnd
from kv_transfer.transports.memory import CopyFrame, MappedPool, hash_frame


class PullSource(SourceEnd):
    """Only hashes: the target does the copying. What is read here may be read until the target has answered."""

    needs_go = False

    def __init__(self, pool: MappedPool) -> None:
        self._pool = pool

    def prepare(self, header: FrameHeader) -> int:
        """Hashes the blocks where they lie."""
        check_frame(header, self._pool.block_bytes)
        self._pool.check(header.source_blocks)
        return hash_frame(self._pool.base, header.source_blocks, self._pool.block_bytes)

    def push(self, header: FrameHeader) -> None:
        """Nothing to do."""

    def finish(self, header: FrameHeader) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """The pool is the agent's."""


class PullTarget(TargetEnd):
    """Copies into the target blocks, which nothing reads before they check, and hashes what it copied."""

    def __init__(
        self, *, source: MappedPool, target: MappedPool, copy_frame: CopyFrame, damage: Damage | None = None
    ) -> None:
        if source.block_bytes != target.block_bytes:
            raise ValueError(f"block_bytes: is {source.block_bytes} at the source and {target.block_bytes} here")
        self._source = source
        self._target = target
        self._copy_frame = copy_frame
        self._damage = damage or Damage()

    def post(self, header: FrameHeader) -> None:
        """Nothing to do: the blocks are granted."""

    def take(self, header: FrameHeader, checksum: int, tag: bytes = b"") -> None:
        """One pass over the frame."""
        size = self._target.block_bytes
        check_frame(header, size)
        self._source.check(header.source_blocks)
        self._target.check(header.target_blocks)
        base = self._target.base
        found = self._copy_frame(base, header.target_blocks, self._source.base, header.source_blocks, size)
        if self._damage.due():
            flip_bit(base + header.target_blocks[0] * size)
            found = hash_frame(base, header.target_blocks, size)
        if found != checksum:
            raise FrameCorrupt(f"checksum {found:016x}, announced {checksum:016x}")

    def close(self) -> None:
        """Only the source's mapping is ours."""
        self._source.close()


def check_frame(header: FrameHeader, block_bytes: int) -> None:
    """Raises ValueError when the frame's size is not that of its blocks."""
    if header.num_bytes != len(header.source_blocks) * block_bytes:
        raise ValueError(
            f"num_bytes: is {header.num_bytes}, {len(header.source_blocks)} blocks of {block_bytes} bytes were named"
        )


def flip_bit(address: int) -> None:
    """Damages the byte at `address`."""
    byte = ctypes.c_ubyte.from_address(address)
    byte.value ^= 0x40
