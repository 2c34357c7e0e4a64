"""Dequantises GGUF blocks straight into a float32 buffer; the common types here, the others by the `gguf` package.

The package works on 16 rows at a time and returns a new array; here pieces that fit the cache are written in place,
with the same float32 operations in the same order, so that the values are equal bit for bit. Block formats:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

PIECE_BLOCKS = 4096  # of 32 values: half a MiB of results, within the second-level cache

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def dequantise_into(stored: Bytes, type_id: int, out: Floats) -> None:
    """Writes the values of `stored` [rows, bytes of a row] into `out` [rows, columns], which is contiguous.

    Raises:
        NotImplementedError: nobody here knows the type.
    """
    kind = GGMLQuantizationType(type_id)
    if kind is GGMLQuantizationType.F32:
        out[...] = stored.view(np.float32)
        return
    if kind not in DIRECT:
        out[...] = dequantize(stored, kind)
        return
    block_bytes, write = DIRECT[kind]
    blocks, values = stored.reshape(-1, block_bytes), out.reshape(-1, 32)
    for first in range(0, len(blocks), PIECE_BLOCKS):
        write(blocks[first : first + PIECE_BLOCKS], values[first : first + PIECE_BLOCKS])


def _halfs(blocks: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes, values: Floats) -> None:
    # Low halves of the 16 bytes are the first 16 values, high halves the others.
    halves = np.empty((len(packed), 2, 16), dtype=np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=halves[:, 0])
    np.right_shift(packed, np.uint8(4), out=halves[:, 1])
    values[...] = halves.reshape(-1, 32)


def _q4_0(blocks: Bytes, values: Floats) -> None:
    _nibbles(blocks[:, 2:], values)
    values -= np.float32(8)
    values *= _halfs(blocks, 0)


def _q4_1(blocks: Bytes, values: Floats) -> None:
    _nibbles(blocks[:, 4:], values)
    values *= _halfs(blocks, 0)
    values += _halfs(blocks, 2)


def _q8_0(blocks: Bytes, values: Floats) -> None:
    values[...] = np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    values *= _halfs(blocks, 0)


# Bytes of a block of 32 values, and what writes them.
DIRECT: dict[GGMLQuantizationType, tuple[int, Callable[[Bytes, Floats], None]]] = {
    GGMLQuantizationType.Q4_0: (18, _q4_0),
    GGMLQuantizationType.Q4_1: (20, _q4_1),
    GGMLQuantizationType.Q8_0: (34, _q8_0),
}
