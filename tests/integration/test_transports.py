"""The contract of a channel, which each keeps: whole frames in order, damage seen, every end bounded, nothing left."""

from __future__ import annotations

import gc
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

import psutil
import pytest
from channel_ends import BLOCK_BYTES, HOST, NUM_BLOCKS, TIMEOUT_S, Ends, Peer, Pool, QueueMeeting, frame, make_ends

from kv_transfer.messages import FrameHeader
from kv_transfer.transports import gloo, inproc, nccl, pair, shm
from kv_transfer.transports.channel import ChannelLost, FrameCorrupt, SourceEnd, TargetEnd
from kv_transfer.transports.meeting import MAX_KEYS, meeting_store
from kv_transfer.transports.memory import MappedPool, load_copy_frame

IN_FLIGHT = pair.STAGING_SLOTS

every_transport = pytest.mark.parametrize("transport", ["inproc", "shm", "gloo", "device-pull", "device-gloo"])
OVER_GLOO = ("gloo", "device-gloo")  # a frame of these lands in staging, and is lost with its pair
between_processes = pytest.mark.parametrize("transport", ["shm", "gloo"])
pytestmark = pytest.mark.usefixtures("no_process_left")


@pytest.fixture
def pools() -> Iterator[tuple[Pool, Pool]]:
    """A source's pool with random content and an empty target's."""
    source, target = Pool(fill=True), Pool()
    yield source, target
    source.close()
    target.close()


@pytest.fixture
def ends(transport: str, pools: tuple[Pool, Pool]) -> Iterator[Ends]:
    """A channel of the kind between the pools."""
    made = make_ends(transport, *pools)
    yield made
    made.close()


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


def _is_there(ends: Ends, header: FrameHeader) -> bool:
    return all(
        ends.target_pool.read(here) == ends.source_pool.read(there)
        for there, here in zip(header.source_blocks, header.target_blocks, strict=True)
    )


# ---- content and order ---------------------------------------------------------------------------------------------


@every_transport
def test_neighbours_and_scattered_blocks_arrive_where_they_should(ends: Ends) -> None:
    checksums = []
    for sequence, (source, target) in enumerate(
        (((2, 3, 4), (9, 1, 5)), ((7, 2, 11, 0), (15, 14, 13, 12)), ((15,), (0,)), ((1, 1), (6, 7)))
    ):
        header = frame(source, target, sequence)
        checksums.append(_move(ends, header))
        assert _is_there(ends, header)
    assert len(set(checksums)) == len(checksums)


@every_transport
def test_frames_in_flight_arrive_in_order_and_go_on_through_every_slot(ends: Ends) -> None:
    headers = [frame((at % 8, 15 - at % 5), (2 * at % 16, (2 * at + 1) % 16), at) for at in range(4 * IN_FLIGHT)]
    under_way: list[tuple[FrameHeader, int]] = []
    for header in headers:
        checksum = ends.source.prepare(header)
        ends.target.post(header)
        ends.source.push(header)
        under_way.append((header, checksum))
        if len(under_way) == IN_FLIGHT:
            first, announced = under_way.pop(0)
            ends.target.take(first, announced)
            ends.source.finish(first)
            assert _is_there(ends, first)
    for header, checksum in under_way:
        ends.target.take(header, checksum)
        ends.source.finish(header)
    assert all(_is_there(ends, header) for header in headers[-IN_FLIGHT:])


@every_transport
@pytest.mark.parametrize(("num_blocks", "block_bytes"), [(1, 8), (1, 16 << 20), (64, 1 << 20)])
def test_the_smallest_and_the_largest_frames_arrive(transport: str, num_blocks: int, block_bytes: int) -> None:
    source, target = (Pool(num_blocks=num_blocks, block_bytes=block_bytes, fill=fill) for fill in (True, False))
    ends = make_ends(transport, source, target)
    try:
        blocks = tuple(range(num_blocks))
        for sequence, there in enumerate((blocks, blocks[::-1])):
            header = frame(there, blocks, sequence, block_bytes)
            _move(ends, header)
            assert _is_there(ends, header)
    finally:
        ends.close()
        source.close()
        target.close()


# ---- damage and refusals -------------------------------------------------------------------------------------------


@every_transport
def test_a_source_that_changes_after_it_was_announced_is_noticed(ends: Ends) -> None:
    header = frame((2, 3), (4, 5))
    checksum = ends.source.prepare(header)
    before = ends.source_pool.read(3)
    ends.source_pool.write(3, bytes([before[100] ^ 1]), at=100)
    with pytest.raises(FrameCorrupt, match="announced"):
        _arrive(ends, header, checksum)
    ends.source_pool.write(3, before)
    _move(ends, replace(header, sequence=1))  # the channel goes on
    assert ends.target_pool.read(5) == before


@every_transport
def test_the_order_of_blocks_is_part_of_what_is_checked(ends: Ends) -> None:
    checksum = ends.source.prepare(frame((2, 3), (4, 5)))
    ends.source.finish(frame((2, 3), (4, 5)))
    swapped = frame((3, 2), (4, 5))
    assert ends.source.prepare(swapped) != checksum
    with pytest.raises(FrameCorrupt):
        _arrive(ends, swapped, checksum)


@every_transport
def test_frames_that_no_pool_has_are_refused_at_both_ends(ends: Ends) -> None:
    with pytest.raises(ValueError, match="block: is 16, must be from 0 to 15"):
        ends.source.prepare(frame((16,), (0,)))
    with pytest.raises(ValueError, match="num_bytes"):
        ends.source.prepare(replace(frame((1,), (0,)), num_bytes=5))
    header = frame((1,), (16,))
    with pytest.raises(ValueError, match="block: is 16, must be from 0 to 15"):
        _arrive(ends, header, ends.source.prepare(header))


# ---- credits -------------------------------------------------------------------------------------------------------


@every_transport
def test_more_frames_than_there_is_staging_for_take_no_more_memory(ends: Ends, transport: str) -> None:
    headers = [frame((at,), (at,), at) for at in range(IN_FLIGHT + 1)]
    checksums = [ends.source.prepare(header) for header in headers]
    for header in headers[:IN_FLIGHT]:
        ends.target.post(header)
    if transport in OVER_GLOO:  # the others land in the target blocks themselves
        with pytest.raises(ChannelLost, match="no staging slot within 2 s"):
            ends.target.post(headers[-1])
    waiting = threading.Timer(0.2, lambda: _push_and_take(ends, headers[0], checksums[0]))
    waiting.start()
    ends.target.post(headers[-1])  # as soon as the first frame is out of its slot
    waiting.join()
    for header, checksum in zip(headers[1:], checksums[1:], strict=True):
        _push_and_take(ends, header, checksum)
    assert all(_is_there(ends, header) for header in headers)


def _push_and_take(ends: Ends, header: FrameHeader, checksum: int) -> None:
    ends.source.push(header)
    ends.target.take(header, checksum)
    ends.source.finish(header)


# ---- a peer that dies, stops, or closes ----------------------------------------------------------------------------

LARGE = 1 << 20  # a frame of NUM_BLOCKS of these takes a while


@pytest.fixture
def large_pools() -> Iterator[tuple[Pool, Pool]]:
    """As `pools`, with blocks of LARGE bytes."""
    source, target = (Pool(block_bytes=LARGE, fill=fill) for fill in (True, False))
    yield source, target
    source.close()
    target.close()


@between_processes
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("delay_s", [None, 0.002])
def test_a_source_that_dies_or_stops_in_the_middle_leaves_a_whole_frame_or_a_lost_channel(
    transport: str, blow: signal.Signals, delay_s: float | None, large_pools: tuple[Pool, Pool]
) -> None:
    source, target = large_pools
    peer = Peer(transport, "source", source, target)
    assert isinstance(peer.end, TargetEnd)
    try:
        blocks = tuple(range(NUM_BLOCKS))
        header = frame(blocks, blocks, block_bytes=LARGE)
        checksum = int(peer.ask("prepare", 0))
        peer.end.post(header)
        if delay_s is not None:
            peer.tell("push", 0)
            time.sleep(delay_s)
        peer.process.send_signal(blow)
        began = time.monotonic()
        try:
            peer.end.take(header, checksum)
            whole = True
        except ChannelLost:
            whole = False
        assert time.monotonic() - began < TIMEOUT_S + 2
        found = [target.read(block) for block in blocks]
        assert found == [source.read(block) if whole else bytes(LARGE) for block in blocks]
        assert whole or transport == "gloo"  # mapped memory outlives its process
        assert not (whole and delay_s is None and transport == "gloo")
    finally:
        peer.close()


@between_processes
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_target_that_dies_or_stops_in_the_middle_lets_go_of_the_source_within_a_bound(
    transport: str, blow: signal.Signals, large_pools: tuple[Pool, Pool]
) -> None:
    source, target = large_pools
    peer = Peer(transport, "target", source, target)
    assert isinstance(peer.end, SourceEnd)
    try:
        blocks = tuple(range(NUM_BLOCKS))
        header = frame(blocks, blocks, block_bytes=LARGE)
        peer.end.prepare(header)
        peer.ask("post", 0)
        peer.process.send_signal(blow)
        began = time.monotonic()
        with_loss = False
        try:
            peer.end.push(header)
            assert time.monotonic() - began < 0.5, "push waits"
            peer.end.finish(header)
        except ChannelLost:
            with_loss = True
        assert with_loss == (transport == "gloo")
        peer.end.close()
        assert time.monotonic() - began < TIMEOUT_S + 2
        source.write(0, b"x" * LARGE)  # nothing reads the pool any more, and nothing keeps the worker from using it
    finally:
        peer.close()


@every_transport
def test_ends_that_close_while_frames_are_in_flight_are_closed_at_once(transport: str) -> None:
    source, target = (Pool(block_bytes=LARGE, fill=fill) for fill in (True, False))
    try:
        for first in ("source", "target"):
            for sent in range(3):
                ends = make_ends(transport, source, target)
                headers = [frame((0, 1, 2), (at, at + 3, at + 6), at, LARGE) for at in range(IN_FLIGHT)]
                for header in headers:
                    ends.source.prepare(header)
                    ends.target.post(header)
                for header in headers[:sent]:
                    ends.source.push(header)
                began = time.monotonic()
                for end in (ends.source, ends.target) if first == "source" else (ends.target, ends.source):
                    end.close()
                    end.close()
                assert time.monotonic() - began < 1
    finally:
        source.close()  # unmapped: whoever still read or wrote here would end this process
        target.close()


@every_transport
def test_a_target_that_waits_while_its_source_closes_is_let_go(ends: Ends, transport: str) -> None:
    header = frame((1,), (1,))
    checksum = ends.source.prepare(header)
    ends.target.post(header)
    closing = threading.Timer(0.2, ends.source.close)
    closing.start()
    if transport in OVER_GLOO:
        began = time.monotonic()
        with pytest.raises(ChannelLost):
            ends.target.take(header, checksum)
        assert time.monotonic() - began < 1
        assert ends.target_pool.read(1) == bytes(BLOCK_BYTES)
    else:
        ends.target.take(header, checksum)
        assert _is_there(ends, header)
    closing.join()


# ---- made anew, many, nothing left ---------------------------------------------------------------------------------


@every_transport
def test_after_a_loss_a_new_channel_between_the_same_pools_works(
    ends: Ends, transport: str, pools: tuple[Pool, Pool]
) -> None:
    header = frame((1,), (1,))
    checksum = ends.source.prepare(header)
    ends.target.post(header)
    if transport in OVER_GLOO:
        with pytest.raises(ChannelLost):
            ends.target.take(header, checksum)  # never pushed: a hung operation ends by its timeout
    ends.close()
    again = make_ends(transport, *pools)
    _move(again, header)
    assert _is_there(again, header)
    again.close()


@every_transport
def test_a_channel_that_hangs_leaves_the_others_of_the_same_pool_alone(
    ends: Ends, transport: str, pools: tuple[Pool, Pool]
) -> None:
    others = [make_ends(transport, *pools) for _ in range(8)]
    header = frame((1,), (1,))
    ends.source.prepare(header)
    ends.target.post(header)  # and never pushed
    for number, other in enumerate(others):
        _move(other, frame((number,), (number + 2,)))
        assert pools[1].read(number + 2) == pools[0].read(number)
        other.close()


@every_transport
def test_channels_that_come_and_go_leave_no_thread_descriptor_or_memory(
    transport: str, large_pools: tuple[Pool, Pool]
) -> None:
    own = psutil.Process()

    def one(number: int) -> None:
        ends = make_ends(transport, *large_pools)
        for sequence in range(2):
            _move(ends, frame((0, 2, 4, 6), (1, 2, 3, 4), sequence, LARGE))  # through staging at both ends
        if number % 2:  # every second one breaks off
            ends.target.post(frame((0,), (1,), 9, LARGE))
        ends.close()

    for number in range(4):
        one(number)
    gc.collect()
    before = (own.num_fds(), own.num_threads())
    grown = []
    for _ in range(3):  # a heap may settle late; what leaks leaks every time
        memory = own.memory_full_info().uss
        for number in range(14):
            one(number)
        gc.collect()
        grown.append(own.memory_full_info().uss - memory)
    deadline = time.monotonic() + 5
    while (own.num_fds(), own.num_threads()) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (own.num_fds(), own.num_threads()) == before
    assert min(grown) < 14 * LARGE // 2, grown  # 14 that kept their staging would hold 12 times as much each


# ---- what only one of them has -------------------------------------------------------------------------------------


def test_a_gloo_frame_over_the_limit_is_refused_before_memory_is_taken(pools: tuple[Pool, Pool]) -> None:
    ends = make_ends("gloo", *pools)
    num = pair.MAX_FRAME_BYTES // BLOCK_BYTES + 1
    with pytest.raises(ValueError, match="num_bytes: is 67117056, at most 67108864 are taken at once"):
        ends.target.post(frame((0,) * num, (0,) * num))
    ends.close()


def test_a_gloo_pair_that_nobody_joins_or_whose_other_end_falls_silent_fails_within_its_time() -> None:
    gloo.load()
    said: queue.Queue[tuple[str, bytes]] = queue.Queue()
    heard: queue.Queue[tuple[str, bytes]] = queue.Queue()
    for rank in (pair.SOURCE_RANK, pair.TARGET_RANK):
        began = time.monotonic()
        with pytest.raises(ChannelLost, match="says nothing"):
            gloo.make_group(QueueMeeting(said, heard), rank, host=HOST, timeout_s=TIMEOUT_S)
        assert time.monotonic() - began < TIMEOUT_S + 1
    for _ in range(4):  # which end connects to the other is drawn by their ports
        heard.put(("0/1", dict(said.queue)["0/1"]))  # it said where it is, and is not there any more
        began = time.monotonic()
        with pytest.raises(ChannelLost):
            gloo.make_group(QueueMeeting(said, heard), pair.SOURCE_RANK, host=HOST, timeout_s=1)
        assert time.monotonic() - began < 3


class Hung:
    """An operation that does not end."""

    def is_completed(self) -> bool:
        return False

    def wait(self, timeout: timedelta) -> bool:
        raise AssertionError("nobody waits for it but by polling")


class Killed(Exception):
    """The agent would have ended itself."""


def _kill(reason: str) -> NoReturn:
    raise Killed(reason)


def test_an_nccl_operation_that_hangs_or_is_dropped_under_way_ends_the_agent() -> None:
    waiter = nccl.PollingWaiter(0.2, _kill)
    began = time.monotonic()
    with pytest.raises(Killed, match=r"has not ended within 0\.2 s"):
        waiter.wait(Hung())
    assert time.monotonic() - began < 1
    with pytest.raises(Killed, match="closed with operations under way"):
        waiter.drop([Hung()])
    waiter.drop([])


def test_a_devices_checksum_sees_every_bit_and_every_place(pools: tuple[Pool, Pool]) -> None:
    memory = pools[0].on_device()
    frame_bytes = memory.in_place(2, 2)
    found = {memory.checksum(frame_bytes)}
    for at in (0, 7, 8, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES - 1):
        for bit in (1, 128):
            frame_bytes[at] ^= bit
            found.add(memory.checksum(frame_bytes))
            frame_bytes[at] ^= bit
    found.add(memory.gather(memory.staging(2 * BLOCK_BYTES), (3, 2)))
    assert len(found) == 14


def test_a_meeting_takes_few_keys() -> None:
    heard: queue.Queue[tuple[str, bytes]] = queue.Queue()
    for number in range(MAX_KEYS + 1):
        heard.put((str(number), b""))
    store = meeting_store(QueueMeeting(queue.Queue(), heard))
    with pytest.raises(ChannelLost, match="not among the 64 keys"):
        store.get("wanted")


def test_inproc_moves_in_one_call(pools: tuple[Pool, Pool]) -> None:
    source, target = pools
    inproc.move(frame((2, 5), (1, 0)), source=source.mapped, target=target.mapped)
    assert target.read(0) == source.read(5)


def test_shared_memory_is_read_only_for_the_peer_and_must_be_as_large_as_it_says(pools: tuple[Pool, Pool]) -> None:
    source, target = pools
    readable = shm.read_only(source.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(readable, b"x", 0)
    with pytest.raises(OSError, match="cannot be mapped"):
        MappedPool(readable, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, writable=True)
    with pytest.raises(ValueError, match="17 blocks of 8192 bytes need"):
        MappedPool(readable, num_blocks=NUM_BLOCKS + 1, block_bytes=BLOCK_BYTES, writable=False)
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC)
    os.ftruncate(unsealed, NUM_BLOCKS * BLOCK_BYTES)
    with pytest.raises(ValueError, match="its size is not sealed"):
        shm.open_target(
            unsealed,
            source_num_blocks=NUM_BLOCKS,
            target=target.mapped,
            copy_frame=load_copy_frame(),
        )
    nonce = os.urandom(shm.NONCE_BYTES)
    nonce_fd = shm.nonce_memory(nonce)
    assert shm.read_nonce(nonce_fd) == nonce
    for each in (readable, unsealed, nonce_fd):
        os.close(each)
