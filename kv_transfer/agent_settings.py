"""How an agent is set: its flags, and what it was started on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kv_transfer.transports.cuda_pool import CudaPool, from_bytes, to_bytes
from tandem.log_lines import LogFormat


class Memory(StrEnum):
    """Where a pool is."""

    HOST = "host"
    CUDA = "cuda"


class TransportChoice(StrEnum):
    """What frames may move over."""

    AUTO = "auto"  # shared memory or CUDA IPC where the same host is proven, else gloo or NCCL
    SHM = "shm"
    GLOO = "gloo"
    CUDA_IPC = "cuda_ipc"
    NCCL = "nccl"


class FrameTags(StrEnum):
    """Which frames carry a keyed tag of their bytes. What is said of them is sealed in any case."""

    AUTO = "auto"  # those that leave the host
    ALWAYS = "always"  # all that go over a connection, also within one host
    NEVER = "never"  # none: the network is trusted


TRANSPORTS = {
    Memory.HOST: (TransportChoice.AUTO, TransportChoice.SHM, TransportChoice.GLOO),
    Memory.CUDA: (TransportChoice.AUTO, TransportChoice.CUDA_IPC, TransportChoice.NCCL),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """What an operator may choose. A frame that does not arrive fails within twice the first two limits together."""

    bind_host: str = "127.0.0.1"  # an address of this host, never a wildcard when `advertised_host` is left empty
    advertised_host: str = ""  # what peers connect to; empty: the bind address
    transport: TransportChoice = TransportChoice.AUTO
    frame_tags: FrameTags = FrameTags.AUTO
    log_format: LogFormat = LogFormat.TEXT
    connect_timeout_ms: int = 2_000
    operation_timeout_ms: int = 5_000
    group_timeout_ms: int = 10_000  # until both ends of a gloo or NCCL pair have joined
    keepalive_ms: int = 5_000  # of silence on an idle link until the peer is asked for a sign of life
    probe_ms: int = 1_000  # the same while frames are under way
    ping_timeout_ms: int = 2_000  # for that sign; then the link is made anew
    stuck_timeout_ms: int = 4_000  # without a sign of life from its agent the worker kills it
    window_frames: int = 4  # announced to one peer and not yet answered
    max_links: int = 64  # to peers, and as many from peers; one more closes the one that was idle for longest
    corrupt_every: int = 0  # fault to test with: damages each n-th frame that arrives; 0 is off

    def __post_init__(self) -> None:
        for name in (each for each in _NUMBERS if each != "corrupt_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: is {getattr(self, name)}, must be at least 1")
        if self.corrupt_every < 0:
            raise ValueError(f"corrupt_every: is {self.corrupt_every}, must be at least 0")
        if self.bind_host in ("", "0.0.0.0", "::") and not self.advertised_host:
            raise ValueError(f"advertised_host: is empty, must be set when bind_host is {self.bind_host!r}")

    @property
    def operation_timeout_s(self) -> float:
        """How long one frame may take from its announcement to its answer."""
        return self.operation_timeout_ms / 1000

    @property
    def group_timeout_s(self) -> float:
        """How long a pair may take to be made."""
        return self.group_timeout_ms / 1000

    @property
    def reachable_host(self) -> str:
        """The address that peers connect to, and that gloo uses."""
        return self.advertised_host or self.bind_host


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStart:
    """What a worker hands to its agent beside the settings: descriptors, the shape of the pool, and who it is."""

    pool: int | CudaPool  # a descriptor of this host's memory, or where it is on a GPU
    control_fd: int
    parent_pid: int
    num_blocks: int
    block_bytes: int
    layout_digest: bytes
    settings: AgentSettings

    def __post_init__(self) -> None:
        check_transport(self.settings, self.pool)


def check_transport(settings: AgentSettings, pool: int | CudaPool) -> None:
    """Raises ValueError when blocks of such a pool cannot move over the transport that was chosen."""
    memory = Memory.CUDA if isinstance(pool, CudaPool) else Memory.HOST
    if settings.transport not in TRANSPORTS[memory]:
        can = ", ".join(TRANSPORTS[memory])
        raise ValueError(f"transport: is {settings.transport}, blocks in {memory} memory move over one of: {can}")


_NUMBERS = (
    "connect_timeout_ms", "operation_timeout_ms", "group_timeout_ms", "keepalive_ms", "probe_ms", "ping_timeout_ms",
    "stuck_timeout_ms", "window_frames", "max_links", "corrupt_every",
)  # fmt: skip


def to_arguments(start: AgentStart) -> list[str]:
    """The command line of an agent, after `python -m kv_transfer.agent`."""
    settings = start.settings
    pairs: list[tuple[str, object]] = [
        ("cuda_pool", to_bytes(start.pool).hex()) if isinstance(start.pool, CudaPool) else ("pool_fd", start.pool),
        ("control_fd", start.control_fd),
        ("parent_pid", start.parent_pid),
        ("num_blocks", start.num_blocks),
        ("block_bytes", start.block_bytes),
        ("layout_digest", start.layout_digest.hex()),
        ("bind_host", settings.bind_host),
        ("advertised_host", settings.advertised_host),
        ("transport", settings.transport.value),
        ("frame_tags", settings.frame_tags.value),
        ("log_format", settings.log_format.value),
        *((name, getattr(settings, name)) for name in _NUMBERS),
    ]
    return [f"--{name.replace('_', '-')}={value}" for name, value in pairs]


def from_arguments(arguments: Sequence[str]) -> AgentStart:
    """Reads a command line back. Exits with a message when a flag is missing or is not what it must be."""
    parser = argparse.ArgumentParser(prog="python -m kv_transfer.agent", description="Moves KV blocks for one worker.")
    for name in ("control-fd", "parent-pid", "num-blocks", "block-bytes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    pool = parser.add_mutually_exclusive_group(required=True)
    pool.add_argument("--pool-fd", dest="pool", type=int)
    pool.add_argument("--cuda-pool", dest="pool", type=lambda text: from_bytes(bytes.fromhex(text)))
    parser.add_argument("--layout-digest", type=bytes.fromhex, required=True)
    defaults = AgentSettings()
    parser.add_argument("--bind-host", default=defaults.bind_host)
    parser.add_argument("--advertised-host", default=defaults.advertised_host)
    parser.add_argument("--transport", type=TransportChoice, default=defaults.transport)
    parser.add_argument("--frame-tags", type=FrameTags, default=defaults.frame_tags)
    parser.add_argument("--log-format", type=LogFormat, default=defaults.log_format)
    for name in _NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    flags = parser.parse_args(arguments)
    return AgentStart(
        pool=flags.pool,
        control_fd=flags.control_fd,
        parent_pid=flags.parent_pid,
        num_blocks=flags.num_blocks,
        block_bytes=flags.block_bytes,
        layout_digest=flags.layout_digest,
        settings=AgentSettings(
            bind_host=flags.bind_host,
            advertised_host=flags.advertised_host,
            transport=flags.transport,
            frame_tags=flags.frame_tags,
            log_format=flags.log_format,
            **{name: getattr(flags, name) for name in _NUMBERS},
        ),
    )
