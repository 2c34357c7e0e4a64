"""An agent's pool on a GPU: near peers open it by its CUDA handle, far ones get it over NCCL.

Nothing but its end stops a CUDA or NCCL operation that hangs: the agent ends itself then, its worker starts another,
and what was under way fails and goes again. The engine, in another process, goes on.

Has not been run on a GPU; the tests run it on the CPU, with shared memory in the place of CUDA's and gloo for NCCL.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import NoReturn

import torch

from kv_transfer.agent_pool import AgentPool
from kv_transfer.agent_settings import AgentStart, Memory, TransportChoice
from kv_transfer.agent_wire import Hello
from kv_transfer.transports import cuda_ipc, nccl, pair
from kv_transfer.transports.channel import SourceEnd, TargetEnd
from kv_transfer.transports.cuda_pool import CudaPool, from_bytes, to_bytes
from kv_transfer.transports.device_memory import DeviceMemory
from kv_transfer.transports.meeting import Meeting

logger = logging.getLogger(__name__)

EXIT_HUNG = 4


class DevicePool(AgentPool):
    """Opened once, as one plain segment, for as long as the agent lives."""

    memory = Memory.CUDA
    near, far = TransportChoice.CUDA_IPC, TransportChoice.NCCL

    def __init__(self, start: AgentStart, pool: CudaPool) -> None:
        super().__init__(start.settings)
        self._start = start
        self._settings = start.settings
        self._device = pool.device
        self._opened = cuda_ipc.OpenedPool(
            pool, device=pool.device, num_blocks=start.num_blocks, block_bytes=start.block_bytes
        )
        self._blocks = DeviceMemory(self._opened.tensor, on_hang=end_process)
        self.cuda_pool = to_bytes(pool)

    def warm_up(self) -> None:
        """Loads the kernels of a copy and its checksum."""
        zeros = torch.zeros((1, self._start.block_bytes), dtype=torch.uint8, device=self._opened.tensor.device)
        DeviceMemory(zeros, on_hang=end_process).pull((0,), zeros, (0,))

    def load_far(self) -> None:
        """Imports what NCCL needs of torch."""
        import torch.distributed  # noqa: F401

    def near_source(self) -> SourceEnd:
        """Over CUDA IPC."""
        return cuda_ipc.DevicePullSource(self._blocks)

    def near_target(self, hello: Hello, descriptors: Sequence[int]) -> TargetEnd:
        """Over CUDA IPC: opens the peer's pool, from this pool's GPU."""
        opened = cuda_ipc.OpenedPool(
            from_bytes(hello.cuda_pool),
            device=self._device,
            num_blocks=hello.num_blocks,
            block_bytes=self._start.block_bytes,
        )
        return cuda_ipc.DevicePullTarget(
            opened,
            self._blocks,
            on_hang=end_process,
            damage=self.damage,
        )

    def far_source(self, meeting: Meeting) -> SourceEnd:
        """Over NCCL."""
        group = self._group(meeting, pair.SOURCE_RANK)
        return nccl.source_end(group, self._blocks, timeout_s=self._settings.operation_timeout_s, on_hang=end_process)

    def far_target(self, meeting: Meeting) -> TargetEnd:
        """Over NCCL."""
        return nccl.target_end(
            self._group(meeting, pair.TARGET_RANK),
            self._blocks,
            timeout_s=self._settings.operation_timeout_s,
            on_hang=end_process,
            damage=self.damage,
        )

    def _group(self, meeting: Meeting, rank: int) -> pair.Group:
        timeout_s = self._settings.group_timeout_s
        return nccl.make_group(meeting, rank, device=self._device, timeout_s=timeout_s, on_hang=end_process)


def end_process(reason: str) -> NoReturn:
    """Ends this agent; its worker reaps it, fails what was under way and starts another."""
    logger.error("the agent ends itself: %s", reason)
    logging.shutdown()
    os._exit(EXIT_HUNG)
