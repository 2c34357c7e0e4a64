"""What a client may leave unsaid, over raw sockets: heads and bodies that do not come, and clients that are gone."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from edge import http_server, saying, service_over
from scripted_driver import ScriptedDriver

from router import request_body
from router.http_connection import HttpLimits
from router.service import Service

HEAD_TIMEOUT_S = 0.4
LATE_S = 10 * HEAD_TIMEOUT_S  # by then a connection must have been closed, also on a busy machine
LIMITS = HttpLimits(head_timeout_s=HEAD_TIMEOUT_S, idle_timeout_s=2, head_bytes_max=8192, connections_max=3)
DEADLINE_S = 30
CHAT = "/v1/chat/completions"
LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


def chat(**more: object) -> bytes:
    """A whole request."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **more}).encode()
    return f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def held() -> ScriptedDriver:
    """A driver whose answers stop after two tokens, until they are cancelled."""
    driver = saying("Hello there, and so on.")
    driver.hold_after = 2
    return driver


def with_server(use: Callable[[Connect], Awaitable[None]], service: Service | None = None) -> None:
    """Runs `use` against a real server with small limits; connections that it opened are closed."""

    async def main() -> None:
        writers: list[asyncio.StreamWriter] = []

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writers.append(writer)
            return reader, writer

        async with http_server(service or service_over(saying("Hello")), LIMITS) as url:
            try:
                await use(connect)
            finally:
                for writer in writers:
                    writer.transport.abort()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What still comes, until the server closes the connection, which it must within its limit."""
    try:
        async with asyncio.timeout(LATE_S):
            return await reader.read()
    except ConnectionResetError:
        return b""


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition of this event loop, at most the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("said", "status"), [(b"", b""), (b"GET /li", b"HTTP/1.1 408"), (LIVE[:-2], b"HTTP/1.1 408")])
def test_a_head_that_does_not_come_ends_the_connection(said: bytes, status: bytes) -> None:
    async def use(connect: Connect) -> None:
        began_s = time.monotonic()
        reader, writer = await connect()
        writer.write(said)
        reply = await rest(reader)
        assert reply.startswith(status)
        assert bool(reply) == bool(status)
        assert time.monotonic() - began_s >= HEAD_TIMEOUT_S * 0.9
        if reply:
            error = json.loads(reply.split(b"\r\n\r\n")[1])["error"]
            assert error["message"] == f"head: has not come in full within {HEAD_TIMEOUT_S:g} s"

    with_server(use)


@pytest.mark.parametrize(
    ("before", "drop"),
    [
        (LIVE[:-2], b"x"),  # the first head
        (LIVE + LIVE[:-2], b"x"),  # a head after a reply
        (LIVE, b"\r\n"),  # between requests
        (b"GET /live HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n", b"x"),  # a body after its reply
    ],
)
def test_what_comes_in_drops_ends_too(before: bytes, drop: bytes) -> None:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        while not writer.transport.is_closing():
            await asyncio.sleep(HEAD_TIMEOUT_S / 8)
            writer.write(drop)

    async def use(connect: Connect) -> None:
        reader, writer = await connect()
        sending = asyncio.create_task(send(writer))
        assert (b" 200 " in await rest(reader)) is (before != LIVE[:-2])
        sending.cancel()

    with_server(use)


def test_a_slow_body_is_not_a_late_head_and_one_connection_serves_many(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(connect: Connect) -> None:
        reader, writer = await connect()
        request = chat()
        for part in (request[:-10], request[-10:-5], request[-5:]):
            writer.write(part)
            await asyncio.sleep(HEAD_TIMEOUT_S * 0.8)
        assert b" 200 " in await reader.readline()
        await reader.readuntil(b"}}}")
        large = chat(user="x" * 100_000)  # its end arrives together with no head, and is not counted as one
        writer.write(large)
        assert b" 200 " in await reader.readline()
        await reader.readuntil(b"}}}")
        monkeypatch.setattr(request_body, "_BODY_TIMEOUT_S", HEAD_TIMEOUT_S)
        writer.write(request[:-1])
        reply = await rest(reader)
        assert reply.startswith(b"HTTP/1.1 408")
        assert b"body: has not come in full within" in reply

    with_server(use)


def test_an_idle_connection_is_kept_longer_than_clients_and_proxies_keep_theirs() -> None:
    """Closed earlier, it would be closed under requests that are on their way: those are lost to their clients."""
    assert HttpLimits().idle_timeout_s > 60

    async def use(connect: Connect) -> None:
        reader, writer = await connect()
        began_s = time.monotonic()
        while time.monotonic() - began_s < 2 * LIMITS.idle_timeout_s:  # each use starts the time anew
            writer.write(LIVE)
            assert b" 200 " in await reader.readline()
            await reader.readuntil(b"}")
            await asyncio.sleep(LIMITS.idle_timeout_s * 0.6)
        assert await rest(reader) == b""

    with_server(use)


def test_a_head_that_does_not_end_is_refused_by_its_size() -> None:
    async def use(connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(LIVE[:-2])
        for _ in range(9):
            writer.write(b"a: " + b"b" * 1000 + b"\r\n")
            await asyncio.sleep(0.01)
        reply = await rest(reader)
        assert reply.startswith(b"HTTP/1.1 431")
        assert b"at most 8192" in reply

    with_server(use)


CHUNKED = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


@pytest.mark.parametrize("part", [b"a: " + b"b" * 1000 + b"\r\n", b"b" * 1000])
@pytest.mark.parametrize("before", [b"2\r\n{}\r\n0\r\n", b"2\r\n{}\r\n0\r\na: ", b"2;"])
def test_what_follows_a_chunked_body_is_bounded_as_a_head_is(before: bytes, part: bytes) -> None:
    async def use(connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(CHUNKED + before)
        await asyncio.sleep(0.01)
        num_sent = 0
        while num_sent < 100_000 and not writer.transport.is_closing():
            writer.write(part)
            num_sent += len(part)
            await asyncio.sleep(0.001)
        assert writer.transport.is_closing()
        with suppress(BrokenPipeError):
            await rest(reader)

    with_server(use)


def test_fields_after_a_body_are_not_of_the_head_that_was_judged() -> None:
    async def use(connect: Connect) -> None:
        reader, writer = await connect()
        body = chat().split(b"\r\n\r\n")[1]
        tail = b"\r\n0\r\nx-request-id: late\r\nauthorization: Bearer late\r\n\r\n"
        writer.write(CHUNKED + f"{len(body):x}\r\n".encode() + body + tail + LIVE)
        reply = await rest(reader)
        assert reply.startswith(b"HTTP/1.1 200")
        assert b"x-request-id: chatcmpl-" in reply

    with_server(use)


def test_chunks_of_one_byte_are_a_body_as_any_other() -> None:
    async def use(connect: Connect) -> None:
        reader, writer = await connect()
        body = chat(user="x" * 5000).split(b"\r\n\r\n")[1]
        writer.write(CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert b" 200 " in await reader.readline()

    with_server(use)


def test_what_is_no_request_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    async def use(connect: Connect) -> None:
        for said in (b"\x16\x03\x01 hello\r\n\r\n", LIVE[:-2] + b"Connection: upgrade\r\nUpgrade: x\r\n\r\n"):
            reader, writer = await connect()
            writer.write(said)
            assert (await reader.readline()).startswith(b"HTTP/1.1 ")
            writer.close()

    with_server(use)
    assert not [each for each in caplog.records if each.name.startswith("uvicorn")]


def test_no_more_connections_than_the_limit() -> None:
    async def use(connect: Connect) -> None:
        open_ones = []
        for _ in range(LIMITS.connections_max):
            reader, writer = await connect()
            writer.write(chat(stream=True))
            assert b" 200 " in await reader.readline()
            open_ones.append(writer)
        reader, writer = await connect()
        reply = await rest(reader)
        assert reply.startswith(b"HTTP/1.1 503")
        assert b"connections: 3 are open, which is the limit" in reply
        assert len(driver.requests) == LIMITS.connections_max
        open_ones[0].transport.abort()
        await until(lambda: any(running.cancelled for running in driver.requests.values()))
        reader, writer = await connect()
        writer.write(LIVE)
        assert b" 200 " in await reader.readline()

    driver = held()
    with_server(use, service_over(driver))


@pytest.mark.parametrize(
    "ahead",
    [
        LIVE,  # a second request
        LIVE * 5000,
        chat()[:-3],  # a second request that does not end
        b"GET /l" + b"x" * 3 * LIMITS.head_bytes_max,  # a head that does not
    ],
)
def test_a_client_that_sends_ahead_of_its_reply_and_leaves_is_noticed(ahead: bytes) -> None:
    async def use(connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(chat(stream=True))
        assert b" 200 " in await reader.readline()
        writer.write(ahead)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await until(lambda: all(running.cancelled for running in driver.requests.values()))
        assert len(driver.requests) == 1

    driver = held()
    with_server(use, service_over(driver))


def test_requests_sent_ahead_are_left_to_another_connection() -> None:
    async def use(connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(chat() + chat() + LIVE)
        reply = await rest(reader)
        assert reply.count(b"HTTP/1.1 200") == 1
        assert json.loads(reply.split(b"\r\n\r\n")[1])["choices"][0]["message"]["content"] == "Hello"

    with_server(use)


def test_the_kernel_looks_after_clients_that_say_nothing() -> None:
    """A vanished client cannot be made without rights over the network: the kernel's own table shows its timer."""

    async def use(connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(chat(stream=True))
        await reader.readline()
        server, client = writer.get_extra_info("peername")[1], writer.get_extra_info("sockname")[1]
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        [row] = [row for row in rows if row[1].endswith(f":{server:04X}") and row[2].endswith(f":{client:04X}")]
        kind, jiffies = row[5].split(":")
        assert kind == "02", "the timer that runs is the keepalive timer"
        assert int(jiffies, 16) / 100 <= 20

    with_server(use, service_over(held()))
