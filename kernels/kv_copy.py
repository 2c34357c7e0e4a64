"""Writes new K and V into the pool, copies blocks, and copies memory while hashing it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import build, reference
from kernels.dtypes import code

_INTEGERS = (
    "block_stride", "kv_stride", "slot_stride", "head_stride", "k_token", "k_head", "v_token", "v_head",
    "tokens", "heads", "dim", "block_size",
)  # fmt: skip

# XXH3 has other rules for short inputs; the library has them.
LONG_BYTES = 241


class _Write(ctypes.Structure):
    """struct tandem_write of cpu/kv_copy.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pool", "k", "v", "slots")),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_int32) for name in ("type", "pool_type")),
    )


def write_kv(pool: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Writes `k, v[T, kv_heads, head_dim]` of one layer to `slots` (int64 `[T]`, block * block_size + offset).

    pool: `[blocks, layers, 2, block_size, kv_heads, head_dim]`. A negative slot is skipped. Rounds to pool's dtype.
    Slots are not checked against the pool: they come from the block ledger. Raises ValueError for shapes and dtypes.
    """
    if k.shape != v.shape or k.dtype != v.dtype or k.shape != (slots.shape[0], *pool.shape[4:]):
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit the pool {tuple(pool.shape)}")
    if slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slots are {slots.dtype}, must be contiguous int64")
    library = build.library()
    if library is None or k.stride(2) != 1 or v.stride(2) != 1:
        reference.write_kv(pool, layer, k, v, slots)
        return
    block_stride, layer_stride, kv_stride, slot_stride, head_stride, _ = pool.stride()
    arguments = _Write(
        pool.data_ptr() + layer * layer_stride * pool.element_size(), k.data_ptr(), v.data_ptr(), slots.data_ptr(),
        block_stride, kv_stride, slot_stride, head_stride, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k.shape[0], k.shape[1], k.shape[2], pool.shape[3], code(k.dtype, "k"), code(pool.dtype, "pool"),
    )  # fmt: skip
    library.tandem_write_kv(ctypes.addressof(arguments))


def copy_blocks(pool: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies whole blocks inside the pool: (source, target) each, in order. Raises IndexError for other block ids."""
    # A block of the pool is one contiguous piece: torch copies it with one memcpy.
    reference.copy_blocks(pool, pairs)


def copy_and_hash(target: int, source: int, num_bytes: int) -> int:
    """Copies `num_bytes` between two addresses that do not overlap -> XXH3-64 (seed 0) of exactly the bytes written.

    Both addresses must be valid for `num_bytes`; nothing checks that. Releases the interpreter lock.
    """
    library = build.library()
    if library is None or num_bytes < LONG_BYTES:
        return reference.copy_and_hash(target, source, num_bytes)
    hashed: int = library.tandem_copy_and_hash(target, _first(), source, _first(), 1, num_bytes)
    return hashed


def copy_blocks_and_hash(
    target: int, target_blocks: Sequence[int], source: int, source_blocks: Sequence[int], block_bytes: int
) -> int:
    """Copies blocks of one pool (at address `source`) to blocks of another (at `target`), in order, in one pass.

    -> XXH3-64 (seed 0) of the bytes written, as of one input. Raises ValueError where the numbers of blocks differ.
    """
    if len(target_blocks) != len(source_blocks):
        raise ValueError(f"{len(source_blocks)} source blocks and {len(target_blocks)} target blocks")
    library = build.library()
    num = len(source_blocks)
    if library is None or num * block_bytes < LONG_BYTES or block_bytes % 64:
        return reference.copy_blocks_and_hash(target, target_blocks, source, source_blocks, block_bytes)
    targets, sources = (ctypes.c_int64 * num)(*target_blocks), (ctypes.c_int64 * num)(*source_blocks)
    hashed: int = library.tandem_copy_and_hash(
        target, ctypes.addressof(targets), source, ctypes.addressof(sources), num, block_bytes
    )
    return hashed


def hash_bytes(source: int, num_bytes: int) -> int:
    """XXH3-64 (seed 0) of `num_bytes` at an address."""
    library = build.library()
    if library is None or num_bytes < LONG_BYTES:
        return reference.hash_bytes(source, num_bytes)
    hashed: int = library.tandem_copy_and_hash(None, None, source, _first(), 1, num_bytes)
    return hashed


_FIRST = (ctypes.c_int64 * 1)(0)


def _first() -> int:
    """Address of the list of pieces that names the first alone."""
    return ctypes.addressof(_FIRST)
