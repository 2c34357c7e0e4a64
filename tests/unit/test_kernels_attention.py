"""Paged attention: close to the torch twin, and each row's bits the same however its tokens were batched or cut."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import build, reference
from kernels.kv_copy import write_kv
from kernels.paged_attention import paged_attention

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C kernels here")
LEVELS = [level for level in (*build.levels(), build.PORTABLE_LEVEL) if build.library() is not None]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One pool and its queries."""

    head_dim: int = 64
    num_kv_heads: int = 3
    group: int = 3
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    q_dtype: torch.dtype | None = None


class Paged:
    """Sequences of random K and V in the blocks of a pool, dealt in a mixed order; q for all their positions."""

    def __init__(self, shape: Shape, lengths: list[int], *, layer: int = 1) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        blocks = [-(-length // shape.block_size) for length in lengths]
        order = torch.randperm(sum(blocks), generator=generator).to(torch.int32) + 1
        self.layer = layer
        self.scale = shape.head_dim**-0.5
        # What was never written is NaN: reading it would show.
        self.pool = torch.full(
            (sum(blocks) + 1, 3, 2, shape.block_size, shape.num_kv_heads, shape.head_dim), float("nan")
        ).to(shape.dtype)
        self.tables = torch.zeros((len(lengths), max(blocks)), dtype=torch.int32)
        self.q: list[Tensor] = []
        dealt = 0
        for i, (length, num) in enumerate(zip(lengths, blocks, strict=True)):
            self.tables[i, :num] = order[dealt : dealt + num]
            dealt += num
            heads = shape.num_kv_heads
            q = torch.randn((length, heads * shape.group, shape.head_dim), generator=generator)
            k, v = torch.randn((2, length, heads, shape.head_dim), generator=generator).to(shape.dtype)
            positions = torch.arange(length)
            slots = self.tables[i, positions // shape.block_size].long() * shape.block_size
            write_kv(self.pool, layer, k, v, slots + positions % shape.block_size)
            self.q.append((2 * q).to(shape.q_dtype or shape.dtype))

    def run(
        self, spans: list[tuple[int, int, int]], *, window: int = 0, softcap: float = 0.0, num_threads: int = 1
    ) -> Tensor:
        """Attention of the spans (sequence, start, end) as one batch."""
        q = torch.cat([self.q[i][start:end] for i, start, end in spans])
        starts, lengths = (
            torch.tensor(column, dtype=torch.int32)
            for column in ([start for _, start, _ in spans], [end - start for _, start, end in spans])
        )
        tables = self.tables[[i for i, _, _ in spans]]
        return paged_attention(
            q, self.pool, self.layer, tables, starts, lengths, self.scale,
            window=window, softcap=softcap, num_threads=num_threads,
        )  # fmt: skip

    def expected(self, span: tuple[int, int, int], *, window: int = 0, softcap: float = 0.0) -> Tensor:
        """The torch twin's answer for one span, in double precision but for the inputs."""
        i, start, end = span
        keys, values = reference.gather_kv(self.pool, self.layer, self.tables[i], end)
        return reference.attend(self.q[i][start:end], keys, values, start, self.scale, window, softcap)


def check(paged: Paged, spans: list[tuple[int, int, int]], tolerance: float, **options: float) -> None:
    result = paged.run(spans, **options)  # type: ignore[arg-type]
    expected = torch.cat([paged.expected(span, **options) for span in spans])  # type: ignore[arg-type]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_decode_and_prefill_of_several_sequences(head_dim: int, group: int, block_size: int) -> None:
    shape = Shape(head_dim=head_dim, num_kv_heads=2, group=group, block_size=block_size)
    paged = Paged(shape, [1, 67, 129, 40])
    check(paged, [(0, 0, 1), (1, 66, 67), (2, 30, 129), (3, 0, 40)], TOLERANCE[torch.float32])


@pytest.mark.parametrize("q_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_pools(dtype: torch.dtype, q_dtype: torch.dtype | None) -> None:
    paged = Paged(Shape(dtype=dtype, q_dtype=q_dtype), [150, 33])
    check(paged, [(0, 149, 150), (1, 0, 33)], TOLERANCE[q_dtype or dtype])


@pytest.mark.parametrize("window", [1, 5, 64, 100, 1000])
def test_windows(window: int) -> None:
    paged = Paged(Shape(), [300, 70])
    check(paged, [(0, 120, 300), (1, 69, 70)], TOLERANCE[torch.float32], window=window)


@pytest.mark.parametrize("head_dim", [8, 20, 24, 72])
def test_odd_head_dims(head_dim: int) -> None:
    paged = Paged(Shape(head_dim=head_dim, num_kv_heads=1, group=4), [100])
    check(paged, [(0, 0, 100)], TOLERANCE[torch.float32])


def test_softcap() -> None:
    check(Paged(Shape(), [130]), [(0, 60, 130)], 5e-5, softcap=20.0)


def test_many_heads_to_one() -> None:
    check(Paged(Shape(num_kv_heads=1, group=100), [80]), [(0, 78, 80)], TOLERANCE[torch.float32])


def test_large_scores_do_not_overflow() -> None:
    paged = Paged(Shape(), [200])
    paged.q[0] *= 300
    check(paged, [(0, 0, 200)], 1e-3)


@needs_compiler
@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 3, 16), (128, 1, 8), (80, 4, 32)])
def test_a_row_has_the_same_bits_however_it_is_batched(
    shape: tuple[int, int, int], dtype: torch.dtype, window: int
) -> None:
    head_dim, group, block_size = shape
    paged = Paged(
        Shape(head_dim=head_dim, group=group, num_kv_heads=2, block_size=block_size, dtype=dtype), [203, 90, 1]
    )
    whole = paged.run([(0, 0, 203)], window=window)
    for cuts in ((64, 128, 203), (1, 2, 50, 113, 203), (202, 203), (*range(7, 203, 14), 203)):
        parts = [paged.run([(0, a, b)], window=window) for a, b in zip((0, *cuts), cuts, strict=False)]
        assert torch.equal(torch.cat(parts), whole), cuts
    mixed = paged.run([(2, 0, 1), (0, 100, 150), (1, 10, 90), (0, 202, 203)], window=window, num_threads=2)
    assert torch.equal(mixed[1:51], whole[100:150])
    assert torch.equal(mixed[131:], whole[202:])
    single = torch.cat([paged.run([(0, i, i + 1)], window=window) for i in range(0, 203, 29)])
    assert torch.equal(single, whole[::29])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets_give_the_same_bits(dtype: torch.dtype) -> None:
    paged = Paged(Shape(dtype=dtype), [150, 40])
    spans = [(0, 20, 150), (1, 39, 40)]
    expected = paged.run(spans, softcap=30.0)
    for level in LEVELS:
        with build.using(level):
            assert torch.equal(paged.run(spans, softcap=30.0), expected), level


@needs_compiler
def test_a_later_token_cannot_reach_an_earlier_row() -> None:
    paged = Paged(Shape(), [40])
    before = paged.run([(0, 0, 40)])
    keys, values = paged.pool[paged.tables[0, 2], 1]
    keys[7], values[7] = float("nan"), float("inf")  # position 39
    after = paged.run([(0, 0, 40)])
    assert torch.equal(after[:39], before[:39])
    assert not torch.isfinite(after[39]).any()


def test_strided_queries_and_pools() -> None:
    paged = Paged(Shape(), [50])
    fused = torch.zeros(50, 9 + 6, 64)
    fused[:, 2:11] = paged.q[0]
    wide = torch.zeros((*paged.pool.shape[:-1], 100))
    wide[..., :64] = paged.pool
    starts, lengths = torch.tensor([0], dtype=torch.int32), torch.tensor([50], dtype=torch.int32)
    out = torch.empty(50, 9, 64)
    paged_attention(
        fused[:, 2:11], wide[..., :64], 1, paged.tables, starts, lengths, paged.scale, out=out
    )  # fmt: skip
    assert torch.equal(out, paged.run([(0, 0, 50)]))


def test_the_torch_twin_answers_alike() -> None:
    paged = Paged(Shape(), [70, 20])
    spans = [(0, 50, 70), (1, 19, 20)]
    result = paged.run(spans, window=30)
    with build.using(None):
        torch.testing.assert_close(paged.run(spans, window=30), result, rtol=2e-5, atol=2e-5)


@needs_compiler
def test_what_would_read_outside_the_pool_is_refused() -> None:
    paged = Paged(Shape(), [40])
    q, tables = paged.q[0], paged.tables

    def run(starts: int, lengths: int, tables: Tensor = tables) -> None:
        one, many = torch.tensor([starts], dtype=torch.int32), torch.tensor([lengths], dtype=torch.int32)
        paged_attention(q, paged.pool, 1, tables, one, many, paged.scale)

    with pytest.raises(ValueError, match="lengths must sum"):
        run(0, 39)
    with pytest.raises(ValueError, match="do not fit into its block table"):
        run(9, 40)
    with pytest.raises(ValueError, match="a block that is not in the pool"):
        run(0, 40, tables + 3)
    with pytest.raises(ValueError, match="must be contiguous int32"):
        run(0, 40, tables.long())
    one = torch.tensor([0], dtype=torch.int32)
    with pytest.raises(ValueError, match="layer is 3"):
        paged_attention(q, paged.pool, 3, tables, one, one + 40, paged.scale)
