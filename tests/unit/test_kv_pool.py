"""The KV pool is shared memory behind a descriptor: mapped twice it is one memory; sizes that cannot be are refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from engine.kv_pool import KVPool, available_bytes, blocks_in
from engine.layout import KVLayout

LAYOUT = KVLayout(
    namespace="n", fingerprint="f", num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32"
)
BYTES = LAYOUT.block_bytes


def test_a_block_is_one_run_of_bytes_of_the_tensor() -> None:
    """What is written through the tensor is in the block's bytes, and the other way round."""
    pool = KVPool(num_blocks=5, block_bytes=BYTES)
    tensor = pool.tensor(LAYOUT)
    assert tensor.shape == (5, 3, 2, 4, 2, 8)
    assert not tensor.any()
    tensor[3] = torch.arange(tensor[3].numel(), dtype=torch.float32).view(tensor[3].shape)
    assert bytes(pool.block(3)) == tensor[3].numpy().tobytes()
    assert not any(pool.block(2))
    pool.block(4)[:] = bytes(pool.block(3))
    assert torch.equal(tensor[4], tensor[3])


def test_another_mapping_sees_the_same_memory() -> None:
    """A descriptor passed on is the same pool, also after its maker closed it."""
    pool = KVPool(num_blocks=2, block_bytes=BYTES)
    other = KVPool.attach(os.dup(pool.fd), num_blocks=2, block_bytes=BYTES)
    pool.block(1)[:4] = b"abcd"
    pool.close()
    pool.close()
    assert bytes(other.block(1)[:4]) == b"abcd"
    other.close()


def test_a_child_process_maps_an_inheritable_pool() -> None:
    """Only what is asked to be inheritable can be passed to a child."""
    pool = KVPool(num_blocks=2, block_bytes=BYTES, inheritable=True)
    assert os.get_inheritable(pool.fd)
    code = (
        "import sys; from engine.kv_pool import KVPool; "
        f"pool = KVPool.attach({pool.fd}, num_blocks=2, block_bytes={BYTES}); pool.block(0)[:5] = b'child'; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], pass_fds=(pool.fd,), timeout=60, check=True)
    assert bytes(pool.block(0)[:5]) == b"child"
    pool.close()
    private = KVPool(num_blocks=1, block_bytes=BYTES)
    assert not os.get_inheritable(private.fd)
    private.close()


def test_a_pool_never_changes_its_size() -> None:
    """Whoever maps it would be ended by the kernel when it read past a new end."""
    pool = KVPool(num_blocks=2, block_bytes=BYTES)
    for size in (BYTES, 3 * BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(pool.fd, size)
    pool.close()


def test_a_pool_larger_than_memory_is_refused() -> None:
    """The message names the flag that sets the size."""
    with pytest.raises(ValueError, match=r"the KV pool needs .* lower --kv-memory"):
        KVPool(num_blocks=available_bytes() // BYTES + 1, block_bytes=BYTES)


def test_sizes_that_cannot_be_are_refused() -> None:
    """Nothing, less than a block, a layout or a descriptor of another size, a block that is not there."""
    with pytest.raises(ValueError, match="num_blocks is 0, must be at least 1"):
        KVPool(num_blocks=0, block_bytes=BYTES)
    with pytest.raises(ValueError, match="is less than one KV block"):
        blocks_in(BYTES - 1, BYTES)
    assert blocks_in(3 * BYTES + 1, BYTES) == 3
    pool = KVPool(num_blocks=2, block_bytes=2 * BYTES)
    with pytest.raises(ValueError, match=f"a block of the layout has {BYTES} bytes, of the pool {2 * BYTES}"):
        pool.tensor(LAYOUT)
    with pytest.raises(ValueError, match="not 3 blocks of"):
        KVPool.attach(pool.fd, num_blocks=3, block_bytes=BYTES)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            pool.block(index)
    pool.close()
