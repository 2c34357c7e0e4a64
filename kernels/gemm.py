"""Matrix products with packed weights; in exact mode a row's bits depend on nothing but the row and the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import build, reference
from kernels.dtypes import code

PANEL = 32  # columns of a panel, cpu/gemm.c

# bfloat16 without `exact`, on a CPU that multiplies bfloat16 natively: the library's product is the faster one above so
# many rows (1.1 to 2 times on Zen 4), ours up to there (1.1 to 2.3 times, for it only reads the weight).
NATIVE_ROWS = 8
NATIVE_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[num_outputs, num_inputs]` laid out for its kernel.

    `panels`: `data` is `[ceil(N / 32), K, 32]`, padded with zeros, for the C kernel; else the plain `[N, K]` matrix.
    `plain`: the matrix besides, for many rows, where the library is faster at them.
    """

    data: Tensor
    num_outputs: int
    num_inputs: int
    exact: bool
    panels: bool
    plain: Tensor | None = None


def pack_weight(weight: Tensor, *, exact: bool) -> PackedWeight:
    """Lays out `weight[N, K]` (float32, bfloat16 or float16) for `linear`; done once, at load.

    `exact`: each element of the product is one chain of fused multiply-adds over k = 0 .. K-1, so that its bits do not
    depend on the number of rows, the thread or the vector width. Raises ValueError for another shape or dtype.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must have 2 dimensions")
    code(weight.dtype, "weight")
    num_outputs, num_inputs = weight.shape
    # float32 without `exact` takes the same kernel: measured 1.0 to 5 times as fast as the library's at every number of
    # rows.
    if build.library() is None or weight.dtype == torch.float16:
        return PackedWeight(weight.contiguous(), num_outputs, num_inputs, exact, False)
    padded = F.pad(weight, (0, 0, 0, -num_outputs % PANEL)) if num_outputs % PANEL else weight
    panels = padded.view(-1, PANEL, num_inputs).transpose(1, 2).contiguous()
    native = weight.dtype == torch.bfloat16 and not exact and bool(NATIVE_FLAGS & build.cpu_flags())
    return PackedWeight(panels, num_outputs, num_inputs, exact, True, weight.contiguous() if native else None)


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, out: Tensor | None = None, num_threads: int = 1
) -> Tensor:
    """`x[M, K] @ weight[N, K]^T + bias[N]` -> `[M, N]` in x's dtype, into `out` (rows contiguous) when it is given.

    x and bias are of the weight's dtype, or float32 with a bfloat16 weight. Accumulates in float32. Raises ValueError
    where shapes or dtypes do not fit.
    """
    _check(x, weight, bias)
    plain = weight.plain if weight.panels else weight.data
    if plain is not None and not (weight.panels and (x.shape[0] <= NATIVE_ROWS or x.dtype != plain.dtype)):
        function = reference.linear_exact if weight.exact else reference.linear
        result = function(x, plain.to(x.dtype), bias)
        return result if out is None else out.copy_(result)
    library = build.library()
    assert library is not None, "a weight packed for the C kernel needs it"
    num_rows = x.shape[0]
    if out is None:
        out = torch.empty((num_rows, weight.num_outputs), dtype=x.dtype)
    elif out.shape != (num_rows, weight.num_outputs) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, must be {(num_rows, weight.num_outputs)} {x.dtype}")
    if x.stride(1) != 1:
        x = x.contiguous()
    library.tandem_gemm(
        out.data_ptr(), out.stride(0), x.data_ptr(), x.stride(0), code(x.dtype, "x"),
        weight.data.data_ptr(), code(weight.data.dtype, "weight"), 0 if bias is None else bias.data_ptr(),
        num_rows, weight.num_outputs, weight.num_inputs, num_threads,
    )  # fmt: skip
    return out


def weight_rows(weight: PackedWeight, rows: Tensor) -> Tensor:
    """Rows `[len(rows), K]` of the weight, bit for bit: the embedding look-up of tied weights."""
    if not weight.panels:
        return weight.data[rows]
    return weight.data[rows // PANEL, :, rows % PANEL]


def _check(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    if x.dim() != 2 or x.shape[1] != weight.num_inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [M, {weight.num_inputs}]")
    widened = x.dtype == torch.float32 and weight.data.dtype == torch.bfloat16
    if x.dtype != weight.data.dtype and not widened:
        raise ValueError(f"x is {x.dtype}, the weight {weight.data.dtype}")
    if bias is not None and (bias.shape != (weight.num_outputs,) or bias.dtype != x.dtype or not bias.is_contiguous()):
        raise ValueError(f"bias is {tuple(bias.shape)} {bias.dtype}, must be {(weight.num_outputs,)} {x.dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"x is on {x.device}, must be on cpu")
