"""Frames between pools that one process can both reach: the target copies straight from the source's blocks."""

from __future__ import annotations

import ctypes

from kv_transfer.messages import FrameHeader
from kv_transfer.transports.channel import FrameCorrupt, SourceEnd, TargetEnd
from kv_transfer.transports.memory import CopyAndHash, MappedPool, frame_checksum, hash_at


class PullSource(SourceEnd):
    """Only hashes: the target does the copying. What is read here may be read until the target has answered."""

    needs_go = False

    def __init__(self, pool: MappedPool) -> None:
        self._pool = pool

    def prepare(self, header: FrameHeader) -> int:
        """Hashes the blocks where they lie."""
        check_frame(header, self._pool.block_bytes)
        size = self._pool.block_bytes
        return frame_checksum([hash_at(self._pool.address(block), size) for block in header.source_blocks])

    def push(self, header: FrameHeader) -> None:
        """Nothing to do."""

    def finish(self, header: FrameHeader) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """The pool is the agent's."""


class PullTarget(TargetEnd):
    """Copies block by block into the target blocks, which nothing reads before they check, and hashes what it copied.

    `corrupt_every` n > 0 flips a bit of each n-th frame after it was copied: a fault to test with.
    """

    def __init__(
        self, *, source: MappedPool, target: MappedPool, copy_and_hash: CopyAndHash, corrupt_every: int = 0
    ) -> None:
        if source.block_bytes != target.block_bytes:
            raise ValueError(f"block_bytes: is {source.block_bytes} at the source and {target.block_bytes} here")
        self._source = source
        self._target = target
        self._copy_and_hash = copy_and_hash
        self._corrupt_every = corrupt_every
        self._num_frames = 0

    def post(self, header: FrameHeader) -> None:
        """Nothing to do: the blocks are granted."""

    def take(self, header: FrameHeader, checksum: int) -> None:
        """One pass over the frame."""
        check_frame(header, self._target.block_bytes)
        size = self._target.block_bytes
        pairs = [
            (self._target.address(target), self._source.address(source))
            for target, source in zip(header.target_blocks, header.source_blocks, strict=True)
        ]
        hashes = [self._copy_and_hash(target, source, size) for target, source in pairs]
        self._num_frames += 1
        if self._corrupt_every and self._num_frames % self._corrupt_every == 0:
            flip_bit(pairs[0][0])
            hashes[0] = hash_at(pairs[0][0], size)
        found = frame_checksum(hashes)
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
