"""What a model is, as plain data: read from a Hugging Face config or from GGUF metadata, refusing all that is unknown.

Each family names the config fields that it understands. A field outside that list, or a value that would change the
result in a way that the decoder does not implement, is refused by name: a silently ignored field is a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class ModelError(ValueError):
    """A model that cannot be served; the message names what is wrong and what to do."""


class Family(StrEnum):
    """The model families that the decoder implements."""

    LLAMA = "llama"  # SmolLM and SmolLM2 are of this family
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"


class RopeScaling(StrEnum):
    """How rotary frequencies are stretched beyond the context that the model was trained on."""

    NONE = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding. Fields after `theta` matter only to the scalings that name them in RoPE papers and configs."""

    theta: float
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    original_context_tokens: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: derived from factor, mscale and mscale_all_dim
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchSpec:
    """Everything that determines the shapes and the arithmetic of one decoder, apart from its weights."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    context_tokens: int
    windows: tuple[int, ...]  # per layer: tokens that a token sees, itself included; 0 is all
    tied: bool  # the head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def scale(self) -> float:
        """Factor on the attention scores."""
        return float(self.head_dim**-0.5)


# ---- Hugging Face configs ------------------------------------------------------------------------------------------

# Fields that say nothing about the result of a forward pass.
INERT = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_commit_hash", "architectures",
    "attention_dropout", "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "decoder_start_token_id", "do_sample", "dtype", "early_stopping", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "initializer_range", "is_llama_config", "label2id", "length_penalty",
    "max_length", "min_length", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "pad_token_id", "prefix", "problem_type", "repetition_penalty", "return_dict", "sep_token_id",
    "task_specific_params",
    "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unsloth_fixed", "use_cache", "use_bfloat16", "use_return_dict",
})  # fmt: skip

# Fields that may be there only with a value that changes nothing; None is always such a value.
ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "partial_rotary_factor": (1.0, 1),
    "logits_soft_cap": (),
    "attn_logit_softcapping": (),
    "auto_map": (),
    "quantization_config": (),
}
WHY_ONLY = {
    "auto_map": "it asks for code from the model's folder, which is never run",
    "quantization_config": "quantised safetensors are not supported; take the unquantised model, or a .gguf file",
}

SHAPE = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "eos_token_id", "bos_token_id",
})  # fmt: skip
WINDOWED = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})

FIELDS: dict[Family, frozenset[str]] = {
    Family.LLAMA: SHAPE | {"attention_bias", "mlp_bias"},
    Family.MISTRAL: SHAPE | {"sliding_window"},
    Family.QWEN2: SHAPE | WINDOWED,
    Family.QWEN3: SHAPE | WINDOWED | {"attention_bias"},
}
ARCHITECTURES = {
    Family.LLAMA: "LlamaForCausalLM",
    Family.MISTRAL: "MistralForCausalLM",
    Family.QWEN2: "Qwen2ForCausalLM",
    Family.QWEN3: "Qwen3ForCausalLM",
}

# What the config classes of transformers assume where a config is silent (older files leave default values out).
DEFAULT_CONTEXT_TOKENS = {Family.LLAMA: 2048, Family.MISTRAL: 131072, Family.QWEN2: 32768, Family.QWEN3: 32768}
DEFAULT_THETA = 10000.0
DEFAULT_EPS = 1e-6


def arch_from_config(config: Mapping[str, object]) -> ArchSpec:
    """Reads the content of a `config.json`.

    Raises:
        ModelError: a family, field or value that the decoder does not implement; names it and what is supported.
    """
    family = _family(config)
    for name, value in config.items():
        if name in ONLY and value is not None and value not in ONLY[name]:
            allowed = " or ".join(repr(one) for one in ONLY[name]) or "absent"
            raise ModelError(f"config field {name} is {value!r}: {WHY_ONLY.get(name, f'it must be {allowed}')}")
        if name not in FIELDS[family] and name not in INERT and name not in ONLY:
            raise ModelError(
                f"config field {name} = {value!r} is unknown for {family} models; it may change the answer, so the "
                f"model is refused (known: {', '.join(sorted(FIELDS[family]))})"
            )
    hidden_size = _count(config, "hidden_size")
    num_heads = _count(config, "num_attention_heads")
    num_kv_heads = _count(config, "num_key_value_heads", default=8 if family is Family.MISTRAL else num_heads)
    default_head_dim = 128 if family is Family.QWEN3 else hidden_size // num_heads
    context_tokens = _count(config, "max_position_embeddings", default=DEFAULT_CONTEXT_TOKENS[family])
    num_layers = _count(config, "num_hidden_layers")
    bias = _flag(config, "attention_bias", default=False)
    spec = ArchSpec(
        family=family,
        vocab_size=_count(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_count(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_count(config, "head_dim", default=default_head_dim),
        norm_eps=_number(config, "rms_norm_eps", default=DEFAULT_EPS),
        rope=_rope(config, context_tokens),
        context_tokens=context_tokens,
        windows=_windows(config, family, num_layers, context_tokens),
        tied=_flag(config, "tie_word_embeddings", default=False),
        qkv_bias=bias or family is Family.QWEN2,
        o_bias=bias,
        mlp_bias=_flag(config, "mlp_bias", default=False),
        qk_norm=family is Family.QWEN3,
        eos_token_ids=token_ids(config.get("eos_token_id"), "eos_token_id"),
        bos_token_id=next(iter(token_ids(config.get("bos_token_id"), "bos_token_id")), None),
    )
    if spec.num_heads % spec.num_kv_heads:
        raise ModelError(
            f"config fields num_attention_heads = {spec.num_heads} and num_key_value_heads = {spec.num_kv_heads}: "
            "the first must be a multiple of the second"
        )
    if spec.head_dim % 2:
        raise ModelError(f"config field head_dim = {spec.head_dim} must be even: rotary embedding turns pairs")
    return spec


def token_ids(value: object, name: str) -> tuple[int, ...]:
    """Token ids of a config field that holds none, one or a list of them."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in values):
        raise ModelError(f"config field {name} is {value!r}; it must be a token id, a list of them or null")
    return tuple(values)


def _family(config: Mapping[str, object]) -> Family:
    model_type = config.get("model_type")
    supported = ", ".join(Family)
    if model_type not in tuple(Family):
        raise ModelError(f"config field model_type is {model_type!r}; supported are {supported} (SmolLM is llama)")
    family = Family(str(model_type))
    architectures = config.get("architectures")
    if architectures and architectures != [ARCHITECTURES[family]]:
        raise ModelError(
            f"config field architectures is {architectures!r}; of {family} only {ARCHITECTURES[family]} is supported"
        )
    return family


def _windows(config: Mapping[str, object], family: Family, num_layers: int, context_tokens: int) -> tuple[int, ...]:
    # Mistral uses its window on all layers; Qwen asks to switch it on, then uses it from a layer on or by a list.
    if config.get("sliding_window") is None or family is Family.LLAMA:
        window = 0
    else:
        window = _count(config, "sliding_window")
    if family is Family.MISTRAL:
        layers = [window] * num_layers
    else:
        window = window if _flag(config, "use_sliding_window", default=False) else 0
        first = _count(config, "max_window_layers", default=28, minimum=0)
        types = config.get("layer_types")
        if types is None:
            types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(num_layers)]
        if not isinstance(types, list) or len(types) != num_layers:
            raise ModelError(
                f"config field layer_types is {types!r}; it must be a list of num_hidden_layers = {num_layers}"
            )
        unknown = [one for one in types if one not in ("full_attention", "sliding_attention")]
        if unknown:
            raise ModelError(
                f"config field layer_types has {unknown[0]!r}; supported are full_attention and sliding_attention"
            )
        if not window and "sliding_attention" in types:
            raise ModelError(
                "config field layer_types has sliding_attention, but use_sliding_window and sliding_window do not say "
                "how wide the window is"
            )
        layers = [window if one == "sliding_attention" else 0 for one in types]
    return tuple(0 if width >= context_tokens else width for width in layers)


ROPE_FIELDS: dict[RopeScaling, frozenset[str]] = {
    RopeScaling.NONE: frozenset(),
    RopeScaling.LINEAR: frozenset({"factor"}),
    RopeScaling.LLAMA3: frozenset({
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    }),
    RopeScaling.YARN: frozenset({
        "factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    }),
}  # fmt: skip


def _rope(config: Mapping[str, object], context_tokens: int) -> RopeSpec:
    # rope_parameters is how transformers 5 writes it; rope_theta beside rope_scaling is how it was before.
    written = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(written, Mapping):
        raise ModelError(f"config field rope_parameters is {written!r}; it must be an object")
    rope: dict[str, object] = {name: value for name, value in written.items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind not in tuple(RopeScaling):
        raise ModelError(f"config field rope_type is {kind!r}; supported are {', '.join(RopeScaling)}")
    scaling = RopeScaling(str(kind))
    if "rope_theta" not in rope:
        rope["rope_theta"] = config.get("rope_theta", DEFAULT_THETA)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config field partial_rotary_factor must be 1.0: rotating a part of the head is not supported")
    unknown = sorted(set(rope) - ROPE_FIELDS[scaling] - {"rope_theta"})
    if unknown:
        raise ModelError(
            f"rope_parameters field {unknown[0]} = {rope[unknown[0]]!r} is unknown for rope_type {scaling}; "
            f"known are {', '.join(sorted(ROPE_FIELDS[scaling])) or 'none'}"
        )
    theta = _number(rope, "rope_theta")
    if scaling is RopeScaling.NONE:
        return RopeSpec(theta=theta)
    original = _count(rope, "original_max_position_embeddings", default=context_tokens)
    if scaling is RopeScaling.YARN and "factor" not in rope:
        rope["factor"] = context_tokens / original
    return RopeSpec(
        theta=theta,
        scaling=scaling,
        factor=_number(rope, "factor"),
        original_context_tokens=original,
        low_freq_factor=_number(rope, "low_freq_factor", default=1.0 if scaling is not RopeScaling.LLAMA3 else None),
        high_freq_factor=_number(rope, "high_freq_factor", default=4.0 if scaling is not RopeScaling.LLAMA3 else None),
        beta_fast=_number(rope, "beta_fast", default=32.0),
        beta_slow=_number(rope, "beta_slow", default=1.0),
        attention_factor=_number(rope, "attention_factor") if "attention_factor" in rope else None,
        mscale=_number(rope, "mscale", default=0.0),
        mscale_all_dim=_number(rope, "mscale_all_dim", default=0.0),
        truncate=_flag(rope, "truncate", default=True),
    )


def _count(config: Mapping[str, object], name: str, *, default: int | None = None, minimum: int = 1) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config field {name} is missing; it must be a whole number of at least {minimum}")
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ModelError(f"config field {name} is {value!r}; it must be a whole number of at least {minimum}")
    return value


def _number(config: Mapping[str, object], name: str, *, default: float | None = None) -> float:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config field {name} is missing; it must be a number")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ModelError(f"config field {name} is {value!r}; it must be a finite number that is not negative")
    return float(value)


def _flag(config: Mapping[str, object], name: str, *, default: bool) -> bool:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"config field {name} is {value!r}; it must be true or false")
    return value


# ---- GGUF metadata -------------------------------------------------------------------------------------------------

# GGUF key after the architecture's prefix -> config field.
GGUF_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")


def config_from_gguf(metadata: Mapping[str, object], *, tensor_names: Sequence[str]) -> dict[str, object]:
    """The `config.json` that GGUF metadata amount to, for `arch_from_config`. Arrays may be given by their length.

    Raises:
        ModelError: an architecture or a key that is not understood; names it.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise ModelError(
            f"GGUF key general.architecture is {architecture!r}; supported are {', '.join(GGUF_ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    config: dict[str, object] = {"model_type": architecture, "tie_word_embeddings": "output.weight" not in tensor_names}
    rest: dict[str, object] = {}
    for key, value in metadata.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            if name in GGUF_FIELDS:
                config[GGUF_FIELDS[name]] = value
            else:
                rest[name] = value
        elif not key.startswith(("general.", "tokenizer.", "quantize.", "GGUF.")):
            raise ModelError(f"GGUF key {key} is unknown for {architecture} models, so the file is refused")
    head_dim = config.get("head_dim")
    if head_dim is None and architecture == "qwen3":
        head_dim = config["head_dim"] = 128
    if head_dim is None:
        head_dim = config["head_dim"] = _count(config, "hidden_size") // _count(config, "num_attention_heads")
    vocab_size = metadata.get("tokenizer.ggml.tokens")
    if "vocab_size" not in config and isinstance(vocab_size, int):
        config["vocab_size"] = vocab_size
    for name in ("attention.value_length", "rope.dimension_count"):
        if rest.pop(name, head_dim) != head_dim:
            raise ModelError(
                f"GGUF key {prefix}{name} is {metadata[prefix + name]!r}; it must equal head_dim = {head_dim}"
            )
    scaling = {name: rest.pop(name) for name in list(rest) if name.startswith("rope.scaling.")}
    if scaling:
        config["rope_parameters"] = _gguf_scaling(scaling, config.pop("rope_theta", DEFAULT_THETA))
    for name, neutral in (("expert_count", 0), ("expert_used_count", 0)):
        if rest.pop(name, neutral) != neutral:
            raise ModelError(
                f"GGUF key {prefix}{name} is {metadata[prefix + name]!r}: mixture-of-experts is not supported"
            )
    if rest:
        name = sorted(rest)[0]
        raise ModelError(f"GGUF key {prefix}{name} = {rest[name]!r} is unknown, so the file is refused")
    for field in ("eos_token_id", "bos_token_id"):
        config[field] = metadata.get(f"tokenizer.ggml.{field}")
    return config


def _gguf_scaling(scaling: Mapping[str, object], theta: object) -> dict[str, object]:
    kind = scaling.get("rope.scaling.type", "none")
    rope: dict[str, object] = {"rope_theta": theta, "rope_type": "default" if kind == "none" else kind}
    names = {
        "rope.scaling.factor": "factor",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
    }
    for name, value in scaling.items():
        if name in names and kind in ("linear", "yarn"):
            if not (kind == "linear" and name.endswith("original_context_length")):
                rope[names[name]] = value
        elif name not in ("rope.scaling.type", "rope.scaling.finetuned", *names):
            raise ModelError(f"GGUF key {name} = {value!r} is unknown, so the file is refused")
    return rope
