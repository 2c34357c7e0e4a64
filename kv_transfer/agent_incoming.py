"""The link from one peer that frames arrive over: one thread for its words, and when it is far one for the bytes."""

from __future__ import annotations

import hmac
import logging
import os
import queue
import secrets
import socket
import threading
import time
from dataclasses import replace

from kv_transfer.agent_attempts import Verdict
from kv_transfer.agent_connect import own_user, tags_frames
from kv_transfer.agent_context import AgentContext
from kv_transfer.agent_meeting import LinkMeeting
from kv_transfer.agent_wire import (
    MAGIC,
    PROTOCOL_VERSION,
    Ack,
    Announce,
    Denied,
    Go,
    Hello,
    Nack,
    OpenChannel,
    Ping,
    Welcome,
)
from kv_transfer.framed_socket import FramedSocket, LinkForged, LinkLost
from kv_transfer.messages import FrameHeader
from kv_transfer.seal import SALT_BYTES, LinkKeys
from kv_transfer.transports import shm
from kv_transfer.transports.channel import ChannelLost, FrameCorrupt, FrameForged, TargetEnd

logger = logging.getLogger(__name__)

SILENT_PINGS = 3  # a source that has not been heard of for so many keep-alives is gone


class IncomingLink(threading.Thread):
    """Made for one accepted connection; ends with it."""

    def __init__(self, context: AgentContext, connection: socket.socket) -> None:
        super().__init__(name="from-peer", daemon=True)
        self._context = context
        self._sock = FramedSocket(connection, send_timeout_s=context.operation_timeout_s, gate=context.gate)
        self._source_agent = 0
        self._is_greeted = False
        self.used_s = time.monotonic()  # when a frame was announced last
        self._num_open = 0  # frames that were announced and not answered
        self._counting = threading.Lock()
        self._channel: TargetEnd | None = None
        self._arriving: queue.SimpleQueue[Announce | None] = queue.SimpleQueue()
        self._tag_key = b""  # of the frames, where they need tags
        self._taker: threading.Thread | None = None

    def run(self) -> None:
        """Until the source closes the link, is silent for too long, or breaks the rules."""
        try:
            if self._greet():
                self._listen()
        except LinkForged as error:
            if self._context.refuse_stranger():
                logger.warning("the link from agent %x ended: %s", self._source_agent, error)
        except (LinkLost, ChannelLost) as error:
            logger.info("the link from agent %x ended: %s", self._source_agent, error)
        except Exception:  # our own mistake: the link ends, so that the source fails its frames, and the agent lives
            logger.exception("the link from agent %x", self._source_agent)
        finally:
            self._sock.hang_up()
            if self._taker is not None:
                self._arriving.put(None)
                self._taker.join()
            if self._channel is not None:
                self._channel.close()
            self._sock.close()

    @property
    def is_idle(self) -> bool:
        """No frame is under way."""
        return self._num_open == 0

    @property
    def is_greeted(self) -> bool:
        """The other end is a member of this cluster: it has used keys of this link, which no recorded hello tells."""
        return self._is_greeted

    def hang_up(self) -> None:
        """Asks the thread to end."""
        self._sock.hang_up()

    # ---- hello ----

    def _greet(self) -> bool:
        secret = self._context.secret
        self._sock.opening = LinkKeys(secret=secret).seal("hello")
        hello = self._sock.receive(self._context.connect_timeout_s)
        if not isinstance(hello, Hello):
            raise LinkLost("no hello")
        keys = LinkKeys(secret=secret, source_salt=hello.salt, target_salt=secrets.token_bytes(SALT_BYTES))
        self._sock.sealing = replace(keys, target_salt=b"").seal("welcome")
        reason = self._objection(hello)
        if reason is not None:
            self._sock.send(Denied(reason=reason))
            return False
        self._source_agent = hello.source_agent
        pool = self._context.pool
        nonce = self._try_near(hello)
        if nonce is not None:
            self._welcome(keys, nonce, pool.near.value)
            return True
        if pool.near in (hello.transport, self._context.settings.transport):
            self._sock.send(Denied(reason=f"transport: is {pool.near}, and no memory is shared"))
            return False
        if tags_frames(self._context, self._sock):
            self._tag_key = keys.key("frames")
        self._welcome(keys, b"", pool.far.value)
        pool.load_far()  # the source does the same now
        return True

    def _welcome(self, keys: LinkKeys, nonce: bytes, transport: str) -> None:
        """From here on both ends seal with keys of this link alone."""
        self._sock.send(Welcome(nonce=nonce, salt=keys.target_salt, transport=transport))
        self._sock.sealing, self._sock.opening = keys.seal("to_source"), keys.seal("to_target")

    def _objection(self, hello: Hello) -> str | None:
        own = self._context
        if hello.magic != MAGIC:
            return "magic: is not that of a transfer agent"
        if hello.version != PROTOCOL_VERSION:
            return f"version: is {hello.version}, must be {PROTOCOL_VERSION}"
        if hello.target_agent != own.incarnation:
            return f"target_agent: is {hello.target_agent}, this one is {own.incarnation}"
        if not hmac.compare_digest(hello.token, own.token):
            own.refuse_stranger()
            return "token: is not the one of this agent's endpoint"
        if hello.layout_digest != own.start.layout_digest or hello.block_bytes != own.start.block_bytes:
            return "layout_digest: the blocks of the two workers are not alike"
        if hello.memory != own.pool.memory:
            return f"memory: is {hello.memory}, this agent's pool is in {own.pool.memory} memory"
        local = self._sock.connection.family == socket.AF_UNIX
        if local and not own_user(self._sock.connection):
            return "user: is another one than that of this agent"
        return None

    def _try_near(self, hello: Hello) -> bytes | None:
        """Opens the source's pool when what that takes came with the hello. The nonce read from memory, or None."""
        pool = self._context.pool
        if pool.far in (hello.transport, self._context.settings.transport):
            return None
        num = len(pool.descriptors) + 1
        if len(self._sock.descriptors) < num:
            return None
        descriptors = self._sock.descriptors[:num]
        del self._sock.descriptors[:num]
        try:
            nonce = shm.read_nonce(descriptors[-1])
            self._channel = pool.near_target(hello, descriptors[:-1])
            return nonce
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning("the pool of agent %x cannot be opened: %s", hello.source_agent, error)
            return None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    # ---- frames ----

    def _listen(self) -> None:
        silence_s = self._context.settings.keepalive_ms / 1000 * SILENT_PINGS
        while True:
            message = self._sock.receive(silence_s)
            if message is None:
                raise LinkLost(f"silent for {silence_s:g} s")
            self._is_greeted = True
            if isinstance(message, Announce):
                self._announced(message)
            elif isinstance(message, OpenChannel) and self._channel is None:
                self._open_far(message)
            elif isinstance(message, Ping):
                self._sock.send(Ping(number=message.number, answer=True))
            else:
                raise LinkLost(f"an unexpected {type(message).__name__}")

    def _announced(self, message: Announce) -> None:
        header, checksum = message.header, message.checksum
        self.used_s = time.monotonic()
        with self._counting:
            self._num_open += 1
        if self._channel is None:
            raise LinkLost("a frame before its channel")
        answer = self._context.take(header, checksum, source_agent=self._source_agent)
        if answer.verdict is Verdict.AGAIN:
            self._ack(header, checksum)
        elif answer.verdict is not Verdict.TAKE:
            self._nack(header, answer.reason)
        elif self._taker is None:
            self._take(message)
        else:
            self._post(message)

    def _post(self, message: Announce) -> None:
        assert self._channel is not None
        header = message.header
        try:
            self._channel.post(header)
        except ValueError as error:
            self._context.dropped(header)
            self._nack(header, str(error))
            return
        except BaseException:
            self._context.dropped(header)
            raise
        self._arriving.put(message)
        self._sock.send(
            Go(transfer_id=header.transfer_id, epoch=header.epoch, sequence=header.sequence),
        )

    def _take(self, message: Announce) -> None:
        """Has a frame that was allowed in its blocks, checked and told; or dropped and told."""
        assert self._channel is not None
        header, checksum = message.header, message.checksum
        try:
            self._channel.take(header, checksum, message.tag)
        except (FrameCorrupt, ValueError) as error:
            if isinstance(error, FrameCorrupt):
                self._context.damaged()
            if isinstance(error, FrameForged) and self._context.refuse_stranger():
                logger.warning("a frame from agent %x is refused: %s", self._source_agent, error)
            self._context.dropped(header)
            self._nack(header, str(error))
            return
        except BaseException:
            self._context.dropped(header)
            raise
        if self._context.landed(header, checksum):
            self._ack(header, checksum)
        else:
            self._nack(header, "not granted: the attempt ended while the frame arrived")

    def _ack(self, header: FrameHeader, checksum: int) -> None:
        self._answer(
            Ack(transfer_id=header.transfer_id, epoch=header.epoch, sequence=header.sequence, checksum=checksum)
        )

    def _nack(self, header: FrameHeader, reason: str) -> None:
        self._answer(Nack(transfer_id=header.transfer_id, epoch=header.epoch, sequence=header.sequence, reason=reason))

    def _answer(self, answer: Ack | Nack) -> None:
        with self._counting:
            self._num_open -= 1
        self._sock.send(answer)

    # ---- far channels ----

    def _open_far(self, message: OpenChannel) -> None:
        own = self._context
        timeout_s = own.settings.group_timeout_s
        self._channel = own.pool.far_target(LinkMeeting(self._sock, pair_epoch=message.pair_epoch, timeout_s=timeout_s))
        self._channel.tag_key = self._tag_key
        self._taker = threading.Thread(target=self._take_all, name="taker", daemon=True)
        self._taker.start()

    def _take_all(self) -> None:
        """Takes what was posted, in order, until the link ends. After a loss the rest is dropped without waiting."""
        broken = False
        while True:
            frame = self._arriving.get()
            if frame is None:
                return
            if broken:
                self._context.dropped(frame.header)
                continue
            try:
                self._take(frame)
            except (LinkLost, ChannelLost) as error:
                logger.info("the channel from agent %x broke: %s", self._source_agent, error)
                broken = True
            except Exception:
                logger.exception("the channel from agent %x", self._source_agent)
                broken = True
            if broken:
                self._sock.hang_up()
