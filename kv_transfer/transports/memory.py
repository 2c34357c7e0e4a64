"""A KV pool as mapped memory, and the checksum of a frame of its blocks."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Sequence

import xxhash

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


class MappedPool:
    """`num_blocks` blocks of `block_bytes` bytes, mapped from a descriptor that stays the caller's.

    Raises ValueError when the file is smaller than that, OSError when it cannot be mapped.
    """

    def __init__(self, fd: int, *, num_blocks: int, block_bytes: int, writable: bool) -> None:
        size = num_blocks * block_bytes
        found = os.fstat(fd).st_size
        if not 0 < size <= found:
            raise ValueError(f"pool: has {found} bytes, {num_blocks} blocks of {block_bytes} bytes need {size}")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
        if address in (None, _MAP_FAILED):
            raise OSError(ctypes.get_errno(), "the pool cannot be mapped")
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self._base: int | None = address
        self._size = size

    def address(self, block: int) -> int:
        """Where the block starts. Raises ValueError when the pool has no such block."""
        assert self._base is not None, "the pool is closed"
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block: is {block}, must be from 0 to {self.num_blocks - 1}")
        return self._base + block * self.block_bytes

    def close(self) -> None:
        """Unmaps it; no operation on it may be under way. Idempotent."""
        if self._base is not None:
            _libc.munmap(self._base, self._size)
            self._base = None


def bytes_at(address: int, num_bytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """The memory there as a buffer. It is not copied and must outlive the buffer."""
    return (ctypes.c_ubyte * num_bytes).from_address(address)


def hash_at(address: int, num_bytes: int) -> int:
    """xxh3-64 of the memory there."""
    return xxhash.xxh3_64_intdigest(bytes_at(address, num_bytes))


def _copy_then_hash(target: int, source: int, num_bytes: int) -> int:
    ctypes.memmove(target, source, num_bytes)
    return hash_at(target, num_bytes)


CopyAndHash = Callable[[int, int, int], int]


def load_copy_and_hash() -> CopyAndHash:
    """Copies memory (target, source, bytes) and gives xxh3-64 of the copy, in one pass where the C kernel is built."""
    try:
        from kernels.kv_copy import copy_and_hash
    except (ImportError, OSError, RuntimeError):
        return _copy_then_hash
    probe = ctypes.create_string_buffer(bytes(range(256)) * 5, 1280)
    copy = ctypes.create_string_buffer(1280)
    fused: CopyAndHash = copy_and_hash
    same = fused(ctypes.addressof(copy), ctypes.addressof(probe), 1280) == xxhash.xxh3_64_intdigest(probe)
    return fused if same and copy.raw == probe.raw else _copy_then_hash


def frame_checksum(block_hashes: Sequence[int]) -> int:
    """Checksum of a frame: xxh3-64 over the xxh3-64 of each of its blocks, in order.

    A hash of hashes, so that blocks which lie apart are copied and hashed in one pass each.
    """
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(block_hashes)}Q", *block_hashes))
