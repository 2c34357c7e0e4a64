"""What an agent's links share: urgent frames go first, few links stay open, and a pair is met over its own link."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
from agent_pair import FAST, End, Pair, with_transport

from kv_transfer.agent_settings import AgentSettings
from kv_transfer.frame_queue import AGE_MS
from kv_transfer.messages import FrameAcked, FrameFailed, FrameLanded

pytestmark = pytest.mark.usefixtures("no_process_left")

# A frame's answer: at most two rounds of connecting and waiting for it, and some room for a loaded machine.
BOUND_S = 2 * (FAST.connect_timeout_ms + FAST.operation_timeout_ms) / 1000 + 5


@pytest.fixture(params=["shm", "gloo"])
def settings(request: pytest.FixtureRequest) -> AgentSettings:
    """The settings of all agents."""
    return replace(with_transport(FAST, request.param), operation_timeout_ms=4_000, keepalive_ms=2_000)


@pytest.fixture
def pair(settings: AgentSettings) -> Iterator[Pair]:
    """Two agents between which a first frame has moved."""
    source, target = End(settings=settings, fill=True), End(settings=settings)
    pair = Pair(source, target)
    pair.expect(blocks=tuple(range(8)))
    pair.move(pair.header(sequence=100, source=(1,), target=(1,)))
    yield pair
    source.close()
    target.close()


def test_urgent_frames_overtake_those_of_a_migration(pair: Pair) -> None:
    pair.target.stop()  # so that frames wait
    for sequence in range(8):
        pair.send(pair.header(sequence=sequence, source=(sequence,), target=(sequence,)), priority=1)
    time.sleep(0.2)  # those that may leave have left
    for sequence in range(50, 54):
        pair.send(pair.header(sequence=sequence, source=(2,), target=(2,)))
    time.sleep(0.2)
    pair.target.go_on()
    order = [acked.sequence for acked in pair.source.wait(FrameAcked, 13)][1:]
    assert order == [0, 1, 50, 51, 52, 53, 2, 3, 4, 5, 6, 7]  # half the window was taken when they came


def test_a_frame_that_gives_way_to_those_for_another_peer_leaves_after_its_age(
    pair: Pair, settings: AgentSettings
) -> None:
    other = End(settings=settings)
    beside = Pair(pair.source, other)
    beside.expect("beside", blocks=(1, 2))
    beside.move(beside.header("beside", source=(1,), target=(1,)))
    pair.target.stop()
    try:
        for sequence in range(settings.window_frames + 1):
            pair.send(pair.header(sequence=sequence, source=(2,), target=(2,)))
        time.sleep(0.1)
        began = time.monotonic()
        beside.send(beside.header("beside", sequence=1, source=(2,), target=(2,)), priority=1)
        other.wait(FrameLanded, 2)
        took_s = time.monotonic() - began
        assert AGE_MS / 1000 - 0.1 < took_s < AGE_MS / 1000 + 1
    finally:
        pair.target.go_on()
        other.close()


def test_a_target_stopped_while_a_pair_is_met_costs_a_bounded_time() -> None:
    """Nothing that the source waits for then has a longer bound than the group's."""
    slow = replace(with_transport(FAST, "gloo"), group_timeout_ms=2_000)
    source, target = End(settings=slow, fill=True), End(settings=slow)
    try:
        pair = Pair(source, target)
        pair.expect(blocks=(1, 2))
        time.sleep(3)  # torch is there
        for delay_s in (0.0, 0.002, 0.005, 0.01):  # before the hello, between the two, after it
            failures = len(source.of(FrameFailed))
            acks = len(source.of(FrameAcked))
            began = time.monotonic()
            pair.send(pair.header(source=(1,), target=(1,)))
            time.sleep(delay_s)
            target.stop()
            try:
                source.until(
                    lambda: len(source.of(FrameFailed)) > failures or len(source.of(FrameAcked)) > acks,  # noqa: B023
                    BOUND_S + 2 * slow.group_timeout_ms / 1000,
                )
                assert time.monotonic() - began < BOUND_S + 2 * slow.group_timeout_ms / 1000
            finally:
                target.go_on()
        pair.expect("again", blocks=(1, 2))
        pair.move(pair.header("again", source=(2,), target=(2,)))
        assert target.read(2) == source.read(2)
        assert not source.restarts
        assert not target.restarts
    finally:
        source.close()
        target.close()


def test_links_over_the_cap_close_the_one_idle_for_longest_and_every_frame_arrives(settings: AgentSettings) -> None:
    few = replace(settings, max_links=2)
    source = End(settings=few, fill=True)
    targets = [End(settings=few) for _ in range(4)]
    agent = psutil.Process(source.info.pid)
    try:
        pairs = [Pair(source, target) for target in targets]
        used: list[tuple[int, int]] = []
        for turn in range(3):
            for number, pair in enumerate(pairs):
                pair.expect(f"t{turn}.{number}", blocks=(turn,))
                pair.move(pair.header(f"t{turn}.{number}", source=(number,), target=(turn,)))
                assert pair.target.read(turn) == source.read(number)
            time.sleep(0.3)  # a closed link's threads end
            used.append((agent.num_fds(), agent.num_threads()))
        assert used[2] == used[1]
        assert len(psutil.Process(source.info.pid).net_connections("inet")) <= 1 + 2 * 2 * 2
        assert not source.of(FrameFailed)
    finally:
        for end in (source, *targets):
            end.close()


def test_sources_over_the_cap_close_the_one_idle_for_longest_and_every_frame_arrives(settings: AgentSettings) -> None:
    few = replace(settings, max_links=2)
    target = End(settings=few)
    sources = [End(settings=few, fill=True) for _ in range(4)]
    try:
        for turn in range(2):
            for number, source in enumerate(sources):
                pair = Pair(source, target)
                pair.expect(f"t{turn}.{number}", blocks=(number,))
                pair.move(pair.header(f"t{turn}.{number}", source=(turn,), target=(number,)))
                assert target.read(number) == source.read(turn)
        assert not [source.of(FrameFailed) for source in sources if source.of(FrameFailed)]
    finally:
        for end in (target, *sources):
            end.close()
