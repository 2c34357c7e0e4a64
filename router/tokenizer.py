"""The model's tokenizer at the edge: text to ids, chats to ids, ids to text, and the limits that validation needs.

Built on the `tokenizers` library alone: transformers would bring torch into the router.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from router.byte_level import unspell
from router.chat import ChatTemplate
from router.gguf_metadata import read_metadata
from router.gguf_tokenizer import build_tokenizer, settings_of
from router.tokenizer_settings import TokenizerSettings
from tandem.errors import InvalidRequest


class TokenizerError(ValueError):
    """The model's folder or file does not hold a tokenizer that can be used; says what is missing."""


class Tokenizer:
    """Encodes and decodes for one model. Stateless between calls and safe to share."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        self.backend = backend
        self.vocab_size = settings.vocab_size
        self.context_tokens = settings.context_tokens
        self.eos_token_ids = settings.eos_token_ids
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.byte_level = _is_byte_level(backend)
        self._chat = ChatTemplate(settings.chat_template, settings.special_tokens) if settings.chat_template else None
        self._token_bytes: dict[int, bytes] = {}
        # A normalizer may shorten text by any amount; without one, no token spells more than the longest piece.
        exact = self.byte_level and backend.normalizer is None
        self._piece_characters_max = max(map(len, backend.get_vocab())) if exact else 0

    def characters_max(self, num_tokens: int) -> int:
        """No text longer than this has at most `num_tokens` tokens; 0 when that cannot be told.

        Characters whose bytes the vocabulary lacks, which tokenizing drops, are taken for ones that it has.
        """
        return self._piece_characters_max * num_tokens

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The ids of `text`; special tokens spelled out in it become their ids."""
        return tuple(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that the chat template makes of `messages`, to be encoded without adding special tokens.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
        """
        if self._chat is None:
            raise InvalidRequest("messages", "the model has no chat template; send a prompt to /v1/completions instead")
        return self._chat.render(messages)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids that the vocabulary does not name give nothing."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, by itself; special tokens give their spelling."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self.byte_level:
            return unspell(piece)
        return str(self.backend.decode([token_id], skip_special_tokens=False)).encode()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model: `path` is its folder (tokenizer.json and the files beside it) or its GGUF file.

    Raises:
        TokenizerError: what is needed is missing or broken; names the file.
    """
    try:
        return _from_folder(path) if path.is_dir() else _from_gguf(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: no usable tokenizer: {error}") from error


def _from_gguf(path: Path) -> Tokenizer:
    metadata = read_metadata(path)
    return Tokenizer(build_tokenizer(path, metadata), settings_of(metadata))


def _from_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(f"{folder}: has no tokenizer.json; save the model's fast tokenizer there")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every kind of broken file
        raise TokenizerError(f"{file}: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    config = _json(folder / "tokenizer_config.json")
    model = _json(folder / "config.json")
    text_model = model.get("text_config", model)
    assert isinstance(text_model, dict) or text_model is None
    text_model = text_model or model
    special = _special_tokens(config)
    eos = _ids(_json(folder / "generation_config.json").get("eos_token_id")) or _ids(text_model.get("eos_token_id"))
    if not eos:
        eos = _ids(backend.token_to_id(special.get("eos_token", "")))
    settings = TokenizerSettings(
        vocab_size=_whole(text_model.get("vocab_size")) or backend.get_vocab_size(with_added_tokens=True),
        context_tokens=_whole(text_model.get("max_position_embeddings")),
        eos_token_ids=eos,
        special_tokens=special,
        chat_template=_chat_template(folder, config),
    )
    return Tokenizer(backend, settings)


def _json(file: Path) -> dict[str, object]:
    if not file.is_file():
        return {}
    loaded = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(loaded, dict):
        raise TokenizerError(f"{file}: is a {type(loaded).__name__}, must be an object")
    return loaded


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(each for each in values if isinstance(each, int))


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """The named special tokens, which a template may use; each is a string or an object with `content`."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _chat_template(folder: Path, config: Mapping[str, object]) -> str:
    """The template in its own file, else in the tokenizer's config: a string, or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    inside = config.get("chat_template")
    if isinstance(inside, list):
        named = {each.get("name"): each.get("template") for each in inside if isinstance(each, dict)}
        inside = named.get("default")
    return inside if isinstance(inside, str) else ""


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether ids decode to bytes one by one, so that text can be put together without decoding twice."""
    return isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
