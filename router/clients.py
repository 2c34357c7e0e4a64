"""One gRPC stream from the router to each worker: dialled, kept, and dialled again until it is closed.

A shell: it turns messages into protobuf and tells what it hears; what follows from that is decided in router/core.py.
A worker answers the hello at once and then beats, with empty reports, while it has nothing to say: heartbeats to the
registry go another way, and that they come says nothing of this stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc.aio

from router.config import RouterConfig
from tandem import report_wire, wire
from tandem.cluster_access import ClusterAccess
from tandem.messages import RouterMessage, WorkerReport
from tandem.request import WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 64 << 20
CLOSE_TIMEOUT_S = 5.0
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a ping has a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


class WorkerLink:
    """The streams to one worker incarnation, one after another. All callbacks run on the event loop.

    `next_session` gives each stream a number of its own. After `on_lost` nothing of that stream is heard any more.
    """

    def __init__(
        self,
        *,
        worker_id: WorkerId,
        control: str,
        config: RouterConfig,
        access: ClusterAccess,
        next_session: Callable[[], int],
        on_up: Callable[[], None],
        on_report: Callable[[WorkerReport], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._worker_id = worker_id
        self._control = control
        self._config = config
        self._access = access
        self._next_session = next_session
        self._on_up = on_up
        self._on_report = on_report
        self._on_lost = on_lost
        self._queue: asyncio.Queue[RouterMessage] | None = None  # None while no stream stands
        self._failed: asyncio.Future[str] | None = None
        self._num_heard = 0  # messages, beats included
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Begins to dial. The task ends by `close`, or by an error that a callback raised."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"link to {self._worker_id}")
        return self._task

    async def close(self) -> None:
        """Ends the stream and all dialling. Says nothing to `on_lost`."""
        self._queue = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def send(self, message: RouterMessage) -> None:
        """Queues a message. A full queue breaks the stream; without a stream the message is dropped."""
        if self._queue is None:
            return
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self._break(f"{self._config.send_queue_max} messages wait to be sent, which is the limit")

    def _break(self, reason: str) -> None:
        if self._failed is not None and not self._failed.done():
            self._failed.set_result(reason)

    async def _run(self) -> None:
        pause_ms = self._config.redial_ms
        while True:
            channel = self._access.dial(self._control, CHANNEL_OPTIONS)
            try:
                was_up, reason = await self._stream(channel)
            finally:
                await _within(channel.close(None), f"channel to worker={self._worker_id}")
            if was_up:
                pause_ms = self._config.redial_ms
                log.warning("link to worker=%s lost: %s", self._worker_id, reason)
            await asyncio.sleep(pause_ms / 1000)
            pause_ms = min(2 * pause_ms, self._config.redial_max_ms)

    async def _stream(self, channel: grpc.aio.Channel) -> tuple[bool, str]:
        """One stream from dial to end: whether it ever stood, and why it ended."""
        timeout_s = self._config.dial_timeout_ms / 1000
        call: grpc.aio.StreamStreamCall[pb.RouterMessage, pb.WorkerReport] | None = None
        try:
            # Not wait_for: until Python 3.12 it swallows a cancellation that meets the end of what it waits for.
            async with asyncio.timeout(timeout_s):
                await channel.channel_ready()
            call = worker_pb2_grpc.WorkerStub(channel).Connect(  # type: ignore[no-untyped-call]
                metadata=self._access.metadata
            )
            hello = pb.RouterHello(router_id=self._config.router_id, session=self._next_session())
            async with asyncio.timeout(timeout_s):
                await call.write(pb.RouterMessage(hello=hello))
                if not isinstance(first := await call.read(), pb.WorkerReport):
                    return False, "the worker ended the stream at once"
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            if call is not None:
                call.cancel()
            return False, _say(error)
        self._queue = asyncio.Queue(self._config.send_queue_max)
        self._failed = asyncio.get_running_loop().create_future()
        self._on_up()
        tasks = [
            asyncio.create_task(self._read(call, first)),
            asyncio.create_task(self._write(call, self._queue)),
            asyncio.create_task(self._watch()),
        ]
        try:
            done, _ = await asyncio.wait([*tasks, self._failed], return_when=asyncio.FIRST_COMPLETED)
            reason = next(iter(done)).result()
        finally:
            heard_no_more = self._queue is not None
            self._queue = None
            for task in tasks:
                task.cancel()
            call.cancel()
            await _within(asyncio.gather(*tasks, return_exceptions=True), f"stream to worker={self._worker_id}")
        if heard_no_more:
            self._on_lost(reason)
        return True, reason

    async def _read(
        self, call: grpc.aio.StreamStreamCall[pb.RouterMessage, pb.WorkerReport], first: pb.WorkerReport
    ) -> str:
        message: object = first
        try:
            while isinstance(message, pb.WorkerReport):
                self._num_heard += 1
                if not report_wire.is_beat(message):
                    self._on_report(report_wire.decode_report(message))
                message = await call.read()
        except (grpc.aio.AioRpcError, ValueError) as error:
            return _say(error)
        return "the worker ended the stream"

    async def _watch(self) -> str:
        """Until the worker is silent for too long. Waits in a row count, not seconds: this process may be stopped."""
        num_missed, num_heard = 0, self._num_heard
        while num_missed <= self._config.beats_missed_max:
            await asyncio.sleep(self._config.beat_ms / 1000)
            num_missed = num_missed + 1 if self._num_heard == num_heard else 0
            num_heard = self._num_heard
        return f"no sign of life for {num_missed * self._config.beat_ms} ms"

    async def _write(
        self,
        call: grpc.aio.StreamStreamCall[pb.RouterMessage, pb.WorkerReport],
        queue: asyncio.Queue[RouterMessage],
    ) -> str:
        timeout_s = self._config.send_timeout_ms / 1000
        try:
            while True:
                message = await queue.get()
                async with asyncio.timeout(timeout_s):
                    await call.write(wire.encode_router_message(message))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            return _say(error)
        except TimeoutError:
            return f"the worker took no message for {timeout_s:g} s"


async def _within(closing: Awaitable[object], what: str) -> None:
    """Waits for an end that may not come: a stream that does not close must not keep the next one from being opened."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await closing
    except TimeoutError:
        log.error("the %s does not close within %g s: it is left", what, CLOSE_TIMEOUT_S)


def _say(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"
