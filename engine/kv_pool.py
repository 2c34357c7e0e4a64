"""The memory that holds a worker's KV blocks: anonymous shared memory behind a file descriptor, so that others map it.

A memfd has no name and no size limit of its own (/dev/shm is often 64 MB), and is gone with its last user.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from engine.layout import KVLayout

if TYPE_CHECKING:
    from torch import Tensor

SPARE_BYTES = 256 << 20  # of available memory that a new pool leaves to others
MADV_POPULATE_WRITE = 23  # <linux/mman.h>; the module mmap does not name it
CGROUP = Path("/sys/fs/cgroup")


class KVPool:
    """`num_blocks * block_bytes` bytes of shared memory, zero at first.

    The creator passes `fd` on (inheritable when asked for); the other side maps it with `attach`. Whoever is done
    calls `close`; views and tensors taken from the pool must not be used after that.
    """

    def __init__(self, *, num_blocks: int, block_bytes: int, inheritable: bool = False) -> None:
        """Makes a new pool.

        Raises:
            ValueError: a size is not positive, or the machine has not that much memory available.
        """
        for name, value in (("num_blocks", num_blocks), ("block_bytes", block_bytes)):
            if value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        num_bytes = num_blocks * block_bytes
        limit = available_bytes() - SPARE_BYTES
        if num_bytes > limit:
            raise ValueError(
                f"the KV pool needs {num_bytes >> 20} MiB ({num_blocks} blocks of {block_bytes} bytes), but only "
                f"{max(0, limit) >> 20} MiB of memory are available; lower --kv-memory or the number of workers"
            )
        fd = shared_memory("tandem-kv", num_bytes)
        os.set_inheritable(fd, inheritable)
        self._map(fd, num_blocks, block_bytes)

    @classmethod
    def attach(cls, fd: int, *, num_blocks: int, block_bytes: int) -> KVPool:
        """Maps the pool behind `fd`, which belongs to the new object from now on.

        Raises:
            ValueError: the pool behind `fd` has another size.
        """
        num_bytes = os.fstat(fd).st_size
        if num_bytes != num_blocks * block_bytes:
            raise ValueError(
                f"the KV pool behind descriptor {fd} has {num_bytes} bytes, not {num_blocks} blocks of {block_bytes}"
            )
        pool = cls.__new__(cls)
        pool._map(fd, num_blocks, block_bytes)
        return pool

    def _map(self, fd: int, num_blocks: int, block_bytes: int) -> None:
        self.fd = fd
        self._closed = False
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self._memory = mmap.mmap(fd, num_blocks * block_bytes, mmap.MAP_SHARED)
        # Kernels without huge pages for shared memory refuse; small pages are slower, not wrong.
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._memory)

    def populate(self) -> None:
        """Takes all of its memory now: else the first step over blocks that an agent wrote pays a fault a page."""
        # Kernels before 5.14 do not know it; then the faults come one by one.
        with contextlib.suppress(OSError):
            self._memory.madvise(MADV_POPULATE_WRITE)

    @property
    def num_bytes(self) -> int:
        """The size of the pool."""
        return self.num_blocks * self.block_bytes

    def block(self, index: int) -> memoryview:
        """The bytes of one block. IndexError when there is no such block."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} is not in a pool of {self.num_blocks}")
        return self.view[index * self.block_bytes : (index + 1) * self.block_bytes]

    def tensor(self, layout: KVLayout) -> Tensor:
        """The pool as `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`; shares the memory.

        Raises:
            ValueError: a block of `layout` has another size than a block of the pool.
        """
        import torch

        if layout.block_bytes != self.block_bytes:
            raise ValueError(f"a block of the layout has {layout.block_bytes} bytes, of the pool {self.block_bytes}")
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[layout.dtype]
        shape = (self.num_blocks, layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        return torch.frombuffer(self._memory, dtype=dtype).view(shape)

    def close(self) -> None:
        """Gives the descriptor and, once no tensor uses it any more, the memory back. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self.view.release()
        # A tensor that is still alive keeps the mapping until it goes; the memory is freed with the last mapping.
        with contextlib.suppress(BufferError):
            self._memory.close()
        os.close(self.fd)


def shared_memory(name: str, num_bytes: int) -> int:
    """A descriptor of zeroed memory whose size is sealed: whoever maps it can trust that it never shrinks."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def available_bytes() -> int:
    """Memory that this process may still take: of the machine, or of its control group when that is less."""
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        files = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # Cached files count as used, but go when memory is asked for.
        available = min(available, max(0, limit - used + int(files.get("inactive_file", 0))))
    return int(available)


def blocks_in(kv_bytes: int, block_bytes: int) -> int:
    """How many blocks `kv_bytes` hold. ValueError when it is not one."""
    num_blocks = kv_bytes // block_bytes
    if num_blocks < 1:
        raise ValueError(f"--kv-memory of {kv_bytes} bytes is less than one KV block of {block_bytes} bytes")
    return num_blocks
