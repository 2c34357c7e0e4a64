"""Strangers at a real agent: forged hellos, replayed and altered messages. Refused, counted, and nobody is harmed."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest
from agent_pair import FAST, LAYOUT, End, Pair, with_transport

from kv_transfer.agent_settings import FrameTags
from kv_transfer.agent_wire import MAGIC, PROTOCOL_VERSION, Hello
from kv_transfer.endpoint import parse_endpoint
from kv_transfer.framed_socket import FramedSocket, LinkLost
from kv_transfer.messages import FrameAcked, FrameFailed
from kv_transfer.seal import LinkKeys, agents_secret

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

SECRET, OTHER = agents_secret("of this cluster"), agents_secret("of another one")
GLOO = replace(with_transport(FAST, "gloo"), connect_timeout_ms=5_000, operation_timeout_ms=5_000)


@pytest.fixture
def pair() -> Iterator[Pair]:
    source, target = End(settings=GLOO, fill=True, secret=SECRET), End(settings=GLOO, secret=SECRET)
    yield Pair(source, target)
    source.close()
    target.close()


def refused(end: End, num: int = 1) -> None:
    """Waits until the end's worker knows of so many strangers."""
    deadline = threading.Event()
    for _ in range(600):
        if end.client.num_refused >= num:
            return
        deadline.wait(0.05)
    raise AssertionError(f"{end.client.num_refused} strangers were told of, not {num}")


def still_works(pair: Pair) -> None:
    pair.expect("after", blocks=(1, 2))
    pair.move(pair.header("after", source=(3, 4), target=(1, 2)))
    assert [pair.target.read(each) for each in (1, 2)] == [pair.source.read(each) for each in (3, 4)]
    assert not pair.target.restarts


def hello(end: End, **changes: object) -> Hello:
    endpoint = parse_endpoint(end.info.endpoint)
    good = Hello(
        magic=MAGIC, version=PROTOCOL_VERSION, layout_digest=LAYOUT, source_agent=1, target_agent=endpoint.incarnation,
        token=bytes.fromhex(endpoint.token), transport="gloo", memory="host", cuda_pool=b"", block_bytes=4096,
        num_blocks=32, salt=b"s" * 16,
    )  # fmt: skip
    return replace(good, **changes)  # type: ignore[arg-type]


def knock(end: End, said: Hello, secret: bytes | None) -> object:
    """Says hello under this secret (None: unsealed); what is answered, or None when the agent hangs up."""
    endpoint = parse_endpoint(end.info.endpoint)
    sock = FramedSocket(socket.create_connection((endpoint.host, endpoint.port), timeout=10), send_timeout_s=5)
    try:
        if secret is not None:
            sock.sealing = LinkKeys(secret=secret).seal("hello")
            sock.opening = LinkKeys(secret=secret, source_salt=said.salt).seal("welcome")
        sock.send(said)
        return sock.receive(10)
    except LinkLost:
        return None
    finally:
        sock.close()


def test_hellos_of_strangers_are_refused_and_counted(pair: Pair) -> None:
    """Who knows the endpoint, and even its token, but not the cluster's secret, gets no word."""
    assert knock(pair.target, hello(pair.target), None) is None
    assert knock(pair.target, hello(pair.target), OTHER) is None
    refused(pair.target)
    answer = knock(pair.target, hello(pair.target, token=b"wrong" * 3), SECRET)
    assert getattr(answer, "reason", "") == "token: is not the one of this agent's endpoint"
    still_works(pair)


def test_agents_of_another_cluster_do_not_link(pair: Pair) -> None:
    stranger = End(settings=GLOO, fill=True, secret=OTHER)
    try:
        beside = Pair(stranger, pair.target)
        beside.expect("theirs", blocks=(1,))
        failed = beside.refusal(beside.header("theirs", source=(1,), target=(1,)))
        assert "agent at" in failed.reason
        assert pair.target.read(1) == bytes(4096)
        refused(pair.target)
    finally:
        stranger.close()
    still_works(pair)


def test_strangers_push_out_no_link_of_a_member() -> None:
    """More connections than an agent takes, that say nothing or repeat a good hello: they make room for one another."""
    few = replace(GLOO, max_links=4)
    source, target = End(settings=few, fill=True, secret=SECRET), End(settings=few, secret=SECRET)
    pair, endpoint = Pair(source, target), parse_endpoint(target.info.endpoint)

    def link() -> int:
        """The source's end of the link."""
        found = psutil.Process(source.info.pid).net_connections("tcp")
        [port] = [each.laddr.port for each in found if each.raddr and each.raddr.port == endpoint.port]
        return int(port)

    strangers: list[socket.socket] = []
    try:
        still_works(pair)
        before = link()
        for _ in range(3 * few.max_links):
            strangers.append(socket.create_connection((endpoint.host, endpoint.port), timeout=10))
        strangers[0].settimeout(10)
        assert strangers[0].recv(1) == b"", "the first to come is the first to go"
        said = hello(target)
        for _ in range(3 * few.max_links):
            strangers.append(socket.create_connection((endpoint.host, endpoint.port), timeout=10))
            sock = FramedSocket(strangers[-1], send_timeout_s=5)
            sock.sealing = LinkKeys(secret=SECRET).seal("hello")
            sock.opening = LinkKeys(secret=SECRET, source_salt=said.salt).seal("welcome")
            sock.send(said)
            assert sock.receive(10) is not None
        pair.expect("beside", blocks=(5,))
        pair.move(pair.header("beside", source=(5,), target=(5,)))
        assert link() == before
    finally:
        for each in strangers:
            each.close()
        source.close()
        target.close()


class Between:
    """A proxy on the way to an agent: records what the source says, and may alter it."""

    def __init__(self, end: End, alter: Callable[[int, bytes], bytes] = lambda link, data: data) -> None:
        endpoint = parse_endpoint(end.info.endpoint)
        self._target, self._alter = (endpoint.host, endpoint.port), alter
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.recorded: list[bytes] = []
        fields = {**json.loads(end.info.endpoint), "port": self._listener.getsockname()[1], "uds": ""}
        self.endpoint = json.dumps(fields)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inside, _ = self._listener.accept()
            except OSError:
                return
            outside = socket.create_connection(self._target)
            link = len(self.recorded)
            self.recorded.append(b"")
            for source, to, from_source in ((inside, outside, True), (outside, inside, False)):
                threading.Thread(target=self._pass_on, args=(link, source, to, from_source), daemon=True).start()

    def _pass_on(self, link: int, source: socket.socket, to: socket.socket, from_source: bool) -> None:
        try:
            while data := source.recv(65536):
                if from_source:
                    self.recorded[link] += data
                    data = self._alter(link, data)
                to.sendall(data)
        except OSError:
            pass
        finally:
            for each in (source, to):
                each.close()

    def close(self) -> None:
        self._listener.close()


def test_a_link_that_was_recorded_cannot_be_played_again(pair: Pair) -> None:
    between = Between(pair.target)
    pair.expect(blocks=(1, 2))
    pair.send(pair.header(source=(1, 2), target=(1, 2)), endpoint=between.endpoint)
    pair.source.wait(FrameAcked)
    before = [pair.target.read(block) for block in range(4)]
    endpoint = parse_endpoint(pair.target.info.endpoint)
    with socket.create_connection((endpoint.host, endpoint.port), timeout=20) as replay:
        replay.sendall(between.recorded[0])
        while replay.recv(65536):
            pass  # a welcome under a salt that the recording does not know, then the end
    refused(pair.target)
    assert [pair.target.read(block) for block in range(4)] == before
    still_works(pair)
    between.close()


def test_a_message_altered_on_the_way_ends_the_link_and_the_frame_goes_again(pair: Pair) -> None:
    """The first link's later words are altered in their last byte; the second one is left alone."""
    seen: dict[int, int] = {}

    def alter(link: int, data: bytes) -> bytes:
        seen[link] = seen.get(link, 0) + 1
        meddled = link == 0 and seen[link] > 1
        return data[:-1] + bytes([data[-1] ^ 1]) if meddled else data

    between = Between(pair.target, alter)
    pair.expect(blocks=(1, 2))
    pair.send(pair.header(source=(1, 2), target=(1, 2)), endpoint=between.endpoint)
    pair.source.wait(FrameAcked)
    refused(pair.target)
    assert [pair.target.read(each) for each in (1, 2)] == [pair.source.read(each) for each in (1, 2)]
    assert len(between.recorded) == 2
    between.close()


@pytest.mark.parametrize(("source_tags", "target_tags", "works"), [
    (FrameTags.ALWAYS, FrameTags.ALWAYS, True), (FrameTags.NEVER, FrameTags.ALWAYS, False),
    (FrameTags.ALWAYS, FrameTags.NEVER, True),
])  # fmt: skip
def test_frames_are_tagged_where_that_is_asked_for(source_tags: FrameTags, target_tags: FrameTags, works: bool) -> None:
    source = End(settings=replace(GLOO, frame_tags=source_tags), fill=True, secret=SECRET)
    target = End(settings=replace(GLOO, frame_tags=target_tags), secret=SECRET)
    try:
        pair = Pair(source, target)
        pair.expect(blocks=(1, 2))
        if works:
            pair.move(pair.header(source=(5, 7), target=(1, 2)))
            assert target.read(1) == source.read(5)
        else:
            failed: FrameFailed = pair.refusal(pair.header(source=(5, 7), target=(1, 2)))
            assert "the tag of its bytes is missing" in failed.reason
            assert target.read(1) == bytes(4096)
            refused(target)
    finally:
        source.close()
        target.close()
