"""Whether two workers may exchange KV blocks; the layout itself is the engine's (engine/layout.py)."""

from __future__ import annotations

from engine.layout import DTYPE_BYTES as DTYPE_BYTES
from engine.layout import KVLayout as KVLayout


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
