"""Configs of the supported families are understood; whatever is not understood is refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from engine.arch import ModelError, RopeScaling, arch_from_config, config_from_gguf

# As published: Meta's Llama 3.2 1B, SmolLM2 135M, Qwen2.5 0.5B, Qwen3 0.6B, Mistral 7B v0.1.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
GGUF: dict[str, Any] = {
    "GGUF.version": 3,
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 96,
    "llama.feed_forward_length": 160,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": 320,
    "tokenizer.ggml.eos_token_id": 2,
}


def test_llama() -> None:
    """Scaled rope, grouped heads and several end tokens are read."""
    arch = arch_from_config(LLAMA)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.num_layers) == (32, 8, 64, 16)
    assert arch.rope.scaling is RopeScaling.LLAMA3
    assert (arch.rope.theta, arch.rope.factor, arch.rope.original_context_tokens) == (500000.0, 32.0, 8192)
    assert arch.eos_token_ids == (128001, 128008, 128009)
    assert arch.tied
    assert not arch.qkv_bias
    assert arch.windows == (0,) * 16


def test_smollm2() -> None:
    """Its harmless extra fields are known; the width of a head follows from the hidden size."""
    arch = arch_from_config(SMOLLM2)
    assert (arch.head_dim, arch.context_tokens, arch.rope.theta) == (64, 8192, 100000.0)


def test_qwen2() -> None:
    """It has biases on q, k and v alone, and no window unless asked."""
    arch = arch_from_config(QWEN2)
    assert arch.qkv_bias
    assert not arch.o_bias
    assert set(arch.windows) == {0}
    windowed = arch_from_config({**QWEN2, "use_sliding_window": True, "sliding_window": 4096})
    assert windowed.windows == (0,) * 21 + (4096,) * 3


def test_qwen3() -> None:
    """It norms q and k and has heads that are wider than hidden size over heads."""
    arch = arch_from_config(QWEN3)
    assert arch.qk_norm
    assert arch.head_dim == 128


def test_mistral() -> None:
    """Its window is on all layers; none, or one as wide as the context, is no window."""
    assert arch_from_config(MISTRAL).windows == (4096,) * 32
    assert set(arch_from_config({**MISTRAL, "sliding_window": None}).windows) == {0}
    assert set(arch_from_config({**MISTRAL, "sliding_window": 32768}).windows) == {0}


def test_old_and_new_rope_fields_mean_the_same() -> None:
    """rope_parameters is read like rope_theta beside rope_scaling."""
    new = {name: value for name, value in LLAMA.items() if name not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert arch_from_config(new) == arch_from_config(LLAMA)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA, {"model_type": "gemma3"}, "model_type is 'gemma3'; supported are llama, mistral, qwen2, qwen3"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM is supported"),
        (LLAMA, {"residual_multiplier": 0.2}, "config field residual_multiplier = 0.2 is unknown for llama models"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu': it must be 'silu'"),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'; supported are default, linear"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 1}},
            "rope_parameters field twist = 1",
        ),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA, {"auto_map": {"AutoModel": "x.Y"}}, "code from the model's folder, which is never run"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantised safetensors are not supported"),
        (LLAMA, {"num_key_value_heads": 5}, "the first must be a multiple of the second"),
        (LLAMA, {"hidden_size": "2048"}, "hidden_size is '2048'; it must be a whole number of at least 1"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers is True"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        (LLAMA, {"head_dim": 63}, "head_dim = 63 must be even"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        (LLAMA, {"eos_token_id": [-4]}, "eos_token_id is [-4]"),
        (QWEN2, {"attention_bias": True}, "config field attention_bias = True is unknown for qwen2"),
        (QWEN2, {"layer_types": ["full_attention"]}, "must be a list of num_hidden_layers = 24"),
        (QWEN2, {"layer_types": ["chunked_attention"] * 24}, "layer_types has 'chunked_attention'"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "how wide the window is"),
    ],
)
def test_what_is_not_understood_is_refused(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """The message names the field and its value."""
    with pytest.raises(ModelError, match=re.escape(message)):
        arch_from_config({**base, **changes})


def test_gguf_metadata() -> None:
    """GGUF keys become config fields; tied is what has no output tensor."""
    arch = arch_from_config(config_from_gguf(GGUF, tensor_names=["token_embd.weight"]))
    assert (arch.hidden_size, arch.num_layers, arch.head_dim, arch.vocab_size) == (96, 2, 16, 320)
    assert arch.tied
    assert not arch_from_config(config_from_gguf(GGUF, tensor_names=["output.weight"])).tied
    assert arch.eos_token_ids == (2,)


def test_gguf_rope_scaling() -> None:
    """Linear and yarn scaling are read."""
    linear = {**GGUF, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert arch_from_config(config_from_gguf(linear, tensor_names=[])).rope.factor == 4.0
    yarn = {
        **linear,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.original_context_length": 128,
        "llama.rope.scaling.finetuned": True,
    }
    rope = arch_from_config(config_from_gguf(yarn, tensor_names=[])).rope
    assert (rope.scaling, rope.original_context_tokens) == (RopeScaling.YARN, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma3"}, "general.architecture is 'gemma3'; supported are llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "mixture-of-experts is not supported"),
        ({"llama.attention.sliding_window": 64}, "attention.sliding_window = 64 is unknown"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8; it must equal head_dim = 16"),
        ({"adapter.type": "lora"}, "adapter.type is unknown"),
        ({"llama.rope.scaling.type": "longrope"}, "rope_type is 'longrope'"),
        ({"llama.block_count": None}, "num_hidden_layers is missing"),
    ],
)
def test_gguf_metadata_that_are_not_understood_are_refused(changes: dict[str, Any], message: str) -> None:
    """The message names the key."""
    with pytest.raises(ModelError, match=re.escape(message)):
        arch_from_config(config_from_gguf({**GGUF, **changes}, tensor_names=[]))
