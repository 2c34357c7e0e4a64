"""Everything that reads bytes of a peer or a file, under any bytes: refused by its own error, or read without loss."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draws import Draws
from google.protobuf.message import DecodeError, Message
from random_messages import damage, fill

from engine.arch import ModelError
from engine.gguf_header import read_header
from engine.model_files import ModelFiles, ModelFormat, read_arch
from kv_transfer import agent_wire, wire
from kv_transfer.endpoint import Endpoint, format_endpoint, parse_endpoint
from kv_transfer.framed_socket import MAX_MESSAGE_BYTES, FramedSocket, LinkLost
from kv_transfer.messages import EndTransfer, FrameHeader, SendFrame
from router.gguf_metadata import GGUFError, read_metadata
from tandem import report_wire
from tandem import wire as router_wire
from tandem.request import TransferId
from tandem.v1 import worker_pb2 as pb

MEMORY_FILE = os.memfd_create("tandem-fuzz", os.MFD_CLOEXEC)
MEMORY_PATH = Path(f"/proc/self/fd/{MEMORY_FILE}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """One reader: `read` takes any bytes, and says how many messages or files it was given."""

    name: str
    read: Callable[[bytes], int]
    seeds: Callable[[], list[bytes]]


def _must_say(error: Exception) -> None:
    if not str(error):
        raise AssertionError(f"{type(error).__name__} says nothing")


# ---- what agents say -----------------------------------------------------------------------------------------------


def header(num_blocks: int = 2, *, sequence: int = 0) -> FrameHeader:
    """A frame that could be."""
    blocks = tuple(range(num_blocks))
    return FrameHeader(
        transfer_id=TransferId("t0"), epoch=1, source_incarnation=1, target_incarnation=2, sequence=sequence,
        source_blocks=blocks, source_generations=blocks, target_blocks=blocks, target_generations=blocks,
        num_bytes=num_blocks * 512,
    )  # fmt: skip


def agent_messages() -> list[agent_wire.Message]:
    """One of many a kind."""
    endpoint = Endpoint(host="127.0.0.1", port=1, uds="u", incarnation=7, token="00ff")
    return [
        agent_wire.AgentReady(endpoint=format_endpoint(endpoint), pid=1),
        SendFrame(header=header(), endpoint=format_endpoint(endpoint), priority=1),
        EndTransfer(transfer_id=TransferId("t0"), epoch=1),
        agent_wire.Hello(
            magic=agent_wire.MAGIC, version=agent_wire.PROTOCOL_VERSION, layout_digest=b"l" * 16, source_agent=1,
            target_agent=2, token=b"t" * 16, salt=b"s" * 16,
            transport="auto", memory="host", cuda_pool=b"", block_bytes=512,
            num_blocks=8,
        ),
        agent_wire.Welcome(nonce=b"n" * 32, salt=b"s" * 16, transport="shm"),
        agent_wire.Denied(reason="no"),
        agent_wire.OpenChannel(pair_epoch=1),
        agent_wire.Meet(pair_epoch=1, key="k", value=b"v"),
        agent_wire.Announce(header=header(3), checksum=5, tag=b"g" * 16),
        agent_wire.Ack(transfer_id=TransferId("t0"), epoch=1, sequence=0, checksum=5),
        agent_wire.Nack(transfer_id=TransferId("t0"), epoch=1, sequence=0, reason="r"),
        agent_wire.Ping(number=1, answer=False),
    ]  # fmt: skip


def read_agent_message(data: bytes) -> int:
    """What is decoded is the same after another turn."""
    try:
        message = agent_wire.decode(data)
    except ValueError as error:
        _must_say(error)
        return 1
    assert agent_wire.decode(agent_wire.encode(message)) == message
    return 1


def read_stream(data: bytes) -> int:
    """A socket's bytes in pieces: whole messages come out, in order, or the link is lost by name."""
    draws = Draws(data)
    stream = bytearray()
    whole = [agent_wire.encode(message) for message in agent_messages()]
    for _ in range(1 + draws.below(6)):
        body = draws.pick(whole) if draws.byte() < 192 else draws.raw(draws.below(64))
        if draws.chance(48):
            body = damage(body, draws)
        length = len(body) if draws.byte() < 224 else draws.pick((0, len(body) + 1, MAX_MESSAGE_BYTES, 0xFFFFFFFF))
        stream += length.to_bytes(4, "big") + body
    near, far = socket.socketpair()
    with near, far:
        sock = FramedSocket(near, send_timeout_s=1)
        num = 0
        try:
            while stream:
                step = 1 + draws.below(200)
                far.sendall(stream[:step])
                del stream[:step]
                while sock.receive(0) is not None:
                    num += 1
            far.shutdown(socket.SHUT_WR)
            while sock.receive(0) is not None:
                num += 1
        except LinkLost as error:
            _must_say(error)
        finally:
            sock.close()
    return max(1, num)


def read_endpoint(data: bytes) -> int:
    """An endpoint out of any text."""
    try:
        endpoint = parse_endpoint(data.decode("utf-8", errors="replace"))
    except ValueError:
        return 1
    assert parse_endpoint(format_endpoint(endpoint)) == endpoint
    return 1


def endpoint_seeds() -> list[bytes]:
    """Good, and nested."""
    good = format_endpoint(Endpoint(host="::1", port=65535, uds="u", incarnation=(1 << 64) - 1, token="00"))
    return [good.encode(), b"[" * 1024, b'{"host":' * 100, b"1" * 1000]


# ---- what protobuf carries -----------------------------------------------------------------------------------------


def _protobuf(
    kind: type[Message], decode: Callable[[Any], Any], encode: Callable[[Any], Any]
) -> Callable[[bytes], int]:
    def read(data: bytes) -> int:
        draws = Draws(data)
        message: Any = kind()
        if draws.byte() < 128:
            fill(message, draws, {})
        try:
            message.MergeFromString(draws.raw(draws.left))
            decoded = decode(message)
            decoded_again = decode(encode(decoded))
        except DecodeError:
            return 1
        except ValueError as error:
            _must_say(error)
            return 1
        # Text, since a NaN of a logprob is not equal to itself.
        assert repr(decoded_again) == repr(decoded)
        return 1

    return read


def _protobuf_seeds(kind: type[Message]) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        found = []
        for first in range(128, 256, 8):  # 128 and more: the rest is the message's own bytes
            message = kind()
            fill(message, Draws(bytes((first * at * 37 + at) % 256 for at in range(400))), {})
            found.append(bytes([128]) + message.SerializeToString())
            found.append(bytes((first * at * 41 + at * 3) % 256 for at in range(300)))
        return found

    return seeds


def _info_again(info: Any) -> Any:
    return router_wire.encode_worker_info(info)


# ---- files ---------------------------------------------------------------------------------------------------------


def _write(data: bytes) -> None:
    os.ftruncate(MEMORY_FILE, 0)
    os.pwrite(MEMORY_FILE, data, 0)


def read_gguf_header(data: bytes) -> int:
    """The engine's reader, and what it makes of the model."""
    _write(data)
    try:
        read_header(MEMORY_PATH)
        read_arch(ModelFiles(name="fuzz", path=MEMORY_PATH, format=ModelFormat.GGUF))
    except ModelError as error:
        _must_say(error)
    return 1


def read_gguf_metadata(data: bytes) -> int:
    """The router's reader."""
    _write(data)
    try:
        read_metadata(MEMORY_PATH)
    except GGUFError as error:
        _must_say(error)
    return 1


def gguf_seeds() -> list[bytes]:
    """Small files with a value of each kind, and arrays in arrays."""

    def text(value: str) -> bytes:
        return len(value).to_bytes(8, "little") + value.encode()

    def pair(key: str, kind: int, value: bytes) -> bytes:
        return text(key) + kind.to_bytes(4, "little") + value

    def array(kind: int, num: int, items: bytes) -> bytes:
        return kind.to_bytes(4, "little") + num.to_bytes(8, "little") + items

    def file(pairs: list[bytes], tensors: list[bytes]) -> bytes:
        counts = len(tensors).to_bytes(8, "little") + len(pairs).to_bytes(8, "little")
        return b"GGUF" + (3).to_bytes(4, "little") + counts + b"".join(pairs) + b"".join(tensors) + bytes(64)

    scalars = [
        pair(f"k{kind}", kind, bytes([1] * 8)[:size]) for kind, size in ((0, 1), (4, 4), (6, 4), (7, 1), (12, 8))
    ]
    arch = [
        pair("general.architecture", 8, text("llama")),
        pair("llama.block_count", 4, (1).to_bytes(4, "little")),
        pair("llama.embedding_length", 4, (8).to_bytes(4, "little")),
        pair("llama.attention.head_count", 4, (2).to_bytes(4, "little")),
        pair("llama.feed_forward_length", 4, (8).to_bytes(4, "little")),
        pair("llama.context_length", 4, (64).to_bytes(4, "little")),
        pair("llama.vocab_size", 4, (16).to_bytes(4, "little")),
        pair("llama.attention.layer_norm_rms_epsilon", 6, b"\x00\x00\x80\x3f"),
        pair("general.alignment", 4, (32).to_bytes(4, "little")),
        pair("tokenizer.ggml.tokens", 9, array(8, 2, text("a") + text("b"))),
        pair("tokenizer.ggml.scores", 9, array(6, 70, bytes(280))),
    ]
    shape = (2).to_bytes(4, "little") + (8).to_bytes(8, "little") * 2
    tensor = text("token_embd.weight") + shape + (0).to_bytes(4, "little") + bytes(8)
    nested = pair("deep", 9, array(9, 1, array(9, 1, array(4, 1, bytes(4)))))
    abyss = pair("abyss", 9, array(9, 1, b"") * 3000)
    return [file(scalars, []), file(arch, [tensor]), file([nested], []), file([abyss], []), b"", b"GGUF"]


DECODINGS: tuple[Decoding, ...] = (
    Decoding(
        name="agent messages",
        read=read_agent_message,
        seeds=lambda: [agent_wire.encode(message) for message in agent_messages()],
    ),
    Decoding(name="agent streams", read=read_stream, seeds=lambda: [bytes(range(256)), bytes(64)]),
    Decoding(name="endpoints", read=read_endpoint, seeds=endpoint_seeds),
    Decoding(
        name="transfer messages",
        read=_protobuf(pb.TransferMessage, wire.decode_transfer_message, wire.encode_transfer_message),
        seeds=_protobuf_seeds(pb.TransferMessage),
    ),
    Decoding(
        name="router messages",
        read=_protobuf(pb.RouterMessage, router_wire.decode_router_message, router_wire.encode_router_message),
        seeds=_protobuf_seeds(pb.RouterMessage),
    ),
    Decoding(
        name="worker reports",
        read=_protobuf(pb.WorkerReport, report_wire.decode_report, report_wire.encode_report),
        seeds=_protobuf_seeds(pb.WorkerReport),
    ),
    Decoding(
        name="registrations",
        read=_protobuf(pb.RegisterRequest, router_wire.decode_worker_info, _info_again),
        seeds=_protobuf_seeds(pb.RegisterRequest),
    ),
    Decoding(name="GGUF headers", read=read_gguf_header, seeds=gguf_seeds),
    Decoding(name="GGUF metadata", read=read_gguf_metadata, seeds=gguf_seeds),
)
