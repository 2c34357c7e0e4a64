"""The keys of a terminal, one at a time and without an echo, and a wait for whichever comes first: a key or a call."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from enum import StrEnum
from types import FrameType, TracebackType
from typing import Any

READ_BYTES = 256


class Key(StrEnum):
    """What was pressed."""

    QUIT = "quit"
    SORT = "sort"
    PAUSE = "pause"
    UP = "up"
    DOWN = "down"
    PAGE_UP = "page up"
    PAGE_DOWN = "page down"
    TOP = "top"
    BOTTOM = "bottom"


# What terminals send. A sequence comes before its own beginnings.
SENT: tuple[tuple[bytes, Key], ...] = (
    (b"\x1b[A", Key.UP),
    (b"\x1bOA", Key.UP),
    (b"\x1b[B", Key.DOWN),
    (b"\x1bOB", Key.DOWN),
    (b"\x1b[5~", Key.PAGE_UP),
    (b"\x1b[6~", Key.PAGE_DOWN),
    (b"\x1b[H", Key.TOP),
    (b"\x1b[1~", Key.TOP),
    (b"\x1b[F", Key.BOTTOM),
    (b"\x1b[4~", Key.BOTTOM),
    (b"q", Key.QUIT),
    (b"Q", Key.QUIT),
    (b"\x04", Key.QUIT),
    (b"s", Key.SORT),
    (b"p", Key.PAUSE),
    (b" ", Key.PAUSE),
    (b"k", Key.UP),
    (b"j", Key.DOWN),
)


def keys_in(sent: bytes) -> list[Key]:
    """The keys in what a terminal has sent; what is none of them is passed over."""
    found = []
    while sent:
        for sequence, key in SENT:
            if sent.startswith(sequence):
                found.append(key)
                sent = sent[len(sequence) :]
                break
        else:
            sent = _without_first(sent)
    return found


def _without_first(sent: bytes) -> bytes:
    """Without its first key: an unknown sequence goes whole, so that its letters are no keys."""
    if sent[:2] not in (b"\x1b[", b"\x1bO"):
        return sent[1:]
    end = next((place for place, byte in enumerate(sent[2:], 2) if 0x40 <= byte <= 0x7E), len(sent) - 1)
    return sent[end + 1 :]


class Keyboard:
    """As a context: standard input, key by key where it is a terminal, as it was afterwards. On the main thread.

    `wake` may be called from any thread, and is what a resize of the window does as well.
    """

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._fd = sys.stdin.fileno() if self.is_terminal else -1
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        self._saved: list[Any] = []

    def __enter__(self) -> Keyboard:
        if self.is_terminal:
            self._saved = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
            settings = termios.tcgetattr(self._fd)
            settings[6][termios.VSUSP] = b"\x00"  # a stopped process would leave the screen as it is
            termios.tcsetattr(self._fd, termios.TCSANOW, settings)
        self._resized = signal.signal(signal.SIGWINCH, self._on_resize)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGWINCH, self._resized)
        if self.is_terminal:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)

    def wake(self) -> None:
        """Ends the wait."""
        try:
            os.write(self._wake_in, b"w")
        except BlockingIOError:
            return  # it is full of calls that nobody has heard yet

    def wait(self, timeout_s: float) -> list[Key]:
        """The keys that were pressed by the first of: a key, a call of `wake`, the time's end."""
        wanted = [self._wake_out, *([self._fd] if self.is_terminal else [])]
        ready, _, _ = select.select(wanted, [], [], timeout_s)
        if self._wake_out in ready:
            os.read(self._wake_out, READ_BYTES)
        if self._fd not in ready:
            return []
        sent = os.read(self._fd, READ_BYTES)
        return keys_in(sent) if sent else [Key.QUIT]  # the terminal is gone

    def _on_resize(self, number: int, frame: FrameType | None) -> None:
        self.wake()
