"""How KV blocks lie in memory on one worker, and whether two workers may exchange them."""

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


def refusal(source: KVLayout, target: KVLayout, *, exact: bool) -> str | None:
    """Says why blocks of `source` may not be read by `target`, or None when they may.

    The sentence names each field that differs with both values. Fingerprints matter only to exact requests.
    """
    fields = [
        "namespace", "num_layers", "num_kv_heads", "head_dim", "block_size", "dtype", "order",
        "tp_rank", "tp_size",
    ]  # fmt: skip
    if exact:
        fields.append("fingerprint")
    different = [
        f"{name} is {getattr(source, name)!r} at the source and {getattr(target, name)!r} at the target"
        for name in fields
        if getattr(source, name) != getattr(target, name)
    ]
    return "; ".join(different) or None
