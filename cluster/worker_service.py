"""The worker's end of the routers' streams: what they say goes to the engine, what the engine reports goes to them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from cluster.worker_reports import joined, stamped
from engine.events import RouterGone
from engine.loop import InboxFull
from kv_transfer.actions import FromRouter, RouterJoined
from kv_transfer.gate import Gate
from tandem import report_wire, wire
from tandem.messages import WorkerReport
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

log = logging.getLogger(__name__)

REPORTS_MAX = 4096  # that wait for one router; with more it is cut off and places its requests anew
SESSIONS_MAX = 64  # of routers; each is told of all that the worker holds
HELLO_TIMEOUT_S = 5.0  # for the first message of a stream: a router sends it at once
JOINED_MAX = 256  # reports of as many steps are written as one to a router that lags
BEAT_INTERVAL_S = 1.0  # a router that hears nothing for some of them dials anew
LAST_WRITE_S = 5.0  # for the report under way when a stream ends; a router that reads nothing holds it up


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """One stream a router session. All methods run on the worker's event loop; `post` hands events to the engine.

    `on_session` hears the name of each router whose stream begins. `gate`: when anything may pass, either way.
    """

    def __init__(
        self, *, post: Callable[[object], None], on_session: Callable[[str], None], gate: Gate | None = None
    ) -> None:
        self._gate = gate or Gate()
        self._post = post
        self._on_session = on_session
        self._queues: dict[int, asyncio.Queue[WorkerReport | None]] = {}

    def report(self, reports: list[tuple[int, WorkerReport]]) -> None:
        """Queues reports for their sessions; those of a session that has ended are dropped."""
        for session, report in reports:
            queue = self._queues.get(session)
            if queue is None:
                continue
            try:
                queue.put_nowait(report)
            except asyncio.QueueFull:
                log.error("session=%d reads too slowly: %d reports wait; it is cut off", session, REPORTS_MAX)
                del self._queues[session]
                queue.get_nowait()
                queue.put_nowait(None)

    def close(self) -> None:
        """Ends every stream after what waits for it."""
        for queue in self._queues.values():
            if not queue.full():
                queue.put_nowait(None)
        self._queues.clear()

    async def Connect(
        self,
        request_iterator: AsyncIterator[pb.RouterMessage],
        context: grpc.aio.ServicerContext[pb.RouterMessage, pb.WorkerReport],
    ) -> None:
        """Serves one router session from its hello to its end."""
        await self._gate.passing()
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await anext(aiter(request_iterator), None)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello came within {HELLO_TIMEOUT_S:g} s")
        if hello is None or hello.WhichOneof("kind") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be hello")
        session = hello.hello.session
        if session in self._queues:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"session {session} is connected already")
        if len(self._queues) >= SESSIONS_MAX:
            limit = f"{SESSIONS_MAX} sessions are connected, no more may"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, limit)
        queue: asyncio.Queue[WorkerReport | None] = asyncio.Queue(REPORTS_MAX)
        self._queues[session] = queue
        log.info("router=%s session=%d connected", hello.hello.router_id, session)
        self._post(RouterJoined(session=session))
        self._on_session(hello.hello.router_id)
        reader = asyncio.create_task(self._read(session, request_iterator))
        writer = asyncio.create_task(_write(queue, context, self._gate))
        try:
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            reason = next(iter(done)).result()
            log.info("session=%d ended: %s", session, reason)
        finally:
            self._queues.pop(session, None)
            self._post(RouterGone(session=session))
            reader.cancel()
            await _end_writing(queue, writer)
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, session: int, messages: AsyncIterator[pb.RouterMessage]) -> str:
        try:
            async for message in messages:
                await self._gate.passing()
                heard_s = time.monotonic()
                said = wire.decode_router_message(message)
                self._post(FromRouter(session=session, message=said, heard_s=heard_s))
        except (ValueError, InboxFull, grpc.RpcError) as error:
            log.error("session=%d is ended: %s", session, error)
            return str(error)
        return "the router ended the stream"


async def _end_writing(queue: asyncio.Queue[WorkerReport | None], writer: asyncio.Task[str]) -> None:
    """Lets the report that is being written out, and drops the rest.

    A write that is cancelled under way would take the stream's end with it: the router would go on waiting.
    """
    while not queue.empty():
        queue.get_nowait()
    queue.put_nowait(None)
    await asyncio.wait({writer}, timeout=LAST_WRITE_S)
    writer.cancel()


async def _write(
    queue: asyncio.Queue[WorkerReport | None],
    context: grpc.aio.ServicerContext[pb.RouterMessage, pb.WorkerReport],
    gate: Gate,
) -> str:
    messages = [pb.WorkerReport()]  # a sign of life
    ended = False
    while True:
        for message in messages:
            await gate.passing()
            await context.write(message)
        if ended:
            return "the worker ended the stream"
        try:
            async with asyncio.timeout(BEAT_INTERVAL_S):
                waiting = [await queue.get()]
        except TimeoutError:
            messages = [pb.WorkerReport()]
            continue
        while waiting[-1] is not None and not queue.empty() and len(waiting) < JOINED_MAX:
            waiting.append(queue.get_nowait())
        ended = waiting[-1] is None
        reports = joined(each for each in waiting if each is not None)
        messages = [report_wire.encode_report(stamped(each, time.monotonic())) for each in reports]
