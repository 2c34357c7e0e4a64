"""Writing K and V by slot, copying blocks, and copying memory while hashing it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xxhash

from kernels import build, reference
from kernels.kv_copy import copy_and_hash, copy_blocks, copy_blocks_and_hash, hash_bytes, write_kv

LEVELS: list[str | None] = [None]
if build.library() is not None:
    LEVELS += [*build.levels(), build.PORTABLE_LEVEL]
SIZES = [0, 1, 3, 8, 16, 17, 128, 129, 240, 241, 255, 256, 257, 511, 512, 513, 1000, 1023, 1024, 1025, 1087, 1088]
SIZES += [1089, 2048, 2049, 4095, 65536, 65537, (1 << 19) - 1, 1 << 19, (1 << 20) + 64, (1 << 20) + 77]


@pytest.mark.parametrize("level", LEVELS)
def test_copy_and_hash_is_memcpy_and_xxh3(level: str | None) -> None:
    data = np.random.default_rng(7).integers(0, 256, (1 << 20) + 200, dtype=np.uint8)
    with build.using(level):
        for size in SIZES:
            for shift in (0, 1, 37):
                source = data[shift : shift + size]
                # One byte of frame on either side must stay.
                target = np.full(size + 128, 0xAA, dtype=np.uint8)
                at = 64 - target.ctypes.data % 64 if shift == 0 else 1
                hashed = copy_and_hash(target.ctypes.data + at, source.ctypes.data, size)
                expected = xxhash.xxh3_64_intdigest(source.tobytes())
                assert hashed == expected, (size, shift)
                assert np.array_equal(target[at : at + size], source), (size, shift)
                assert (target[:at] == 0xAA).all(), (size, shift)
                assert (target[at + size :] == 0xAA).all(), (size, shift)
                assert hash_bytes(source.ctypes.data, size) == expected, (size, shift)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("block_bytes", [1, 100, 64, 192, 1024, 1088, 98304])
def test_blocks_are_hashed_as_one_input(level: str | None, block_bytes: int) -> None:
    generator = np.random.default_rng(block_bytes)
    source = generator.integers(0, 256, 9 * block_bytes, dtype=np.uint8)
    target = np.zeros(12 * block_bytes, dtype=np.uint8)
    sources, targets = [3, 0, 8, 5, 1, 2, 7], [11, 4, 2, 9, 0, 1, 5]
    with build.using(level):
        hashed = copy_blocks_and_hash(target.ctypes.data, targets, source.ctypes.data, sources, block_bytes)
    moved = source.reshape(9, -1)[sources]
    assert hashed == xxhash.xxh3_64_intdigest(moved.tobytes())
    assert np.array_equal(target.reshape(12, -1)[targets], moved)
    assert not target.reshape(12, -1)[[3, 6, 7, 8, 10]].any()


def test_a_changed_bit_changes_the_hash() -> None:
    data = np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8)
    before = hash_bytes(data.ctypes.data, data.size)
    for at in (0, 63, 1024, 2500, 4999):
        data[at] ^= 1
        assert hash_bytes(data.ctypes.data, data.size) != before
        data[at] ^= 1
    assert hash_bytes(data.ctypes.data, data.size) == before


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 source blocks and 1 target blocks"):
        copy_blocks_and_hash(0, [0], 0, [0, 1], 64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_write_kv_by_slot(level: str | None, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    # From a fused projection: q, k and v side by side.
    fused = torch.randn((7, 5, 40), generator=generator).to(dtype)
    fused[0, 1, :9] = torch.tensor([6e4, 7e4, -1e9, 1e-7, 3e-8, -0.0, 65519.0, 65520.0, 1e-40])
    k, v = fused[:, 1:3], fused[:, 3:5]
    slots = torch.tensor([5, -1, 0, 31, 16, -3, 7])
    pool, expected = torch.zeros(2, 4, 3, 2, 8, 2, 40).to(pool_dtype)
    with build.using(level):
        write_kv(pool, 2, k, v, slots)
    reference.write_kv(expected, 2, k, v, slots)
    assert torch.equal(pool, expected)
    assert pool[0, 2, :, 5].any()
    assert not pool[:, :2].any()


def test_wrong_shapes_are_named() -> None:
    pool = torch.zeros(4, 3, 2, 8, 2, 40)
    with pytest.raises(ValueError, match="do not fit the pool"):
        write_kv(pool, 0, torch.zeros(3, 2, 8), torch.zeros(3, 2, 8), torch.zeros(3).long())
    with pytest.raises(ValueError, match="slots are"):
        write_kv(pool, 0, torch.zeros(3, 2, 40), torch.zeros(3, 2, 40), torch.zeros(3).int())


def test_copy_blocks() -> None:
    pool = torch.randn(6, 2, 2, 8, 1, 16)
    before = pool.clone()
    copy_blocks(pool, [(1, 4), (4, 5), (0, 1)])
    for target, source in enumerate((0, 0, 2, 3, 1, 1)):
        assert torch.equal(pool[target], before[source])
