"""Norms, rotary embedding and gated activations: as transformers rounds them, and row by row the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import build, reference
from kernels.elementwise import add_rms_norm, gelu_tanh_mul, rms_norm, rope, silu_mul

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C kernels here")
LEVELS = [level for level in (*build.levels(), build.PORTABLE_LEVEL) if build.library() is not None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One step of the narrow type, where a sum in another order may round to the neighbour.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def close(result: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 64, 100, 576, 1000])
def test_rms_norm(width: int, dtype: torch.dtype, plus_one: bool) -> None:
    x, weight = 3 * torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
    expected = reference.rms_norm(x, weight, 1e-5, plus_one)
    close(rms_norm(x, weight, 1e-5, plus_one=plus_one), expected)
    residual, branch = torch.randn(2, 5, width).to(dtype)
    total = residual + branch
    normed, same = add_rms_norm(branch, residual, weight, 1e-5, plus_one=plus_one)
    assert same is residual
    assert torch.equal(residual, total)
    close(normed, reference.rms_norm(total, weight, 1e-5, plus_one))
    assert torch.equal(normed, rms_norm(total, weight, 1e-5, plus_one=plus_one))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads_in_place_inside_a_fused_projection(dtype: torch.dtype) -> None:
    fused = torch.randn(4, 10, 64).to(dtype)
    before, weight = fused.clone(), torch.randn(64).to(dtype)
    q = fused[:, 2:7]
    assert rms_norm(q, weight, 1e-6, out=q) is q
    close(q, reference.rms_norm(before[:, 2:7], weight, 1e-6, False))
    assert torch.equal(fused[:, :2], before[:, :2])
    assert torch.equal(fused[:, 7:], before[:, 7:])


@pytest.mark.parametrize("table_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (80, 80), (64, 32), (20, 20)])
def test_rope_has_the_bits_of_transformers(
    widths: tuple[int, int], dtype: torch.dtype, table_dtype: torch.dtype | None
) -> None:
    head_dim, rotary = widths
    angles = torch.randn(6, rotary // 2).repeat(1, 2)
    cos, sin = angles.cos().to(table_dtype or dtype), angles.sin().to(table_dtype or dtype)
    fused = torch.randn(6, 9, head_dim).to(dtype)
    expected = fused.clone()
    rope(fused[:, :5], fused[:, 5:7], cos, sin)
    reference.rotate(expected[:, :7], cos, sin)
    assert torch.equal(fused, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 48, 100, 1536])
def test_gated_activations(width: int, dtype: torch.dtype) -> None:
    gate_up = (4 * torch.randn(5, 2 * width)).to(dtype)
    gate_up[0, 0], gate_up[1, 0], gate_up[2, 0] = 100.0, -100.0, 0.0
    close(silu_mul(gate_up), reference.gated(gate_up, "silu"))
    close(gelu_tanh_mul(gate_up), reference.gated(gate_up, "gelu_tanh"))


def everything(x: Tensor, first: int, last: int) -> list[Tensor]:
    """All kernels over the rows first .. last - 1 of x."""
    part = x[first:last].clone()
    weight = torch.linspace(0.5, 2, x.shape[1]).to(x.dtype)
    heads = part.reshape(last - first, 3, -1).clone()
    angles = torch.arange(x.shape[0])[first:last, None] * torch.linspace(0.1, 1, heads.shape[2] // 2).repeat(2)
    rope(heads[:, :2], heads[:, 2:], angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    normed, total = add_rms_norm(part, part.flip(1).contiguous(), weight, 1e-5)
    return [rms_norm(part, weight, 1e-5), normed, total, heads, silu_mul(part), gelu_tanh_mul(part)]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_same_bits_alone_and_on_every_instruction_set(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(33, 300)).to(dtype)
    whole = everything(x, 0, 33)
    for level in LEVELS:
        with build.using(level):
            for first, last in ((0, 1), (32, 33), (7, 29)):
                for result, expected in zip(everything(x, first, last), whole, strict=True):
                    assert torch.equal(result, expected[first:last]), level


def test_the_torch_twin_answers_alike() -> None:
    x = torch.randn(5, 300)
    results = everything(x, 0, 5)
    with build.using(None):
        for twin, result in zip(everything(x, 0, 5), results, strict=True):
            torch.testing.assert_close(twin, result, rtol=1e-5, atol=1e-5)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8), 1e-5)
    with pytest.raises(ValueError, match="do not fit q"):
        rope(torch.zeros(2, 1, 8), torch.zeros(2, 1, 8), torch.zeros(2, 10), torch.zeros(2, 10))
    with pytest.raises(ValueError, match="out is"):
        silu_mul(torch.zeros(2, 8), out=torch.zeros(2, 5))
