"""Seals on a link: what was forged, altered, replayed or reordered does not open; and tags on the bytes of a frame."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kv_pool import shared_memory
from kv_transfer.agent_wire import Ping
from kv_transfer.framed_socket import FramedSocket, LinkForged
from kv_transfer.messages import FrameHeader
from kv_transfer.seal import Forged, LinkKeys, Seal, agents_secret, frame_tag
from kv_transfer.transports.channel import FrameCorrupt, FrameForged
from kv_transfer.transports.gloo import HostMemory, HostWaiter
from kv_transfer.transports.memory import MappedPool, copy_then_hash
from kv_transfer.transports.pair import PairSource, PairTarget
from tandem.request import TransferId

KEY, OTHER = b"k" * 32, b"o" * 32
BLOCK_BYTES, NUM_BLOCKS = 4096, 8


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_what_is_sealed_opens_in_order(messages: list[bytes]) -> None:
    here, there = Seal(KEY), Seal(KEY)
    assert [there.open(here.seal(each)) for each in messages] == messages


@given(st.binary(min_size=1, max_size=60), st.data())
def test_a_flipped_bit_does_not_open(body: bytes, data: st.DataObject) -> None:
    sealed = bytearray(Seal(KEY).seal(body))
    at = data.draw(st.integers(0, len(sealed) - 1))
    sealed[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(Forged):
        Seal(KEY).open(bytes(sealed))


def test_a_message_fits_no_other_place_key_or_link() -> None:
    first, second = (sealing := Seal(KEY)).seal(b"a"), sealing.seal(b"a")
    assert first != second, "the same words are sealed anew"
    for said in ([second], [first, first], [first, b""], [b"short"], [b""]):
        opening = Seal(KEY)
        for each in said[:-1]:
            opening.open(each)
        with pytest.raises(Forged):
            opening.open(said[-1])
    with pytest.raises(Forged):
        Seal(OTHER).open(first)
    secret = agents_secret("token")
    keys = [
        LinkKeys(secret=each, source_salt=source, target_salt=target).key(use)
        for each in (secret, agents_secret("another token"))
        for source, target in ((b"s", b""), (b"s", b"t"), (b"st", b""), (b"", b"st"))
        for use in ("hello", "welcome", "to_target", "to_source", "frames")
    ]
    assert len(set(keys)) == len(keys)


def test_a_socket_that_opens_seals_takes_nothing_else() -> None:
    one, other = socket.socketpair()
    here, there = FramedSocket(one, send_timeout_s=1), FramedSocket(other, send_timeout_s=1)
    here.sealing, there.opening = Seal(KEY), Seal(KEY)
    here.send(Ping(number=1, answer=False))
    assert there.receive(1) == Ping(number=1, answer=False)
    here.sealing = None
    here.send(Ping(number=2, answer=False))
    with pytest.raises(LinkForged, match="its seal does not fit"):
        there.receive(1)
    here.close()
    there.close()


class Wire:
    """One message at a time from the source's rank to the target's; `meddle` sees each on its way."""

    class Done:
        def is_completed(self) -> bool:
            return True

        def wait(self, timeout: timedelta) -> bool:
            return True

    def __init__(self) -> None:
        self.meddle: Callable[[torch.Tensor], None] = lambda frame: None
        self.waiting: list[torch.Tensor] = []

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Wire.Done:
        self.waiting.append(tensors[0])
        return self.Done()

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Wire.Done:
        frame = tensors[0].clone()
        self.meddle(frame)
        self.waiting.pop(0)[:] = frame
        return self.Done()


Ends = tuple[PairSource, PairTarget, Wire, int, int]


@pytest.fixture
def ends() -> Iterator[Ends]:
    fds = [shared_memory("seal-test", NUM_BLOCKS * BLOCK_BYTES) for _ in range(2)]
    os.pwrite(fds[0], os.urandom(NUM_BLOCKS * BLOCK_BYTES), 0)
    pools = [MappedPool(fd, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, writable=True) for fd in fds]
    memories, wire, waiter = [HostMemory(pool, copy_then_hash) for pool in pools], Wire(), HostWaiter(1)
    source = PairSource(wire, memories[0], waiter)
    target = PairTarget(wire, memories[1], waiter, post_timeout_s=1)
    source.tag_key = target.tag_key = KEY
    yield source, target, wire, fds[0], fds[1]
    for pool in pools:
        pool.close()
    for fd in fds:
        os.close(fd)


HEADER = FrameHeader(
    transfer_id=TransferId("t"), epoch=1, source_incarnation=1, target_incarnation=1, sequence=0,
    source_blocks=(5, 1, 2), source_generations=(0,) * 3, target_blocks=(3, 4, 6), target_generations=(0,) * 3,
    num_bytes=3 * BLOCK_BYTES,
)  # fmt: skip


def move(ends: Ends, *, tag: bytes | None = None) -> None:
    source, target, _, _, _ = ends
    checksum = source.prepare(HEADER)
    target.post(HEADER)
    source.push(HEADER)
    target.take(HEADER, checksum, source.tag(HEADER) if tag is None else tag)


def test_a_tagged_frame_arrives(ends: Ends) -> None:
    move(ends)
    _, _, _, sent, landed = ends
    assert os.pread(landed, BLOCK_BYTES, 3 * BLOCK_BYTES) == os.pread(sent, BLOCK_BYTES, 5 * BLOCK_BYTES)


@pytest.mark.parametrize(("tag", "words"), [(b"x" * 16, "forged"), (b"", "the tag of its bytes is missing")])
def test_bytes_whose_checksum_holds_and_whose_tag_does_not_are_forged(ends: Ends, tag: bytes, words: str) -> None:
    """As when somebody on the way has made other bytes of the same xxh3: nothing of them reaches a block."""
    with pytest.raises(FrameForged, match=words):
        move(ends, tag=tag)
    assert os.pread(ends[4], NUM_BLOCKS * BLOCK_BYTES, 0) == bytes(NUM_BLOCKS * BLOCK_BYTES)


def test_damage_on_the_way_is_damage_and_no_forgery(ends: Ends) -> None:
    def flip(frame: torch.Tensor) -> None:
        frame[0] ^= 1

    ends[2].meddle = flip
    with pytest.raises(FrameCorrupt, match="checksum") as caught:
        move(ends)
    assert not isinstance(caught.value, FrameForged)
    assert os.pread(ends[4], NUM_BLOCKS * BLOCK_BYTES, 0) == bytes(NUM_BLOCKS * BLOCK_BYTES)


def test_the_tag_depends_on_key_and_bytes() -> None:
    tags = {frame_tag(key, memoryview(data)) for key in (KEY, OTHER) for data in (b"", b"a", b"b")}
    assert len(tags) == 6
    assert {len(each) for each in tags} == {16}
