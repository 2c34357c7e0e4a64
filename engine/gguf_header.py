"""The header of a GGUF file: its metadata, and where which tensor lies. Long arrays are passed over, not read.

The `gguf` package's reader keeps every token string as an array of its own, which takes seconds at start-up; only its
dequantisation is used. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from engine.arch import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SHORT_ARRAY = 64  # longer arrays (vocabularies) are given by their length
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
MAX_DIMS = 4
MAX_NESTING = 4  # of arrays in arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """A tensor of the file. `shape` has the slowest dimension first; `start` is a byte offset in the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """Metadata by key (long arrays by their length) and tensors by name."""

    metadata: dict[str, object]
    tensors: dict[str, TensorPlace]


def read_header(path: Path) -> GgufHeader:
    """Reads the header of `path`.

    Raises:
        ModelError: the file is no GGUF file of a supported version, or it is cut off or damaged.
    """
    if path.stat().st_size == 0:
        raise ModelError(f"{path}: not a GGUF file (it is empty); give a folder or a .gguf file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        if cursor.take(len(MAGIC)) != MAGIC:
            raise ModelError(f"{path}: not a GGUF file; give a folder or a .gguf file")
        version = cursor.number("<I")
        if version not in VERSIONS:
            raise ModelError(f"{path}: GGUF version {version} is not supported; supported are {VERSIONS}")
        num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
        metadata: dict[str, object] = {}
        for _ in range(num_keys):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("<I"))
        found = [cursor.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{path}: GGUF key general.alignment is {alignment!r}; it must be a positive number")
        begin = -(-cursor.at // alignment) * alignment
    tensors = {
        name: TensorPlace(name=name, shape=shape, type_id=type_id, start=begin + offset)
        for name, shape, type_id, offset in found
    }
    return GgufHeader(metadata=metadata, tensors=tensors)


class _Cursor:
    """Reads forward and refuses to read past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        end = self.at + num_bytes
        if end > len(self.data):
            raise ModelError(f"{self.path}: the GGUF file is cut off in its header; fetch it again")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, kind: str) -> int:
        """The next whole number of a struct format."""
        return int(struct.unpack(kind, self.take(struct.calcsize(kind)))[0])

    def string(self) -> str:
        """The next string."""
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: the GGUF header is damaged ({error}); fetch the file again") from error

    def value(self, kind: int, depth: int = 0) -> object:
        """The next value of a GGUF type; a long array by its length. `depth`: arrays that it is in."""
        if kind in SCALARS:
            return struct.unpack(SCALARS[kind], self.take(struct.calcsize(SCALARS[kind])))[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ModelError(f"{self.path}: the GGUF header is damaged (value type {kind}); fetch the file again")
        if depth >= MAX_NESTING:
            raise ModelError(
                f"{self.path}: the GGUF header is damaged (arrays nest deeper than {MAX_NESTING}); fetch the file again"
            )
        item, num = self.number("<I"), self.number("<Q")
        if num <= SHORT_ARRAY:
            return [self.value(item, depth + 1) for _ in range(num)]
        if item in SCALARS:
            self.take(struct.calcsize(SCALARS[item]) * num)
        else:
            self._pass_strings(item, num)
        return num

    def _pass_strings(self, item: int, num: int) -> None:
        if item != STRING:
            raise ModelError(f"{self.path}: the GGUF header is damaged (array of type {item}); fetch the file again")
        # The hot loop of opening a file: some hundred thousand strings.
        length_at, data, at, end = struct.Struct("<Q").unpack_from, self.data, self.at, len(self.data)
        for _ in range(num):
            if at + 8 > end:
                break
            at += 8 + length_at(data, at)[0]
        self.at = at
        self.take(0)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """The next tensor's name, shape, type and offset."""
        name = self.string()
        num_dims = self.number("<I")
        if num_dims > MAX_DIMS:
            raise ModelError(
                f"{self.path}: tensor {name} has {num_dims} dimensions; the file is damaged, fetch it again"
            )
        shape = tuple(self.number("<Q") for _ in range(num_dims))
        return name, shape[::-1], self.number("<I"), self.number("<Q")
