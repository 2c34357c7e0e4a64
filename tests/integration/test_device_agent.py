"""Agents of pools on a device move blocks over what stands for CUDA IPC and NCCL; what hangs ends the agent alone."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from agent_pair import FAST, DeviceEnd, End, Pair, with_transport
from device_agent import HANGS, export

from kv_transfer.agent_client import AgentClient
from kv_transfer.agent_settings import AgentSettings, TransportChoice
from kv_transfer.messages import FrameAcked, FrameFailed, FrameLanded, TransferQuiet

pytestmark = pytest.mark.usefixtures("no_process_left")
BOUND_S = 2 * (FAST.connect_timeout_ms + FAST.operation_timeout_ms) / 1000 + 10


@pytest.fixture(params=["cuda_ipc", "nccl"])
def settings(request: pytest.FixtureRequest) -> AgentSettings:
    """Of both agents."""
    return with_transport(FAST, request.param)


@pytest.fixture
def pair(settings: AgentSettings) -> Iterator[Pair]:
    """Two agents; the target damages each sixth frame."""
    source = DeviceEnd(settings=settings, fill=True)
    target = DeviceEnd(settings=replace(settings, corrupt_every=6))
    yield Pair(source, target)
    source.close()
    target.close()


def _maps_the_pool_of(source: End, target: End) -> bool:
    inode = os.fstat(source.pool_fd).st_ino
    return any(f" {inode} " in line for line in Path(f"/proc/{target.info.pid}/maps").read_text().splitlines())


def test_frames_arrive_whole_and_damaged_ones_go_again(pair: Pair, settings: AgentSettings) -> None:
    draw = random.Random(7)
    granted = tuple(range(pair.target.num_blocks))
    pair.expect(blocks=granted)
    num_damaged = 0
    for sequence in range(20):
        num_blocks = draw.randint(1, 6)
        there, here = (tuple(draw.sample(granted, num_blocks)) for _ in range(2))
        header = pair.header(sequence=sequence, source=there, target=here)
        pair.send(header)
        pair.source.until(lambda sequence=sequence: _answers(pair, sequence) > 0)  # type: ignore[misc]
        while pair.source.of(FrameFailed)[num_damaged:]:
            num_damaged += 1
            assert "checksum" in pair.source.of(FrameFailed)[-1].reason
            pair.send(header)
            pair.source.until(lambda sequence=sequence: _answers(pair, sequence) > 1)  # type: ignore[misc]
        pair.target.until(lambda sequence=sequence: sequence in [each.sequence for each in pair.target.of(FrameLanded)])  # type: ignore[misc]
        assert all(pair.target.read(b) == pair.source.read(a) for a, b in zip(there, here, strict=True))
    assert num_damaged == 3
    assert _maps_the_pool_of(pair.source, pair.target) is (settings.transport is TransportChoice.CUDA_IPC)
    pair.end(pair.source)
    pair.end(pair.target)
    assert not pair.source.restarts + pair.target.restarts


def _answers(pair: Pair, sequence: int) -> int:
    acked, failed = pair.source.of(FrameAcked), pair.source.of(FrameFailed)
    return sum(each.sequence == sequence for each in acked) + sum(each.sequence == sequence for each in failed)


def test_a_hung_operation_ends_both_agents_and_the_next_ones_move_the_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "hangs"
    monkeypatch.setenv(HANGS, str(hangs))
    settings = with_transport(FAST, "nccl")
    source, target = DeviceEnd(settings=settings, fill=True), DeviceEnd(settings=settings)
    pair = Pair(source, target)
    try:
        pair.expect(blocks=(1, 2))
        pair.move(pair.header(source=(1,), target=(1,)))
        hangs.touch()
        pair.send(pair.header(sequence=1, source=(2,), target=(2,)))
        for end in (source, target):
            end.until(lambda end=end: bool(end.restarts), timeout_s=BOUND_S)  # type: ignore[misc]
            assert [type(event) for event in end.events[-2:]] == [FrameFailed, TransferQuiet]
            info = end.restarts[0]
            assert info is not None
            end.info = info
        hangs.unlink()
        pair.expect("again", blocks=(9,))
        pair.move(pair.header("again", source=(5,), target=(9,)))
        assert target.read(9) == source.read(5)
        assert len(source.restarts) == len(target.restarts) == 1
    finally:
        source.close()
        target.close()


def test_a_pool_that_the_peer_cannot_open_goes_over_the_network() -> None:
    with tempfile.TemporaryDirectory(prefix="t") as folder:  # a handle has 64 bytes
        source = DeviceEnd(settings=FAST, fill=True, link=Path(folder) / "pool")
    # The source's agent has it open; nobody else can open it any more.
    target = DeviceEnd(settings=FAST)
    only_near = DeviceEnd(settings=with_transport(FAST, "cuda_ipc"))
    try:
        pair = Pair(source, target)
        pair.expect(blocks=(1,))
        pair.move(pair.header(source=(1,), target=(1,)))
        assert target.read(1) == source.read(1)
        assert not _maps_the_pool_of(source, target)
        pair = Pair(source, only_near)
        pair.expect("near", blocks=(1,))
        assert "transport: is cuda_ipc" in pair.refusal(pair.header("near", source=(1,), target=(1,))).reason
    finally:
        for end in (source, target, only_near):
            end.close()


def test_memory_of_the_host_and_of_a_device_are_not_mixed() -> None:
    source, target = DeviceEnd(settings=FAST, fill=True), End(settings=FAST)
    try:
        for pair in (Pair(source, target), Pair(target, source)):
            pair.expect(blocks=(1,))
            failed = pair.refusal(pair.header(source=(1,), target=(1,)))
            assert failed.reason.split(": ", 1)[1].startswith("refused by the peer's agent: memory: is ")
    finally:
        source.close()
        target.close()


@pytest.mark.parametrize(
    ("pool", "transport", "others"),
    [(3, "nccl", "auto, shm, gloo"), (3, "cuda_ipc", "auto, shm, gloo"), (export(3), "shm", "auto, cuda_ipc, nccl")],
)
def test_a_transport_that_does_not_reach_the_pool_is_refused(pool: int, transport: str, others: str) -> None:
    with pytest.raises(ValueError, match=rf"transport: is {transport}, .* over one of: {others}"):
        AgentClient(
            pool=pool,
            num_blocks=1,
            block_bytes=4096,
            layout_digest=b"",
            settings=with_transport(FAST, transport),
            on_event=lambda event: None,
            on_restart=lambda info: None,
        )
