"""Tensors of a GGUF file under their Hugging Face names, dequantised into a buffer as they are read."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from engine.arch import ArchSpec, Family, ModelError
from engine.gguf_dequantise import dequantise_into
from engine.gguf_header import TensorPlace, read_header

# GGUF name -> Hugging Face name; those of a layer follow "blk.N." and "model.layers.N.".
WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)")
ROTATED = re.compile(r".*\.self_attn\.(?P<which>[qk])_proj\.(weight|bias)")


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; the name itself where there is none."""
    found = NAME.fullmatch(name)
    if found is None:
        return name
    layer, module, kind = found["layer"], found["module"], found["kind"]
    if layer is None:
        return f"{WHOLE[module]}.{kind}" if module in WHOLE else name
    return f"model.layers.{layer}.{IN_LAYER[module]}.{kind}" if module in IN_LAYER else name


class GgufSource:
    """Tensors of one GGUF file. The values equal those of transformers' own GGUF loader bit for bit."""

    def __init__(self, path: Path, arch: ArchSpec) -> None:
        self._path, self._arch = path, arch
        tensors = read_header(path).tensors
        if "rope_freqs.weight" in tensors:
            raise ModelError(
                f"{path}: tensor rope_freqs.weight (Llama 3 rope scaling) is not supported in GGUF files; "
                "take the model as safetensors"
            )
        self._places = {hf_name(name): place for name, place in tensors.items()}
        self._data = np.asarray(np.memmap(path, mode="r"))
        for place in tensors.values():
            if place.start + self._row_bytes(place) * _num_rows(place) > self._data.size:
                raise ModelError(f"{path}: cut off in tensor {place.name}; fetch the file again")

    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._places)

    def read(self, name: str, out: Tensor) -> None:
        """Dequantises the tensor into `out`, cast to its dtype."""
        place = self._places.get(name)
        if place is None:
            raise ModelError(f"{self._path}: tensor {name} is missing; fetch the file again")
        if place.shape != tuple(out.shape):
            raise ModelError(
                f"{self._path}: tensor {place.name} has shape {place.shape}, the metadata ask for {tuple(out.shape)}"
            )
        row_bytes = self._row_bytes(place)
        stored = self._data[place.start : place.start + row_bytes * _num_rows(place)].reshape(-1, row_bytes)
        rotated = self._arch.family is Family.LLAMA and ROTATED.fullmatch(name)
        straight = not rotated and out.dtype == torch.float32
        values = out if straight else torch.empty(out.shape, dtype=torch.float32)
        try:
            dequantise_into(stored, place.type_id, values.view(len(stored), -1).numpy())
        except NotImplementedError as error:
            raise ModelError(f"{self._path}: tensor {place.name}: {error}; take another quantisation") from error
        if rotated:
            num_heads = self._arch.num_heads if rotated["which"] == "q" else self._arch.num_kv_heads
            _halves(out, num_heads).copy_(_pairs(values, num_heads))
        elif not straight:
            out.copy_(values)

    def _row_bytes(self, place: TensorPlace) -> int:
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(place.type_id)]
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"{self._path}: tensor {place.name} has the unknown type {place.type_id}; take another quantisation"
            ) from error
        if not place.shape or place.shape[-1] % block:
            raise ModelError(
                f"{self._path}: tensor {place.name} of shape {place.shape} is damaged; fetch the file again"
            )
        return place.shape[-1] // block * block_bytes


def _num_rows(place: TensorPlace) -> int:
    num = 1
    for dim in place.shape[:-1]:
        num *= dim
    return num


def _pairs(tensor: Tensor, num_heads: int) -> Tensor:
    # llama.cpp rotates neighbours, transformers the two halves of a head: its converter interleaved the rows.
    return tensor.view(num_heads, tensor.shape[0] // num_heads // 2, 2, *tensor.shape[1:]).transpose(1, 2)


def _halves(tensor: Tensor, num_heads: int) -> Tensor:
    return tensor.view(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
