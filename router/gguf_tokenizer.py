"""Builds a `tokenizers` tokenizer from a GGUF file's metadata, with the same ids as transformers gives for the file.

Byte-level BPE (`tokenizer.ggml.model` = gpt2: Llama 3, Qwen, SmolLM, ...) is built here, in a fraction of a second.
Other kinds go through transformers' own conversion in a process of its own, since that needs torch; its result is kept
in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from router.byte_level import BYTE_OF, spell
from router.gguf_metadata import MetadataValue
from router.tokenizer_settings import TokenizerSettings

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_CONVERT_TIMEOUT_S = 300

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` -> the expression that splits text before merging (transformers, gguf_tokenizer_mapping.py).
# Those not named here are split as GPT-2 does; those that we do not build ourselves go through transformers.
_SPLITS = {
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
_GPT2_SPLIT = {"", "default", "gpt-2", "smollm"}

# Converts with transformers: argv are the GGUF file and the file to write.
_CONVERTER = (
    "import sys, pathlib; from transformers import AutoTokenizer; f = pathlib.Path(sys.argv[1]);"
    "AutoTokenizer.from_pretrained(str(f.parent), gguf_file=f.name).backend_tokenizer.save(sys.argv[2])"
)


def settings_of(metadata: Mapping[str, MetadataValue]) -> TokenizerSettings:
    """Limits and special tokens as the metadata gives them. Raises KeyError when there is no vocabulary."""
    architecture = metadata.get("general.architecture", "")
    tokens = _strings(metadata["tokenizer.ggml.tokens"])
    special, eos = {}, []
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and number < len(tokens):
            special[f"{name}_token"] = tokens[number]
    for key in ("eos", "eot", "eom"):  # Llama 3 ends a turn with another token than a text
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and number not in eos:
            eos.append(number)
    vocab_size = metadata.get(f"{architecture}.vocab_size", len(tokens))
    context = metadata.get(f"{architecture}.context_length", 0)
    template = metadata.get("tokenizer.chat_template", "")
    return TokenizerSettings(
        vocab_size=vocab_size if isinstance(vocab_size, int) else len(tokens),
        context_tokens=context if isinstance(context, int) else 0,
        eos_token_ids=tuple(eos),
        special_tokens=special,
        chat_template=template if isinstance(template, str) else "",
    )


def build_tokenizer(path: Path, metadata: Mapping[str, MetadataValue]) -> tokenizers.Tokenizer:
    """The tokenizer that the GGUF file at `path` describes.

    Raises:
        ValueError: transformers cannot convert it either; says why.
    """
    pre = metadata.get("tokenizer.ggml.pre", "")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and (pre in _SPLITS or pre in _GPT2_SPLIT):
        return _byte_level(metadata, str(pre))
    return _converted(path, metadata)


def _byte_level(metadata: Mapping[str, MetadataValue], pre: str) -> tokenizers.Tokenizer:
    tokens = _strings(metadata["tokenizer.ggml.tokens"])
    alphabet = frozenset(BYTE_OF)
    spelled = [token if alphabet.issuperset(token) else spell(token.encode()) for token in tokens]
    vocab = {token: number for number, token in enumerate(spelled)}
    merges = [_pair(merge) for merge in _strings(metadata["tokenizer.ggml.merges"])]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    )
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    assert isinstance(kinds, list)
    # A control token spelled outside the alphabet is mislabelled: adding it would take an id past the vocabulary.
    marked = list(zip(tokens, kinds, strict=False))
    control = [token for token, kind in marked if kind == _CONTROL and alphabet.issuperset(token)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    own = [token for token, kind in marked if kind == _USER_DEFINED and token in vocab]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
    _add_ends(backend, metadata, tokens)
    return backend


def _add_ends(backend: tokenizers.Tokenizer, metadata: Mapping[str, MetadataValue], tokens: list[str]) -> None:
    """A text begins with BOS, and ends with EOS, where the file asks for it."""
    before, after, special = "", "", []
    for name in ("bos", "eos"):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if metadata.get(f"tokenizer.ggml.add_{name}_token") is not True or not isinstance(number, int):
            continue
        special.append((tokens[number], number))
        before, after = (f"{tokens[number]} ", after) if name == "bos" else (before, f" {tokens[number]}")
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}", pair=f"{before}$A{after} {before}$B{after}", special_tokens=special
        )


def _converted(path: Path, metadata: Mapping[str, MetadataValue]) -> tokenizers.Tokenizer:
    """By transformers in another process; the result is cached by the digest of what it was made from."""
    told = {key: value for key, value in metadata.items() if key.startswith(("tokenizer.", "general.architecture"))}
    digest = hashlib.blake2b(repr(sorted(told.items())).encode(), digest_size=16).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "tokenizers"
    cached = folder / f"{digest}.json"
    if not cached.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{digest}.{os.getpid()}.part"
        done = subprocess.run(
            [sys.executable, "-c", _CONVERTER, str(path), str(fresh)],
            capture_output=True, text=True, timeout=_CONVERT_TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"transformers does not convert its tokenizer: {last}")
        fresh.replace(cached)
    return tokenizers.Tokenizer.from_file(str(cached))


def _strings(value: MetadataValue) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"a list of strings is a {type(value).__name__}")
    return [each for each in value if isinstance(each, str)]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
