"""Plain torch twins of the C kernels: what each kernel means, and what runs where no C compiler is at hand."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

# Rows that one call of the exact fallback GEMM works on: a fixed shape makes the library pick one kernel, and with it
# one order of summation, whatever the batch is.
EXACT_ROWS = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x[M, K] @ weight[N, K]^T + bias` by the library's fastest way; its bits may depend on M."""
    return F.linear(x, weight, bias)


def linear_exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in tiles of always EXACT_ROWS rows (padded with zeros), so that a row's bits do not depend on M."""
    num_rows = x.shape[0]
    out = torch.empty((num_rows, weight.shape[0]), dtype=x.dtype)
    for begin in range(0, num_rows, EXACT_ROWS):
        tile = x[begin : begin + EXACT_ROWS]
        padded = torch.zeros((EXACT_ROWS, x.shape[1]), dtype=x.dtype)
        padded[: tile.shape[0]] = tile
        out[begin : begin + tile.shape[0]] = F.linear(padded, weight, bias)[: tile.shape[0]]
    return out


def gather_kv(pool: Tensor, layer: int, table: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """K and V `[num_tokens, kv_heads, head_dim]` of one sequence, read through its block table."""
    num_blocks = -(-num_tokens // pool.shape[3])
    blocks = pool[table[:num_blocks].long(), layer]
    keys, values = blocks[:, 0].flatten(0, 1), blocks[:, 1].flatten(0, 1)
    return keys[:num_tokens], values[:num_tokens]


def attend(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, window: int, softcap: float) -> Tensor:
    """Causal attention of `q[n, H, D]` at positions start.. over `keys, values[start + n, KVH, D]`, in fp32."""
    group = q.shape[1] // keys.shape[1]
    keys = keys.float().repeat_interleave(group, dim=1)
    values = values.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(start, start + q.shape[0])[:, None]
    columns = torch.arange(keys.shape[0])[None, :]
    visible = columns <= rows
    if window:
        visible &= columns > rows - window
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), values).to(q.dtype)


def paged_attention(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Attention of every sequence in turn; see kernels.paged_attention.paged_attention."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    row = 0
    for table, start, length in zip(block_tables, starts.tolist(), lengths.tolist(), strict=True):
        if length:
            keys, values = gather_kv(pool, layer, table, start + length)
            out[row : row + length] = attend(q[row : row + length], keys, values, start, scale, window, softcap)
        row += length
    return out


def write_kv(pool: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Scatters the rows of k and v to `slots`; a negative slot is skipped."""
    keep = slots >= 0
    blocks, offsets = slots[keep] // pool.shape[3], slots[keep] % pool.shape[3]
    pool[blocks, layer, 0, offsets] = k[keep].to(pool.dtype)
    pool[blocks, layer, 1, offsets] = v[keep].to(pool.dtype)


def copy_blocks(pool: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies whole blocks source -> target, in order."""
    for source, target in pairs:
        pool[target] = pool[source]


def copy_and_hash(target: int, source: int, num_bytes: int) -> int:
    """memmove and XXH3-64 of the bytes that arrived."""
    ctypes.memmove(target, source, num_bytes)
    return hash_bytes(target, num_bytes)


def copy_blocks_and_hash(
    target: int, target_blocks: Sequence[int], source: int, source_blocks: Sequence[int], block_bytes: int
) -> int:
    """memmove of each block and XXH3-64 of all that arrived, in order."""
    hashed = xxhash.xxh3_64()
    for to, origin in zip(target_blocks, source_blocks, strict=True):
        address = target + to * block_bytes
        ctypes.memmove(address, source + origin * block_bytes, block_bytes)
        hashed.update((ctypes.c_char * block_bytes).from_address(address))
    return hashed.intdigest()


def hash_bytes(source: int, num_bytes: int) -> int:
    """XXH3-64 (seed 0) of memory at an address."""
    return xxhash.xxh3_64_intdigest((ctypes.c_char * num_bytes).from_address(source))


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """RMSNorm in Hugging Face's order of rounding: Llama's casts before the weight, Gemma's (plus_one) after."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if plus_one:
        return (wide * (1.0 + weight.float())).to(x.dtype)
    return weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates the first `cos.shape[1]` dimensions of `x[T, H, D]` in place, the two halves as pairs."""
    width = cos.shape[1]
    part = x[..., :width]
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    low, high = part.chunk(2, dim=-1)
    x[..., :width] = part * cos + torch.cat((-high, low), dim=-1) * sin


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up` of `[M, 2F] = [gate | up]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
