"""A random model of little compute and much KV, 64 KiB a token: its moves are as heavy as those of a large model."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from cluster.config import FAKE_VOCAB_SIZE
from cluster.served_model import byte_backend

NAME = "fat-kv"
VOCAB_SIZE = FAKE_VOCAB_SIZE  # a token is a byte


def write(folder: Path, *, seed: int = 1) -> Path:
    """Writes the model, four layers of 16 KV heads of 128, to `folder`/fat-kv and returns that path."""
    path = folder / NAME
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        max_position_embeddings=8192,
        initializer_range=0.3,  # wide, so that tokens depend on what stands far before them
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(path)
    byte_backend().save(str(path / "tokenizer.json"))
    return path
