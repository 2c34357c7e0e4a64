"""What agents say to their worker and to one another, in bytes: a tag, then the fields in the order of a table.

Every message is framed by its length (see kv_transfer/framed_socket.py). Decoding trusts nobody: ValueError names what
is wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
from tandem.request import TransferId

MAGIC = b"tandem-kv"
PROTOCOL_VERSION = 4


# ---- between a worker and its agent, once, at the start ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReady:
    """The agent to its worker: it listens; this is the endpoint to hand out."""

    endpoint: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturb:
    """The worker to its agent: a fault to test with. Either frames are damaged, or links to and from peers are shut."""

    for_ms: int
    period_ms: int  # as in kv_transfer/gate.py
    corrupt_every: int  # 0: the links are shut


# ---- between two agents --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of a link, from the source's agent. Over a local socket, its nonce comes as a descriptor, and so
    does its pool when that is in this host's memory.
    """

    magic: bytes
    version: int
    layout_digest: bytes
    source_agent: int  # incarnation of the one that speaks
    target_agent: int  # incarnation of the one that it wants to reach
    token: bytes  # from the target's endpoint: who does not know it was not told of this agent
    transport: str  # what the source is set to: auto, or the one that it must be
    memory: str  # where its pool is
    cuda_pool: bytes  # how to open it there, over a local socket; else empty
    block_bytes: int
    num_blocks: int
    salt: bytes  # of the seals of this link, see kv_transfer/seal.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The target's agent takes the link. `nonce` is what it read in the memory that came as a descriptor, or empty."""

    nonce: bytes
    salt: bytes
    transport: str  # what frames on this link move over


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """The target's agent does not take the link."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenChannel:
    """Source to target: make your end of a channel under this pair epoch."""

    pair_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Meet:
    """Either way, while a pair is made: one thing that torch.distributed lets its two ends know of each other."""

    pair_epoch: int
    key: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """Source to target: this frame is ready, with its checksum, and the keyed tag of its bytes where it needs one."""

    header: FrameHeader
    checksum: int
    tag: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Go:
    """Target to source: memory is posted for the frame, push it."""

    transfer_id: TransferId
    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """Target to source: the frame is in its blocks and checks."""

    transfer_id: TransferId
    epoch: int
    sequence: int
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Nack:
    """Target to source: the frame was not taken, and why."""

    transfer_id: TransferId
    epoch: int
    sequence: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Either way: are you there? `answer` marks the reply."""

    number: int
    answer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StrangersRefused:
    """The agent to its worker: so many more peers or messages were refused that were forged, replayed or strangers'."""

    num: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FramesDamaged:
    """The agent to its worker: so many more frames arrived that did not check."""

    num: int


LinkMessage = Hello | Welcome | Denied | OpenChannel | Meet | Announce | Go | Ack | Nack | Ping
Message = AgentCommand | AgentEvent | AgentReady | StrangersRefused | FramesDamaged | Disturb | LinkMessage

# ---- the codec -----------------------------------------------------------------------------------------------------

# How a field is written: lengths and lists are of 32 bit little-endian numbers.
_U64, _U32, _TEXT, _BYTES, _LIST, _FLAG, _MAYBE, _HEADER = "u64", "u32", "text", "bytes", "list", "flag", "maybe", "hdr"

_FRAME_HEADER_FIELDS = (
    ("transfer_id", _TEXT),
    ("epoch", _U64),
    ("source_incarnation", _U64),
    ("target_incarnation", _U64),
    ("sequence", _U64),
    ("source_blocks", _LIST),
    ("source_generations", _LIST),
    ("target_blocks", _LIST),
    ("target_generations", _LIST),
    ("num_bytes", _U64),
)
_FRAME_KEY = (("transfer_id", _TEXT), ("epoch", _U64), ("sequence", _U64))

_MESSAGES: dict[int, tuple[type[Any], tuple[tuple[str, str], ...]]] = {
    1: (AgentReady, (("endpoint", _TEXT), ("pid", _U32))),
    2: (SendFrame, (("header", _HEADER), ("endpoint", _TEXT), ("priority", _U32))),
    3: (
        ExpectFrames,
        (
            ("transfer_id", _TEXT),
            ("epoch", _U64),
            ("source_incarnation", _U64),
            ("target_incarnation", _U64),
            ("blocks", _LIST),
            ("generations", _LIST),
            ("endpoint", _TEXT),
        ),
    ),
    4: (EndTransfer, (("transfer_id", _TEXT), ("epoch", _U64))),
    5: (FrameLanded, (*_FRAME_KEY, ("target_blocks", _LIST), ("num_bytes", _U64), ("checksum", _U64))),
    6: (FrameAcked, (*_FRAME_KEY, ("checksum", _U64))),
    7: (FrameFailed, (("transfer_id", _TEXT), ("epoch", _U64), ("sequence", _MAYBE), ("reason", _TEXT))),
    8: (TransferQuiet, (("transfer_id", _TEXT), ("epoch", _U64))),
    9: (Disturb, (("for_ms", _U32), ("period_ms", _U32), ("corrupt_every", _U32))),
    10: (StrangersRefused, (("num", _U64),)),
    11: (FramesDamaged, (("num", _U64),)),
    32: (
        Hello,
        (
            ("magic", _BYTES),
            ("version", _U32),
            ("layout_digest", _BYTES),
            ("source_agent", _U64),
            ("target_agent", _U64),
            ("token", _BYTES),
            ("transport", _TEXT),
            ("memory", _TEXT),
            ("cuda_pool", _BYTES),
            ("block_bytes", _U64),
            ("num_blocks", _U64),
            ("salt", _BYTES),
        ),
    ),
    33: (Welcome, (("nonce", _BYTES), ("salt", _BYTES), ("transport", _TEXT))),
    34: (Denied, (("reason", _TEXT),)),
    35: (OpenChannel, (("pair_epoch", _U64),)),
    36: (Meet, (("pair_epoch", _U64), ("key", _TEXT), ("value", _BYTES))),
    37: (Announce, (("header", _HEADER), ("checksum", _U64), ("tag", _BYTES))),
    38: (Go, _FRAME_KEY),
    39: (Ack, (*_FRAME_KEY, ("checksum", _U64))),
    40: (Nack, (*_FRAME_KEY, ("reason", _TEXT))),
    41: (Ping, (("number", _U64), ("answer", _FLAG))),
}
_TAGS = {kind: tag for tag, (kind, _) in _MESSAGES.items()}


def encode(message: Message) -> bytes:
    """One message: its tag and its fields. Raises ValueError on numbers that do not fit."""
    tag = _TAGS[type(message)]
    out = bytearray([tag])
    try:
        _put(out, message, _MESSAGES[tag][1])
    except struct.error as error:
        raise ValueError(f"{type(message).__name__}: {error}") from None
    return bytes(out)


def decode(data: bytes) -> Message:
    """Raises ValueError on an unknown tag, on fields that are cut short, on bytes that are left over."""
    if not data or data[0] not in _MESSAGES:
        raise ValueError(f"tag: is {data[:1].hex() or 'missing'}, must be one of {sorted(_MESSAGES)}")
    kind, fields = _MESSAGES[data[0]]
    values, end = _take(data, 1, fields)
    if end != len(data):
        raise ValueError(f"{kind.__name__}: has {len(data) - end} bytes more than its fields")
    message: Message = kind(**values)
    validate(message)
    return message


def validate(message: Message) -> None:
    """Raises ValueError when lists of one message do not go together, or a frame moves nothing."""
    check = _CHECKS.get(type(message))
    if check is not None:
        check(message)


def _put(out: bytearray, source: object, fields: tuple[tuple[str, str], ...]) -> None:
    for name, kind in fields:
        value = getattr(source, name)
        if kind == _TEXT:
            raw = value.encode()
            out += struct.pack("<I", len(raw)) + raw
        elif kind == _BYTES:
            out += struct.pack("<I", len(value)) + value
        elif kind == _U64:
            out += struct.pack("<Q", value)
        elif kind == _U32:
            out += struct.pack("<I", value)
        elif kind == _LIST:
            out += struct.pack(f"<I{len(value)}I", len(value), *value)
        elif kind == _FLAG:
            out.append(1 if value else 0)
        elif kind == _MAYBE:
            out += struct.pack("<BQ", value is not None, value or 0)
        else:
            _put(out, value, _FRAME_HEADER_FIELDS)


def _take(data: bytes, at: int, fields: tuple[tuple[str, str], ...]) -> tuple[dict[str, object], int]:
    values: dict[str, object] = {}
    for name, kind in fields:
        try:
            values[name], at = _take_one(data, at, kind)
        except struct.error:
            raise ValueError(f"{name}: is cut short at byte {len(data)}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{name}: is not UTF-8") from None
    return values, at


def _take_one(data: bytes, at: int, kind: str) -> tuple[object, int]:
    if kind == _U64:
        return struct.unpack_from("<Q", data, at)[0], at + 8
    if kind == _U32:
        return struct.unpack_from("<I", data, at)[0], at + 4
    if kind == _FLAG:
        return struct.unpack_from("<B", data, at)[0] != 0, at + 1
    if kind == _MAYBE:
        present, value = struct.unpack_from("<BQ", data, at)
        return (value if present else None), at + 9
    if kind == _HEADER:
        header, at = _take(data, at, _FRAME_HEADER_FIELDS)
        return FrameHeader(**header), at  # type: ignore[arg-type]
    (length,) = struct.unpack_from("<I", data, at)
    end = at + 4 + length * (4 if kind == _LIST else 1)
    if end > len(data):
        raise struct.error
    raw = data[at + 4 : end]
    if kind == _LIST:
        return _numbers(raw), end
    return (raw.decode() if kind == _TEXT else raw), end


def _numbers(raw: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(raw) // 4}I", raw)


def _check_header(message: Any) -> None:
    header: FrameHeader = message.header
    num_blocks = len(header.source_blocks)
    for name in ("source_generations", "target_blocks", "target_generations"):
        if len(getattr(header, name)) != num_blocks:
            raise ValueError(f"{name}: has {len(getattr(header, name))} entries, source_blocks has {num_blocks}")
    if num_blocks == 0:
        raise ValueError("source_blocks: is empty, a frame moves at least one block")
    if len(set(header.target_blocks)) != num_blocks:
        raise ValueError("target_blocks: names a block twice")


def _check_expect(message: Any) -> None:
    if len(message.blocks) != len(message.generations):
        raise ValueError(f"generations: has {len(message.generations)} entries, blocks has {len(message.blocks)}")


_CHECKS: dict[type[Any], Callable[[Any], None]] = {
    SendFrame: _check_header,
    Announce: _check_header,
    ExpectFrames: _check_expect,
}
