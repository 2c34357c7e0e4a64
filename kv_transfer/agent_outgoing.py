"""The link to one peer that frames leave over: one thread, one channel, a window of announced frames.

A link that breaks or hangs is dropped with its channel and made anew once, under the next pair epoch; what was
announced and not answered is announced again. When that fails too, every frame for the peer fails.

Of frames that wait, urgent ones go first, whichever peer of this agent they are for; others take half the window at
most, so that an urgent one that comes has few ahead of it.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from kv_transfer.agent_connect import Connection, PeerRefused, connect
from kv_transfer.agent_context import AgentContext
from kv_transfer.agent_wire import Ack, Announce, Go, Nack, Ping
from kv_transfer.endpoint import Endpoint
from kv_transfer.frame_queue import URGENT, FrameQueue, Waiting, urgency
from kv_transfer.framed_socket import LinkForged, LinkLost
from kv_transfer.messages import FrameHeader
from kv_transfer.transports.channel import ChannelLost
from tandem.request import TransferId

logger = logging.getLogger(__name__)

MAX_LOSSES = 2  # in a row, without an answer in between
HELD_S = 0.01  # until a frame that gives way is looked at again

FrameKey = tuple[TransferId, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Announced:
    waiting: Waiting
    checksum: int
    deadline_s: float

    @property
    def header(self) -> FrameHeader:
        return self.waiting.header


class OutgoingLink(threading.Thread):
    """Made for one endpoint; connects when the first frame is there."""

    def __init__(self, context: AgentContext, peer: Endpoint) -> None:
        super().__init__(name=f"to-{peer.incarnation:x}", daemon=True)
        self._context = context
        self._peer = peer
        self._queue = FrameQueue()
        self._queueing = threading.Lock()
        self._announced: OrderedDict[FrameKey, _Announced] = OrderedDict()
        self._connection: Connection | None = None
        self._pair_epoch = 0
        self._losses = 0
        self._heard_s = 0.0
        self._pinged_s: float | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._ending = threading.Lock()  # the descriptor's number may be another's once it is closed
        self.used_s = time.monotonic()

    # ---- from other threads ----

    def submit(self, header: FrameHeader, priority: int) -> bool:
        """Queues a frame. False: the queue is full."""
        self.used_s = time.monotonic()
        with self._queueing:
            if not self._queue.put(header, priority, now_ms=_now_ms()):
                return False
        if priority == URGENT:
            self._context.count_urgent(1)
        os.eventfd_write(self._wake, 1)
        return True

    def close(self) -> None:
        """Asks the thread to end; frames not yet answered fail."""
        with self._ending:
            self._closing = True
            os.eventfd_write(self._wake, 1)

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    @property
    def is_idle(self) -> bool:
        """Nothing is queued or under way."""
        return not self._queue and not self._announced

    # ---- the thread ----

    def run(self) -> None:
        """Until closed."""
        while not self._closing:
            try:
                if self._queue and self._connection is None:
                    self._connect()
                self._announce()
                self._wait()
                self._read()
                self._check_time()
            except PeerRefused as error:
                self._give_up(str(error))
            except (LinkLost, ChannelLost) as error:
                if isinstance(error, LinkForged) and self._context.refuse_stranger():
                    logger.warning("the link to %s:%d: %s", self._peer.host, self._peer.port, error)
                self._lost(str(error))
            except Exception as error:  # our own mistake, or the system's: the frames fail, the agent lives
                logger.exception("the link to %s:%d", self._peer.host, self._peer.port)
                self._give_up(f"{type(error).__name__}: {error}")
        self._give_up("the link was closed")
        with self._ending:
            os.close(self._wake)

    def _connect(self) -> None:
        self._pair_epoch += 1
        self._connection = connect(self._context, self._peer, pair_epoch=self._pair_epoch)
        self._heard_s = time.monotonic()
        self._pinged_s = None

    def _announce(self) -> None:
        """Fills the window."""
        connection = self._connection
        while connection and (waiting := self._next()) is not None:
            header = waiting.header
            if not self._context.begin_sending(header):
                continue  # the attempt has ended meanwhile
            key = (header.transfer_id, header.epoch, header.sequence)
            if key in self._announced:
                self._context.set_back(header)  # the answer to the first one answers both
                continue
            try:
                checksum = connection.channel.prepare(header)
            except ValueError as error:
                self._context.failed(header, str(error))
                continue
            except Exception as error:  # such as no memory just now: it goes again, and what others know is not harmed
                logger.exception("a frame to %s:%d cannot be prepared", self._peer.host, self._peer.port)
                self._context.failed(header, f"{type(error).__name__}: {error}")
                continue
            deadline_s = time.monotonic() + self._context.operation_timeout_s
            self._announced[key] = _Announced(waiting=waiting, checksum=checksum, deadline_s=deadline_s)
            tag = connection.channel.tag(header)
            connection.sock.send(Announce(header=header, checksum=checksum, tag=tag))

    def _next(self) -> Waiting | None:
        """Takes the frame that is due off the queue when there is room for it."""
        now_ms, window = _now_ms(), self._context.settings.window_frames
        with self._queueing:
            waiting = self._queue.peek(now_ms=now_ms)
            if waiting is None:
                return None
            gives_way = urgency(waiting, now_ms=now_ms) != URGENT
            if len(self._announced) >= (max(1, window // 2) if gives_way else window):
                return None
            if gives_way and self._context.urgent_wait:
                return None
            self._queue.take(waiting)
        if waiting.priority == URGENT:
            self._context.count_urgent(-1)
        return waiting

    def _put_back(self, waiting: Waiting) -> None:
        with self._queueing:
            self._queue.put_back(waiting)
        if waiting.priority == URGENT:
            self._context.count_urgent(1)

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        if self._connection is not None:
            poller.register(self._connection.sock, select.POLLIN)
        due_s = [frame.deadline_s for frame in self._announced.values()]
        if self._connection is not None:
            due_s.append(self._next_ping_s())
            if self._queue and len(self._announced) < self._context.settings.window_frames:
                due_s.append(time.monotonic() + HELD_S)
        timeout_ms = max(0, int((min(due_s) - time.monotonic()) * 1000) + 1) if due_s else None
        for fd, _ in poller.poll(timeout_ms):
            if fd == self._wake:
                os.eventfd_read(self._wake)

    def _read(self) -> None:
        while self._connection is not None:
            message = self._connection.sock.receive(0)
            if message is None:
                return
            self._heard_s, self._pinged_s = time.monotonic(), None
            if isinstance(message, Go):
                frame = self._announced.get((message.transfer_id, message.epoch, message.sequence))
                if frame is not None:
                    self._connection.channel.push(frame.header)
            elif isinstance(message, (Ack, Nack)):
                self._answered(message)
            elif not isinstance(message, Ping):
                raise LinkLost(f"an unexpected {type(message).__name__}")

    def _answered(self, message: Ack | Nack) -> None:
        assert self._connection is not None
        key = (message.transfer_id, message.epoch, message.sequence)
        frame = self._announced.get(key)
        if frame is None:
            return  # late: the frame was answered before
        self._connection.channel.finish(frame.header)
        del self._announced[key]
        self._losses = 0
        if isinstance(message, Nack):
            self._context.failed(frame.header, message.reason)
        elif message.checksum != frame.checksum:
            self._context.failed(frame.header, f"checksum {message.checksum:016x} was acknowledged")
        else:
            self._context.acked(frame.header, frame.checksum)

    def _next_ping_s(self) -> float:
        """When to ping next, or, after a ping, when to have heard of it."""
        settings = self._context.settings
        if self._pinged_s is not None:
            return self._pinged_s + settings.ping_timeout_ms / 1000
        if self._announced:
            begun_s = next(iter(self._announced.values())).deadline_s - self._context.operation_timeout_s
            return max(self._heard_s, begun_s) + settings.probe_ms / 1000
        return self._heard_s + settings.keepalive_ms / 1000

    def _check_time(self) -> None:
        now_s = time.monotonic()
        if self._announced:
            first = next(iter(self._announced.values()))
            if now_s >= first.deadline_s:
                raise LinkLost(f"no answer to a frame within {self._context.operation_timeout_s:g} s")
        if self._connection is not None and now_s >= self._next_ping_s():
            if self._pinged_s is not None:
                raise LinkLost(f"no answer to a ping within {self._context.settings.ping_timeout_ms} ms")
            self._connection.sock.send(Ping(number=self._pair_epoch, answer=False))
            self._pinged_s = now_s

    # ---- losses ----

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.channel.close()
            self._connection.sock.close()
            self._connection = None

    def _lost(self, reason: str) -> None:
        """Drops the link; frames that were announced go back to the head of the queue, to be sent once more."""
        self._losses += not self.is_idle
        if self._losses >= MAX_LOSSES:
            self._give_up(reason)
            return
        self._hang_up()
        for frame in reversed(self._announced.values()):
            self._context.set_back(frame.header)
            self._put_back(frame.waiting)
        self._announced.clear()

    def _give_up(self, reason: str) -> None:
        """Drops the link, and every frame with it."""
        self._losses = 0
        self._hang_up()
        headers = [frame.header for frame in self._announced.values()]
        for header in headers:
            self._context.set_back(header)
        self._announced.clear()
        with self._queueing:
            queued = self._queue.clear()
        self._context.count_urgent(-sum(waiting.priority == URGENT for waiting in queued))
        headers += [waiting.header for waiting in queued]
        where = f"agent at {self._peer.host}:{self._peer.port}"
        self._context.link_failed({(header.transfer_id, header.epoch) for header in headers}, f"{where}: {reason}")


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
