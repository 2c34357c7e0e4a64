"""Blocks of a pool that torch reaches on a device, as frames: copies and a checksum in whole-tensor operations.

On a GPU this has not been run; the tests run it on the CPU, over gloo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch

from kv_transfer.seal import frame_tag
from kv_transfer.transports.memory import bytes_at, check_blocks

WORD_BYTES = 8
FACTOR = -7046029254386353131  # odd, so that no word's bits are lost: 2^64 / golden ratio, as a signed number


OnHang = Callable[[str], NoReturn]


class DeviceMemory:
    """`pool` is a tensor of bytes, (num_blocks, block_bytes). Every method returns when the device is done.

    A device that fails once does not work for this process any more: then `on_hang` ends it.

    The checksum is the sum modulo 2^64 of the frame's 64 bit words, each mixed with its place as MurmurHash3's
    finalizer mixes: it sees bits that flipped, words that are missing and blocks that changed places. It is no defence
    against intent.
    """

    def __init__(self, pool: torch.Tensor, *, on_hang: OnHang) -> None:
        if pool.dim() != 2 or pool.dtype != torch.uint8 or pool.shape[1] % WORD_BYTES:
            raise ValueError(f"pool: is {pool.dtype} of shape {tuple(pool.shape)}, must be rows of whole words")
        self.pool = pool
        self._on_hang = on_hang
        self.block_bytes = int(pool.shape[1])

    def check(self, blocks: Sequence[int]) -> None:
        """Raises ValueError when the pool has no such block."""
        check_blocks(blocks, self.pool.shape[0])

    def staging(self, num_bytes: int) -> torch.Tensor:
        """On the pool's device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.pool.device)

    def in_place(self, first: int, num_blocks: int) -> torch.Tensor:
        """Without a copy."""
        return self.pool[first : first + num_blocks].view(-1)

    def gather(self, frame: torch.Tensor, blocks: Sequence[int]) -> int:
        """Through no other buffer."""
        with self._device():
            torch.index_select(self.pool, 0, self._index(blocks), out=frame.view(-1, self.block_bytes))
        return self.checksum(frame)

    def land(self, blocks: Sequence[int], frame: torch.Tensor, announced: int) -> int:
        """Block ids are distinct. Nothing is copied of a frame that does not check."""
        found = self.checksum(frame)
        if found == announced:
            with self._device():
                self.pool.index_copy_(0, self._index(blocks), frame.view(-1, self.block_bytes))
                self._synchronize()
        return found

    def checksum(self, frame: torch.Tensor) -> int:
        """With temporaries of the frame's size."""
        with self._device():
            words = frame.view(torch.int64)
            mixed = torch.arange(words.numel(), device=words.device).mul_(FACTOR).bitwise_xor_(words).mul_(FACTOR)
            mixed.bitwise_xor_(mixed >> 32).mul_(FACTOR)
            total: int = int(mixed.sum())  # waits for the device
        return total & ((1 << 64) - 1)

    def tag(self, frame: torch.Tensor, key: bytes) -> bytes:
        """On the host, to which the frame is copied: slow, and exact."""
        with self._device():
            here = frame.cpu()
        return frame_tag(key, memoryview(bytes_at(here.data_ptr(), here.numel())))

    def damage(self, frame: torch.Tensor) -> None:
        """The first byte."""
        frame[0] ^= 0x40

    def pull(self, blocks: Sequence[int], source: torch.Tensor, source_blocks: Sequence[int]) -> int:
        """Copies blocks of another pool that this device reaches into ours, and gives the checksum of what is ours."""
        with self._device():
            self.pool.index_copy_(0, self._index(blocks), source.index_select(0, self._index(source_blocks)))
            written = self.pool.index_select(0, self._index(blocks)).view(-1)
        return self.checksum(written)

    @contextmanager
    def _device(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # the frame fails, and goes again when there is room
        except RuntimeError as error:
            self._on_hang(f"{self.pool.device} failed: {error}")

    def _index(self, blocks: Sequence[int]) -> torch.Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.pool.device)

    def _synchronize(self) -> None:
        if self.pool.is_cuda:
            torch.cuda.current_stream(self.pool.device).synchronize()
