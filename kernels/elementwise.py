"""Norms, rotary embedding and gated activations; every row is computed alike, whatever the batch is."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import build, reference
from kernels.dtypes import code


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, out: Tensor | None = None) -> Tensor:
    """RMSNorm of the last dimension of `x[M, H]` or `x[T, heads, D]`, in Hugging Face's order of rounding.

    `plus_one` multiplies with 1 + weight in float32 (Gemma). `out` may be x: per-head norms of q and k run in place
    on strided views `[T, heads, head_dim]`. Raises ValueError where shapes or dtypes do not fit.
    """
    if x.dim() not in (2, 3) or weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}")
    library = build.library()
    if library is None or x.stride(-1) != 1:
        result = reference.rms_norm(x, weight, eps, plus_one)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype)
    elif out.shape != x.shape or out.dtype != x.dtype or out.stride(-1) != 1:
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, must be {tuple(x.shape)} {x.dtype}")
    heads = x.dim() == 3
    library.tandem_rms_norm(
        out.data_ptr(), out.stride(0), out.stride(1) if heads else 0,
        x.data_ptr(), x.stride(0), x.stride(1) if heads else 0,
        weight.data_ptr(), x.shape[0], x.shape[1] if heads else 1, x.shape[-1], eps,
        code(x.dtype, "x"), code(weight.dtype, "weight"), plus_one,
    )  # fmt: skip
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False
) -> tuple[Tensor, Tensor]:
    """Adds x to residual `[M, H]` IN PLACE, then norms it -> (normed, residual)."""
    if x.shape != residual.shape or x.dtype != residual.dtype or x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, residual {tuple(residual.shape)}, weight {tuple(weight.shape)}"
        )
    library = build.library()
    if library is None or x.stride(1) != 1 or not residual.is_contiguous():
        residual += x
        return rms_norm(residual, weight, eps, plus_one=plus_one), residual
    normed = torch.empty(x.shape, dtype=x.dtype)
    library.tandem_add_rms_norm(
        normed.data_ptr(), residual.data_ptr(), x.data_ptr(), x.stride(0), weight.data_ptr(), x.shape[0], x.shape[1],
        eps, code(x.dtype, "x"), code(weight.dtype, "weight"), plus_one,
    )  # fmt: skip
    return normed, residual


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates `q[T, H, D]` and `k[T, KVH, D]` in place with `cos, sin[T, R]`: halves as pairs, as Hugging Face does.

    R <= D: only the first R dimensions turn. q and k may be views with strides into one fused projection.
    """
    if cos.shape != sin.shape or cos.shape[0] != q.shape[0] or cos.shape[1] > q.shape[2] or cos.shape[1] % 2:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit q {tuple(q.shape)}")
    library = build.library()
    cos, sin = cos.contiguous(), sin.contiguous()
    for x in (q, k):
        if library is None or x.stride(2) != 1:
            reference.rotate(x, cos, sin)
            continue
        library.tandem_rope(
            x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), cos.shape[1],
            x.shape[0], x.shape[1], cos.shape[1], code(x.dtype, "x"), code(cos.dtype, "cos"),
        )  # fmt: skip


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` of `gate_up[M, 2F] = [gate | up]` -> `[M, F]`."""
    return _gated(gate_up, "silu", out)


def gelu_tanh_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`gelu(gate) * up` with the tanh form of gelu (Gemma) of `gate_up[M, 2F] = [gate | up]` -> `[M, F]`."""
    return _gated(gate_up, "gelu_tanh", out)


def _gated(gate_up: Tensor, activation: str, out: Tensor | None) -> Tensor:
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    library = build.library()
    if library is None or gate_up.stride(1) != 1:
        result = reference.gated(gate_up, activation)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty((num_rows, width), dtype=gate_up.dtype)
    elif out.shape != (num_rows, width) or out.dtype != gate_up.dtype or out.stride(1) != 1:
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, must be {(num_rows, width)} {gate_up.dtype}")
    library.tandem_gated(
        out.data_ptr(), out.stride(0), gate_up.data_ptr(), gate_up.stride(0), num_rows, width,
        code(gate_up.dtype, "gate_up"), activation == "gelu_tanh",
    )  # fmt: skip
    return out
