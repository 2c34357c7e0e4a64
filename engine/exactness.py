"""Whether this machine computes a row the same whatever else is in the step, and the names of numerics and of a model.

An exact engine promises that a token depends on weights, prompt and parameters alone. That rests on two properties of
the kernels, tried here at start-up on the model's own shapes: a row of a matrix product has the same bits for any
number of rows beside it, and a position's attention has the same bits in prefill, in any chunk, and in decode.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from engine.arch import ArchSpec
from engine.weights import ModelWeights
from kernels import build
from kernels.gemm import PackedWeight, linear
from kernels.kv_copy import write_kv
from kernels.paged_attention import paged_attention

NUM_ROWS = 33
ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32)
HEAD_ROW_COUNTS = (1, 2, 17)  # the head is large: a few counts tell
NUM_TOKENS = 40
BLOCK_SIZE = 16
CHUNKS: tuple[tuple[int, ...], ...] = ((40,), (16, 24), (1,) * 40, (7, 9, 1, 23))


@torch.inference_mode()
def self_test(arch: ArchSpec, weights: ModelWeights, *, num_threads: int = 1) -> tuple[bool, str]:
    """Tries row invariance on the first layer's and the head's own matrices. Returns (it holds, what was found).

    Takes about 0.3 s for a model of 135M parameters. Fixed inputs: the answer is the same at every start.
    """
    generator = torch.Generator().manual_seed(20240229)
    layer = weights.layers[0]
    attention_width = arch.num_heads * arch.head_dim
    matrices: list[tuple[str, PackedWeight, int, tuple[int, ...]]] = [
        ("qkv", layer.qkv, arch.hidden_size, ROW_COUNTS),
        ("o", layer.o, attention_width, ROW_COUNTS),
        ("gate_up", layer.gate_up, arch.hidden_size, ROW_COUNTS),
        ("down", layer.down, arch.intermediate_size, ROW_COUNTS),
        ("head", weights.head, arch.hidden_size, HEAD_ROW_COUNTS),
    ]
    dtype = weights.norm.dtype
    for name, weight, width, counts in matrices:
        rows = torch.randn((NUM_ROWS, width), generator=generator).to(dtype)
        differs = _product_differs(rows, weight, counts, num_threads)
        if differs is not None:
            return False, f"rows of the {name} product change with the number of rows: {differs}"
    differs = _attention_differs(arch, dtype, generator, num_threads)
    if differs is not None:
        return False, f"attention of a position changes with the chunk that it is in: {differs}"
    return True, f"rows have equal bits for 1 to {NUM_ROWS} rows and for {len(CHUNKS)} chunkings"


def _product_differs(rows: Tensor, weight: PackedWeight, counts: tuple[int, ...], num_threads: int) -> str | None:
    whole = linear(rows, weight, num_threads=num_threads)
    for count in counts:
        # The last rows too: a row's place in the step must not matter either.
        for first in (0, NUM_ROWS - count):
            some = linear(rows[first : first + count].contiguous(), weight, num_threads=num_threads)
            if not torch.equal(some, whole[first : first + count]):
                return f"{count} of {NUM_ROWS}"
    return None


def _attention_differs(arch: ArchSpec, dtype: torch.dtype, generator: torch.Generator, num_threads: int) -> str | None:
    num_blocks = -(-NUM_TOKENS // BLOCK_SIZE)
    q = torch.randn((NUM_TOKENS, arch.num_heads, arch.head_dim), generator=generator).to(dtype)
    k, v = torch.randn((2, NUM_TOKENS, arch.num_kv_heads, arch.head_dim), generator=generator).to(dtype)
    pool = torch.zeros((num_blocks, 1, 2, BLOCK_SIZE, arch.num_kv_heads, arch.head_dim), dtype=dtype)
    write_kv(pool, 0, k, v, torch.arange(NUM_TOKENS))
    table = torch.arange(num_blocks, dtype=torch.int32)[None]
    found = []
    for chunks in CHUNKS:
        parts, start = [], 0
        for length in chunks:
            starts = torch.tensor([start], dtype=torch.int32)
            lengths = torch.tensor([length], dtype=torch.int32)
            part = q[start : start + length].contiguous()
            parts.append(
                paged_attention(
                    part, pool, 0, table, starts, lengths, arch.scale, window=arch.windows[0], num_threads=num_threads
                )
            )
            start += length
        found.append(torch.cat(parts))
    for chunks, mixed in zip(CHUNKS, found, strict=True):
        if not torch.equal(mixed, found[0]):
            return f"chunks of {chunks[:4]} tokens"
    return None


def fingerprint(*, dtype: str, exact: bool) -> str:
    """Names everything, apart from model and layout, that determines the bits of a step on this machine."""
    capability = torch.backends.cpu.get_cpu_capability()
    mode = "exact" if exact else "fast"
    return f"torch {torch.__version__} {capability}, {build.description()}, {dtype}, {mode}"


def namespace(*, model: str, arch: ArchSpec, weights: ModelWeights, dtype: str, block_size: int) -> str:
    """Names everything that determines the content of a KV block: the model's name and a digest of the rest."""
    digest = hashlib.blake2b(digest_size=8)
    # The end tokens end answers; they do not change a block.
    shape = [getattr(arch, name) for name in arch.__slots__ if name not in ("eos_token_ids", "bos_token_id")]
    digest.update(f"{weights.digest} {shape} {dtype} {block_size}".encode())
    return f"{model}:{digest.hexdigest()}"
