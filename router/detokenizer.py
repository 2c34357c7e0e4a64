"""Turns a request's tokens into text as they come: whole characters only, special tokens left out, stops found.

The text put together is that of decoding all ids at once, whatever the borders between tokens and between batches.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from router.tokenizer import Tokenizer

_PREFIX_TOKENS = 6  # of the prompt, so that a leading space is seen by decoders that drop one at the start
_HELD_TOKENS_MAX = 8  # a character has at most four bytes: what is longer incomplete stays so
_REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    """Text of tokens that come one by one."""

    def step(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        ...


class ByteText:
    """For byte-level vocabularies: each id is a run of bytes, so the text is an incremental UTF-8 decoding of them."""

    __slots__ = ("_decoder", "_skipped", "_spelled")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._skipped = tokenizer.special_ids
        self._spelled = tokenizer.token_bytes

    def step(self, token_id: int) -> str:
        """As TextStream.step."""
        return "" if token_id in self._skipped else self._decoder.decode(self._spelled(token_id))

    def flush(self) -> str:
        """As TextStream.flush."""
        return self._decoder.decode(b"", True)


class WindowText:
    """For all other vocabularies: decodes a short window twice, before and after the new token.

    The method of vLLM's detokenize_incrementally and of Hugging Face's text-generation-inference: text that still
    ends in a replacement character is held back.
    """

    __slots__ = ("_ids", "_read", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_PREFIX_TOKENS:])
        self._read = len(self._ids)

    def step(self, token_id: int) -> str:
        """As TextStream.step."""
        self._ids.append(token_id)
        before, after = self._window()
        incomplete = after.endswith(_REPLACEMENT) and len(self._ids) - self._read < _HELD_TOKENS_MAX
        if len(after) <= len(before) or incomplete:
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """As TextStream.flush."""
        before, after = self._window()
        self._read = len(self._ids)
        return after[len(before) :]

    def _window(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._ids[: self._read]), decode(self._ids)


def text_stream(tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> TextStream:
    """The text stream that suits the tokenizer; `prompt` is what precedes the answer."""
    return ByteText(tokenizer) if tokenizer.byte_level else WindowText(tokenizer, prompt)


class _Pattern:
    """A stop string as a Knuth-Morris-Pratt automaton: `matched` is the longest prefix of it that ends the text."""

    __slots__ = ("failure", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self.failure = [0] * len(text)
        length = 0
        for position in range(1, len(text)):
            while length and text[position] != text[length]:
                length = self.failure[length - 1]
            length += text[position] == text[length]
            self.failure[position] = length

    def advance(self, character: str) -> bool:
        """Takes one character; True when the stop string is complete."""
        matched, text = self.matched, self.text
        while matched and character != text[matched]:
            matched = self.failure[matched - 1]
        matched += character == text[matched]
        self.matched = matched
        return matched == len(text)


class StopStrings:
    """Finds the first stop string in text that comes in pieces, and holds back what may be the beginning of one.

    The stop that is complete first wins; of several complete at the same character the longest. Time is linear in the
    text for each stop string, however the pieces fall.
    """

    __slots__ = ("_held", "_patterns")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._patterns = [_Pattern(stop) for stop in stops]
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Takes new text; returns what may be sent now, and the stop string when one is complete.

        What is sent ends before the stop string; nothing may be fed after it.
        """
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            character = buffer[position]
            complete = [pattern for pattern in self._patterns if pattern.advance(character)]
            if complete:
                stop = max((pattern.text for pattern in complete), key=len)
                self._held = ""
                return buffer[: position + 1 - len(stop)], stop
        hold = max((pattern.matched for pattern in self._patterns), default=0)
        cut = len(buffer) - hold
        self._held = buffer[cut:]
        return buffer[:cut], None

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held
