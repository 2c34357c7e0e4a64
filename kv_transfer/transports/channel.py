"""What a channel is: the two ends of one direction between two pools, over which whole frames move.

The source's end `prepare`s a frame (its blocks may not change from here on), the control link announces it, the
target's end `post`s memory for it, the source `push`es, the target `take`s it and checks it. Where the target pulls,
`post` and `push` do nothing and `needs_go` is False. Ends are not thread-safe unless their module says more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from kv_transfer.messages import FrameHeader


class ChannelLost(Exception):
    """The channel broke or hung: both ends are to be closed and made anew under another pair epoch."""


class FrameCorrupt(Exception):
    """The bytes that arrived are not those that were announced; nothing reads them. The channel goes on."""


class FrameForged(FrameCorrupt):
    """The bytes that arrived have the checksum that was announced, and are not those of a member of the cluster."""


class SourceEnd(ABC):
    """The end that frames leave from."""

    needs_go: ClassVar[bool]
    tag_key: bytes = b""  # frames carry a keyed tag of their bytes; empty: they need none

    @abstractmethod
    def prepare(self, header: FrameHeader) -> int:
        """Makes the frame ready to leave and gives its checksum. Raises ValueError on blocks that are not there."""

    def tag(self, header: FrameHeader) -> bytes:
        """The keyed tag of a prepared frame, or empty."""
        return b""

    @abstractmethod
    def push(self, header: FrameHeader) -> None:
        """Starts to move a prepared frame; does not wait. Raises ChannelLost."""

    @abstractmethod
    def finish(self, header: FrameHeader) -> None:
        """The target has answered for the frame: forget it. Raises ChannelLost when it did not leave whole."""

    @abstractmethod
    def close(self) -> None:
        """Ends whatever is under way; afterwards nothing reads the pool over this channel. Idempotent."""


class TargetEnd(ABC):
    """The end that frames arrive at."""

    tag_key: bytes = b""  # as of SourceEnd

    @abstractmethod
    def post(self, header: FrameHeader) -> None:
        """Gets memory ready for the frame, in the order of announcements. Raises ChannelLost when none frees up."""

    @abstractmethod
    def take(self, header: FrameHeader, checksum: int, tag: bytes = b"") -> None:
        """Waits for the frame, bounded, and has it checked in its target blocks when it returns.

        `tag` is what came with the announcement. Called in the order of `post`. Raises FrameCorrupt, ChannelLost, and
        ValueError on blocks that are not there.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends whatever is under way; afterwards nothing writes the pool over this channel. Idempotent."""
