"""What the router needs to know of a model: its name, its context and its tokenizer. Without weights or torch."""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cluster.config import FAKE_CONTEXT_TOKENS, FAKE_MODEL, FAKE_VOCAB_SIZE, ClusterConfig
from engine.model_files import find_model, read_arch
from router.tokenizer import Tokenizer, load_tokenizer
from router.tokenizer_settings import TokenizerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAtTheEdge:
    """A model without its weights."""

    name: str
    context_tokens: int
    tokenizer: Tokenizer


def describe(config: ClusterConfig) -> ModelAtTheEdge:
    """Finds and describes the configured model. Raises ModelError or TokenizerError, both ValueErrors."""
    if config.model == FAKE_MODEL:
        return ModelAtTheEdge(name=FAKE_MODEL, context_tokens=FAKE_CONTEXT_TOKENS, tokenizer=_byte_tokenizer())
    files = find_model(config.model)
    arch = read_arch(files)
    return ModelAtTheEdge(
        name=files.name, context_tokens=arch.context_tokens, tokenizer=load_tokenizer(files.path)
    )  # fmt: skip


def byte_backend() -> tokenizers.Tokenizer:
    """One token a byte, in the order of byte-level BPE's alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_tokenizer() -> Tokenizer:
    """A token a byte, and a chat template that only joins the turns."""
    settings = TokenizerSettings(
        vocab_size=FAKE_VOCAB_SIZE,
        context_tokens=FAKE_CONTEXT_TOKENS,
        eos_token_ids=(),
        chat_template="{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}",
    )
    return Tokenizer(byte_backend(), settings)
