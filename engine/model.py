"""The decoder: one function from a step's tokens to the logits of its sampled rows, driven by an ArchSpec.

The order of roundings is that of transformers' models, so that float32 gives the same tokens and bfloat16 the same
bits wherever a matrix product gives them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.arch import ArchSpec, RopeScaling, RopeSpec
from engine.weights import LayerWeights, ModelWeights
from kernels.elementwise import add_rms_norm, rms_norm, rope, silu_mul
from kernels.gemm import linear, weight_rows
from kernels.kv_copy import write_kv
from kernels.paged_attention import paged_attention

FIRST_WORKSPACE_TOKENS = 64
ROPE_TABLE_TOKENS = 4096  # positions that the rotary tables begin with; they double when a longer context comes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """One step: the tokens of all rows one after another, and where each row's KV is.

    T tokens in N rows, of which S are sampled. Row n runs `lengths[n]` tokens from position `starts[n]` on.
    """

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]: block * block_size + offset, where the token's K and V go
    block_tables: Tensor  # int32 [N, most blocks of a row]; short rows are padded with any valid block
    starts: Tensor  # int32 [N]
    lengths: Tensor  # int32 [N]
    sampled: Tensor  # int64 [S]: indices into tokens of the last token of each sampled row
    context_tokens: int  # the largest position, plus one


class Workspace:
    """The intermediate results of a step, in memory that is kept: memory touched for the first time is slow."""

    def __init__(self, arch: ArchSpec, dtype: torch.dtype, num_tokens: int) -> None:
        heads = arch.num_heads + 2 * arch.num_kv_heads
        self.num_tokens = num_tokens
        self.hidden = torch.empty((num_tokens, arch.hidden_size), dtype=dtype)
        self.qkv = torch.empty((num_tokens, heads * arch.head_dim), dtype=dtype)
        self.mixed = torch.empty((num_tokens, arch.num_heads, arch.head_dim), dtype=dtype)
        self.gate_up = torch.empty((num_tokens, 2 * arch.intermediate_size), dtype=dtype)
        self.gated = torch.empty((num_tokens, arch.intermediate_size), dtype=dtype)


class Decoder:
    """Runs steps over a KV pool. Holds weights and rotary tables, and no state of any request.

    Not thread-safe: steps share their intermediate memory.
    """

    def __init__(self, arch: ArchSpec, weights: ModelWeights, *, num_threads: int = 1) -> None:
        self.arch = arch
        self.weights = weights
        self.num_threads = num_threads
        self.dtype = weights.norm.dtype
        self._cos, self._sin = rope_tables(arch, min(arch.context_tokens, ROPE_TABLE_TOKENS), self.dtype)
        self._space = Workspace(arch, self.dtype, FIRST_WORKSPACE_TOKENS)
        self._logits = torch.empty((0, arch.vocab_size), dtype=self.dtype)
        self.num_layers_begun = 0  # in all steps so far: tells a slow step from one that hangs

    @torch.inference_mode()
    def forward(self, step: StepTensors, pool: Tensor) -> Tensor:
        """Writes the step's K and V into `pool` and returns the logits `[S, vocab_size]` of the sampled rows.

        `pool` is `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`. The logits are overwritten by the
        next step.
        """
        self._make_room(step)
        cos, sin = self._cos.index_select(0, step.positions), self._sin.index_select(0, step.positions)
        layers, eps = self.weights.layers, self.arch.norm_eps
        residual = self._embed(step.tokens)
        hidden = rms_norm(residual, layers[0].input_norm, eps)
        for index, layer in enumerate(layers):
            self.num_layers_begun += 1
            mixed = self._attention(hidden, layer, index, step, pool, cos, sin)
            if index == len(layers) - 1:
                # Past the last attention nothing but the sampled rows is of use to anyone.
                mixed, residual = mixed.index_select(0, step.sampled), residual.index_select(0, step.sampled)
                if not step.sampled.numel():
                    return self._logits[:0]
            following = layers[index + 1].input_norm if index + 1 < len(layers) else self.weights.norm
            hidden, residual = self._after_attention(mixed, residual, layer, following)
        return linear(hidden, self.weights.head, out=self._logits[: step.sampled.numel()], num_threads=self.num_threads)

    def _attention(
        self, hidden: Tensor, layer: LayerWeights, index: int, step: StepTensors, pool: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Attention of one layer, before its output projection: `[T, num_heads * head_dim]`."""
        arch, threads = self.arch, self.num_threads
        num_tokens = hidden.shape[0]
        fused = linear(hidden, layer.qkv, layer.qkv_bias, out=self._space.qkv[:num_tokens], num_threads=threads)
        q, k, v = torch.split(
            fused.view(num_tokens, -1, arch.head_dim), [arch.num_heads, arch.num_kv_heads, arch.num_kv_heads], dim=1
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            rms_norm(q, layer.q_norm, arch.norm_eps, out=q)
            rms_norm(k, layer.k_norm, arch.norm_eps, out=k)
        rope(q, k, cos, sin)
        write_kv(pool, index, k, v, step.slots)
        mixed = paged_attention(
            q,
            pool,
            index,
            step.block_tables,
            step.starts,
            step.lengths,
            arch.scale,
            window=arch.windows[index],
            out=self._space.mixed[:num_tokens],
            num_threads=threads,
        )
        return mixed.view(num_tokens, -1)

    def _after_attention(
        self, mixed: Tensor, residual: Tensor, layer: LayerWeights, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output projection and MLP of one layer, and the norm that follows it: (normed, residual)."""
        space, threads, eps, num_tokens = self._space, self.num_threads, self.arch.norm_eps, mixed.shape[0]
        hidden = linear(mixed, layer.o, layer.o_bias, out=space.hidden[:num_tokens], num_threads=threads)
        hidden, residual = add_rms_norm(hidden, residual, layer.mlp_norm, eps)
        both = linear(hidden, layer.gate_up, layer.gate_up_bias, out=space.gate_up[:num_tokens], num_threads=threads)
        gated = silu_mul(both, out=space.gated[:num_tokens])
        hidden = linear(gated, layer.down, layer.down_bias, out=space.hidden[:num_tokens], num_threads=threads)
        return add_rms_norm(hidden, residual, following, eps)

    def _make_room(self, step: StepTensors) -> None:
        if step.context_tokens > self._cos.shape[0]:
            self._grow_tables(step.context_tokens)
        if step.tokens.numel() > self._space.num_tokens:
            self._space = Workspace(self.arch, self.dtype, _power_of_two(step.tokens.numel()))
        if step.sampled.numel() > self._logits.shape[0]:
            self._logits = torch.empty((_power_of_two(step.sampled.numel()), self.arch.vocab_size), dtype=self.dtype)

    def _embed(self, tokens: Tensor) -> Tensor:
        embedding = self.weights.embedding
        return weight_rows(self.weights.head, tokens) if embedding is None else embedding.index_select(0, tokens)

    def _grow_tables(self, context_tokens: int) -> None:
        self._cos, self._sin = rope_tables(self.arch, _power_of_two(context_tokens), self.dtype)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def rope_tables(arch: ArchSpec, num_positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[num_positions, head_dim]`, computed in float32 and rounded once, as transformers does."""
    frequencies, factor = rope_frequencies(arch.rope, arch.head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rope_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """The rotary frequencies `[head_dim / 2]` and the factor on cosines and sines.

    Linear: Chen et al., arXiv 2306.15595. llama3: the scaling of Llama 3.1. yarn: Peng et al., arXiv 2309.00071.
    Each follows the operations of transformers' modeling_rope_utils one by one, for equal bits.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.scaling is RopeScaling.NONE:
        return plain, 1.0
    if rope.scaling is RopeScaling.LINEAR:
        return plain / rope.factor, 1.0
    if rope.scaling is RopeScaling.LLAMA3:
        return _llama3_frequencies(rope, plain), 1.0
    return _yarn_frequencies(rope, head_dim, rope.theta**exponents), _yarn_factor(rope)


def _llama3_frequencies(rope: RopeSpec, plain: Tensor) -> Tensor:
    original = rope.original_context_tokens
    longest, shortest = original / rope.low_freq_factor, original / rope.high_freq_factor
    wavelengths = 2 * math.pi / plain
    scaled = torch.where(wavelengths > longest, plain / rope.factor, plain)
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelengths < shortest) * ~(wavelengths > longest)
    return torch.where(between, smoothed, scaled)


def _yarn_frequencies(rope: RopeSpec, head_dim: int, powers: Tensor) -> Tensor:
    def dimension(rotations: float) -> float:
        # The (fractional) dimension that turns so often within the original context.
        turns = rope.original_context_tokens / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp would have no width
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return (1.0 / (rope.factor * powers)) * (1 - kept) + (1.0 / powers) * kept


def _yarn_factor(rope: RopeSpec) -> float:
    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.factor, rope.mscale) / magnitude(rope.factor, rope.mscale_all_dim)
    return magnitude(rope.factor)
