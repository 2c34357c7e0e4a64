"""Weights come out of safetensors and GGUF as they went in; damaged, incomplete or dangerous files are refused."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, build, last_logits, prompts

from engine.arch import ModelError
from engine.cpu_runner import CpuRunner
from engine.gguf_dequantise import dequantise_into
from engine.gguf_header import read_header
from engine.gguf_weights import GgufSource
from engine.model_files import ModelFiles, ModelFormat, find_model, read_arch
from engine.tensor_shapes import expected_shapes
from engine.weights import ModelWeights, load_weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that no test changes."""
    folder = tmp_path_factory.mktemp("saved")
    build("llama-llama3-gqa", folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A model folder to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(path: Path, *, dtype: str = "float32") -> ModelWeights:
    """The weights of a folder or GGUF file."""
    files = find_model(str(path))
    return load_weights(files, read_arch(files), dtype=dtype, exact=False)


# ---- safetensors ---------------------------------------------------------------------------------------------------


def test_shards_give_the_weights_of_one_file(saved: Path, tmp_path: Path) -> None:
    """A sharded model has the digest of the whole one."""
    tensors = load_file(saved / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(saved / "config.json", tmp_path)
    assert load(tmp_path).digest == load(saved).digest


def test_a_changed_tensor_changes_the_digest(folder: Path, saved: Path) -> None:
    """Every fused matrix and every vector counts."""
    before = load(saved).digest
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"):
        save_file({**tensors, name: tensors[name] * 1.01}, folder / "model.safetensors")
        assert load(folder).digest != before


def without(name: str) -> Callable[[Path], None]:
    """Removes a tensor."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return change


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    """Adds or replaces a tensor."""

    def change(folder: Path) -> None:
        save_file({**load_file(folder / "model.safetensors"), name: tensor}, folder / "model.safetensors")

    return change


def with_config(**fields: Any) -> Callable[[Path], None]:
    """Changes the config."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def cut(name: str, keep: float) -> Callable[[Path], None]:
    """Cuts a file off."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return change


def pickled(folder: Path) -> None:
    """Leaves nothing but a pickle."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def indexed(weight_map: object) -> Callable[[Path], None]:
    """Adds an index of shards."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (without("lm_head.weight"), "tensor lm_head.weight is missing"),
        (
            with_tensor("model.norm.weight", torch.ones(95)),
            "tensor model.norm.weight has shape (95,), the config asks for (96,)",
        ),
        (with_tensor("model.norm.bias", torch.ones(96)), "tensor model.norm.bias is unknown for llama models"),
        (
            with_tensor("model.norm.weight", torch.ones(96, dtype=torch.int8)),
            "tensor model.norm.weight is stored as I8; supported are",
        ),
        (with_config(num_hidden_layers=4), "tensor model.layers.3.input_layernorm.weight is missing"),
        (with_config(num_hidden_layers=2), "tensor model.layers.2.input_layernorm.weight is unknown"),
        (with_config(vocab_size=321), "tensor model.embed_tokens.weight has shape (320, 96)"),
        (with_config(model_type="gpt_neox"), "model_type is 'gpt_neox'; supported are"),
        (with_config(attn_temperature=3), "config field attn_temperature = 3 is unknown"),
        (cut("model.safetensors", 0.6), "not a whole safetensors file"),
        (cut("model.safetensors", 0), "not a whole safetensors file"),
        (cut("config.json", 0.5), "config.json: not a JSON file"),
        (pickled, "pytorch_model.bin is a pickle, which can run code when loaded and is never read"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors and no"),
        (indexed({"a": "gone.safetensors"}), "names gone.safetensors, which is not there"),
        (indexed({"a": "../else.safetensors"}), "names files outside its folder"),
        (indexed(3), "not a safetensors index"),
    ],
)
def test_broken_folders_are_refused(folder: Path, breaks: Callable[[Path], None], message: str) -> None:
    """A ModelError, which is a ValueError, names what is wrong."""
    breaks(folder)
    with pytest.raises(ModelError, match=re.escape(message)):
        load(folder)


def test_an_unknown_dtype_is_refused(saved: Path) -> None:
    """The message lists what there is."""
    with pytest.raises(ModelError, match="dtype 'int4' is not supported; supported are float32, bfloat16"):
        load(saved, dtype="int4")


# ---- GGUF ----------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NO_SCALING = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def interleaved(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """The row order of llama.cpp's converter (convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, folder: Path, *, quantisation: str = "F32", skip: str = "", more: dict[str, float] | None = None
) -> None:
    """Writes a model folder as GGUF, as llama.cpp's converter does; matrices in `quantisation`."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(config.head_dim if config.model_type == "qwen3" else 16)
    writer.add_token_list([f"<{number}>" for number in range(VOCAB_SIZE)])
    writer.add_eos_token_id(2)
    for key, value in (more or {}).items():
        writer.add_float32(key, value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        *_, layer, module, ending = re.fullmatch(r"(model\.layers\.(\d+)\.)?(.*)\.(weight|bias)", name).groups()  # type: ignore[union-attr]
        values = tensor.numpy()
        if config.model_type == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in module else config.num_key_value_heads
            values = interleaved(values, heads)
        short = f"{'' if layer is None else f'blk.{layer}.'}{GGUF_NAMES[module]}.{ending}"
        if short == skip:
            continue
        if values.ndim == 2 and kind is not GGMLQuantizationType.F32:
            writer.add_tensor(short, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(short, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-bias", "qwen3-norms"])
def test_gguf_holds_what_safetensors_hold(name: str, tmp_path: Path) -> None:
    """Unquantised, a GGUF file and a folder give equal digests and logits of equal bits."""
    build(name, tmp_path / "folder")
    write_gguf(tmp_path / "model.gguf", tmp_path / "folder")
    found = []
    for path in (tmp_path / "folder", tmp_path / "model.gguf"):
        runner = CpuRunner.load(str(path), exact=False, num_blocks=16, block_size=8)
        found.append((load(path).digest, last_logits(runner, prompts([50])[0])))
        runner.close()
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_gguf(quantisation: str, dtype: str, tmp_path: Path) -> None:
    """Each tensor is the gguf package's dequantisation, its rows in Hugging Face's order, rounded once."""
    folder, path = tmp_path / "folder", tmp_path / "model.gguf"
    build("llama-tied", folder)
    write_gguf(path, folder, quantisation=quantisation)
    arch = read_arch(find_model(str(path)))
    source = GgufSource(path, arch)
    kind = GGMLQuantizationType[quantisation]
    torch_dtype = getattr(torch, dtype)
    originals = load_file(folder / "model.safetensors")
    for name, shape in expected_shapes(arch).items():
        found = torch.empty(shape, dtype=torch_dtype)
        source.read(name, found)
        # Rows are quantised one by one, so that their order does not matter.
        values = originals[name].numpy()
        values = dequantize(quantize(values, kind), kind) if values.ndim == 2 else values
        assert torch.equal(found, torch.from_numpy(values).to(torch_dtype)), name


@pytest.mark.parametrize("quantisation", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_dequantisation_equals_the_package_bit_for_bit(quantisation: str) -> None:
    """On arbitrary bytes, over several pieces and a remainder."""
    kind = GGMLQuantizationType[quantisation]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    columns = 768
    stored = np.random.default_rng(3).integers(0, 256, (401, columns // block * block_bytes), dtype=np.uint8)
    found = np.empty((401, columns), dtype=np.float32)
    with np.errstate(all="ignore"):
        dequantise_into(stored, int(kind), found)
        assert found.tobytes() == dequantize(stored, kind).tobytes()


def test_the_header_is_the_one_that_the_package_reads(saved: Path, tmp_path: Path) -> None:
    """Keys, short values, lengths of long arrays, and the place of every tensor."""
    with_config(**NO_SCALING)(Path(shutil.copytree(saved, tmp_path / "folder")))
    write_gguf(tmp_path / "model.gguf", tmp_path / "folder", quantisation="Q8_0")
    header = read_header(tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert header.metadata["tokenizer.ggml.tokens"] == VOCAB_SIZE
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "tokenizer.ggml.tokens":
            assert header.metadata[key] == field.contents(), key
    places = {tensor.name: (tensor.data_offset, tuple(tensor.shape[::-1])) for tensor in reader.tensors}
    assert {name: (place.start, place.shape) for name, place in header.tensors.items()} == places


@pytest.mark.parametrize("keep", [0.0005, 0.01, 0.5, 0.999])
def test_a_truncated_gguf_file_is_refused(saved: Path, tmp_path: Path, keep: float) -> None:
    """Wherever it ends."""
    path = tmp_path / "model.gguf"
    write_gguf(path, saved)
    cut("model.gguf", keep)(tmp_path)
    with pytest.raises(ModelError, match="cut off"):
        load(path)


def test_gguf_files_with_other_content_are_refused(saved: Path, tmp_path: Path) -> None:
    """A missing tensor, an unknown key, another file type."""
    path = tmp_path / "model.gguf"
    write_gguf(path, saved, skip="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=re.escape("tensor model.layers.1.mlp.up_proj.weight is missing")):
        load(path)
    write_gguf(path, saved, more={"llama.logit_scale": 2.0})
    with pytest.raises(ModelError, match=re.escape("llama.logit_scale = 2.0 is unknown")):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="it is empty"):
        read_header(path)
    arrays_in_arrays = struct.pack("<IQ", 9, 1) * 3000
    path.write_bytes(struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 9) + arrays_in_arrays)
    with pytest.raises(ModelError, match="arrays nest deeper than 4"):
        read_header(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load(path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(64))
    with pytest.raises(ModelError, match="GGUF version 9 is not supported"):
        load_weights(
            ModelFiles(name="x", path=path, format=ModelFormat.GGUF),
            read_arch(find_model(str(saved))),
            dtype="float32",
            exact=False,
        )
