"""Attention of new tokens over a paged KV pool: one kernel for decode, chunked prefill and verification."""

from __future__ import annotations

from torch import Tensor

from kernels import reference


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
    softcap: scores become `softcap * tanh(score / softcap)`; 0 is off.
    A row's bits depend on its q and the K and V that it sees, not on batch, chunking, tile or thread.
    """
    result = reference.paged_attention(q, pool, layer, block_tables, starts, lengths, scale, window, softcap)
    return result if out is None else out.copy_(result)
