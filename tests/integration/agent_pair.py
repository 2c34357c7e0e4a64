"""Two workers' pools with a real agent process each, and what a test asks of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from device_agent import DeviceAgentClient, export

from engine.kv_pool import shared_memory
from kv_transfer.agent_client import AgentClient, AgentInfo
from kv_transfer.agent_settings import AgentSettings, TransportChoice
from kv_transfer.messages import (
    AgentCommand,
    AgentEvent,
    EndTransfer,
    ExpectFrames,
    FrameAcked,
    FrameFailed,
    FrameHeader,
    FrameLanded,
    SendFrame,
    TransferQuiet,
)
from kv_transfer.transports.cuda_pool import CudaPool
from tandem.request import TransferId

EventT = TypeVar("EventT", bound=AgentEvent)

SOURCE_INCARNATION, TARGET_INCARNATION = 11, 22
# No test is about what a worker makes of a stopped agent unless it says so.
FAST = AgentSettings(connect_timeout_ms=1_000, operation_timeout_ms=1_500, keepalive_ms=500, stuck_timeout_ms=60_000)
PATIENCE_S = 60.0  # several agents import torch at once, on a loaded machine
LAYOUT = b"layout-digest-16"


class End:
    """One worker's pool and agent client, with every event that came."""

    client_type: ClassVar[type[AgentClient]] = AgentClient

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        block_bytes: int = 4096,
        settings: AgentSettings = FAST,
        layout: bytes = LAYOUT,
        fill: bool = False,
        secret: bytes = b"",
        log_file: Path | None = None,
    ) -> None:
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        pool = self.open_pool()
        if fill:
            for block in range(num_blocks):
                self.write(block, os.urandom(block_bytes))
        self.events: list[AgentEvent] = []
        self.restarts: list[AgentInfo | None] = []
        self._changed = threading.Condition()
        self.client = self.client_type(
            pool=pool,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            layout_digest=layout,
            settings=settings,
            on_event=self._on_event,
            on_restart=self._on_restart,
            secret=secret,
            log_file=log_file,
        )
        self.info = self.client.start()

    def open_pool(self) -> int | CudaPool:
        """Makes the pool, of zeros; what its agent is to be told of it."""
        self.pool_fd = shared_memory("test-pool", self.num_blocks * self.block_bytes)
        return self.pool_fd

    def close_pool(self) -> None:
        """Nobody uses it any more."""
        os.close(self.pool_fd)

    def _on_event(self, event: AgentEvent) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def _on_restart(self, info: AgentInfo | None) -> None:
        with self._changed:
            self.restarts.append(info)
            self._changed.notify_all()

    def read(self, block: int) -> bytes:
        """A block's bytes as the worker sees them."""
        return os.pread(self.pool_fd, self.block_bytes, block * self.block_bytes)

    def write(self, block: int, data: bytes) -> None:
        """Writes a block as the worker does."""
        os.pwrite(self.pool_fd, data, block * self.block_bytes)

    def until(self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Waits for the condition on what came; fails the test after the deadline."""
        with self._changed:
            came = self._changed.wait_for(condition, timeout_s)
        assert came, f"not within {timeout_s} s; came: {self.events[-8:]}"

    def of(self, kind: type[EventT]) -> list[EventT]:
        """The events of that kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def wait(self, kind: type[EventT], num: int = 1, timeout_s: float = PATIENCE_S) -> list[EventT]:
        """Waits until so many events of the kind came."""
        self.until(lambda: len(self.of(kind)) >= num, timeout_s)
        return self.of(kind)

    def tell(self, command: AgentCommand) -> None:
        """Tells the agent that the test knows of."""
        self.client.send(command, endpoint=self.info.endpoint)

    def stop(self) -> None:
        """Stops the agent's process, and returns when none of its threads runs any more."""
        os.kill(self.info.pid, signal.SIGSTOP)
        threads = Path(f"/proc/{self.info.pid}/task")
        deadline_s = time.monotonic() + PATIENCE_S
        while not all(_state(thread) == "T" for thread in threads.iterdir()):
            assert time.monotonic() < deadline_s, "it does not stop"
            time.sleep(0.001)

    def go_on(self) -> None:
        """Lets a stopped agent run again."""
        os.kill(self.info.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends the agent; the pool is gone."""
        self.client.close()
        self.close_pool()


class DeviceEnd(End):
    """With a pool on what stands for a device. `link`: where others find it."""

    client_type = DeviceAgentClient

    def __init__(self, *, link: Path | None = None, **other: Any) -> None:
        self._link = link
        super().__init__(**other)

    def open_pool(self) -> CudaPool:
        """Memory of the host all the same."""
        super().open_pool()
        if self._link is None:
            return export(self.pool_fd)
        self._link.symlink_to(f"/proc/{os.getpid()}/fd/{self.pool_fd}")
        return export(self._link)


class Pair:
    """A source and a target, and the words that a handoff uses."""

    def __init__(self, source: End, target: End) -> None:
        self.source, self.target = source, target

    def expect(self, transfer: str = "t", *, epoch: int = 1, blocks: tuple[int, ...], generation: int = 5) -> None:
        """The target grants blocks of one generation to the source."""
        self.target.tell(
            ExpectFrames(
                transfer_id=TransferId(transfer),
                epoch=epoch,
                source_incarnation=SOURCE_INCARNATION,
                target_incarnation=TARGET_INCARNATION,
                blocks=blocks,
                generations=(generation,) * len(blocks),
                endpoint=self.source.info.endpoint,
            )
        )

    def header(
        self,
        transfer: str = "t",
        *,
        epoch: int = 1,
        sequence: int = 0,
        source: tuple[int, ...],
        target: tuple[int, ...],
        generation: int = 5,
    ) -> FrameHeader:
        """A frame that fits the grant."""
        return FrameHeader(
            transfer_id=TransferId(transfer),
            epoch=epoch,
            source_incarnation=SOURCE_INCARNATION,
            target_incarnation=TARGET_INCARNATION,
            sequence=sequence,
            source_blocks=source,
            source_generations=(1,) * len(source),
            target_blocks=target,
            target_generations=(generation,) * len(target),
            num_bytes=len(source) * self.source.block_bytes,
        )

    def send(self, header: FrameHeader, *, endpoint: str | None = None, priority: int = 0) -> None:
        """The source asks its agent to move the frame."""
        endpoint = endpoint or self.target.info.endpoint
        self.source.tell(SendFrame(header=header, endpoint=endpoint, priority=priority))

    def end(self, end: End, transfer: str = "t", *, epoch: int = 1, timeout_s: float = PATIENCE_S) -> None:
        """One side ends its part and waits for quiet."""
        key = (TransferId(transfer), epoch)
        end.tell(EndTransfer(transfer_id=key[0], epoch=key[1]))
        end.until(lambda: any((q.transfer_id, q.epoch) == key for q in end.of(TransferQuiet)), timeout_s)

    def move(self, header: FrameHeader) -> FrameAcked:
        """Sends one frame and waits until both sides have said that it is over there."""
        before = len(self.source.of(FrameAcked))
        self.send(header)
        acked = self.source.wait(FrameAcked, before + 1)[-1]
        self.target.until(
            lambda: any(
                (e.transfer_id, e.sequence) == (header.transfer_id, header.sequence)
                for e in self.target.of(FrameLanded)
            )
        )
        return acked

    def refusal(
        self, header: FrameHeader, *, endpoint: str | None = None, timeout_s: float = PATIENCE_S
    ) -> FrameFailed:
        """Sends one frame that is to fail, and says how it did."""
        before = len(self.source.of(FrameFailed))
        self.send(header, endpoint=endpoint)
        return self.source.wait(FrameFailed, before + 1, timeout_s)[-1]


def _state(thread: Path) -> str:
    """The kernel's letter for what a thread does; a thread that has ended counts as stopped."""
    try:
        return (thread / "stat").read_text().rsplit(") ", 1)[1][0]
    except (FileNotFoundError, ProcessLookupError):
        return "T"


def with_transport(settings: AgentSettings, transport: str) -> AgentSettings:
    """The same settings over another transport."""
    return replace(settings, transport=TransportChoice(transport))
