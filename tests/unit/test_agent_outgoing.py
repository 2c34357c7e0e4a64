"""Frames that an agent cannot even prepare: they fail by name, and nothing of them stays under way."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from engine.kv_pool import shared_memory
from kv_transfer import agent_outgoing
from kv_transfer.agent import LINGER_S, Agent
from kv_transfer.agent_connect import Connection
from kv_transfer.agent_context import AgentContext
from kv_transfer.agent_outgoing import OutgoingLink
from kv_transfer.agent_settings import AgentSettings, AgentStart
from kv_transfer.endpoint import Endpoint, format_endpoint
from kv_transfer.framed_socket import FramedSocket
from kv_transfer.messages import EndTransfer, FrameFailed, FrameHeader, SendFrame, TransferQuiet
from kv_transfer.transports.channel import SourceEnd
from tandem.request import TransferId

PEER = Endpoint(host="127.0.0.1", port=1, uds="", incarnation=7, token="00")
WAIT_S = 10.0


def frame(name: str, sequence: int = 0) -> FrameHeader:
    return FrameHeader(
        transfer_id=TransferId(name), epoch=1, source_incarnation=1, target_incarnation=2, sequence=sequence,
        source_blocks=(1,), source_generations=(1,), target_blocks=(1,), target_generations=(1,), num_bytes=64,
    )  # fmt: skip


class NoRoom(SourceEnd):
    """A channel whose device has no memory left for a frame."""

    needs_go = False

    def prepare(self, header: FrameHeader) -> int:
        raise MemoryError("no room for a frame")

    def push(self, header: FrameHeader) -> None:
        raise AssertionError("nothing was announced")

    def finish(self, header: FrameHeader) -> None:
        raise AssertionError("nothing was announced")

    def close(self) -> None:
        pass


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[AgentContext, OutgoingLink]]:
    near, far = socket.socketpair()
    sock = FramedSocket(near, send_timeout_s=WAIT_S)
    monkeypatch.setattr(agent_outgoing, "connect", lambda *_, **__: Connection(sock=sock, channel=NoRoom()))
    fd = shared_memory("pool", 4 * 64)
    start = AgentStart(
        pool=fd, control_fd=-1, parent_pid=os.getpid(), num_blocks=4, block_bytes=64, layout_digest=b"l",
        settings=AgentSettings(),
    )  # fmt: skip
    context = AgentContext(start)
    link = OutgoingLink(context, PEER)
    link.start()
    yield context, link
    link.close()
    link.join(WAIT_S)
    far.close()
    os.close(fd)


def test_a_frame_that_cannot_be_prepared_fails_and_its_attempt_gets_quiet(
    link: tuple[AgentContext, OutgoingLink],
) -> None:
    context, outgoing = link
    for sequence in range(2):
        assert outgoing.submit(frame("t", sequence), 0)
    failed = [context.events.get(timeout=WAIT_S) for _ in range(2)]
    assert [(each.transfer_id, each.sequence) for each in failed if isinstance(each, FrameFailed)] == [
        ("t", 0),
        ("t", 1),
    ]
    context.end(EndTransfer(transfer_id=TransferId("t"), epoch=1))
    assert context.events.get(timeout=WAIT_S) == TransferQuiet(transfer_id=TransferId("t"), epoch=1)


def eventfds() -> int:
    """Open ones of this process: each link has one."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(os.readlink(path))
    return sum("eventfd" in each for each in links)


def test_links_to_agents_that_are_gone_end_after_a_while_and_leave_no_file() -> None:
    fd = shared_memory("pool", 4 * 64)
    start = AgentStart(
        pool=fd, control_fd=-1, parent_pid=os.getpid(), num_blocks=4, block_bytes=64, layout_digest=b"l",
        settings=AgentSettings(connect_timeout_ms=200),
    )  # fmt: skip
    context = AgentContext(start)
    near, far = socket.socketpair()
    agent = Agent(context, FramedSocket(near, send_timeout_s=WAIT_S))
    try:
        num_events = eventfds()
        gone = [replace(PEER, incarnation=number) for number in range(5)]  # each start of a peer is another one
        for number, peer in enumerate(gone):
            agent._send_frame(
                SendFrame(header=frame(f"t{number}"), endpoint=format_endpoint(peer), priority=0)
            )  # fmt: skip
        failed = [context.events.get(timeout=WAIT_S) for _ in gone]
        assert {type(each) for each in failed} == {FrameFailed}
        links = list(agent._links.values())
        agent.let_go(time.monotonic() + LINGER_S / 2)
        assert len(agent._links) == 5, "they may be needed again"
        agent.let_go(time.monotonic() + 2 * LINGER_S)
        assert not agent._links
        for each in links:
            each.join(WAIT_S)
            assert not each.is_alive()
        assert eventfds() == num_events
    finally:
        for end in (agent._tcp, agent._local, far, near):
            end.close()
        os.close(fd)
