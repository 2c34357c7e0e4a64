"""Reads the metadata at the head of a GGUF file, without numpy, torch or the tensors.

The format is llama.cpp's (ggml/docs/gguf.md). The `gguf` package reads the same, but touches every tensor and takes
two seconds where this takes a tenth: the router only wants the vocabulary and a few numbers.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

MetadataValue = bool | int | float | str | list["MetadataValue"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Value type -> struct format, for the types of fixed size.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NESTING_MAX = 4


class GGUFError(ValueError):
    """The file is not a GGUF file, is cut short, or is of a version that is not known."""


def read_metadata(path: Path) -> dict[str, MetadataValue]:
    """All key-value pairs of the GGUF file at `path`.

    Raises:
        GGUFError: it cannot be read as GGUF; the message names the file and what is wrong.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise GGUFError(f"{path}: is empty") from error
    with view:
        try:
            return _Reader(view).read_all()
        except (struct.error, IndexError, UnicodeDecodeError, GGUFError) as error:
            raise GGUFError(f"{path}: not readable as GGUF: {error}") from error


class _Reader:
    """A cursor over the bytes of the file."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self._at = 0

    def read_all(self) -> dict[str, MetadataValue]:
        if self._view[:4] != _MAGIC:
            raise GGUFError(f"it begins with {self._view[:4]!r}, not {_MAGIC!r}")
        self._at = 4
        version = self._number("I")
        if version not in _VERSIONS:
            raise GGUFError(f"version {version} is not one of {_VERSIONS}")
        self._number("Q")  # tensors
        num_pairs = self._number("Q")
        pairs: dict[str, MetadataValue] = {}
        for _ in range(int(num_pairs)):
            key = self._string()
            pairs[key] = self._value(int(self._number("I")), 0)
        return pairs

    def _number(self, form: str) -> bool | int | float:
        value: bool | int | float = struct.unpack_from("<" + form, self._view, self._at)[0]
        self._at += struct.calcsize("<" + form)
        return value

    def _string(self) -> str:
        length = int(self._number("Q"))
        end = self._at + length
        if end > len(self._view):
            raise GGUFError(f"a string of {length} bytes at {self._at} reaches past the end of the file")
        text = self._view[self._at : end].decode("utf-8")
        self._at = end
        return text

    def _value(self, kind: int, depth: int) -> MetadataValue:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(depth)
        form = _FIXED.get(kind)
        if form is None:
            raise GGUFError(f"value type {kind} is not known")
        return self._number(form)

    def _array(self, depth: int) -> list[MetadataValue]:
        if depth >= _NESTING_MAX:
            raise GGUFError(f"arrays are nested deeper than {_NESTING_MAX}")
        kind, length = int(self._number("I")), int(self._number("Q"))
        if length > len(self._view) - self._at:
            raise GGUFError(f"an array of {length} values at {self._at} reaches past the end of the file")
        form = _FIXED.get(kind)
        if form is not None:
            values = list(struct.unpack_from(f"<{length}{form}", self._view, self._at))
            self._at += struct.calcsize(f"<{length}{form}")
            return values
        return [self._value(kind, depth + 1) for _ in range(length)]
