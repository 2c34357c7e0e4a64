"""An agent of a pool on a GPU, but on the CPU: mapped memory in the place of CUDA's, gloo in the place of NCCL.

Run as a program it is such an agent. All else is what runs on a GPU.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from torch import Tensor

from kv_transfer.agent_client import AgentClient
from kv_transfer.transports import gloo
from kv_transfer.transports.cuda_pool import HANDLE_BYTES, CudaPool
from kv_transfer.transports.device_memory import OnHang
from kv_transfer.transports.meeting import Meeting
from kv_transfer.transports.memory import MappedPool
from kv_transfer.transports.pair import Group, Work

HANGS = "TANDEM_TEST_HANGS"


class DeviceAgentClient(AgentClient):
    """Starts agents of this module."""

    program = (sys.executable, __file__)


def export(path: Path | int) -> CudaPool:
    """A handle of the memory behind a path, or behind a descriptor of this process, which others can open."""
    path = Path(f"/proc/{os.getpid()}/fd/{path}") if isinstance(path, int) else path
    return CudaPool(handle=bytes(path).ljust(HANDLE_BYTES, b"\0"), offset=0, device=0)


class OpenedPool:
    """As kv_transfer.transports.cuda_ipc.OpenedPool."""

    def __init__(self, pool: CudaPool, *, device: int, num_blocks: int, block_bytes: int) -> None:
        assert device == 0
        fd = os.open(pool.handle.rstrip(b"\0"), os.O_RDWR | os.O_CLOEXEC)
        try:
            self._mapped = MappedPool(fd, num_blocks=num_blocks, block_bytes=block_bytes, writable=True)
        finally:
            os.close(fd)
        self.tensor = gloo.tensor_at(self._mapped.base, num_blocks * block_bytes).view(num_blocks, block_bytes)

    def close(self) -> None:
        """Unmaps it."""
        self._mapped.close()


class PolledWork:
    """An operation of gloo's, which knows of its end only on a thread that waits for it. It never times out.

    While there is a file that HANGS names it does not end.
    """

    def __init__(self, work: Work) -> None:
        self._ended = threading.Event()
        self._error: RuntimeError | None = None
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def _run(self, work: Work) -> None:
        while HANGS in os.environ and Path(os.environ[HANGS]).exists():
            time.sleep(0.01)
        try:
            work.wait(timedelta(hours=1))
        except RuntimeError as error:
            self._error = error
        self._ended.set()

    def is_completed(self) -> bool:
        """As an operation of NCCL's."""
        return self._ended.is_set()

    def wait(self, timeout: timedelta) -> bool:
        """Only of what is over."""
        assert self._ended.is_set()
        if self._error is not None:
            raise self._error
        return True


class PolledGroup:
    """A group whose operations can be polled."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        """Does not wait."""
        return PolledWork(self._group.send(tensors, peer, tag))

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        """Does not wait."""
        return PolledWork(self._group.recv(tensors, peer, tag))


def make_group(meeting: Meeting, rank: int, *, device: int, timeout_s: float, on_hang: OnHang) -> Group:
    """As kv_transfer.transports.nccl.make_group."""
    return PolledGroup(gloo.make_group(meeting, rank, host="127.0.0.1", timeout_s=timeout_s))


def main() -> int:
    """Runs one agent."""
    from kv_transfer import agent
    from kv_transfer.transports import cuda_ipc, nccl

    cuda_ipc.OpenedPool = OpenedPool  # type: ignore[assignment,misc]
    nccl.make_group = make_group
    return agent.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
