"""How KV blocks lie in the memory of one worker's pool."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """One pool `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`: a block is one contiguous message.

    `namespace` names everything that determines the KV values (model, weights, dtype, rope, block size);
    `fingerprint` everything that determines the bits of an exact step (kernels, torch, instruction set).
    """

    namespace: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    order: str = "NHD"
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: all layers, K and V, all its token slots."""
        per_token = self.num_layers * 2 * self.num_kv_heads * self.head_dim
        return per_token * self.block_size * DTYPE_BYTES[self.dtype]
