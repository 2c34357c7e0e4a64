"""Tokenizers: the same ids as transformers, chats as its templates render them, folders, GGUF files, broken files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from edge import smol
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.model_files import DEFAULT_MODEL, find_model
from router.byte_level import BYTE_OF, spell, unspell
from router.chat import ChatTemplate, check_role, text_of_content
from router.gguf_metadata import GGUFError, read_metadata
from router.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from tandem.errors import InvalidRequest

CORPUS = [
    "",
    " ",
    "Hello, world! It's 3.14 o'clock; don't panic.",
    "  leading and trailing  \n\n\t tabs\r\nand   runs 1  22   333 ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\n\nclass A:\n\tpass",
    '{"a": [1, 2.5e-3, null], "b": "\\u00e9"}',
    "Ünïcödé — ‘quotes’ … € ½ ﬁ",
    "日本語のテキスト、한국어, Русский, العربية, עברית, ไทย, हिन्दी",
    "\U0001f600 \U0001f469‍\U0001f469‍\U0001f467 \U0001f1e9\U0001f1ea ☃️ \U0001d11e",
    "a\u0301 \u200b\u200d\ufeff\u00a0\u2028 \x00\x01\x7f",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><file_sep><repo_name>x",
    "<|im_start |> <|im_end| > < |endoftext|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "https://example.org/path?query=1&b=%20#frag",
    "E=mc² ∑∫√ ≠≤≥ αβγ ①②③",
]
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
]


@pytest.fixture(scope="module")
def reference() -> Any:
    """The tokenizer that transformers makes of the same file."""
    from transformers import AutoTokenizer

    path = find_model(DEFAULT_MODEL).path
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.mark.model
@pytest.mark.parametrize("text", CORPUS)
def test_same_ids_and_text_as_transformers(text: str, reference: Any) -> None:
    ids = smol().encode(text)
    assert list(ids) == reference(text)["input_ids"]
    for skip in (True, False):
        assert smol().decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


@pytest.mark.model
@given(st.text())
def test_same_ids_for_any_text(reference: Any, text: str) -> None:
    assert list(smol().encode(text)) == reference(text)["input_ids"]


@pytest.mark.model
@pytest.mark.parametrize("chat", CHATS)
def test_same_chat_prompt_as_transformers(chat: list[dict[str, str]], reference: Any) -> None:
    want = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert smol().render_chat(chat) == want


@pytest.mark.model
def test_limits_of_the_default_model(reference: Any) -> None:
    assert smol().vocab_size == 49152
    assert smol().context_tokens == 8192
    assert smol().eos_token_ids == (reference.eos_token_id,)
    assert smol().special_ids == set(reference.all_special_ids) | set(range(17))


@pytest.mark.model
@given(st.text(min_size=1))
def test_text_too_long_to_fit_is_known_without_encoding(text: str) -> None:
    assume(smol().decode(smol().encode(text), skip_special_tokens=False) == text)
    num_tokens = len(smol().encode(text))
    assert len(text) <= smol().characters_max(num_tokens)


@given(st.binary())
def test_byte_spelling_is_undone(data: bytes) -> None:
    assert unspell(spell(data)) == data


def test_byte_alphabet_is_that_of_the_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(BYTE_OF) == set(ByteLevel.alphabet())
    assert unspell("日<") == "日<".encode()


def save(folder: Path, tokenizer: Tokenizer, **files: object) -> Path:
    """A model folder with this tokenizer and these JSON files."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.model
def test_folder_gives_ids_ends_context_and_template(tmp_path: Path) -> None:
    folder = save(
        tmp_path,
        smol(),
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "chat_template": "old"},
        config={"vocab_size": 50000, "max_position_embeddings": 777, "eos_token_id": 0},
        generation_config={"eos_token_id": [2, 0]},
    )
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    loaded = load_tokenizer(folder)
    assert loaded.encode(CORPUS[2]) == smol().encode(CORPUS[2])
    assert (loaded.vocab_size, loaded.context_tokens, loaded.eos_token_ids) == (50000, 777, (2, 0))
    assert loaded.render_chat(CHATS[0]) == "<|im_start|>hi<|im_end|>"
    assert loaded.decode([49999]) == ""


@pytest.mark.model
def test_folder_without_configs_falls_back(tmp_path: Path) -> None:
    template = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    loaded = load_tokenizer(
        save(tmp_path, smol(), tokenizer_config={"eos_token": "<|im_end|>", "chat_template": template})
    )
    assert (loaded.vocab_size, loaded.context_tokens, loaded.eos_token_ids) == (49152, 0, (2,))
    assert loaded.render_chat(CHATS[0]) == "d"


@pytest.mark.model
def test_model_without_template_says_where_to_go(tmp_path: Path) -> None:
    loaded = load_tokenizer(save(tmp_path, smol()))
    with pytest.raises(InvalidRequest, match="no chat template; send a prompt to /v1/completions"):
        loaded.render_chat(CHATS[0])


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"missing\.gguf"):
        load_tokenizer(tmp_path / "missing.gguf")


def gguf(*pairs: tuple[str, int, bytes]) -> bytes:
    """The head of a GGUF file with these key-value pairs."""
    body = b"".join(struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + v for key, kind, v in pairs)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    nested = struct.pack("<IQ", 9, 1) + struct.pack("<IQ2H", 2, 2, 7, 8)
    file.write_bytes(
        gguf(
            ("s", 8, string("é")),
            ("b", 7, b"\x01"),
            ("i", 5, struct.pack("<i", -3)),
            ("f", 12, struct.pack("<d", 0.5)),
            ("strings", 9, struct.pack("<IQ", 8, 2) + string("x") + string("")),
            ("nested", 9, nested),
        )
    )
    assert read_metadata(file) == {"s": "é", "b": True, "i": -3, "f": 0.5, "strings": ["x", ""], "nested": [[7, 8]]}


GOOD = gguf(("s", 8, string("text")), ("a", 9, struct.pack("<IQ3I", 4, 3, 1, 2, 3)))
HUGE = struct.pack("<Q", 1 << 62)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGML" + GOOD[4:], "begins with b'GGML'"),
        (GOOD[:4] + b"\x09" + GOOD[5:], "version 9"),
        (gguf(("s", 8, HUGE)), "past the end"),
        (gguf(("a", 9, struct.pack("<I", 8) + HUGE)), "past the end"),
        (gguf(("x", 77, b"")), "value type 77"),
        (gguf(("a", 9, struct.pack("<IQ", 9, 1) * 9)), "nested deeper"),
        (gguf(("s", 8, struct.pack("<Q", 1) + b"\xff")), "utf-8"),
    ],
)
def test_broken_gguf_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(GGUFError, match=message):
        read_metadata(file)


@given(st.integers(0, len(GOOD) - 1))
def test_gguf_cut_short_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    file = tmp_path_factory.mktemp("cut") / "a.gguf"
    file.write_bytes(GOOD[:length])
    with pytest.raises(GGUFError):
        read_metadata(file)


@pytest.mark.model
def test_other_kinds_of_vocabulary_go_through_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentencepiece vocabulary, converted once and then read from the cache."""
    import gguf as writer_package

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi", "▁hi"]
    kinds = [2, 3, 3, *([6] * 256), 1, 1, 1, 1, 1]
    writer = writer_package.GGUFWriter(str(tmp_path / "spm.gguf"), "llama")
    writer.add_context_length(99)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_tokenizer(tmp_path / "spm.gguf")
    assert (loaded.vocab_size, loaded.context_tokens, loaded.eos_token_ids) == (264, 99, (2,))
    assert not loaded.byte_level
    ids = loaded.encode("hi é")
    assert ids[:2] == (1, pieces.index("▁hi"))
    assert loaded.decode(ids) == "hi é"
    (cached,) = (tmp_path / "cache" / "tandem" / "tokenizers").iterdir()
    monkeypatch.setattr("subprocess.run", None)
    assert load_tokenizer(tmp_path / "spm.gguf").encode("hi é") == ids
    cached.unlink()


def test_template_environment_is_that_of_transformers() -> None:
    source = (
        "{%- for m in messages %}\n  {% if m.role == 'stop' %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n{%- endfor %}"
        "{{ strftime_now('%%') }}{{ bos_token }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": "é<"}, {"role": "stop", "content": ""}]) == '"é<"%<s>'


def test_template_can_refuse_and_cannot_escape() -> None:
    with pytest.raises(InvalidRequest, match="refuses them: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render([])
    with pytest.raises(InvalidRequest, match="refuses them"):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", {}).render([])
    with pytest.raises(InvalidRequest, match="refuses them"):
        ChatTemplate("{% for i in range(10**9) %}{% endfor %}", {}).render([])
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% for %}", {})


def test_content_parts_and_roles() -> None:
    assert text_of_content([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "c") == "ab"
    assert text_of_content(None, "c") == ""
    with pytest.raises(InvalidRequest, match="c: is a dict"):
        text_of_content({}, "c")
    assert check_role("developer", "r") == "system"
