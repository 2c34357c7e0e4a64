"""Frames over torch.distributed's NCCL between GPUs: as over gloo, but an operation that hangs ends with the process.

Nothing else ends it for certain: aborting a communicator may hang too. So the communicator is made without blocking,
every wait polls with a deadline, and past it `on_hang` ends the agent, whose worker starts another. A communicator
takes tens of megabytes of the GPU and its copies take multiprocessors: it gets few blocks of threads.

Has not been run on a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import cast

from kv_transfer.gate import Damage
from kv_transfer.transports.channel import ChannelLost
from kv_transfer.transports.device_memory import DeviceMemory, OnHang
from kv_transfer.transports.meeting import Meeting, meeting_store
from kv_transfer.transports.pair import SOURCE_RANK, TARGET_RANK, Group, PairSource, PairTarget, Work, first_line

POLL_S = 0.0002
MAX_BLOCKS_OF_THREADS = 4
# Read when the first group is made. By default torch's own watchdog would end the process, later and without a word.
ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


def make_group(meeting: Meeting, rank: int, *, device: int, timeout_s: float, on_hang: OnHang) -> Group:
    """One end of a pair, proven by one word from source to target. Raises ChannelLost, and what the meeting raises."""
    os.environ.update(ENVIRONMENT)
    import torch
    from torch.distributed import ProcessGroupNCCL

    torch.cuda.set_device(device)
    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    options.config.blocking = 0
    options.config.max_ctas = MAX_BLOCKS_OF_THREADS
    word = torch.zeros(1, dtype=torch.uint8, device=f"cuda:{device}")
    try:
        group = cast(Group, ProcessGroupNCCL(meeting_store(meeting), rank, 2, options))
        work = group.send([word], TARGET_RANK, 0) if rank == SOURCE_RANK else group.recv([word], SOURCE_RANK, 0)
    except RuntimeError as error:
        raise ChannelLost(f"the pair was not joined: {first_line(error)}") from None
    PollingWaiter(timeout_s, on_hang).wait(work)
    return group


def source_end(group: Group, memory: DeviceMemory, *, timeout_s: float, on_hang: OnHang) -> PairSource:
    """The end that frames leave from."""
    return PairSource(group, memory, PollingWaiter(timeout_s, on_hang))


def target_end(
    group: Group, memory: DeviceMemory, *, timeout_s: float, on_hang: OnHang, damage: Damage | None = None
) -> PairTarget:
    """The end that frames arrive at."""
    waiter = PollingWaiter(timeout_s, on_hang)
    return PairTarget(group, memory, waiter, post_timeout_s=timeout_s, damage=damage)


class PollingWaiter:
    """Waits on the host: torch's own wait would only make a stream wait."""

    def __init__(self, timeout_s: float, on_hang: OnHang) -> None:
        self._timeout_s = timeout_s
        self._on_hang = on_hang

    def wait(self, work: Work) -> None:
        """Raises RuntimeError when it failed; does not return when it hangs."""
        ends_s = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if time.monotonic() >= ends_s:
                self._on_hang(f"an NCCL operation has not ended within {self._timeout_s:g} s")
            time.sleep(POLL_S)
        work.wait(timedelta(seconds=self._timeout_s))  # is over: raises what it failed with

    def drop(self, works: Iterable[Work]) -> None:
        """What is under way reads or writes memory until the process ends."""
        if not all(work.is_completed() for work in works):
            self._on_hang("an NCCL channel was closed with operations under way")
