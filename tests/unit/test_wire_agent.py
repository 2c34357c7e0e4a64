"""What agents say crosses their sockets unchanged; what is malformed, cut or too long is refused by name."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import agent_wire as aw
from kv_transfer.endpoint import Endpoint, format_endpoint, layout_digest, parse_endpoint
from kv_transfer.framed_socket import MAX_MESSAGE_BYTES, FramedSocket, LinkLost
from kv_transfer.layout import KVLayout
from kv_transfer.messages import (
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

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
text = st.text(max_size=8)
transfers = text.map(TransferId)


@st.composite
def headers(draw: st.DrawFn) -> FrameHeader:
    """A frame of one to five blocks."""
    num_blocks = draw(st.integers(1, 5))

    def numbers() -> tuple[int, ...]:
        return tuple(draw(st.lists(u32, min_size=num_blocks, max_size=num_blocks)))

    return FrameHeader(
        transfer_id=draw(transfers),
        epoch=draw(u64),
        source_incarnation=draw(u64),
        target_incarnation=draw(u64),
        sequence=draw(u64),
        source_blocks=numbers(),
        source_generations=numbers(),
        target_blocks=tuple(draw(st.lists(u32, min_size=num_blocks, max_size=num_blocks, unique=True))),
        target_generations=numbers(),
        num_bytes=draw(u64),
    )


@st.composite
def expectations(draw: st.DrawFn) -> ExpectFrames:
    """A grant with a generation for each block."""
    blocks = draw(st.lists(u32, max_size=5))
    return ExpectFrames(
        transfer_id=draw(transfers), epoch=draw(u64), source_incarnation=draw(u64), target_incarnation=draw(u64),
        blocks=tuple(blocks), generations=tuple(draw(u32) for _ in blocks), endpoint=draw(text),
    )  # fmt: skip


frames = {"transfer_id": transfers, "epoch": u64, "sequence": u64}
messages: st.SearchStrategy[aw.Message] = st.one_of(
    st.builds(aw.AgentReady, endpoint=text, pid=u32),
    st.builds(SendFrame, header=headers(), endpoint=text, priority=u32),
    expectations(),
    st.builds(EndTransfer, transfer_id=transfers, epoch=u64),
    st.builds(FrameLanded, **frames, target_blocks=st.lists(u32, max_size=4).map(tuple), num_bytes=u64, checksum=u64),
    st.builds(FrameAcked, **frames, checksum=u64),
    st.builds(FrameFailed, transfer_id=transfers, epoch=u64, sequence=st.none() | u64, reason=text),
    st.builds(TransferQuiet, transfer_id=transfers, epoch=u64),
    st.builds(
        aw.Hello, magic=st.binary(max_size=9), version=u32, layout_digest=st.binary(max_size=16), source_agent=u64,
        target_agent=u64, token=st.binary(max_size=16), transport=text, block_bytes=u64, num_blocks=u64,
    ),
    st.builds(aw.Welcome, nonce=st.binary(max_size=32), salt=st.binary(max_size=16), transport=text),
    st.builds(aw.Denied, reason=text),
    st.builds(aw.OpenChannel, pair_epoch=u64),
    st.builds(aw.Meet, pair_epoch=u64, key=text, value=st.binary(max_size=32)),
    st.builds(aw.Announce, header=headers(), checksum=u64, tag=st.binary(max_size=16)),
    st.builds(aw.StrangersRefused, num=u64),
    st.builds(aw.FramesDamaged, num=u64),
    st.builds(aw.Go, **frames),
    st.builds(aw.Ack, **frames, checksum=u64),
    st.builds(aw.Nack, **frames, reason=text),
    st.builds(aw.Ping, number=u64, answer=st.booleans()),
)  # fmt: skip


@given(messages)
def test_every_message_crosses_unchanged(message: aw.Message) -> None:
    assert aw.decode(aw.encode(message)) == message


@given(messages, st.data())
def test_a_message_cut_or_damaged_is_refused_or_decoded_and_never_breaks_the_decoder(
    message: aw.Message, data: st.DataObject
) -> None:
    sent = aw.encode(message)
    with pytest.raises(ValueError, match=":"):
        aw.decode(sent[: data.draw(st.integers(0, len(sent) - 1))])
    with pytest.raises(ValueError, match="more than its fields"):
        aw.decode(sent + b"x")
    damaged = bytearray(sent)
    damaged[data.draw(st.integers(0, len(sent) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(ValueError):
        aw.decode(bytes(damaged))


def _header(**change: object) -> FrameHeader:
    fields: dict[str, object] = {
        "transfer_id": "t", "epoch": 1, "source_incarnation": 1, "target_incarnation": 1, "sequence": 0,
        "source_blocks": (1, 2), "source_generations": (1, 1), "target_blocks": (3, 4), "target_generations": (1, 1),
        "num_bytes": 2,
    }  # fmt: skip
    return FrameHeader(**{**fields, **change})  # type: ignore[arg-type]


def test_lists_that_do_not_go_together_are_refused() -> None:
    for header, field in (
        (_header(target_generations=(1,)), "target_generations"),
        (_header(target_blocks=(3,)), "target_blocks"),
        (_header(target_blocks=(3, 3)), "target_blocks: names a block twice"),
        (
            _header(source_blocks=(), source_generations=(), target_blocks=(), target_generations=()),
            "source_blocks: is empty",
        ),
    ):
        with pytest.raises(ValueError, match=field):
            aw.decode(aw.encode(aw.Announce(header=header, checksum=1, tag=b"")))


def _sockets() -> tuple[FramedSocket, FramedSocket, socket.socket]:
    one, other = socket.socketpair()
    return FramedSocket(one, send_timeout_s=0.05), FramedSocket(other, send_timeout_s=0.05), one


def test_a_socket_carries_messages_and_descriptors() -> None:
    one, other, _ = _sockets()
    fd = os.memfd_create("x")
    os.write(fd, b"shared")
    one.send(aw.Ping(number=1, answer=False), (fd,))
    one.send(aw.Ping(number=2, answer=True))
    assert other.receive(1) == aw.Ping(number=1, answer=False)
    assert os.pread(other.descriptors[0], 6, 0) == b"shared"
    assert other.receive(1) == aw.Ping(number=2, answer=True)
    assert other.receive(0) is None
    one.close()
    with pytest.raises(LinkLost, match="closed"):
        other.receive(1)
    other.close()
    os.close(fd)


def test_a_socket_gives_up_on_one_that_does_not_read_and_on_one_that_babbles() -> None:
    one, other, _ = _sockets()
    with pytest.raises(LinkLost, match="cannot be written"):
        one.send(aw.Denied(reason="x" * 4_000_000))
    one.close()
    other.close()
    for sent, reason in (
        ((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"), "at most"),
        (b"\0\0\0\1\xff", "malformed"),
    ):
        one, other, raw = _sockets()
        raw.send(sent)
        with pytest.raises(LinkLost, match=reason):
            other.receive(1)
        one.close()
        other.close()


def test_a_stranger_cannot_use_up_our_descriptors() -> None:
    before = len(os.listdir("/proc/self/fd"))
    one, other, raw = _sockets()
    for _ in range(4):  # of a message that is never whole
        socket.send_fds(raw, [b"\0"], [raw.fileno()] * 2)
    with pytest.raises(LinkLost, match="more than 2 descriptors"):
        other.receive(1)
    other.close()
    one.close()
    assert len(os.listdir("/proc/self/fd")) == before


ENDPOINT = Endpoint(host="10.0.0.1", port=7, uds="name", incarnation=2**63, token="00ff")


def test_an_endpoint_survives_its_string_and_others_are_refused() -> None:
    assert parse_endpoint(format_endpoint(ENDPOINT)) == ENDPOINT
    good = format_endpoint(ENDPOINT)
    for bad, field in (
        ("", "endpoint"),
        ("[]", "endpoint"),
        ("x" * 2000, "endpoint"),
        ("[" * 1024, "endpoint"),  # nested deeper than the reader goes
        (good.replace('"port":7', '"port":0'), "endpoint.port"),
        (good.replace('"port":7', '"port":true'), "endpoint.port"),
        (good.replace('"host":"10.0.0.1",', ""), "endpoint.host"),
        (good.replace("00ff", "zz"), "endpoint.token"),
        (good.replace(str(2**63), str(2**64)), "endpoint.incarnation"),
    ):
        with pytest.raises(ValueError, match=field):
            parse_endpoint(bad)


def test_a_layout_digest_tells_layouts_apart() -> None:
    layout = {
        "namespace": "n", "fingerprint": "f", "num_layers": 2, "num_kv_heads": 2, "head_dim": 4, "block_size": 4,
        "dtype": "float32",
    }  # fmt: skip
    digest = layout_digest(KVLayout(**layout))  # type: ignore[arg-type]
    assert layout_digest(KVLayout(**{**layout, "fingerprint": "g"})) == digest  # type: ignore[arg-type]
    for change in ({"namespace": "m"}, {"num_layers": 3}, {"dtype": "float16"}, {"tp_size": 2}):
        assert layout_digest(KVLayout(**{**layout, **change})) != digest  # type: ignore[arg-type]
