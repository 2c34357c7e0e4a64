"""Where a pool is on a GPU, in words that a worker hands to its agent and the agent to its peers."""

from __future__ import annotations

import struct
from dataclasses import dataclass

HANDLE_BYTES = 64  # CUipcMemHandle
_LAYOUT = struct.Struct(f"<{HANDLE_BYTES}sQI")


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaPool:
    """A pool that other processes of the host can open."""

    handle: bytes  # of the whole allocation
    offset: int  # of block 0 in it
    device: int


def to_bytes(pool: CudaPool) -> bytes:
    """The pool as bytes."""
    return _LAYOUT.pack(pool.handle, pool.offset, pool.device)


def from_bytes(data: bytes) -> CudaPool:
    """Raises ValueError when these are not the bytes of a pool."""
    if len(data) != _LAYOUT.size:
        raise ValueError(f"cuda_pool: has {len(data)} bytes, must have {_LAYOUT.size}")
    handle, offset, device = _LAYOUT.unpack(data)
    return CudaPool(handle=handle, offset=offset, device=device)
