"""Text of tokens as they come is the text of all of them; stop strings are found however the text is cut."""

from __future__ import annotations

import pytest
from edge import smol
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from router.detokenizer import ByteText, StopStrings, WindowText, text_stream
from router.tokenizer import Tokenizer
from router.tokenizer_settings import TokenizerSettings

EMOJI = "\U0001f469‍\U0001f680 wörld 日本"


def pieces_tokenizer() -> Tokenizer:
    """A vocabulary as sentencepiece makes it: pieces with a mark for the space, and bytes for all else."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁▁", "é", "日", "\ufffd"]
    backend = Backend(
        models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    settings = TokenizerSettings(vocab_size=len(pieces), context_tokens=0, eos_token_ids=())
    return Tokenizer(backend, settings)


PIECES = pieces_tokenizer()


def joined(stream: ByteText | WindowText, ids: list[int]) -> str:
    """All text of a stream."""
    return "".join([*(stream.step(each) for each in ids), stream.flush()])


@pytest.mark.model
@given(st.lists(st.integers(0, 49151), max_size=60))
@example([0, 1, 2])
@example(list(smol().encode(EMOJI))[:3])
def test_bytes_give_the_text_of_all_ids(ids: list[int]) -> None:
    assert joined(ByteText(smol()), ids) == smol().decode(ids)


@pytest.mark.model
@given(st.text(alphabet=EMOJI + "abc é ü \n", max_size=60))
def test_no_half_character_is_ever_sent(text: str) -> None:
    stream = ByteText(smol())
    sent = ""
    for token_id in smol().encode(text):
        sent += stream.step(token_id)
        assert text.startswith(sent)
    assert sent == text


@given(st.text(alphabet="ab é日\ufffd\U0001f680x", max_size=40))
def test_window_gives_the_text_of_all_ids(text: str) -> None:
    ids = list(PIECES.backend.encode(text.replace(" ", "▁")).ids)
    assert joined(WindowText(PIECES), ids) == PIECES.decode(ids)


def test_window_keeps_the_space_after_the_prompt_and_ends_with_garbage() -> None:
    vocab = PIECES.backend.get_vocab()
    a, lone = vocab["▁a"], vocab["<0xC3>"]
    assert joined(WindowText(PIECES), [a, a]) == "a a"
    assert joined(WindowText(PIECES, [a, a]), [a, a]) == " a a"
    stream = WindowText(PIECES, [a])
    texts = [stream.step(lone) for _ in range(40)]
    assert len("".join(texts)) >= 32, "an endless run of broken bytes is held back for ever"
    assert "".join([*texts, stream.flush()]) == "\ufffd" * 40


def test_kind_follows_the_tokenizer() -> None:
    assert isinstance(text_stream(PIECES), WindowText)
    assert isinstance(text_stream(smol()), ByteText)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What is sent of `text`: up to the stop that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=6), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=1),
)
@example("aabaabaaab", ["aabaaab"], [1])
@example("abcabd", ["abd", "bca"], [3])
def test_stops_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    want_text, want_stop = expected(text, stops)
    finder, sent, at, turn = StopStrings(stops), "", 0, 0
    found = None
    while at < len(text) and found is None:
        size = cuts[turn % len(cuts)]
        more, found = finder.feed(text[at : at + size])
        sent += more
        at, turn = at + size, turn + 1
        assert want_text.startswith(sent), "text was sent that belongs to a stop string"
    if found is None:
        sent += finder.flush()
    assert (sent, found) == (want_text, want_stop)


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    finder = StopStrings(["</end>"])
    assert finder.feed("one < two </e") == ("one < two ", None)
    assert finder.feed("x") == ("</ex", None)
    assert finder.feed("</") == ("", None)
    assert finder.flush() == "</"


def test_stops_that_nearly_match_all_along() -> None:
    finder = StopStrings(["a" * 255 + chr(98 + number) for number in range(16)])
    sent = ""
    for _ in range(2000):
        more, found = finder.feed("a")
        assert found is None
        sent += more
    assert len(sent) == 2000 - 255, "what may begin a stop is held back, and no more"
    assert finder.feed("c") == ("", "a" * 255 + "c")
