"""Two real agent processes move blocks: content, refusals, corruption, and quiet."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
from agent_pair import FAST, End, Pair, with_transport

from kv_transfer.messages import FrameAcked, FrameFailed, FrameLanded
from tandem.request import TransferId

pytestmark = pytest.mark.usefixtures("no_process_left")


@pytest.fixture(params=["shm", "gloo"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two agents over the transport of the parameter."""
    settings = with_transport(FAST, request.param)
    source, target = End(settings=settings, fill=True), End(settings=settings)
    yield Pair(source, target)
    source.close()
    target.close()


def test_a_hundred_frames_of_random_blocks_arrive_whole(pair: Pair) -> None:
    draw = random.Random(7)
    granted = tuple(range(pair.target.num_blocks))
    pair.expect(blocks=granted)
    wanted: dict[int, bytes] = {}
    for sequence in range(100):
        num_blocks = draw.randint(1, 6)
        start = draw.randint(0, 20)
        source = tuple(range(start, start + num_blocks)) if sequence % 2 else tuple(draw.sample(granted, num_blocks))
        target = tuple(draw.sample(granted, num_blocks))
        pair.send(pair.header(sequence=sequence, source=source, target=target))
        wanted.update(zip(target, (pair.source.read(block) for block in source), strict=True))
    acks = pair.source.wait(FrameAcked, 100, timeout_s=60)
    landed = pair.target.wait(FrameLanded, 100)
    assert [ack.sequence for ack in acks] == list(range(100))
    assert {(a.sequence, a.checksum) for a in acks} == {(e.sequence, e.checksum) for e in landed}
    assert all(pair.target.read(block) == data for block, data in wanted.items())
    assert not pair.source.of(FrameFailed)


def test_a_frame_sent_twice_is_acknowledged_twice_and_lands_once(pair: Pair) -> None:
    pair.expect(blocks=(3, 4))
    header = pair.header(source=(1, 2), target=(3, 4))
    first = pair.move(header)
    pair.target.write(3, b"\0" * pair.target.block_bytes)  # the worker goes on with it: a double must not touch it
    pair.send(header)
    second = pair.source.wait(FrameAcked, 2)[1]
    assert second == first
    assert pair.target.read(3) == b"\0" * pair.target.block_bytes
    assert len(pair.target.of(FrameLanded)) == 1


def test_what_was_not_granted_is_refused_and_touches_nothing(pair: Pair) -> None:
    pair.expect(blocks=(3, 4))
    good = pair.header(source=(1, 2), target=(3, 4))
    for header, reason in (
        (replace(good, transfer_id=TransferId("other")), "the attempt is not expected"),
        (replace(good, epoch=2), "the attempt is not expected"),
        (replace(good, target_generations=(5, 6)), "block 4 has generation 5, the frame names 6"),
        (replace(good, target_blocks=(3, 5)), "block 5 is not among the granted"),
        (replace(good, source_incarnation=12), "source incarnation 12, expected 11"),
        (replace(good, target_incarnation=23), "target incarnation 23, expected 22"),
        (replace(good, num_bytes=1), "num_bytes: is 1"),
        (replace(good, source_blocks=(1, 32)), "block: is 32, must be from 0 to 31"),
    ):
        failed = pair.refusal(header)
        assert reason in failed.reason
        assert failed.sequence == 0
    assert not pair.target.of(FrameLanded)
    assert all(pair.target.read(block) == b"\0" * pair.target.block_bytes for block in range(pair.target.num_blocks))
    pair.move(good)  # and the link still works


def test_after_the_end_an_attempt_is_quiet_and_takes_no_frame(pair: Pair) -> None:
    pair.expect(blocks=(3,))
    pair.move(pair.header(source=(1,), target=(3,)))
    pair.end(pair.target)
    late = pair.refusal(pair.header(sequence=1, source=(2,), target=(3,)))
    assert "the attempt has ended" in late.reason
    assert pair.target.read(3) == pair.source.read(1)
    pair.end(pair.source)
    pair.end(pair.source, "never heard of")
    before = len(pair.source.events)
    pair.send(pair.header(sequence=2, source=(2,), target=(3,)))  # ended here too: nothing is said of it any more
    pair.expect("u", blocks=(6,))
    pair.move(pair.header("u", source=(2,), target=(6,)))
    assert [type(event) for event in pair.source.events[before:]] == [FrameAcked]


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_damaged_frame_is_refused_and_can_be_sent_again(transport: str) -> None:
    settings = with_transport(FAST, transport)
    source = End(settings=settings, fill=True)
    target = End(settings=replace(settings, corrupt_every=2))
    pair = Pair(source, target)
    try:
        pair.expect(blocks=tuple(range(8)))
        pair.move(pair.header(sequence=0, source=(1, 2), target=(3, 4)))
        damaged = pair.header(sequence=1, source=(5, 6), target=(1, 2))
        failed = pair.refusal(damaged)
        assert failed.sequence == 1
        assert "checksum" in failed.reason
        assert [event.sequence for event in target.of(FrameLanded)] == [0]
        pair.move(damaged)
        assert (target.read(1), target.read(2)) == (source.read(5), source.read(6))
        assert (source.client.num_damaged, target.client.num_damaged) == (0, 1)
    finally:
        source.close()
        target.close()


def test_agents_prefer_shared_memory_and_fall_back_to_gloo() -> None:
    source, target = End(settings=FAST, fill=True), End(settings=FAST)
    only_gloo = End(settings=with_transport(FAST, "gloo"))
    try:
        for end, maps_source in ((target, True), (only_gloo, False)):
            pair = Pair(source, end)
            pair.expect(blocks=(1,))
            pair.move(pair.header(source=(1,), target=(1,)))
            assert end.read(1) == source.read(1)
            assert (_num_pools_mapped(end.info.pid) == 2) is maps_source
    finally:
        for end in (source, target, only_gloo):
            end.close()


def _num_pools_mapped(pid: int) -> int:
    with open(f"/proc/{pid}/maps") as maps:
        return sum("memfd:test-pool" in line for line in maps)


def test_agents_that_do_not_fit_refuse_each_other_in_words() -> None:
    source = End(fill=True)
    other_layout = End(layout=b"another-layout-1")
    target = End()
    try:
        pair = Pair(source, other_layout)
        pair.expect(blocks=(1,))
        failed = pair.refusal(pair.header(source=(1,), target=(1,)))
        assert failed.sequence is None
        assert "layout_digest" in failed.reason
        pair = Pair(source, target)
        pair.expect(blocks=(1,))
        header = pair.header(source=(1,), target=(1,))
        token = target.info.endpoint.split('"token":"')[1][:32]
        endpoint = target.info.endpoint.replace(token, "0" * 32)
        assert "token" in pair.refusal(header, endpoint=endpoint).reason
        assert "endpoint" in pair.refusal(header, endpoint="nowhere").reason
    finally:
        for end in (source, other_layout, target):
            end.close()


def test_a_malformed_command_fails_its_frame_and_leaves_the_agent_alone() -> None:
    source, target = End(fill=True), End()
    try:
        pair = Pair(source, target)
        pair.expect(blocks=(1,))
        good = pair.header(source=(1,), target=(1,))
        for header, reason in (
            (pair.header(source=(), target=()), "source_blocks: is empty"),
            (replace(good, target_generations=()), "target_generations"),
            (replace(good, source_blocks=(-1,)), "SendFrame"),
        ):
            assert reason in pair.refusal(header).reason
        pair.move(good)
        assert not source.restarts
    finally:
        source.close()
        target.close()


def test_an_agent_without_gloo_is_small_and_loads_no_torch() -> None:
    end = End()
    try:
        assert psutil.Process(end.info.pid).memory_full_info().uss < 64 << 20
        with open(f"/proc/{end.info.pid}/maps") as maps:
            assert not any("libtorch" in line for line in maps)
    finally:
        end.close()


def test_frames_cross_in_both_directions_at_once(pair: Pair) -> None:
    back = Pair(pair.target, pair.source)
    granted = tuple(range(16, 24))
    pair.expect("there", blocks=granted)
    back.expect("back", blocks=granted)
    for block in range(8):
        pair.target.write(block, bytes([block]) * pair.target.block_bytes)
    for sequence in range(8):
        pair.send(pair.header("there", sequence=sequence, source=(sequence,), target=(16 + sequence,)))
        back.send(back.header("back", sequence=sequence, source=(sequence,), target=(16 + sequence,)))
    for end in (pair.source, pair.target):
        end.wait(FrameAcked, 8)
        end.wait(FrameLanded, 8)
    for block in range(8):
        assert pair.target.read(16 + block) == pair.source.read(block)
        assert pair.source.read(16 + block) == pair.target.read(block)
