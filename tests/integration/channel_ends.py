"""Channels of every kind between two pools, in one process or two, for the contract that they all keep."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from device_agent import OpenedPool, export

from engine.kv_pool import shared_memory
from kv_transfer.agent_meeting import LinkMeeting
from kv_transfer.framed_socket import FramedSocket
from kv_transfer.messages import FrameHeader
from kv_transfer.transports import gloo, pair, shm
from kv_transfer.transports.channel import ChannelLost, SourceEnd, TargetEnd
from kv_transfer.transports.meeting import Meeting
from kv_transfer.transports.memory import MappedPool, load_copy_frame
from kv_transfer.transports.pull import PullSource, PullTarget
from tandem.request import TransferId

if TYPE_CHECKING:
    from kv_transfer.transports.device_memory import DeviceMemory

HOST = "127.0.0.1"
NUM_BLOCKS, BLOCK_BYTES = 16, 8192
TIMEOUT_S = 2.0


@dataclass
class Pool:
    """One side's blocks."""

    num_blocks: int = NUM_BLOCKS
    block_bytes: int = BLOCK_BYTES
    fill: bool = False
    fd: int = -1
    mapped: MappedPool = field(init=False)

    def __post_init__(self) -> None:
        if self.fd < 0:
            self.fd = shared_memory("test", self.num_blocks * self.block_bytes)
        if self.fill:
            for block in range(self.num_blocks):
                self.write(block, os.urandom(self.block_bytes))
        self.mapped = self.mapping()

    def mapping(self) -> MappedPool:
        """One more, which is the caller's to close."""
        return MappedPool(self.fd, num_blocks=self.num_blocks, block_bytes=self.block_bytes, writable=True)

    def on_device(self) -> DeviceMemory:
        """The same blocks as torch has them on a device, which is the CPU."""
        from kv_transfer.transports.device_memory import DeviceMemory

        whole = gloo.tensor_at(self.mapped.base, self.num_blocks * self.block_bytes)
        return DeviceMemory(whole.view(self.num_blocks, self.block_bytes), on_hang=pytest.fail)

    def read(self, block: int) -> bytes:
        """A block's bytes as its worker sees them."""
        return os.pread(self.fd, self.block_bytes, block * self.block_bytes)

    def write(self, block: int, data: bytes, at: int = 0) -> None:
        """Writes into a block as its worker does."""
        os.pwrite(self.fd, data, block * self.block_bytes + at)

    def close(self) -> None:
        """No end may use it any more."""
        self.mapped.close()
        os.close(self.fd)


@dataclass
class Ends:
    """Both ends of one channel between two pools."""

    source: SourceEnd
    target: TargetEnd
    source_pool: Pool
    target_pool: Pool

    def close(self) -> None:
        """The pools stay."""
        self.source.close()
        self.target.close()


class QueueMeeting(Meeting):
    """The two ends of a pair in one process."""

    def __init__(self, said: queue.Queue[tuple[str, bytes]], heard: queue.Queue[tuple[str, bytes]]) -> None:
        self._said, self._heard = said, heard

    def tell(self, key: str, value: bytes) -> None:
        """Never waits."""
        self._said.put((key, value))

    def hear(self) -> tuple[str, bytes]:
        """Waits for TIMEOUT_S."""
        try:
            return self._heard.get(timeout=TIMEOUT_S)
        except queue.Empty:
            raise ChannelLost("the other end says nothing") from None


def both(make: Callable[[Meeting, int], object]) -> list[object]:
    """Makes both ranks of a pair at once, each on its thread."""
    there: queue.Queue[tuple[str, bytes]] = queue.Queue()
    back: queue.Queue[tuple[str, bytes]] = queue.Queue()
    made: dict[int, object] = {}

    def join() -> None:
        made[pair.TARGET_RANK] = make(QueueMeeting(back, there), pair.TARGET_RANK)

    thread = threading.Thread(target=join)
    thread.start()
    made[pair.SOURCE_RANK] = make(QueueMeeting(there, back), pair.SOURCE_RANK)
    thread.join()
    return [made[pair.SOURCE_RANK], made[pair.TARGET_RANK]]


def make_ends(transport: str, source: Pool, target: Pool) -> Ends:
    """A channel of the kind within this process."""
    source_end: SourceEnd
    target_end: TargetEnd
    if transport == "gloo":
        source_end, target_end = _gloo_ends(source, target)
    elif transport == "inproc":
        source_end = PullSource(source.mapped)
        target_end = PullTarget(source=source.mapping(), target=target.mapped, copy_frame=load_copy_frame())
    elif transport == "device-gloo":  # what NCCL uses of torch, on the CPU
        source_end, target_end = _device_gloo_ends(source, target)
    elif transport == "device-pull":  # what CUDA IPC uses of torch, on the CPU
        from kv_transfer.transports.cuda_ipc import DevicePullSource, DevicePullTarget

        source_end = DevicePullSource(source.on_device())
        opened = OpenedPool(export(source.fd), device=0, num_blocks=source.num_blocks, block_bytes=source.block_bytes)
        target_end = DevicePullTarget(opened, target.on_device(), on_hang=pytest.fail)  # type: ignore[arg-type]
    else:
        assert transport == "shm"
        source_end, target_end = PullSource(source.mapped), _shm_target(source.fd, source.num_blocks, target)
    return Ends(source=source_end, target=target_end, source_pool=source, target_pool=target)


def _gloo_ends(source: Pool, target: Pool) -> tuple[SourceEnd, TargetEnd]:
    def make(meeting: Meeting, rank: int) -> SourceEnd | TargetEnd:
        return _gloo_end(meeting, rank, source if rank == pair.SOURCE_RANK else target)

    source_end, target_end = both(make)
    assert isinstance(source_end, SourceEnd)
    assert isinstance(target_end, TargetEnd)
    return source_end, target_end


def _device_gloo_ends(source: Pool, target: Pool) -> tuple[SourceEnd, TargetEnd]:
    def make(meeting: Meeting, rank: int) -> SourceEnd | TargetEnd:
        group = gloo.make_group(meeting, rank, host=HOST, timeout_s=TIMEOUT_S)
        waiter = gloo.HostWaiter(TIMEOUT_S)
        if rank == pair.SOURCE_RANK:
            return pair.PairSource(group, source.on_device(), waiter)
        return pair.PairTarget(group, target.on_device(), waiter, post_timeout_s=TIMEOUT_S)

    source_end, target_end = both(make)
    assert isinstance(source_end, SourceEnd)
    assert isinstance(target_end, TargetEnd)
    return source_end, target_end


def _gloo_end(meeting: Meeting, rank: int, pool: Pool) -> SourceEnd | TargetEnd:
    group = gloo.make_group(meeting, rank, host=HOST, timeout_s=TIMEOUT_S)
    if rank == pair.TARGET_RANK:
        return gloo.target_end(group, pool.mapped, copy_frame=load_copy_frame(), timeout_s=TIMEOUT_S)
    return gloo.source_end(group, pool.mapped, copy_frame=load_copy_frame(), timeout_s=TIMEOUT_S)


def _shm_target(source_fd: int, source_num_blocks: int, target: Pool) -> TargetEnd:
    readable = shm.read_only(source_fd)
    try:
        return shm.open_target(
            readable,
            source_num_blocks=source_num_blocks,
            target=target.mapped,
            copy_frame=load_copy_frame(),
        )
    finally:
        os.close(readable)


def frame(
    source: tuple[int, ...], target: tuple[int, ...], sequence: int = 0, block_bytes: int = BLOCK_BYTES
) -> FrameHeader:
    """A frame from these blocks into those."""
    zeros = (0,) * len(source)
    return FrameHeader(
        transfer_id=TransferId("t"), epoch=1, source_incarnation=1, target_incarnation=1, sequence=sequence,
        source_blocks=source, source_generations=zeros, target_blocks=target, target_generations=zeros,
        num_bytes=len(source) * block_bytes,
    )  # fmt: skip


# ---- one end in another process, which can be killed and stopped ---------------------------------------------------


class Peer:
    """Another process with the other end: it is told "prepare", "push", "post", "take", and answers each."""

    def __init__(self, transport: str, role: str, source: Pool, target: Pool) -> None:
        ours, far = socket.socketpair()
        arguments = [transport, role, far.fileno(), source.fd, target.fd, source.num_blocks, source.block_bytes]
        with far:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *map(str, arguments)],
                pass_fds=(far.fileno(), source.fd, target.fd),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                cwd=Path(__file__).parents[2],
            )
        self.sock = FramedSocket(ours, send_timeout_s=TIMEOUT_S)
        self._answer()  # its imports are done
        rank = pair.SOURCE_RANK if role == "target" else pair.TARGET_RANK
        self.end = _end_in_process(transport, rank, self.sock, source, target)
        self._answer()

    def ask(self, command: str, sequence: int, *rest: object) -> str:
        """One command and its answer."""
        self.tell(command, sequence, *rest)
        return self._answer()

    def tell(self, command: str, sequence: int, *rest: object) -> None:
        """One command, without waiting for its answer."""
        assert self.process.stdin is not None
        print(command, sequence, *rest, file=self.process.stdin, flush=True)

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """Ends the process, stopped or not."""
        self.process.kill()
        self.process.communicate()
        self.sock.close()
        self.end.close()


def _end_in_process(transport: str, rank: int, sock: FramedSocket, source: Pool, target: Pool) -> SourceEnd | TargetEnd:
    """The end of `rank`, made while the other process makes its own."""
    if transport == "gloo":
        meeting = LinkMeeting(sock, pair_epoch=1, timeout_s=20)
        return _gloo_end(meeting, rank, source if rank == pair.SOURCE_RANK else target)
    if rank == pair.SOURCE_RANK:
        return PullSource(source.mapped)
    return _shm_target(source.fd, source.num_blocks, target)


def _run_peer(arguments: list[str]) -> None:
    transport, role = arguments[:2]
    sock_fd, source_fd, target_fd, num_blocks, block_bytes = map(int, arguments[2:])
    source = Pool(num_blocks=num_blocks, block_bytes=block_bytes, fd=source_fd)
    target = Pool(num_blocks=num_blocks, block_bytes=block_bytes, fd=target_fd)
    sock = FramedSocket(socket.socket(fileno=sock_fd), send_timeout_s=TIMEOUT_S)
    if transport == "gloo":
        gloo.load()
    print("ready", flush=True)
    rank = pair.SOURCE_RANK if role == "source" else pair.TARGET_RANK
    end = _end_in_process(transport, rank, sock, source, target)
    print("open", flush=True)
    for line in sys.stdin:
        command, sequence, *rest = line.split()
        blocks = tuple(range(num_blocks))
        header = frame(blocks, blocks, int(sequence), block_bytes)
        answer: object = "done"
        if isinstance(end, SourceEnd):
            answer = end.prepare(header) if command == "prepare" else end.push(header)
        elif command == "post":
            end.post(header)
        else:
            end.take(header, int(rest[0]))
        print(answer, flush=True)


if __name__ == "__main__":
    _run_peer(sys.argv[1:])
