"""Which tensors a decoder has, by their names and shapes, and how many numbers that makes."""

from __future__ import annotations

from math import prod

from engine.arch import ArchSpec


def expected_shapes(arch: ArchSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that `arch` has, by its Hugging Face name, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (arch.vocab_size, arch.hidden_size),
        "model.norm.weight": (arch.hidden_size,),
    }
    if not arch.tied:
        shapes["lm_head.weight"] = (arch.vocab_size, arch.hidden_size)
    for layer in range(arch.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(arch).items()}
    return shapes


def _layer_shapes(arch: ArchSpec) -> dict[str, tuple[int, ...]]:
    hidden, mlp = arch.hidden_size, arch.intermediate_size
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    if arch.qkv_bias:
        shapes |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if arch.o_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if arch.mlp_bias:
        shapes |= {"mlp.gate_proj.bias": (mlp,), "mlp.up_proj.bias": (mlp,), "mlp.down_proj.bias": (hidden,)}
    if arch.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (arch.head_dim,), "self_attn.k_norm.weight": (arch.head_dim,)}
    return shapes


def num_parameters(arch: ArchSpec) -> int:
    """Numbers in all weights; those of tied ones once."""
    return sum(prod(shape) for shape in expected_shapes(arch).values())
