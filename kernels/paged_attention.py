"""Attention of new tokens over a paged KV pool: one kernel for decode, chunked prefill and verification."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import build, reference
from kernels.dtypes import code

_POINTERS = ("out", "q", "pool", "tables", "starts", "lengths")
_INTEGERS = (
    "q_token", "q_head", "block_stride", "kv_stride", "slot_stride", "head_stride",
    "num_rows", "num_blocks", "num_sequences", "max_blocks", "num_heads", "num_kv_heads", "head_dim", "block_size",
    "window",
)  # fmt: skip


class _Attention(ctypes.Structure):
    """struct tandem_attention of cpu/attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("q_type", "kv_type", "num_threads")),
    )


WRONG = {
    1: "starts and lengths must not be negative and lengths must sum to the rows of q",
    2: "its tokens do not fit into its block table",
    3: "its block table names a block that is not in the pool",
}


def paged_attention(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
    num_threads: int = 1,
) -> Tensor:
    """Causal attention of the new tokens of several sequences -> `[T, heads, head_dim]`.

    q: `[T, heads, head_dim]`, the new tokens of sequence 0, then of sequence 1, ...; their K and V are in the pool.
    pool: `[blocks, layers, 2, block_size, kv_heads, head_dim]`, float32, bfloat16 or float16, any strides but the last.
    block_tables: int32 `[sequences, max_blocks]`. starts: int32, position of the first new token of each sequence.
    lengths: int32, new tokens of each, sum T. window: a token sees this many tokens, itself included; 0 is all.
    softcap: scores become `softcap * tanh(score / softcap)`; 0 is off. Accumulates in float32.
    A row's bits depend on its q and the K and V that it sees, not on batch, chunking, tile or thread.
    Raises ValueError where shapes, dtypes, lengths or block ids do not fit.
    """
    _check(q, pool, layer, block_tables, starts, lengths, window)
    library = build.library()
    if library is None:
        result = reference.paged_attention(q, pool, layer, block_tables, starts, lengths, scale, window, softcap)
        return result if out is None else out.copy_(result)
    if q.stride(2) != 1:
        q = q.contiguous()
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, must be {tuple(q.shape)} {q.dtype}, contiguous")
    block_stride, layer_stride, kv_stride, slot_stride, head_stride, _ = pool.stride()
    num_sequences, max_blocks = block_tables.shape
    arguments = _Attention(
        out.data_ptr(), q.data_ptr(), pool.data_ptr() + layer * layer_stride * pool.element_size(),
        block_tables.data_ptr(), starts.data_ptr(), lengths.data_ptr(),
        q.stride(0), q.stride(1), block_stride, kv_stride, slot_stride, head_stride,
        q.shape[0], pool.shape[0], num_sequences, max_blocks, q.shape[1], pool.shape[4], q.shape[2], pool.shape[3],
        window, scale, softcap, code(q.dtype, "q"), code(pool.dtype, "pool"), num_threads,
    )  # fmt: skip
    marks = (ctypes.c_int64 * (2 * num_sequences + 2))()
    wrong = library.tandem_paged_attention(ctypes.addressof(arguments), ctypes.addressof(marks))
    if wrong:
        raise ValueError(f"sequence {marks[0]} of {num_sequences}: {WRONG[wrong]}")
    return out


def _check(
    q: Tensor, pool: Tensor, layer: int, block_tables: Tensor, starts: Tensor, lengths: Tensor, window: int
) -> None:
    if q.dim() != 3 or pool.dim() != 6 or q.shape[2] != pool.shape[5] or q.shape[1] % pool.shape[4]:
        raise ValueError(f"q {tuple(q.shape)} does not fit the pool {tuple(pool.shape)}")
    if pool.stride(5) != 1:
        raise ValueError(f"pool has strides {pool.stride()}, the last must be 1")
    if not 0 <= layer < pool.shape[1]:
        raise ValueError(f"layer is {layer}, must be in 0 .. {pool.shape[1] - 1}")
    if window < 0:
        raise ValueError(f"window is {window}, must be 0 or more")
    for name, tensor in (("block_tables", block_tables), ("starts", starts), ("lengths", lengths)):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous() or tensor.shape[0] != block_tables.shape[0]:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, must be contiguous int32 with a row a sequence"
            )
