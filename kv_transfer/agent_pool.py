"""An agent's pool as its links need it: where it is, and the channels that lead from it to a peer's, near or far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kv_transfer.agent_settings import AgentSettings, AgentStart, Memory, TransportChoice
from kv_transfer.agent_wire import Hello
from kv_transfer.gate import Damage
from kv_transfer.transports import gloo, pair, shm
from kv_transfer.transports.channel import SourceEnd, TargetEnd
from kv_transfer.transports.cuda_pool import CudaPool
from kv_transfer.transports.meeting import Meeting
from kv_transfer.transports.memory import CopyFrame, MappedPool, copy_then_hash, load_copy_frame
from kv_transfer.transports.pull import PullSource


class AgentPool(ABC):
    """A near channel is for a peer that reaches this memory itself, a far one for any peer."""

    memory: ClassVar[Memory]
    near: ClassVar[TransportChoice]
    far: ClassVar[TransportChoice]
    descriptors: tuple[int, ...] = ()  # that let a peer of this host read the pool
    cuda_pool: bytes = b""  # the same for a pool on a GPU

    def __init__(self, settings: AgentSettings) -> None:
        self.damage = Damage(settings.corrupt_every)  # of frames that arrive

    @abstractmethod
    def warm_up(self) -> None:
        """Does now what the first frames would else wait for. On a thread of its own."""

    @abstractmethod
    def load_far(self) -> None:
        """Imports what far channels need, which takes a second or two."""

    @abstractmethod
    def near_source(self) -> SourceEnd:
        """The end that frames leave from."""

    @abstractmethod
    def near_target(self, hello: Hello, descriptors: Sequence[int]) -> TargetEnd:
        """The end that frames arrive at. `descriptors` stay the caller's. Raises ValueError, OSError, RuntimeError."""

    @abstractmethod
    def far_source(self, meeting: Meeting) -> SourceEnd:
        """Blocks until the peer has met, bounded. Raises ChannelLost, and what the meeting raises."""

    @abstractmethod
    def far_target(self, meeting: Meeting) -> TargetEnd:
        """As `far_source`."""


def open_pool(start: AgentStart) -> AgentPool:
    """The pool that the agent was started on. Raises ValueError, OSError, RuntimeError."""
    if not isinstance(start.pool, CudaPool):
        return HostPool(start, start.pool)
    from kv_transfer.agent_device_pool import DevicePool  # with torch

    return DevicePool(start, start.pool)


class HostPool(AgentPool):
    """Shared memory of this host: near peers map it, far ones get it over gloo."""

    memory = Memory.HOST
    near, far = TransportChoice.SHM, TransportChoice.GLOO

    def __init__(self, start: AgentStart, pool_fd: int) -> None:
        super().__init__(start.settings)
        self._settings = start.settings
        self._mapped = MappedPool(pool_fd, num_blocks=start.num_blocks, block_bytes=start.block_bytes, writable=True)
        self._copy_frame: CopyFrame = copy_then_hash
        self.descriptors = (shm.read_only(pool_fd),)

    def warm_up(self) -> None:
        """Maps all pages; the copying kernel may have to be built first."""
        self._mapped.populate()
        self._copy_frame = load_copy_frame()

    def load_far(self) -> None:
        """Imports torch."""
        gloo.load()

    def near_source(self) -> SourceEnd:
        """Over shared memory."""
        return PullSource(self._mapped)

    def near_target(self, hello: Hello, descriptors: Sequence[int]) -> TargetEnd:
        """Over shared memory: maps the peer's pool."""
        (pool_fd,) = descriptors
        return shm.open_target(
            pool_fd,
            source_num_blocks=hello.num_blocks,
            target=self._mapped,
            copy_frame=self._copy_frame,
            damage=self.damage,
        )

    def far_source(self, meeting: Meeting) -> SourceEnd:
        """Over gloo."""
        group = gloo.make_group(
            meeting, pair.SOURCE_RANK, host=self._settings.reachable_host, timeout_s=self._settings.group_timeout_s
        )
        timeout_s = self._settings.operation_timeout_s
        return gloo.source_end(group, self._mapped, copy_frame=self._copy_frame, timeout_s=timeout_s)

    def far_target(self, meeting: Meeting) -> TargetEnd:
        """Over gloo."""
        settings = self._settings
        group = gloo.make_group(
            meeting, pair.TARGET_RANK, host=settings.reachable_host, timeout_s=settings.group_timeout_s
        )
        return gloo.target_end(
            group,
            self._mapped,
            copy_frame=self._copy_frame,
            timeout_s=settings.operation_timeout_s,
            damage=self.damage,
        )
