"""Norms, rotary embedding and gated activations; every row is computed alike, whatever the batch is."""

from __future__ import annotations

from torch import Tensor

from kernels import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, out: Tensor | None = None) -> Tensor:
    """RMSNorm of the last dimension of `x[..., H]` with `weight[H]`, in Hugging Face's order of rounding.

    `plus_one` multiplies with 1 + weight in float32 (Gemma). `out` may be x: per-head norms of q and k run in place
    on strided views `[T, heads, head_dim]`.
    """
    result = reference.rms_norm(x, weight, eps, plus_one)
    return result if out is None else out.copy_(result)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False
) -> tuple[Tensor, Tensor]:
    """Adds x to residual `[M, H]` IN PLACE, then norms it -> (normed, residual)."""
    residual += x
    return reference.rms_norm(residual, weight, eps, plus_one), residual


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates `q[T, H, D]` and `k[T, KVH, D]` in place with `cos, sin[T, R]`: halves as pairs, as Hugging Face does.

    R <= D: only the first R dimensions turn. q and k may be views with strides into one fused projection.
    """
    reference.rotate(q, cos, sin)
    reference.rotate(k, cos, sin)


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` of `gate_up[M, 2F] = [gate | up]` -> `[M, F]`."""
    result = reference.gated(gate_up, "silu")
    return result if out is None else out.copy_(result)


def gelu_tanh_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`gelu(gate) * up` with the tanh form of gelu (Gemma) of `gate_up[M, 2F] = [gate | up]` -> `[M, F]`."""
    result = reference.gated(gate_up, "gelu_tanh")
    return result if out is None else out.copy_(result)
