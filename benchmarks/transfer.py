"""How fast KV frames move: each channel, bare and verified, and whole agents, against memcpy and raw TCP in one run.

Everything is interleaved, five rounds or more, medians. Two processes on one host.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import timedelta

from benchmarks import report
from benchmarks.transfer_rivals import Rival, start_all
from engine.kv_pool import shared_memory
from kv_transfer.agent_client import AgentClient
from kv_transfer.agent_meeting import LinkMeeting
from kv_transfer.agent_settings import AgentSettings, TransportChoice
from kv_transfer.framed_socket import FramedSocket
from kv_transfer.messages import AgentEvent, EndTransfer, ExpectFrames, FrameAcked, FrameFailed, FrameHeader, SendFrame
from kv_transfer.transports import gloo, pair, shm
from kv_transfer.transports.channel import SourceEnd, TargetEnd
from kv_transfer.transports.memory import MappedPool, bytes_at, copy_then_hash, load_copy_frame
from kv_transfer.transports.pull import PullSource
from tandem.request import TransferId

BLOCK_BYTES = 256 << 10
POOL_BYTES = 128 << 20
NUM_BLOCKS = POOL_BYTES // BLOCK_BYTES
TIMEOUT_S = 20.0
IN_FLIGHT = 3
ORDER = struct.Struct("<8sQQ")  # kind, bytes of a frame, frames
CHECKSUM = struct.Struct("<Q")


def frame(sequence: int, frame_bytes: int, *, shuffled: bool) -> FrameHeader:
    """Source blocks in a row or scattered, as a cache after a while has them; target blocks always scattered."""
    num = frame_bytes // BLOCK_BYTES
    blocks = list(range(NUM_BLOCKS))
    random.Random(1).shuffle(blocks)
    start = sequence * num % (NUM_BLOCKS - num + 1)
    source = tuple(blocks[start : start + num]) if shuffled else tuple(range(start, start + num))
    target = tuple(blocks[NUM_BLOCKS - start - num : NUM_BLOCKS - start])
    return FrameHeader(
        transfer_id=TransferId("t"), epoch=1, source_incarnation=1, target_incarnation=2, sequence=sequence,
        source_blocks=source, source_generations=(0,) * num, target_blocks=target, target_generations=(0,) * num,
        num_bytes=frame_bytes,
    )  # fmt: skip


def make_pool() -> tuple[int, MappedPool]:
    """A pool whose pages are all there."""
    fd = shared_memory("bench", POOL_BYTES)
    for at in range(0, POOL_BYTES, 1 << 20):
        os.pwrite(fd, os.urandom(1 << 20), at)
    pool = MappedPool(fd, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, writable=True)
    copy_then_hash(pool.base, range(NUM_BLOCKS), pool.base, range(NUM_BLOCKS), BLOCK_BYTES)
    return fd, pool


def exactly(sock: socket.socket, num_bytes: int) -> bytes:
    """So many bytes, or an error when the other side has ended."""
    data = b""
    while len(data) < num_bytes:
        got = sock.recv(num_bytes - len(data))
        if not got:
            raise ConnectionError("the other process has ended")
        data += got
    return data


def make_groups(link: socket.socket, rank: int) -> list[pair.Group]:
    """Two pairs with the other process, met over the link."""
    framed = FramedSocket(link, send_timeout_s=TIMEOUT_S)
    groups = []
    for epoch in (1, 2):
        meeting = LinkMeeting(framed, pair_epoch=epoch, timeout_s=TIMEOUT_S)
        groups.append(gloo.make_group(meeting, rank, host="127.0.0.1", timeout_s=TIMEOUT_S))
    framed.close()
    return groups


# ---- the target's process ------------------------------------------------------------------------------------------


def target_main(control_fd: int, source_pool_fd: int) -> None:
    """Obeys the orders of the benchmark until its socket closes."""
    control = socket.socket(fileno=control_fd)
    _, pool = make_pool()
    gloo.load()
    listener = socket.create_server(("127.0.0.1", 0))
    control.sendall(struct.pack("<Q", listener.getsockname()[1]))
    tcp, _ = listener.accept()
    meeting_sock, _ = listener.accept()
    bare, verified = make_groups(meeting_sock, pair.TARGET_RANK)
    ends: dict[str, TargetEnd] = {
        "gloo": gloo.target_end(verified, pool, copy_frame=load_copy_frame(), timeout_s=TIMEOUT_S)
    }
    ends["shm"] = shm.open_target(
        source_pool_fd,
        source_num_blocks=NUM_BLOCKS,
        target=pool,
        copy_frame=load_copy_frame(),
    )
    control.sendall(b"r")
    while True:
        try:
            kind, frame_bytes, num_frames = ORDER.unpack(exactly(control, ORDER.size))
        except ConnectionError:
            return
        name = kind.rstrip(b"\0").decode()
        if name == "tcp":
            _take_tcp(tcp, pool, frame_bytes, num_frames)
            control.sendall(b"a")
        elif name == "bare":
            _take_bare(control, bare, pool, frame_bytes, num_frames)
        else:
            _take_frames(control, ends[name], frame_bytes, num_frames)


def start_of(sequence: int, frame_bytes: int) -> int:
    """Where the frame of plain bytes lies in the pool: another place each time, as blocks do."""
    return sequence * frame_bytes % (POOL_BYTES - frame_bytes + 1)


def _take_tcp(tcp: socket.socket, pool: MappedPool, frame_bytes: int, num_frames: int) -> None:
    for sequence in range(num_frames):
        view = memoryview(bytes_at(pool.base + start_of(sequence, frame_bytes), frame_bytes)).cast("B")
        got = 0
        while got < len(view):
            got += tcp.recv_into(view[got:])


def _take_bare(control: socket.socket, group: pair.Group, pool: MappedPool, frame_bytes: int, num_frames: int) -> None:
    def post(sequence: int) -> pair.Work:
        tensor = gloo.tensor_at(pool.base + start_of(sequence, frame_bytes), frame_bytes)
        return group.recv([tensor], pair.SOURCE_RANK, 0)

    posted = [post(sequence) for sequence in range(min(IN_FLIGHT, num_frames))]
    for sequence in range(num_frames):
        posted.pop(0).wait(timedelta(seconds=TIMEOUT_S))
        control.sendall(b"a")
        if sequence + IN_FLIGHT < num_frames:
            posted.append(post(sequence + IN_FLIGHT))


def _take_frames(control: socket.socket, end: TargetEnd, frame_bytes: int, num_frames: int) -> None:
    headers = [frame(sequence, frame_bytes, shuffled=False) for sequence in range(num_frames)]
    for header in headers[:IN_FLIGHT]:
        end.post(header)
    for sequence, header in enumerate(headers):
        (checksum,) = CHECKSUM.unpack(exactly(control, CHECKSUM.size))
        end.take(header, checksum)
        control.sendall(b"a")
        if sequence + IN_FLIGHT < num_frames:
            end.post(headers[sequence + IN_FLIGHT])


# ---- the source's process ------------------------------------------------------------------------------------------


class Source:
    """The source's ends, and the process that has the others."""

    def __init__(self) -> None:
        self.fd, self.pool = make_pool()
        self._control, theirs = socket.socketpair()
        with theirs:
            arguments = [f"--target={theirs.fileno()}", f"--pool-fd={self.fd}"]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.transfer", *arguments], pass_fds=(theirs.fileno(), self.fd)
            )
        self._control.settimeout(120)
        (tcp_port,) = struct.unpack("<Q", exactly(self._control, 8))
        self._tcp = socket.create_connection(("127.0.0.1", tcp_port))
        self._tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        copy_frame = load_copy_frame()
        gloo.load()
        self._bare, verified = make_groups(socket.create_connection(("127.0.0.1", tcp_port)), pair.SOURCE_RANK)
        self._ends: dict[str, SourceEnd] = {
            "shm": PullSource(self.pool),
            "gloo": gloo.source_end(verified, self.pool, copy_frame=copy_frame, timeout_s=TIMEOUT_S),
        }
        exactly(self._control, 1)

    def memcpy(self, frame_bytes: int, num_frames: int) -> None:
        """Copies the pool's blocks within one process."""
        for sequence in range(num_frames):
            header = frame(sequence, frame_bytes, shuffled=False)
            for there, here in zip(header.source_blocks, header.target_blocks, strict=True):
                base = self.pool.base
                ctypes.memmove(base + here * BLOCK_BYTES, base + there * BLOCK_BYTES, BLOCK_BYTES)

    def tcp(self, frame_bytes: int, num_frames: int) -> None:
        """Streams frames over one connection, one answer at the end."""
        self._control.sendall(ORDER.pack(b"tcp", frame_bytes, num_frames))
        for sequence in range(num_frames):
            self._tcp.sendall(bytes_at(self.pool.base + start_of(sequence, frame_bytes), frame_bytes))
        exactly(self._control, 1)

    def bare(self, frame_bytes: int, num_frames: int) -> None:
        """What gloo itself takes: plain sends and receives, a few in flight."""
        self._control.sendall(ORDER.pack(b"bare", frame_bytes, num_frames))
        flying: list[pair.Work] = []
        for sequence in range(num_frames):
            tensor = gloo.tensor_at(self.pool.base + start_of(sequence, frame_bytes), frame_bytes)
            flying.append(self._bare.send([tensor], pair.TARGET_RANK, 0))
            if len(flying) == IN_FLIGHT:
                exactly(self._control, 1)
                flying.pop(0).wait(timedelta(seconds=TIMEOUT_S))
        for work in flying:
            exactly(self._control, 1)
            work.wait(timedelta(seconds=TIMEOUT_S))

    def channel(self, name: str, frame_bytes: int, num_frames: int) -> None:
        """Moves frames over a channel, a few in flight."""
        self._control.sendall(ORDER.pack(name.encode(), frame_bytes, num_frames))
        end = self._ends[name]
        flying: list[FrameHeader] = []
        for sequence in range(num_frames):
            header = frame(sequence, frame_bytes, shuffled=False)
            checksum = end.prepare(header)
            end.push(header)
            self._control.sendall(CHECKSUM.pack(checksum))
            flying.append(header)
            if len(flying) == IN_FLIGHT:
                exactly(self._control, 1)
                end.finish(flying.pop(0))
        for header in flying:
            exactly(self._control, 1)
            end.finish(header)

    def close(self) -> None:
        """Ends the other process."""
        self._control.close()
        self._process.wait(10)


class Agents:
    """Two agents, from the worker's command to its event: the whole way of a frame."""

    def __init__(self, transport: TransportChoice) -> None:
        self._pools = [make_pool() for _ in range(2)]
        self._acked = threading.Semaphore(0)
        self._failure: str | None = None
        self._transfer = 0
        self._clients = [
            AgentClient(
                pool=fd,
                num_blocks=NUM_BLOCKS,
                block_bytes=BLOCK_BYTES,
                layout_digest=b"benchmark-layout",
                settings=AgentSettings(transport=transport, operation_timeout_ms=20_000),
                on_event=self._on_event,
                on_restart=lambda info: None,
            )
            for fd, _ in self._pools
        ]
        self._infos = [client.start() for client in self._clients]

    def _on_event(self, event: AgentEvent) -> None:
        if isinstance(event, FrameFailed):
            self._failure = event.reason
        if isinstance(event, (FrameAcked, FrameFailed)):
            self._acked.release()

    def move(self, frame_bytes: int, num_frames: int) -> None:
        """One transfer of so many frames, blocks scattered on both sides."""
        self._transfer += 1
        transfer = TransferId(f"t{self._transfer}")
        blocks = tuple(range(NUM_BLOCKS))
        self._clients[1].send(
            ExpectFrames(
                transfer_id=transfer, epoch=1, source_incarnation=1, target_incarnation=2, blocks=blocks,
                generations=(0,) * NUM_BLOCKS, endpoint=self._infos[0].endpoint,
            ),
            endpoint=self._infos[1].endpoint,
        )  # fmt: skip
        for sequence in range(num_frames):
            header = frame(sequence, frame_bytes, shuffled=True)
            named = FrameHeader(
                **{name: getattr(header, name) for name in header.__slots__} | {"transfer_id": transfer}
            )
            command = SendFrame(header=named, endpoint=self._infos[1].endpoint)
            self._clients[0].send(command, endpoint=self._infos[0].endpoint)
        for _ in range(num_frames):
            if not self._acked.acquire(timeout=30) or self._failure is not None:
                raise RuntimeError(f"a frame failed: {self._failure or 'no answer'}")
        for client, info in zip(self._clients, self._infos, strict=True):
            client.send(EndTransfer(transfer_id=transfer, epoch=1), endpoint=info.endpoint)

    def close(self) -> None:
        """Ends both agents."""
        for client in self._clients:
            client.close()


def measure(rounds: int, sizes_mib: list[int], rivals: list[Rival]) -> dict[tuple[str, int], float]:
    """GB/s of each way and frame size: the median of the rounds, after one that does not count."""
    found: dict[tuple[str, int], list[float]] = {}
    with closing(Source()) as source, closing(Agents(TransportChoice.SHM)) as over_shm:
        with closing(Agents(TransportChoice.GLOO)) as over_gloo:
            ways: dict[str, Callable[[int, int], None]] = {
                "memcpy": source.memcpy,
                "raw TCP": source.tcp,
                "gloo, bare": source.bare,
                "gloo, verified": lambda size, num: source.channel("gloo", size, num),
                "shared memory, verified": lambda size, num: source.channel("shm", size, num),
                "agents over shared memory": over_shm.move,
                "agents over gloo": over_gloo.move,
                **{rival.name: rival.move for rival in rivals},
            }
            for round_number in range(rounds + 1):
                for mib in sizes_mib:
                    for name, way in ways.items():
                        num_frames = max(8, 256 // mib)
                        began = time.perf_counter()
                        way(mib << 20, num_frames)
                        took_s = time.perf_counter() - began
                        if round_number:
                            found.setdefault((name, mib), []).append(num_frames * (mib << 20) / took_s / 1e9)
    return {key: statistics.median(values) for key, values in found.items()}


def main() -> int:
    """Prints the table and writes benchmarks/results/transfer.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes-mib", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rivals", action="store_true", help="Mooncake and NIXL too, installed under .rivals/")
    parser.add_argument("--target", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pool-fd", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.target is not None:
        target_main(flags.target, flags.pool_fd)
        return 0
    rivals, missing = start_all(pool_bytes=POOL_BYTES, block_bytes=BLOCK_BYTES) if flags.rivals else ([], [])
    with ExitStack() as started:
        for rival in rivals:
            started.enter_context(closing(rival))
        found = measure(flags.rounds, flags.sizes_mib, rivals)
    rows = []
    for name, mib in sorted(found, key=lambda key: key[1]):
        speed, tcp, memcpy = found[name, mib], found["raw TCP", mib], found["memcpy", mib]
        rows.append((f"{mib} MiB", name, speed, f"{speed / tcp:.2f}", f"{speed / memcpy:.2f}"))
    body = report.table(("frame", "way", "GB/s", "of raw TCP", "of memcpy"), rows)
    fused = "in one pass (C)" if load_copy_frame() is not copy_then_hash else "in two passes (no C kernel)"
    note = (
        f"Blocks of {BLOCK_BYTES >> 10} KiB, a pool of {POOL_BYTES >> 20} MiB, {flags.rounds} rounds interleaved, "
        f"medians. Copy and hash {fused}. Bare: gloo's own sends and receives, in place. Verified: xxh3-64 made at the "
        "source and checked at the target; gloo lands in staging, and is checked as it is copied on into its blocks. "
        "Agents: from the worker's command to its event, both ways through sockets, with the grant checked per "
        "block and source blocks scattered too."
    )
    if rivals:
        note += (
            " The rivals write from one memory into another, blocks scattered at the target, one frame after "
            "another; they check nothing and ask nobody for leave, so that their rows stand beside the bare one."
        )
    note = "\n\n".join([note, *missing])
    report.write("transfer", "Moving KV frames between two processes of one host", f"{note}\n\n{body}", threads="1")
    return 0


if __name__ == "__main__":
    sys.exit(main())
