"""Matrix products with packed weights; in exact mode a row's bits depend on nothing but the row and the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[num_outputs, num_inputs]` laid out for its kernel. `panels` False: `data` is the plain matrix."""

    data: Tensor
    num_outputs: int
    num_inputs: int
    exact: bool
    panels: bool


def pack_weight(weight: Tensor, *, exact: bool) -> PackedWeight:
    """Lays out `weight[N, K]` (float32, bfloat16) for `linear`; done once, at load.

    `exact`: each element of the product is one chain of fused multiply-adds over k = 0 .. K-1, so that its bits do not
    depend on the number of rows, the thread or the vector width.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must have 2 dimensions")
    return PackedWeight(weight.contiguous(), weight.shape[0], weight.shape[1], exact, False)


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, out: Tensor | None = None, num_threads: int = 1
) -> Tensor:
    """`x[M, K] @ weight[N, K]^T + bias[N]` -> `[M, N]` in x's dtype, into `out` when it is given.

    Accumulates in float32. Raises ValueError where shapes or dtypes do not fit.
    """
    _check(x, weight)
    function = reference.linear_exact if weight.exact else reference.linear
    result = function(x, weight.data, bias)
    return result if out is None else out.copy_(result)


def weight_rows(weight: PackedWeight, rows: Tensor) -> Tensor:
    """Rows `[len(rows), K]` of the weight, bit for bit: the embedding look-up of tied weights."""
    return weight.data[rows]


def _check(x: Tensor, weight: PackedWeight) -> None:
    if x.dim() != 2 or x.shape[1] != weight.num_inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [M, {weight.num_inputs}]")
    if x.dtype != weight.data.dtype:
        raise ValueError(f"x is {x.dtype}, the weight {weight.data.dtype}")
    if x.device != torch.device("cpu"):
        raise ValueError(f"x is on {x.device}, must be on cpu")
