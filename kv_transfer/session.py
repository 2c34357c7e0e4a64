"""The control side of transfers between workers: gRPC streams that carry TransferMessages.

One rule: each worker speaks on streams that it opened itself, one to each peer's control address, and listens on
streams that peers opened to it. So replies go over the replier's own stream, and either direction breaks alone.
Order is kept per peer for as long as its stream lives.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc

from kv_transfer.gate import Gate
from kv_transfer.messages import TransferMessage
from kv_transfer.wire import decode_transfer_message, encode_transfer_message
from tandem.cluster_access import ClusterAccess
from tandem.messages import WorkerAddress
from tandem.request import WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

MAX_PEERS = 256
MAX_QUEUED_MESSAGES = 1024
CONNECT_TIMEOUT_S = 2.0
WRITE_TIMEOUT_S = 5.0
# The end that listens says every second that its loop runs: sooner and truer than what TCP knows of a peer
# that is stopped or stuck.
BEAT_INTERVAL_S = 1.0
BEAT_TIMEOUT_S = 3.0
RECONNECT_DELAY_S = 0.05
MAX_LOSSES = 2  # in a row, without a sign of life in between
INCARNATION_KEY = "tandem-target-incarnation"
CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),  # a lost stream is reopened here, where it is known what was not written
    ("grpc.use_local_subchannel_pool", 1),  # a peer restarted at the same address is not seen through an old channel
)

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[pb.TransferMessage, pb.TransferMessage]


class TransferSessions(pb_grpc.TransferServicer):
    """A worker's streams with all its peers. Lives on one asyncio loop; `send` may be called from any thread.

    `on_message` and `on_peer_gone` are called on the loop and must not block. A peer is gone when its stream broke
    and could not be opened again, or when another incarnation answers at its address. What was queued for it is lost
    then, and the next `send` tries anew. A stream that breaks and is reopened may have lost what was last written: the
    protocol repeats what is not answered.

    `incarnation` is this worker's own: streams meant for another are refused. It is None, and every stream is taken,
    until whoever registers the worker sets it. `access` is shown to peers; who may call is the server's matter. `gate`:
    when anything may pass, either way.
    """

    def __init__(
        self,
        *,
        worker_id: WorkerId,
        on_message: Callable[[TransferMessage], None],
        on_peer_gone: Callable[[WorkerId, int], None],
        incarnation: int | None = None,
        access: ClusterAccess | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.incarnation = incarnation
        self._gate = gate or Gate()
        self._worker_id = worker_id
        self._access = access or ClusterAccess()
        self._on_message = on_message
        self._on_peer_gone = on_peer_gone
        self._peers: OrderedDict[tuple[WorkerId, int, str], _Peer] = OrderedDict()
        self._loop = asyncio.get_running_loop()
        self._closed = False

    # ---- outgoing ----

    def send(self, to: WorkerAddress, message: TransferMessage) -> None:
        """Queues a message; never blocks. It arrives, or `on_peer_gone` is called for the peer's incarnation."""
        self._loop.call_soon_threadsafe(self._send, to, message)

    def _send(self, to: WorkerAddress, message: TransferMessage) -> None:
        if self._closed:
            return
        key = (to.worker_id, to.incarnation, to.control)
        peer = self._peers.get(key)
        if peer is None:
            self._make_room()
            peer = self._peers[key] = _Peer(to, self._on_peer_gone, self._access, self._gate)
        self._peers.move_to_end(key)
        peer.send(message)

    def _make_room(self) -> None:
        """Closes the stream that was used least lately, of those that have nothing queued."""
        if len(self._peers) < MAX_PEERS:
            return
        for key, peer in self._peers.items():
            if peer.is_idle:
                del self._peers[key]
                peer.cancel()
                return

    async def close(self) -> None:
        """Ends all streams; queued messages are lost and nobody is told. Idempotent."""
        self._closed = True
        peers = list(self._peers.values())
        self._peers.clear()
        for peer in peers:
            peer.cancel()
        await asyncio.gather(*(peer.ended() for peer in peers))

    # ---- incoming ----

    async def Exchange(
        self,
        request_iterator: AsyncIterator[pb.TransferMessage],
        context: grpc.aio.ServicerContext[pb.TransferMessage, pb.TransferMessage],
    ) -> None:
        """Takes what a peer says until it ends its stream; answers with empty messages, its signs of life.

        Ends with FAILED_PRECONDITION when another incarnation is meant, INVALID_ARGUMENT on a malformed message.
        """
        await self._gate.passing()
        wanted = {str(value) for key, value in context.invocation_metadata() or () if key == INCARNATION_KEY}
        if self.incarnation is not None and wanted != {str(self.incarnation)}:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{INCARNATION_KEY}: is {sorted(wanted)}, worker {self._worker_id} is incarnation {self.incarnation}",
            )
        writing = asyncio.Lock()
        beats = asyncio.create_task(_beat(context, writing, self._gate))
        try:
            malformed = await self._listen(request_iterator)
        finally:
            # gRPC sends no status while a message is on its way. A peer that reads nothing may hold one for ever: it
            # gets none.
            with suppress(TimeoutError):
                async with asyncio.timeout(WRITE_TIMEOUT_S), writing:
                    beats.cancel()
            beats.cancel()
        if malformed is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, malformed)

    async def _listen(self, wires: AsyncIterator[pb.TransferMessage]) -> str | None:
        """Until the peer ends its stream, or says something malformed: then what."""
        async for wire in wires:
            try:
                message = decode_transfer_message(wire)
            except ValueError as error:
                return str(error)
            await self._gate.passing()
            self._on_message(message)
        return None


async def _beat(
    context: grpc.aio.ServicerContext[pb.TransferMessage, pb.TransferMessage], writing: asyncio.Lock, gate: Gate
) -> None:
    while True:
        await gate.passing()
        async with writing:
            await context.write(pb.TransferMessage())
        await asyncio.sleep(BEAT_INTERVAL_S)


class _Peer:
    """The stream to one incarnation of one peer: a queue and a task that exists while there is something to write."""

    def __init__(
        self, address: WorkerAddress, on_gone: Callable[[WorkerId, int], None], access: ClusterAccess, gate: Gate
    ) -> None:
        self._address = address
        self._access = access
        self._gate = gate
        self._on_gone = on_gone
        self._queue: deque[TransferMessage] = deque()
        self._ready = asyncio.Event()  # something is queued
        self._alive = False  # the stream has shown a sign of life
        self._task = asyncio.create_task(self._run(), name=f"peer {address.worker_id}")

    @property
    def is_idle(self) -> bool:
        return not self._queue

    def send(self, message: TransferMessage) -> None:
        if len(self._queue) >= MAX_QUEUED_MESSAGES:
            self._give_up(f"it takes nothing, and {len(self._queue)} messages are queued")
        self._queue.append(message)
        self._ready.set()

    def cancel(self) -> None:
        self._task.cancel()

    async def ended(self) -> None:
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        losses = 0
        while True:
            if losses == 0:
                await self._ready.wait()
            else:
                await asyncio.sleep(RECONNECT_DELAY_S)  # at once after a loss: whether the peer lives is news
            self._alive = False
            try:
                async with self._access.dial(self._address.control, CHANNEL_OPTIONS) as channel:
                    await self._talk(channel)
                reason = "the stream ended"
            except TimeoutError:
                reason = "it does not answer"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except asyncio.InvalidStateError:
                reason = "the stream ended under a message"
            except Exception as error:  # our own mistake, such as a message that has no encoding: it must not go again
                logger.exception("stream to worker %s", self._address.worker_id)
                self._give_up(f"{type(error).__name__}: {error}")
                losses = 0
                continue
            losses = 1 if self._alive else losses + 1
            if losses >= MAX_LOSSES:
                self._give_up(reason)
                losses = 0

    async def _talk(self, channel: grpc.aio.Channel) -> None:
        """Until the stream breaks or the peer shows no sign of life. Raises AioRpcError and TimeoutError."""
        metadata = (*self._access.metadata, (INCARNATION_KEY, str(self._address.incarnation)))
        call: Call = pb_grpc.TransferStub(channel).Exchange(metadata=metadata)  # type: ignore[no-untyped-call]
        writing: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._gate.passing()
                ended = not isinstance(await call.read(), pb.TransferMessage)
            self._alive = not ended
            writing = asyncio.create_task(self._write(call))
            while not ended and not writing.done():
                async with asyncio.timeout(BEAT_TIMEOUT_S):
                    ended = not isinstance(await call.read(), pb.TransferMessage)
                    await self._gate.passing()
            if writing.done():
                writing.result()
        finally:
            if writing is not None:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
            call.cancel()

    async def _write(self, call: Call) -> None:
        """Writes what is queued. A message leaves the queue when it is written."""
        while True:
            await self._ready.wait()
            while self._queue:
                message = self._queue[0]
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await self._gate.passing()
                    await call.write(encode_transfer_message(message))
                if self._queue and self._queue[0] is message:
                    self._queue.popleft()
            self._ready.clear()

    def _give_up(self, reason: str) -> None:
        logger.warning("worker %s at %s is gone: %s", self._address.worker_id, self._address.control, reason)
        self._queue.clear()
        self._ready.clear()
        try:
            self._on_gone(self._address.worker_id, self._address.incarnation)
        except Exception:  # the worker's own mistake must not end the task that tells of the next loss
            logger.exception("on_peer_gone(%s)", self._address.worker_id)
