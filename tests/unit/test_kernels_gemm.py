"""The product of packed weights: right to the last bit, and the same bits for any batch, thread and vector width."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import build
from kernels.gemm import NATIVE_FLAGS, NATIVE_ROWS, PANEL, linear, pack_weight, weight_rows

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C kernels here")
LEVELS = [level for level in (*build.levels(), build.PORTABLE_LEVEL) if build.library() is not None]
SHAPES = [(960, 576), (576, 1536), (33, 7), (1, 1), (100, 300), (64, 2000)]  # (N, K)
ROW_COUNTS = (1, 2, 3, 5, 6, 7, 13, 14, 15, 28, 29, 33, 97)


def matrices(num_outputs: int, num_inputs: int, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_outputs * 7919 + num_inputs)
    x = torch.randn((num_rows, num_inputs), generator=generator).to(dtype)
    weight = torch.randn((num_outputs, num_inputs), generator=generator).to(dtype)
    bias = torch.randn(num_outputs, generator=generator).to(dtype)
    return x, weight, bias


def rounded(value: Fraction) -> np.float32:
    """The float32 nearest to an exact number, ties to even."""
    near = np.float32(float(value))
    choices = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(choices, key=lambda choice: (abs(Fraction(float(choice)) - value), int(choice.view(np.int32)) & 1))


@needs_compiler
@pytest.mark.parametrize("level", LEVELS)
def test_each_element_is_one_chain_of_fused_multiply_adds(level: str) -> None:
    x, weight, bias = matrices(40, 50, 3, torch.float32)
    with build.using(level):
        result = linear(x, pack_weight(weight, exact=True), bias)
    for row, column in ((0, 0), (1, 17), (2, 39)):
        total = np.float32(0)
        for a, b in zip(x[row].tolist(), weight[column].tolist(), strict=True):
            total = rounded(Fraction(a) * Fraction(b) + Fraction(float(total)))
        assert result[row, column].item() == float(np.float32(total) + np.float32(bias[column].item()))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_close_to_double_precision(shape: tuple[int, int], dtype: torch.dtype, exact: bool) -> None:
    x, weight, bias = matrices(*shape, 17, dtype)
    expected = x.double() @ weight.double().T + bias.double()
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    result = linear(x, pack_weight(weight, exact=exact), bias)
    assert result.dtype == dtype
    assert ((result.double() - expected).abs() <= tolerance * (shape[1] ** 0.5 + expected.abs())).all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_whatever_the_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = matrices(*shape, 97, dtype)
    packed = pack_weight(weight, exact=True)
    whole = linear(x, packed, bias)
    for count in ROW_COUNTS:
        first = (count * 5) % (97 - count + 1)
        assert torch.equal(linear(x[first : first + count], packed, bias), whole[first : first + count]), count


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instruction_sets_and_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    for shape in SHAPES[:3]:
        x, weight, bias = matrices(*shape, 29, dtype)
        packed = pack_weight(weight, exact=True)
        expected = linear(x, packed, bias)
        assert torch.equal(linear(x, packed, bias, num_threads=3), expected)
        for level in LEVELS:
            with build.using(level):
                for count in (1, 29):
                    assert torch.equal(linear(x[:count], packed, bias), expected[:count]), level


@needs_compiler
def test_many_rows_and_many_threads() -> None:
    x, weight, _ = matrices(200, 576, 700, torch.float32)
    packed = pack_weight(weight, exact=True)
    whole = linear(x, packed)
    torch.testing.assert_close(whole, x @ weight.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(linear(x, packed, num_threads=2), whole)
    assert torch.equal(linear(x[650:651], packed), whole[650:651])


def test_float_activations_with_narrow_weights() -> None:
    x, weight, _ = matrices(70, 90, 5, torch.float32)
    narrow = weight.bfloat16()
    result = linear(x, pack_weight(narrow, exact=True))
    torch.testing.assert_close(result, x @ narrow.float().T, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_fast_bfloat16_takes_few_rows_and_many() -> None:
    x, weight, bias = matrices(70, 90, 40, torch.bfloat16)
    packed = pack_weight(weight, exact=False)
    native = bool(NATIVE_FLAGS & build.cpu_flags())
    assert (packed.plain is not None) == native
    assert pack_weight(weight, exact=True).plain is None
    for count in (NATIVE_ROWS, NATIVE_ROWS + 1, 40):
        expected = (x[:count].float() @ weight.float().T + bias.float()).bfloat16()
        out = torch.empty(count, 70).bfloat16()
        torch.testing.assert_close(linear(x[:count], packed, bias, out=out), expected, rtol=2e-2, atol=2e-2)


def test_views_in_and_out() -> None:
    x, weight, _ = matrices(70, 90, 5, torch.float32)
    packed = pack_weight(weight, exact=True)
    wide_in, wide_out = torch.zeros(5, 200), torch.zeros(5, 100)
    wide_in[:, 10:100] = x
    result = linear(wide_in[:, 10:100], packed, out=wide_out[:, 20:90])
    assert torch.equal(result, linear(x, packed))
    assert not wide_out[:, :20].any()
    assert not wide_out[:, 90:].any()
    assert torch.equal(linear(x.T.contiguous().T, packed), result)
    assert linear(x[:0], packed).shape == (0, 70)


@pytest.mark.parametrize("level", [None, *LEVELS[:1]])
def test_weight_rows_are_the_rows(level: str | None) -> None:
    with build.using(level):
        weight = torch.randn(3 * PANEL + 5, 24)
        rows = torch.tensor([0, 31, 32, 100, 0, 64])
        assert torch.equal(weight_rows(pack_weight(weight, exact=True), rows), weight[rows])


def test_the_torch_twin_is_close_and_exact_in_tiles() -> None:
    x, weight, bias = matrices(100, 300, 40, torch.float32)
    with build.using(None):
        packed = pack_weight(weight, exact=True)
        assert not packed.panels
        torch.testing.assert_close(linear(x, packed, bias), x @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_wrong_shapes_are_named() -> None:
    packed = pack_weight(torch.zeros(8, 4), exact=True)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\), must be \[M, 4\]"):
        linear(torch.zeros(2, 5), packed)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16, the weight torch\.float32"):
        linear(torch.zeros(2, 4).bfloat16(), packed)
    with pytest.raises(ValueError, match="bias is"):
        linear(torch.zeros(2, 4), packed, torch.zeros(7))
    with pytest.raises(ValueError, match="weight has shape"):
        pack_weight(torch.zeros(8), exact=True)
    with pytest.raises(ValueError, match=r"weight is torch\.int64"):
        pack_weight(torch.zeros(8, 4).long(), exact=True)
