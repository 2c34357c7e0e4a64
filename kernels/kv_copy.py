"""Writes new K and V into the pool, copies blocks, and copies memory while hashing it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels import reference


def write_kv(pool: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Writes `k, v[T, kv_heads, head_dim]` of one layer to `slots` (int64 `[T]`, block * block_size + offset).

    pool: `[blocks, layers, 2, block_size, kv_heads, head_dim]`. A negative slot is skipped. Rounds to pool's dtype.
    """
    reference.write_kv(pool, layer, k, v, slots)


def copy_blocks(pool: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies whole blocks inside the pool: (source, target) each, in order."""
    reference.copy_blocks(pool, list(pairs))


def copy_and_hash(target: int, source: int, num_bytes: int) -> int:
    """Copies `num_bytes` between two addresses that do not overlap -> XXH3-64 (seed 0) of exactly the bytes written.

    Both addresses must be valid for `num_bytes`; nothing checks that. Releases the interpreter lock.
    """
    return reference.copy_and_hash(target, source, num_bytes)


def hash_bytes(source: int, num_bytes: int) -> int:
    """XXH3-64 (seed 0) of `num_bytes` at an address."""
    return reference.hash_bytes(source, num_bytes)
