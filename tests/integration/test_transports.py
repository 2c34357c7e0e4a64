"""Every channel moves frames whole, sees damage, and ends what is under way when it is closed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import pytest

from engine.kv_pool import shared_memory
from kv_transfer.messages import FrameHeader
from kv_transfer.transports import gloo, inproc, shm
from kv_transfer.transports.channel import ChannelLost, FrameCorrupt, SourceEnd, TargetEnd
from kv_transfer.transports.memory import MappedPool, load_copy_frame
from kv_transfer.transports.pull import PullSource, PullTarget
from tandem.request import TransferId

NUM_BLOCKS, BLOCK_BYTES = 16, 8192
TIMEOUT_S = 2.0
pair_numbers = count()


@dataclass
class Ends:
    """Both ends of one channel and what lies below them."""

    source: SourceEnd
    target: TargetEnd
    source_fd: int
    target_fd: int


def _pool(fill: bool) -> tuple[int, MappedPool]:
    fd = shared_memory("test", NUM_BLOCKS * BLOCK_BYTES)
    if fill:
        os.pwrite(fd, os.urandom(NUM_BLOCKS * BLOCK_BYTES), 0)
    return fd, MappedPool(fd, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, writable=True)


def _gloo_ends(source: MappedPool, target: MappedPool) -> tuple[SourceEnd, TargetEnd]:
    store, port = gloo.host_store("127.0.0.1", timeout_s=TIMEOUT_S)
    name = gloo.pair_name(1, next(pair_numbers))
    made: list[gloo.GlooTarget] = []

    def join() -> None:
        group = gloo.make_group(store, name, gloo.TARGET_RANK, host="127.0.0.1", timeout_s=TIMEOUT_S)
        made.append(gloo.GlooTarget(group, target, timeout_s=TIMEOUT_S))

    thread = threading.Thread(target=join)
    thread.start()
    joined = gloo.join_store("127.0.0.1", port, timeout_s=TIMEOUT_S)
    group = gloo.make_group(joined, name, gloo.SOURCE_RANK, host="127.0.0.1", timeout_s=TIMEOUT_S)
    thread.join(TIMEOUT_S)
    copy_frame = load_copy_frame()
    return gloo.GlooSource(group, source, copy_frame=copy_frame, timeout_s=TIMEOUT_S), made[0]


@pytest.fixture(params=["inproc", "shm", "gloo"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """A channel of each kind between two fresh pools."""
    (source_fd, source), (target_fd, target) = _pool(fill=True), _pool(fill=False)
    copy_frame = load_copy_frame()
    if request.param == "gloo":
        source_end, target_end = _gloo_ends(source, target)
    elif request.param == "inproc":
        source_end = PullSource(source)
        target_end = PullTarget(source=source, target=target, copy_frame=copy_frame)
    else:
        source_end = PullSource(source)
        readable = shm.read_only(source_fd)
        target_end = shm.open_target(
            readable, source_num_blocks=NUM_BLOCKS, target=target, copy_frame=copy_frame, corrupt_every=0
        )
        os.close(readable)
    yield Ends(source=source_end, target=target_end, source_fd=source_fd, target_fd=target_fd)
    source_end.close()
    target_end.close()
    source.close()
    target.close()
    os.close(source_fd)
    os.close(target_fd)


def _header(source: tuple[int, ...], target: tuple[int, ...], sequence: int = 0) -> FrameHeader:
    zeros = (0,) * len(source)
    return FrameHeader(
        transfer_id=TransferId("t"), epoch=1, source_incarnation=1, target_incarnation=1, sequence=sequence,
        source_blocks=source, source_generations=zeros, target_blocks=target, target_generations=zeros,
        num_bytes=len(source) * BLOCK_BYTES,
    )  # fmt: skip


def _move(ends: Ends, header: FrameHeader) -> int:
    checksum = ends.source.prepare(header)
    _arrive(ends, header, checksum)
    return checksum


def _arrive(ends: Ends, header: FrameHeader, checksum: int) -> None:
    ends.target.post(header)
    ends.source.push(header)
    try:
        ends.target.take(header, checksum)
    finally:
        ends.source.finish(header)


def _block(fd: int, block: int) -> bytes:
    return os.pread(fd, BLOCK_BYTES, block * BLOCK_BYTES)


def test_neighbours_and_scattered_blocks_arrive_where_they_should(ends: Ends) -> None:
    checksums = []
    for sequence, (source, target) in enumerate(
        (((2, 3, 4), (9, 1, 5)), ((7, 2, 11, 0), (15, 14, 13, 12)), ((15,), (0,)), ((1, 1), (6, 7)))
    ):
        checksums.append(_move(ends, _header(source, target, sequence)))
        for there, here in zip(source, target, strict=True):
            assert _block(ends.target_fd, here) == _block(ends.source_fd, there)
    assert len(set(checksums)) == len(checksums)


def test_a_source_that_changes_after_it_was_announced_is_noticed(ends: Ends) -> None:
    header = _header((2, 3), (4, 5))
    checksum = ends.source.prepare(header)
    before = _block(ends.source_fd, 3)
    os.pwrite(ends.source_fd, bytes([before[100] ^ 1]), 3 * BLOCK_BYTES + 100)
    with pytest.raises(FrameCorrupt, match="announced"):
        _arrive(ends, header, checksum)
    os.pwrite(ends.source_fd, before, 3 * BLOCK_BYTES)
    _move(ends, replace(header, sequence=1))  # the channel goes on
    assert _block(ends.target_fd, 5) == before


def test_the_order_of_blocks_is_part_of_what_is_checked(ends: Ends) -> None:
    checksum = ends.source.prepare(_header((2, 3), (4, 5)))
    ends.source.finish(_header((2, 3), (4, 5)))
    swapped = _header((3, 2), (4, 5))
    assert ends.source.prepare(swapped) != checksum
    with pytest.raises(FrameCorrupt):
        _arrive(ends, swapped, checksum)


def test_frames_that_no_pool_has_are_refused_at_both_ends(ends: Ends) -> None:
    with pytest.raises(ValueError, match="block: is 16, must be from 0 to 15"):
        ends.source.prepare(_header((16,), (0,)))
    with pytest.raises(ValueError, match="num_bytes"):
        ends.source.prepare(replace(_header((1,), (0,)), num_bytes=5))
    header = _header((1,), (16,))
    with pytest.raises(ValueError, match="block: is 16, must be from 0 to 15"):
        _arrive(ends, header, ends.source.prepare(header))


def test_inproc_moves_in_one_call() -> None:
    (source_fd, source), (target_fd, target) = _pool(fill=True), _pool(fill=False)
    inproc.move(_header((2, 5), (1, 0)), source=source, target=target)
    assert _block(target_fd, 0) == _block(source_fd, 5)
    for fd in (source_fd, target_fd):
        os.close(fd)
    source.close()
    target.close()


def test_shared_memory_is_read_only_for_the_peer_and_must_be_as_large_as_it_says() -> None:
    fd, pool = _pool(fill=True)
    readable = shm.read_only(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(readable, b"x", 0)
    with pytest.raises(OSError, match="cannot be mapped"):
        MappedPool(readable, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, writable=True)
    with pytest.raises(ValueError, match="17 blocks of 8192 bytes need"):
        MappedPool(readable, num_blocks=NUM_BLOCKS + 1, block_bytes=BLOCK_BYTES, writable=False)
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC)
    os.ftruncate(unsealed, NUM_BLOCKS * BLOCK_BYTES)
    target_fd, target = _pool(fill=False)
    with pytest.raises(ValueError, match="its size is not sealed"):
        shm.open_target(
            unsealed, source_num_blocks=NUM_BLOCKS, target=target, copy_frame=load_copy_frame(), corrupt_every=0
        )
    target.close()
    os.close(target_fd)
    os.close(unsealed)
    nonce = os.urandom(shm.NONCE_BYTES)
    nonce_fd = shm.nonce_memory(nonce)
    assert shm.read_nonce(nonce_fd) == nonce
    for each in (fd, readable, nonce_fd):
        os.close(each)
    pool.close()


@pytest.mark.parametrize("ends", ["gloo"], indirect=True)
def test_a_gloo_receive_fails_when_the_source_closes(ends: Ends) -> None:
    header = _header((1,), (1,))
    checksum = ends.source.prepare(header)
    ends.target.post(header)
    ends.source.close()
    with pytest.raises(ChannelLost):
        ends.target.take(header, checksum)
    assert _block(ends.target_fd, 1) == bytes(BLOCK_BYTES)


@pytest.mark.parametrize("ends", ["gloo"], indirect=True)
def test_a_gloo_receive_that_hangs_ends_by_its_timeout(ends: Ends) -> None:
    header = _header((1,), (1,))
    checksum = ends.source.prepare(header)
    ends.target.post(header)
    began = time.monotonic()
    with pytest.raises(ChannelLost):
        ends.target.take(header, checksum)
    assert time.monotonic() - began < TIMEOUT_S + 2


def test_a_gloo_pair_that_nobody_joins_fails_within_its_timeout() -> None:
    store, _ = gloo.host_store("127.0.0.1", timeout_s=1)
    with pytest.raises(ChannelLost, match="was not joined"):
        gloo.make_group(store, "alone/1", gloo.TARGET_RANK, host="127.0.0.1", timeout_s=1)
    with pytest.raises(ChannelLost, match="does not answer"):
        gloo.join_store("127.0.0.1", 1, timeout_s=0.5)
