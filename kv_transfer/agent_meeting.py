"""The meeting of two agents for one pair: keys as messages of their link, all within one deadline."""

from __future__ import annotations

import time

from kv_transfer.agent_wire import Meet
from kv_transfer.framed_socket import FramedSocket
from kv_transfer.transports.channel import ChannelLost
from kv_transfer.transports.meeting import Meeting


class LinkMeeting(Meeting):
    """Made when the pair is about to be: its time begins now. Only the thread that receives on the link uses it."""

    def __init__(self, sock: FramedSocket, *, pair_epoch: int, timeout_s: float) -> None:
        self._sock = sock
        self._pair_epoch = pair_epoch
        self._timeout_s = timeout_s
        self._ends_s = time.monotonic() + timeout_s

    def tell(self, key: str, value: bytes) -> None:
        """Raises LinkLost."""
        self._sock.send(Meet(pair_epoch=self._pair_epoch, key=key, value=value))

    def hear(self) -> tuple[str, bytes]:
        """Raises LinkLost, and ChannelLost when the time is over or something else is said."""
        message = self._sock.receive(self._ends_s - time.monotonic())
        if message is None:
            raise ChannelLost(f"the peer's agent does not say within {self._timeout_s:g} s where to meet")
        if not isinstance(message, Meet) or message.pair_epoch != self._pair_epoch:
            raise ChannelLost(f"an unexpected {type(message).__name__} where pair {self._pair_epoch} was to be met")
        return message.key, message.value
