"""How the source's agent reaches a peer: over the local socket where there is one, else TCP; hello; then a channel."""

from __future__ import annotations

import os
import secrets
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, replace

from kv_transfer.agent_context import AgentContext
from kv_transfer.agent_meeting import LinkMeeting
from kv_transfer.agent_settings import FrameTags, TransportChoice
from kv_transfer.agent_wire import MAGIC, PROTOCOL_VERSION, Denied, Hello, OpenChannel, Welcome
from kv_transfer.endpoint import Endpoint
from kv_transfer.framed_socket import FramedSocket, LinkForged, LinkLost
from kv_transfer.seal import SALT_BYTES, LinkKeys
from kv_transfer.transports.channel import SourceEnd


class PeerRefused(Exception):
    """The peer answered, and does not take the link: trying again is of no use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A link that was welcomed, and the end of the channel that goes with it."""

    sock: FramedSocket
    channel: SourceEnd


def connect(context: AgentContext, peer: Endpoint, *, pair_epoch: int) -> Connection:
    """Opens a link and a channel to the peer, bounded. Raises LinkLost, ChannelLost and PeerRefused."""
    sock = FramedSocket(_open(context, peer), send_timeout_s=context.operation_timeout_s, gate=context.gate)
    try:
        transport, keys = _greet(context, peer, sock)
        near = transport is context.pool.near
        channel = context.pool.near_source() if near else _open_far(context, sock, pair_epoch)
        if not near and tags_frames(context, sock):
            channel.tag_key = keys.key("frames")
        return Connection(sock=sock, channel=channel)
    except BaseException:
        sock.close()
        raise


def own_user(connection: socket.socket) -> bool:
    """Whether the other end of a local socket runs under our user."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", raw)
    return bool(uid == os.getuid())


def tags_frames(context: AgentContext, sock: FramedSocket) -> bool:
    """Whether frames of a far link need tags. Both ends come to the same: each sees the same two addresses."""
    chosen = context.settings.frame_tags
    if chosen is not FrameTags.AUTO:
        return chosen is FrameTags.ALWAYS
    connection = sock.connection
    if connection.family == socket.AF_UNIX:
        return False
    return bool(connection.getpeername()[0] != connection.getsockname()[0])  # else it never leaves this host


def _open(context: AgentContext, peer: Endpoint) -> socket.socket:
    if context.settings.transport is not context.pool.far and peer.uds:
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with suppress(OSError):  # another host, or the peer is gone: TCP will tell
            local.settimeout(context.connect_timeout_s)
            local.connect("\0" + peer.uds)
            if own_user(local):  # our pool's descriptor goes to no one else
                return local
        local.close()
    if context.settings.transport is context.pool.near:
        raise LinkLost(f"no local socket of the peer at {peer.uds!r}, and the transport is {context.pool.near}")
    try:
        remote = socket.create_connection((peer.host, peer.port), timeout=context.connect_timeout_s)
    except OSError as error:
        raise LinkLost(f"{peer.host}:{peer.port} cannot be reached: {error}") from None
    remote.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return remote


def _greet(context: AgentContext, peer: Endpoint, sock: FramedSocket) -> tuple[TransportChoice, LinkKeys]:
    salt = secrets.token_bytes(SALT_BYTES)
    keys = LinkKeys(secret=context.secret, source_salt=salt)
    sock.sealing, sock.opening = LinkKeys(secret=context.secret).seal("hello"), keys.seal("welcome")
    local = sock.connection.family == socket.AF_UNIX
    hello = Hello(
        magic=MAGIC,
        version=PROTOCOL_VERSION,
        layout_digest=context.start.layout_digest,
        source_agent=context.incarnation,
        target_agent=peer.incarnation,
        token=bytes.fromhex(peer.token),
        transport=context.settings.transport.value,
        memory=context.pool.memory.value,
        cuda_pool=context.pool.cuda_pool if local else b"",
        block_bytes=context.start.block_bytes,
        num_blocks=context.start.num_blocks,
        salt=salt,
    )
    sock.send(hello, (*context.pool.descriptors, context.nonce_fd) if local else ())
    try:
        answer = sock.receive(context.connect_timeout_s)
    except LinkForged:
        context.refuse_stranger()
        raise PeerRefused("what the peer's agent says has not the seal of this cluster") from None
    if isinstance(answer, Denied):
        raise PeerRefused(f"refused by the peer's agent: {answer.reason}")
    if not isinstance(answer, Welcome):
        raise LinkLost(f"no welcome within {context.connect_timeout_s:g} s")
    keys = replace(keys, target_salt=answer.salt)
    sock.sealing, sock.opening = keys.seal("to_target"), keys.seal("to_source")
    if answer.transport == context.pool.near:
        if answer.nonce != context.nonce:
            raise PeerRefused("the peer's agent does not share memory with this one")
        return context.pool.near, keys
    return context.pool.far, keys


def _open_far(context: AgentContext, sock: FramedSocket, pair_epoch: int) -> SourceEnd:
    context.pool.load_far()  # while the peer does the same: the time of the meeting begins when both are ready
    sock.send(OpenChannel(pair_epoch=pair_epoch))
    meeting = LinkMeeting(sock, pair_epoch=pair_epoch, timeout_s=context.settings.group_timeout_s)
    return context.pool.far_source(meeting)
