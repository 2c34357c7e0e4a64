"""Frames between two processes on GPUs of one host: the target opens the source's pool by its IPC handle and pulls.

A worker exports one handle for its whole pool, once; its agent and its peers' agents open it and count blocks from its
start. When the exporter dies, a copy may break this process's CUDA context: that ends the agent.

Has not been run on a GPU.
"""

from __future__ import annotations

import ctypes

import torch

from kv_transfer.gate import Damage
from kv_transfer.messages import FrameHeader
from kv_transfer.transports.channel import FrameCorrupt, SourceEnd, TargetEnd
from kv_transfer.transports.cuda_pool import HANDLE_BYTES, CudaPool
from kv_transfer.transports.device_memory import DeviceMemory, OnHang
from kv_transfer.transports.pull import check_frame

_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


def export(pool: torch.Tensor) -> CudaPool:
    """The handle of a pool of this process, which must outlive every use. Raises RuntimeError."""
    handle, base, size = _Handle(), ctypes.c_uint64(), ctypes.c_size_t()
    address = ctypes.c_uint64(pool.data_ptr())
    driver = _driver(pool.device.index)
    _check(driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address), "the pool's allocation")
    _check(driver.cuIpcGetMemHandle(ctypes.byref(handle), address), "the pool's handle")
    return CudaPool(handle=bytes(handle), offset=pool.data_ptr() - base.value, device=pool.device.index)


class OpenedPool:
    """A pool of another process, mapped into this one's address space until closed. Raises RuntimeError."""

    def __init__(self, pool: CudaPool, *, device: int, num_blocks: int, block_bytes: int) -> None:
        base = ctypes.c_uint64()
        self._driver = _driver(device)
        code = self._driver.cuIpcOpenMemHandle_v2(
            ctypes.byref(base), _Handle.from_buffer_copy(pool.handle), _LAZY_PEER_ACCESS
        )
        _check(code, "the peer's pool")
        self._base: ctypes.c_uint64 | None = base
        # What torch reads of foreign memory: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
        self.__cuda_array_interface__ = {
            "shape": (num_blocks, block_bytes),
            "typestr": "|u1",
            "data": (base.value + pool.offset, False),
            "version": 3,
        }
        self.tensor = torch.as_tensor(self, device=f"cuda:{device}")

    def close(self) -> None:
        """No operation on it may be under way. Idempotent."""
        if self._base is not None:
            self._driver.cuIpcCloseMemHandle(self._base)
            self._base = None


class DevicePullSource(SourceEnd):
    """Only hashes, as the source of shared memory."""

    needs_go = False

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory

    def prepare(self, header: FrameHeader) -> int:
        """Through a temporary of the frame's size."""
        check_frame(header, self._memory.block_bytes)
        self._memory.check(header.source_blocks)
        return self._memory.gather(self._memory.staging(header.num_bytes), header.source_blocks)

    def push(self, header: FrameHeader) -> None:
        """Nothing to do."""

    def finish(self, header: FrameHeader) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """The pool is the agent's."""


class DevicePullTarget(TargetEnd):
    """Copies into the target blocks, which nothing reads before they check."""

    def __init__(
        self, source: OpenedPool, target: DeviceMemory, *, on_hang: OnHang, damage: Damage | None = None
    ) -> None:
        self._opened = source
        self._source = DeviceMemory(source.tensor, on_hang=on_hang)
        self._target = target
        self._damage = damage or Damage()

    def post(self, header: FrameHeader) -> None:
        """Nothing to do: the blocks are granted."""

    def take(self, header: FrameHeader, checksum: int, tag: bytes = b"") -> None:
        """One copy, and one pass over what was copied."""
        check_frame(header, self._target.block_bytes)
        self._source.check(header.source_blocks)
        self._target.check(header.target_blocks)
        found = self._target.pull(header.target_blocks, self._source.pool, header.source_blocks)
        if self._damage.due():
            self._target.damage(self._target.in_place(header.target_blocks[0], 1))
            found = self._target.gather(self._target.staging(header.num_bytes), header.target_blocks)
        if found != checksum:
            raise FrameCorrupt(f"checksum {found:016x}, announced {checksum:016x}")

    def close(self) -> None:
        """Unmaps the source's pool."""
        self._opened.close()


def _driver(device: int) -> ctypes.CDLL:
    torch.zeros(1, device=f"cuda:{device}")  # makes the device's context, and makes it this thread's
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} cannot be had: CUDA error {code}")
