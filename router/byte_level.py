"""GPT-2's spelling of bytes as printable characters, which all byte-level vocabularies use.

From GPT-2's encoder.py, bytes_to_unicode: bytes that print stand for themselves, the others for the characters from
U+0100 on, in their order.
"""

from __future__ import annotations

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in set(_PRINTABLE)]

CHARACTER_OF: dict[int, str] = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + number) for number, byte in enumerate(_HIDDEN)
}
BYTE_OF: dict[str, int] = {character: byte for byte, character in CHARACTER_OF.items()}


def spell(data: bytes) -> str:
    """`data` as the vocabulary spells it."""
    return "".join(CHARACTER_OF[byte] for byte in data)


def unspell(piece: str) -> bytes:
    """The bytes of one piece of a vocabulary; a piece outside the alphabet stands for its own UTF-8."""
    try:
        return bytes([BYTE_OF[character] for character in piece])
    except KeyError:
        return piece.encode()
