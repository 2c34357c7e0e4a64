"""What a model's files say about its text, beside the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """Limits, ends and the chat template. `context_tokens` 0: the files do not say; `chat_template` empty: none."""

    vocab_size: int  # rows of the embedding: ids are below it
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ... for the template
    chat_template: str = ""
