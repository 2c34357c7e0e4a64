"""Real agents killed, stopped and orphaned: everything that was under way ends within a bound, and nothing leaks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from agent_pair import FAST, End, Pair, with_transport

from kv_transfer.agent_settings import AgentSettings
from kv_transfer.agent_wire import Disturb
from kv_transfer.messages import EndTransfer, FrameAcked, FrameFailed, FrameLanded, TransferQuiet
from tandem.errors import Unavailable
from tandem.request import TransferId

pytestmark = pytest.mark.usefixtures("no_process_left")

# A frame's answer: at most two rounds of connecting and waiting for it, and some room for a loaded machine.
BOUND_S = 2 * (FAST.connect_timeout_ms + FAST.operation_timeout_ms) / 1000 + 5


@pytest.fixture(params=["shm", "gloo"])
def settings(request: pytest.FixtureRequest) -> AgentSettings:
    """The settings of both agents."""
    return with_transport(FAST, request.param)


@pytest.fixture
def pair(settings: AgentSettings) -> Iterator[Pair]:
    """Two agents between which a first frame has moved."""
    source, target = End(settings=settings, fill=True), End(settings=settings)
    pair = Pair(source, target)
    pair.expect(blocks=tuple(range(8)))
    pair.move(pair.header(source=(1,), target=(1,)))
    yield pair
    source.close()
    target.close()


def _until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.01)


def test_when_the_targets_agent_is_killed_both_sides_hear_of_it(pair: Pair) -> None:
    os.kill(pair.target.info.pid, signal.SIGKILL)
    began = time.monotonic()
    failed = pair.refusal(pair.header(sequence=1, source=(2,), target=(2,)), timeout_s=BOUND_S)
    assert time.monotonic() - began < BOUND_S
    assert failed.sequence is None
    pair.end(pair.source)
    # The target's worker: its transfer failed as a whole, is quiet, and another agent is there.
    pair.target.until(lambda: len(pair.target.restarts) == 1)
    assert [type(event) for event in pair.target.events[-2:]] == [FrameFailed, TransferQuiet]
    assert not psutil.pid_exists(pair.target.info.pid)
    restarted = pair.target.restarts[0]
    assert restarted is not None
    assert restarted.endpoint != pair.target.info.endpoint
    pair.target.info = restarted
    pair.expect("again", blocks=(4,))
    pair.move(pair.header("again", source=(3,), target=(4,)))
    assert pair.target.read(4) == pair.source.read(3)


def test_frames_under_way_when_the_target_dies_all_end(pair: Pair) -> None:
    pair.target.stop()  # frames are announced and wait
    for sequence in range(1, 7):
        pair.send(pair.header(sequence=sequence, source=(2,), target=(2,)))
    os.kill(pair.target.info.pid, signal.SIGKILL)
    pair.source.wait(FrameFailed, timeout_s=BOUND_S)
    pair.end(pair.source, timeout_s=BOUND_S)
    assert len(pair.source.of(FrameAcked)) == 1


def test_when_the_sources_agent_is_killed_its_frames_fail_and_the_target_gets_quiet(pair: Pair) -> None:
    os.kill(pair.source.info.pid, signal.SIGKILL)
    failed = pair.source.wait(FrameFailed, timeout_s=BOUND_S)[-1]
    assert (failed.sequence, failed.reason) == (None, "the transfer agent died")
    pair.source.wait(TransferQuiet)
    pair.end(pair.target, timeout_s=BOUND_S)


def test_a_stopped_target_fails_its_frames_within_the_bound_and_others_go_on(
    pair: Pair, settings: AgentSettings
) -> None:
    bystander = End(settings=settings)
    beside = Pair(pair.source, bystander)
    beside.expect("beside", blocks=tuple(range(8)))
    pair.target.stop()
    try:
        began = time.monotonic()
        pair.send(pair.header(sequence=1, source=(2,), target=(2,)))
        beside.move(beside.header("beside", source=(5,), target=(5,)))
        assert bystander.read(5) == pair.source.read(5)
        pair.source.wait(FrameFailed, timeout_s=BOUND_S)
        pair.end(pair.source, timeout_s=BOUND_S)
        assert time.monotonic() - began < BOUND_S
    finally:
        pair.target.go_on()
        bystander.close()
    # What it had been told before it was stopped comes late, and does no harm: the attempt can still end.
    pair.end(pair.target, timeout_s=BOUND_S)


def test_a_stopped_source_keeps_no_block_of_the_target_from_becoming_quiet(pair: Pair) -> None:
    for sequence in range(1, 4):
        pair.send(pair.header(sequence=sequence, source=(2,), target=(2,)))
    pair.source.stop()
    try:
        pair.end(pair.target, timeout_s=BOUND_S)
    finally:
        pair.source.go_on()


def test_an_end_while_frames_are_under_way_waits_for_them_and_says_quiet_last(pair: Pair) -> None:
    pair.target.stop()
    try:
        pair.send(pair.header(sequence=1, source=(2,), target=(2,)))
        pair.source.tell(EndTransfer(transfer_id=TransferId("t"), epoch=1))
        pair.source.wait(TransferQuiet, timeout_s=BOUND_S)
    finally:
        pair.target.go_on()
    assert isinstance(pair.source.events[-1], TransferQuiet)
    assert len(pair.source.of(FrameAcked)) == 1


def test_a_link_that_is_lost_while_idle_is_made_anew(pair: Pair) -> None:
    """A stopped target answers no keep-alive, so the source hangs up; the next frame arrives all the same."""
    linked = psutil.Process(pair.source.info.pid).num_fds()
    pair.target.stop()
    try:
        _until(lambda: psutil.Process(pair.source.info.pid).num_fds() < linked, BOUND_S)
    finally:
        pair.target.go_on()
    pair.move(pair.header(sequence=1, source=(2,), target=(2,)))
    assert pair.target.read(2) == pair.source.read(2)
    assert not pair.source.of(FrameFailed)


def test_a_restarted_agent_refuses_frames_for_its_predecessor(pair: Pair) -> None:
    old = pair.target.info.endpoint
    os.kill(pair.target.info.pid, signal.SIGKILL)
    pair.target.until(lambda: len(pair.target.restarts) == 1)
    restarted = pair.target.restarts[0]
    assert restarted is not None
    pair.target.info = restarted
    pair.expect(epoch=2, blocks=(1, 2))
    # As though the new agent had got the old one's addresses: only incarnation and token are the old ones.
    mixed = _with_addresses(old, restarted.endpoint)
    failed = pair.refusal(pair.header(epoch=2, source=(2,), target=(2,)), endpoint=mixed)
    assert "target_agent" in failed.reason


def _with_addresses(identity: str, addresses: str) -> str:
    from kv_transfer.endpoint import format_endpoint, parse_endpoint

    other = parse_endpoint(addresses)
    return format_endpoint(replace(parse_endpoint(identity), host=other.host, port=other.port, uds=other.uds))


def test_an_agent_dies_with_its_worker() -> None:
    """Also when the worker is killed, and when its agent is stopped at the time."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from agent_pair import End\n"
        "end = End(); print(end.info.pid, flush=True); sys.stdin.read()\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    agent = psutil.Process(int(worker.stdout.readline()))
    assert os.getpgid(agent.pid) == os.getpgid(worker.pid)
    os.kill(agent.pid, signal.SIGSTOP)
    worker.kill()
    worker.communicate()
    _until(lambda: not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE)


def test_a_stuck_agent_is_killed_so_that_its_blocks_leave_quarantine(settings: AgentSettings) -> None:
    watched = replace(settings, stuck_timeout_ms=3_000)  # importing torch takes a loaded machine a second or two
    source, target = End(settings=watched, fill=True), End(settings=watched)
    try:
        pair = Pair(source, target)
        pair.expect(blocks=(1, 2))
        target.stop()
        pair.end(target, timeout_s=10)
        target.until(lambda: len(target.restarts) == 1)
        assert not psutil.pid_exists(target.info.pid)
        assert target.restarts[0] is not None
        target.info = target.restarts[0]
        pair.expect("again", blocks=(4,))
        pair.move(pair.header("again", source=(3,), target=(4,)))
        assert source.restarts == []  # it had nothing to do for longer than that, and answered
    finally:
        source.close()
        target.close()


def test_a_command_for_a_dead_agent_never_reaches_the_next(pair: Pair) -> None:
    """The worker decides on without knowing that its agent is new: what it says is answered, and has no effect."""
    os.kill(pair.target.info.pid, signal.SIGKILL)
    pair.target.until(lambda: len(pair.target.restarts) == 1)
    failures = len(pair.target.of(FrameFailed))
    pair.expect(epoch=2, blocks=(1, 2))
    failed = pair.target.wait(FrameFailed, failures + 1)[-1]
    assert (failed.epoch, failed.reason) == (2, "the transfer agent that it was meant for has died")
    restarted = pair.target.restarts[0]
    assert restarted is not None
    refused = pair.refusal(pair.header(epoch=2, source=(2,), target=(2,)), endpoint=restarted.endpoint)
    assert refused.reason == "not granted: the attempt is not expected"
    pair.end(pair.target, epoch=2)


def test_quiet_is_said_only_when_no_process_can_touch_a_block_any_more() -> None:
    """Also to a worker that keeps ending transfers while its stopped agent is being killed."""
    end = End(settings=replace(FAST, stuck_timeout_ms=200))
    pid, early = end.info.pid, []
    try:
        os.kill(pid, signal.SIGSTOP)
        numbers = iter(range(100_000))
        deadline = time.monotonic() + 20
        while not end.of(TransferQuiet):
            assert time.monotonic() < deadline
            end.tell(EndTransfer(transfer_id=TransferId(f"t{next(numbers)}"), epoch=1))
            early.append(bool(end.of(TransferQuiet)) and psutil.pid_exists(pid))
        assert not any(early)
        end.wait(TransferQuiet, next(numbers))
    finally:
        end.close()


def test_an_agent_prints_to_the_log_file_that_it_is_given(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="did not start"):
        End(settings=AgentSettings(bind_host="192.0.2.1"), log_file=tmp_path / "w.log")
    assert "Cannot assign requested address" in (tmp_path / "w.log").read_text()


def test_an_agent_that_cannot_start_says_why() -> None:
    with pytest.raises(Unavailable, match="did not start"):
        End(settings=AgentSettings(bind_host="192.0.2.1"))


def test_an_agent_that_dies_again_and_again_is_given_up() -> None:
    end = End()
    pid = end.info.pid
    try:
        for deaths in range(1, 7):
            os.kill(pid, signal.SIGKILL)
            end.until(lambda: len(end.restarts) == deaths)  # noqa: B023 - it is called before the next round
            restarted = end.restarts[-1]
            if restarted is None:
                break
            pid = restarted.pid
        assert end.restarts[-1] is None
        end.tell(EndTransfer(transfer_id=TransferId("t"), epoch=1))
        end.wait(TransferQuiet)  # no process is left that could touch a block
    finally:
        end.close()


def test_nothing_leaks_over_many_links() -> None:
    source = End(fill=True)
    own = psutil.Process()
    agent = psutil.Process(source.info.pid)

    def one_round(number: int) -> None:
        target = End()
        pair = Pair(source, target)
        pair.expect(f"t{number}", blocks=(1,))
        pair.move(pair.header(f"t{number}", source=(1,), target=(1,)))
        for end in (source, target):
            pair.end(end, f"t{number}")
        target.close()

    one_round(0)
    shared_memory = set(os.listdir("/dev/shm"))
    num_fds, agent_fds, threads = own.num_fds(), agent.num_fds(), agent.num_threads()
    for number in range(1, 5):
        one_round(number)
    assert own.num_fds() == num_fds
    # A link to a peer that is gone keeps its thread and its eventfd until it is the oldest of many.
    assert agent.num_fds() <= agent_fds + 4
    assert agent.num_threads() <= threads + 4
    assert set(os.listdir("/dev/shm")) == shared_memory
    assert len(source.of(FrameLanded)) == 0
    source.close()


def _armed(end: End, fault: Disturb) -> None:
    """Has the agent suffer the fault, and returns when it does: it takes commands in order."""
    name = TransferId(f"after {fault}")
    end.client.disturb(fault)
    end.tell(EndTransfer(transfer_id=name, epoch=1))
    end.until(lambda: any(each.transfer_id == name for each in end.of(TransferQuiet)))


def test_a_partition_fails_what_is_under_way_as_a_whole_and_frames_pass_after_it(pair: Pair) -> None:
    for_s = 2 * BOUND_S
    _armed(pair.target, Disturb(for_ms=round(for_s * 1000), period_ms=0, corrupt_every=0))
    began = time.monotonic()
    pair.send(pair.header(sequence=1, source=(2,), target=(2,)))
    failed = pair.source.wait(FrameFailed, timeout_s=BOUND_S)[-1]
    assert failed.sequence is None, "the whole attempt: no frame gets through"
    pair.end(pair.source, timeout_s=BOUND_S)
    assert time.monotonic() - began < for_s, "it was not the end of the partition that ended it"
    assert pair.target.restarts == pair.source.restarts == [], "who is cut off is not stuck"
    _until(lambda: time.monotonic() > began + for_s, for_s + 5)
    pair.expect("after", blocks=(3,))
    pair.move(pair.header("after", source=(4,), target=(3,)))
    assert pair.target.read(3) == pair.source.read(4)


def test_a_slow_link_delays_frames_and_loses_none(pair: Pair) -> None:
    _armed(pair.target, Disturb(for_ms=5_000, period_ms=200, corrupt_every=0))
    for sequence in range(1, 6):
        pair.move(pair.header(sequence=sequence, source=(sequence,), target=(sequence,)))
        assert pair.target.read(sequence) == pair.source.read(sequence)
    assert not pair.source.of(FrameFailed)


def test_damage_that_is_armed_at_run_time_is_found_and_ends(pair: Pair) -> None:
    _armed(pair.target, Disturb(for_ms=60_000, period_ms=0, corrupt_every=1))
    assert "checksum" in pair.refusal(pair.header(sequence=1, source=(2,), target=(2,))).reason
    _armed(pair.target, Disturb(for_ms=1, period_ms=0, corrupt_every=1_000_000))
    pair.move(pair.header(sequence=1, source=(2,), target=(2,)))
    assert pair.target.read(2) == pair.source.read(2)
