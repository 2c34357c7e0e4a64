"""Choices drawn from the bytes of one input, so that a fuzzer that changes a byte changes a choice."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

# Where checks are off by one, and where types end.
EDGES = (
    0, 1, 2, 3, 7, 15, 16, 17, 127, 128, 255, 256, 1023, 1024, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1,
)  # fmt: skip
REALS = (
    0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-6, 1e-45, 5e-324, 1e38, -1e38, 1e308, -1e308,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", "a", "r", "0", "-1", "\x00", "\u00e9", "\U0001f680", "a b", "#", "x" * 129, "../..", "{}", "[1]", "null",
    "\u202e", "\ufeff", "decode-0", "prefill-0",
)  # fmt: skip


class Draws:
    """Reads the input front to back. Past its end every choice is the first one: an input always means something."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that were not used yet."""
        return max(0, len(self._data) - self._at)

    def byte(self) -> int:
        """From 0 to 255."""
        at = self._at
        self._at = at + 1
        return self._data[at] if at < len(self._data) else 0

    def below(self, num: int) -> int:
        """From 0 to num - 1; `num` is at most 65,536."""
        value = self.byte() if num <= 256 else self.byte() | self.byte() << 8
        return value % num

    def chance(self, of_256: int) -> bool:
        """Happens `of_256` times of 256. Not past the input's end."""
        return self.byte() > 255 - of_256

    def pick(self, choices: Sequence[T]) -> T:
        """One of them."""
        return choices[self.below(len(choices))]

    def raw(self, num: int) -> bytes:
        """The next bytes, fewer at the input's end."""
        taken = self._data[self._at : self._at + num]
        self._at += num
        return taken

    def whole(self, bits: int) -> int:
        """A number without sign: small, at an edge, or any."""
        kind = self.byte()
        if kind < 160:
            return kind % 8
        if kind < 224:
            return self.pick(EDGES) & ((1 << bits) - 1)
        return int.from_bytes(self.raw(bits // 8), "little")

    def real(self) -> float:
        """A double: small, strange, or any."""
        kind = self.byte()
        if kind < 96:
            return kind / 32
        if kind < 224:
            return self.pick(REALS)
        value: float = struct.unpack("<d", self.raw(8).ljust(8, b"\x00"))[0]
        return value

    def text(self, known: Sequence[str] = ()) -> str:
        """A text: one of the known, a strange one, or any."""
        kind = self.byte()
        if known and kind < 176:
            return known[kind % len(known)]
        if kind < 240:
            return self.pick(TEXTS)
        return self.raw(self.below(24)).decode("utf-8", errors="replace")
