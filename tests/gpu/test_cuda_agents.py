"""Agents of real pools on a GPU move blocks by CUDA IPC. Has not been run: no GPU was at hand."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "integration"))

from agent_pair import FAST, End, Pair

from kv_transfer.messages import FrameAcked, FrameFailed, FrameLanded
from kv_transfer.transports.cuda_pool import CudaPool

pytestmark = pytest.mark.gpu


class CudaEnd(End):
    """With a pool on the first GPU."""

    def open_pool(self) -> CudaPool:
        """One allocation of torch's, exported."""
        import torch

        from kv_transfer.transports.cuda_ipc import export

        self.pool = torch.zeros((self.num_blocks, self.block_bytes), dtype=torch.uint8, device="cuda:0")
        torch.cuda.synchronize()
        return export(self.pool)

    def close_pool(self) -> None:
        """Gives it back to torch."""
        del self.pool

    def read(self, block: int) -> bytes:
        """As the worker sees it."""
        return bytes(self.pool[block].cpu().numpy())

    def write(self, block: int, data: bytes) -> None:
        """As the worker writes it."""
        import torch

        self.pool[block] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.pool.device)
        torch.cuda.synchronize()


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two agents on one GPU; the target damages each sixth frame."""
    source, target = CudaEnd(fill=True), CudaEnd(settings=replace(FAST, corrupt_every=6))
    yield Pair(source, target)
    source.close()
    target.close()


def test_frames_arrive_whole_and_damaged_ones_are_refused(pair: Pair) -> None:
    draw = random.Random(7)
    granted = tuple(range(pair.target.num_blocks))
    pair.expect(blocks=granted)
    for sequence in range(30):
        there, here = (tuple(draw.sample(granted, 4)) for _ in range(2))
        pair.send(pair.header(sequence=sequence, source=there, target=here))
        pair.source.until(
            lambda sequence=sequence: len(pair.source.of(FrameAcked)) + len(pair.source.of(FrameFailed)) > sequence
        )
        if (sequence + 1) % 6:
            pair.target.until(
                lambda sequence=sequence: sequence in [each.sequence for each in pair.target.of(FrameLanded)]
            )
            assert all(pair.target.read(b) == pair.source.read(a) for a, b in zip(there, here, strict=True))
    assert [each.sequence for each in pair.source.of(FrameFailed)] == [5, 11, 17, 23, 29]
    pair.end(pair.source)
    pair.end(pair.target)


def test_a_pool_outlives_the_agents_that_open_it(pair: Pair) -> None:
    pair.expect(blocks=(1,))
    pair.move(pair.header(source=(1,), target=(1,)))
    pair.source.client.close()
    assert pair.target.read(1) == pair.source.read(1)
