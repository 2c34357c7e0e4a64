"""Frames between two processes of one host: the target maps the source's pool and pulls.

The pool comes as a read-only descriptor over the local socket, with a second one that holds a nonce: whoever can name
the nonce shares memory with the source, whatever the host names say.
"""

from __future__ import annotations

import fcntl
import os

from kv_transfer.gate import Damage
from kv_transfer.transports.memory import CopyFrame, MappedPool
from kv_transfer.transports.pull import PullTarget

NONCE_BYTES = 32


def read_only(fd: int) -> int:
    """Another descriptor of the same memory through which it cannot be written."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def nonce_memory(nonce: bytes) -> int:
    """A read-only descriptor of memory that holds the nonce. The caller closes it."""
    fd = os.memfd_create("tandem-nonce", os.MFD_CLOEXEC)
    try:
        os.write(fd, nonce)
        return read_only(fd)
    finally:
        os.close(fd)


def read_nonce(fd: int) -> bytes:
    """The nonce in the memory behind the descriptor."""
    return os.pread(fd, NONCE_BYTES, 0)


def open_target(
    fd: int,
    *,
    source_num_blocks: int,
    target: MappedPool,
    copy_frame: CopyFrame,
    damage: Damage | None = None,
) -> PullTarget:
    """The target's end over the source's pool, whose descriptor stays the caller's. Raises ValueError, OSError.

    A pool whose size is not sealed is refused: when it shrank, reading it would end this process (SIGBUS).
    """
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("pool: its size is not sealed, so it might shrink")
    source = MappedPool(fd, num_blocks=source_num_blocks, block_bytes=target.block_bytes, writable=False)
    return PullTarget(source=source, target=target, copy_frame=copy_frame, damage=damage)
