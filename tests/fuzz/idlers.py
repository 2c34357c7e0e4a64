"""Clients that hold connections and say nothing, or little, or do not listen; and many that come and go at once."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc.aio

from tandem.v1 import inference_pb2, inference_pb2_grpc

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # and empty settings
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
DEADLINE_S = 60.0
LONG_ANSWER = 4000
AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Both doors of a router."""

    http_port: int
    grpc_port: int

    @property
    def ports(self) -> tuple[int, int]:
        """HTTP, gRPC."""
        return self.http_port, self.grpc_port


Attack = Callable[[Target, int], Coroutine[Any, Any, int]]


def raise_open_files() -> None:
    """As many as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _open(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.open_connection("127.0.0.1", port)


async def idle(target: Target, num: int) -> int:
    """Half are at HTTP and say nothing, half at gRPC and say that they speak HTTP/2. All stay until the end."""
    open_ones = []
    for number in range(num):
        port = target.ports[number % 2]
        reader, writer = await _open(port)
        if port == target.grpc_port:
            writer.write(PREFACE)
        open_ones.append((reader, writer))
    await asyncio.sleep(3)  # is what they do
    for _, writer in open_ones:
        writer.transport.abort()
    return num


async def drip(target: Target, num: int) -> int:
    """A byte now and then, of a head or a preface, until they are cut off, which they must be."""

    async def one(number: int) -> None:
        port = target.ports[number % 2]
        text = HEAD if port == target.http_port else PREFACE
        reader, writer = await _open(port)
        with suppress(OSError):
            for byte in text[: 10 + number % 20]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)
            async with asyncio.timeout(DEADLINE_S):
                while await reader.read(65536):
                    continue
        writer.transport.abort()

    await _all(one, num)
    return num


async def deaf(target: Target, num: int) -> int:
    """Ask for a long answer and read nothing of it; then they are gone."""

    async def over_http(number: int) -> None:
        body = json.dumps({"prompt": [number % 256] * 8, "max_tokens": LONG_ANSWER, "stream": True}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, ("127.0.0.1", target.http_port))
            await loop.sock_sendall(connection, HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await asyncio.sleep(2)

    async def over_grpc(number: int) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{target.grpc_port}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            request = inference_pb2.GenerateRequest(text="x" * (1 + number % 8))
            request.sampling.max_tokens = LONG_ANSWER
            call = stub.Generate(request)
            await asyncio.sleep(2)
            call.cancel()

    await _all(lambda number: over_grpc(number) if number % 2 else over_http(number), num)
    return num


async def come_and_go(target: Target, num: int) -> int:
    """Connect and leave: at once, after a byte, or after half a request."""
    said = (b"", b"G", HEAD, PREFACE, PREFACE[:20], b"\x16\x03\x01\x02\x00\x01")

    async def one(number: int) -> None:
        _, writer = await _open(target.ports[number % 2])
        writer.write(said[number % len(said)])
        if number % 3:
            writer.transport.abort()
        else:
            writer.close()

    await _all(one, num)
    return num


async def cancel_storm(target: Target, num: int) -> int:
    """Requests over both APIs that are given up a moment later."""
    draw = random.Random(num)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{target.grpc_port}")
    stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]

    async def one(number: int) -> None:
        wait_s = draw.random() * 0.2
        if number % 2:
            request = inference_pb2.GenerateRequest(text="storm")
            request.sampling.max_tokens = LONG_ANSWER
            call = stub.Generate(request)
            await asyncio.sleep(wait_s)
            call.cancel()
            return
        body = json.dumps({"prompt": "storm", "max_tokens": LONG_ANSWER, "stream": bool(number % 4)}).encode()
        _, writer = await _open(target.http_port)
        writer.write(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await asyncio.sleep(wait_s)
        writer.transport.abort()

    await _all(one, num)
    await channel.close(None)
    return num


async def garble(target: Target, num: int) -> int:
    """Heads, chunks and pipelines that keep no rule of HTTP; the answers are 2xx or 4xx, or the connection ends."""
    draw = random.Random(num)
    good = b'{"prompt": [1, 2], "max_tokens": 2}'
    heads = (
        HEAD + b"Content-Length: %d\r\n\r\n" % len(good) + good,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(good), good),
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(good) + good,
        HEAD + b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n" * 5,
        b"GET /live HTTP/1.0\r\n\r\n",
        b"GET " + b"/a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /live HTTP/1.1\r\n" + b"X-Header: y\r\n" * 3000 + b"\r\n",
        b"GET /v1/models/%00%ff%2e%2e HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    )

    async def one(number: int) -> None:
        data = bytearray(heads[number % len(heads)])
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        reader, writer = await _open(target.http_port)
        with suppress(OSError):
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(DEADLINE_S):
                answer = await reader.read()
            statuses = [line.split()[1] for line in answer.splitlines() if line.startswith(b"HTTP/1.1 ")]
            assert all(status[:1] in b"124" for status in statuses), f"{statuses} to {bytes(data)!r}"
        writer.transport.abort()

    await _all(one, num)
    return num


async def _all(one: Callable[[int], Awaitable[None]], num: int) -> None:
    left = iter(range(num))

    async def some() -> None:
        for number in left:
            await one(number)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(some())


# What each is, and how many clients it takes in full.
ATTACKS: dict[str, tuple[Attack, int]] = {
    "idle connections": (idle, 4000),
    "slow heads and prefaces": (drip, 200),
    "streams that nobody reads": (deaf, 128),
    "connections that come and go": (come_and_go, 10_000),
    "requests given up at once": (cancel_storm, 2000),
    "garbled HTTP": (garble, 5000),
}
