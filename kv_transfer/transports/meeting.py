"""How the two ends of a torch.distributed pair tell each other where they are: over a link that they share already.

A group is usually built on a TCPStore. Waiting on one whose process is stopped has no bound, and anybody who reaches
its port may write to it. Here the few keys of one pair go over the authenticated link instead, and every wait is that
link's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kv_transfer.transports.channel import ChannelLost

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

MAX_KEYS = 64


class Meeting(ABC):
    """The link, while one pair is made over it."""

    @abstractmethod
    def tell(self, key: str, value: bytes) -> None:
        """Says one key to the other end. Raises ChannelLost or the link's own error."""

    @abstractmethod
    def hear(self) -> tuple[str, bytes]:
        """The next key that the other end says; waits, bounded. Raises ChannelLost or the link's own error."""


def meeting_store(meeting: Meeting) -> Store:
    """A store for one group of two. What its methods raise comes out of the group's constructor."""
    from torch.distributed import Store  # type: ignore[attr-defined]

    class MeetingStore(Store):
        def __init__(self) -> None:
            super().__init__()
            self._known: dict[str, bytes] = {}

        def set(self, key: str, value: bytes) -> None:  # type: ignore[override] # bytes is what C++ hands over
            self._known[key] = bytes(value)
            meeting.tell(key, bytes(value))

        def get(self, key: str) -> bytes:
            while key not in self._known:
                if len(self._known) >= MAX_KEYS:
                    raise ChannelLost(f"{key!r} is not among the {MAX_KEYS} keys that were told")
                name, value = meeting.hear()
                self._known[name] = value
            return self._known[key]

        def wait(self, keys: Iterable[str], timeout: object = None) -> None:
            for key in keys:
                self.get(key)

    return MeetingStore()
