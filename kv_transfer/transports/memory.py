"""A KV pool as mapped memory, and the checksum of a frame of its blocks."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence

import xxhash

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_WRITE = 23  # <linux/mman.h>
# What the C kernel takes: blocks of whole stripes, and more than the short inputs that XXH3 treats apart.
KERNEL_STRIPE_BYTES = 64
KERNEL_LEAST_BYTES = 240

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

    def populate(self) -> None:
        """Maps all pages that are there already, so that frames do not pay a fault a page; any thread."""
        _libc.madvise(self.base, self._size, _MADV_POPULATE_WRITE)  # kernels before 5.14 refuse: faults come later

    @property
    def base(self) -> int:
        """Where block 0 starts."""
        assert self._base is not None, "the pool is closed"
        return self._base

    def check(self, blocks: Sequence[int]) -> None:
        """Raises ValueError when the pool has no such block."""
        check_blocks(blocks, self.num_blocks)

    def close(self) -> None:
        """Unmaps it; no operation on it may be under way. Idempotent."""
        if self._base is not None:
            _libc.munmap(self._base, self._size)
            self._base = None


def check_blocks(blocks: Sequence[int], num_blocks: int) -> None:
    """Raises ValueError when a pool of so many blocks has not all of them."""
    for block in blocks:
        if not 0 <= block < num_blocks:
            raise ValueError(f"block: is {block}, must be from 0 to {num_blocks - 1}")


def bytes_at(address: int, num_bytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """The memory there as a buffer. It is not copied and must outlive the buffer."""
    return (ctypes.c_ubyte * num_bytes).from_address(address)


def hash_frame(address: int, blocks: Sequence[int], block_bytes: int) -> int:
    """Checksum of a frame: xxh3-64 of the bytes of its blocks, which count from `address`, in order."""
    hasher = xxhash.xxh3_64()
    for block in blocks:
        hasher.update(bytes_at(address + block * block_bytes, block_bytes))
    return hasher.intdigest()


# Copies blocks (to an address, its blocks; from an address, its blocks; bytes of a block) and gives the frame's
# checksum, taken of what was written.
CopyFrame = Callable[[int, Sequence[int], int, Sequence[int], int], int]


def copy_then_hash(
    to: int, to_blocks: Sequence[int], source: int, source_blocks: Sequence[int], block_bytes: int
) -> int:
    """Two passes, without a compiler. Each block is hashed while it is still in the cache."""
    hasher = xxhash.xxh3_64()
    for there, here in zip(source_blocks, to_blocks, strict=True):
        address = to + here * block_bytes
        ctypes.memmove(address, source + there * block_bytes, block_bytes)
        hasher.update(bytes_at(address, block_bytes))
    return hasher.intdigest()


def load_copy_frame() -> CopyFrame:
    """One pass in C where the kernels are built (the first call may build them, which takes seconds), else two."""
    from kernels.build import library  # and not kernels.kv_copy, which needs torch

    kernel = getattr(library(), "tandem_copy_and_hash", None)
    if kernel is None:
        return copy_then_hash
    kernel.restype = ctypes.c_uint64
    kernel.argtypes = (ctypes.c_void_p,) * 4 + (ctypes.c_int64, ctypes.c_int64)

    def copy_and_hash(
        to: int, to_blocks: Sequence[int], source: int, source_blocks: Sequence[int], block_bytes: int
    ) -> int:
        num_blocks = len(to_blocks)
        if block_bytes % KERNEL_STRIPE_BYTES or num_blocks * block_bytes <= KERNEL_LEAST_BYTES:
            return copy_then_hash(to, to_blocks, source, source_blocks, block_bytes)
        indices = ctypes.c_int64 * num_blocks
        checksum: int = kernel(to, indices(*to_blocks), source, indices(*source_blocks), num_blocks, block_bytes)
        return checksum

    return copy_and_hash if _agree(copy_and_hash) else copy_then_hash


def _agree(copy_frame: CopyFrame) -> bool:
    """Whether it does what `copy_then_hash` does: peers may not have the same one."""
    size, num_blocks = 1024, 6
    source = ctypes.create_string_buffer(bytes(at * 7 % 251 for at in range(size * num_blocks)), size * num_blocks)
    found = []
    for copy in (copy_frame, copy_then_hash):
        to = ctypes.create_string_buffer(size * num_blocks)
        checksum = copy(ctypes.addressof(to), (0, 5, 2), ctypes.addressof(source), (4, 1, 3), size)
        found.append((checksum, to.raw))
    return found[0] == found[1]
