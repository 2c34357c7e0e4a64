"""Reads a model's weights into fused, packed matrices: from safetensors or GGUF, never from a pickle.

Both sources answer to Hugging Face's tensor names and write straight into the fused buffers, so that a model is held
once. A tensor that is missing, misshaped or unknown is refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.arch import ArchSpec, ModelError
from engine.gguf_weights import GgufSource
from engine.model_files import ModelFiles, ModelFormat, safetensors_shards
from engine.tensor_shapes import expected_shapes
from kernels.gemm import PackedWeight, pack_weight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOATS = ("F64", "F32", "F16", "BF16")
DIGEST_SAMPLES = 512


class WeightSource(Protocol):
    """Somewhere tensors can be read from by their Hugging Face names."""

    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        ...

    def read(self, name: str, out: Tensor) -> None:
        """Writes the tensor into `out`, cast to its dtype. ModelError when it is missing or of another shape."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer. q, k and v are one matrix by rows, and so are gate and up."""

    input_norm: Tensor
    qkv: PackedWeight
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: PackedWeight
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: PackedWeight
    gate_up_bias: Tensor | None
    down: PackedWeight
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """All of a decoder's weights. `digest` names their values, whatever file they came from."""

    embedding: Tensor | None  # [vocab_size, hidden_size]; None where the head serves as embedding too
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: PackedWeight
    digest: str


def load_weights(files: ModelFiles, arch: ArchSpec, *, dtype: str, exact: bool) -> ModelWeights:
    """Reads the weights of `arch` as `dtype`, "float32" or "bfloat16", packed for exact or for fast steps.

    Raises:
        ModelError: a file is damaged, or a tensor is missing, misshaped, unknown or stored in an unsupported way.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    source: WeightSource
    if files.format is ModelFormat.GGUF:
        source = GgufSource(files.path, arch)
    else:
        source = SafetensorsSource(safetensors_shards(files.path))
    _refuse_unknown(source, arch, files.path)
    return _Loader(source, arch, DTYPES[dtype], exact=exact).load()


def _refuse_unknown(source: WeightSource, arch: ArchSpec, path: Path) -> None:
    # A rotary table is recomputed, and a stored head of a tied model is its embedding.
    expected = expected_shapes(arch)
    for name in sorted(source.names()):
        if name not in expected and not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
            raise ModelError(
                f"{path}: tensor {name} is unknown for {arch.family} models; it may change the answer, so the model is "
                "refused"
            )


class _Loader:
    """Fills fused buffers from a source, packs them, and sums up the digest."""

    def __init__(self, source: WeightSource, arch: ArchSpec, dtype: torch.dtype, *, exact: bool) -> None:
        self.source, self.arch, self.dtype, self.exact = source, arch, dtype, exact
        self.shapes = expected_shapes(arch)
        self._scratch = torch.empty(0, dtype=dtype)
        self.digest = hashlib.blake2b(digest_size=16)

    def load(self) -> ModelWeights:
        """All weights."""
        embedding = None if self.arch.tied else self._read("model.embed_tokens.weight")
        head = self._pack("model.embed_tokens" if self.arch.tied else "lm_head")
        layers = tuple(self._layer(f"model.layers.{layer}.") for layer in range(self.arch.num_layers))
        norm = self._read("model.norm.weight")
        return ModelWeights(embedding=embedding, layers=layers, norm=norm, head=head, digest=self.digest.hexdigest())

    def _layer(self, prefix: str) -> LayerWeights:
        arch = self.arch
        qkv = [f"{prefix}self_attn.{one}_proj" for one in "qkv"]
        mlp = [f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"]
        o, down = f"{prefix}self_attn.o_proj", f"{prefix}mlp.down_proj"
        return LayerWeights(
            input_norm=self._read(f"{prefix}input_layernorm.weight"),
            qkv=self._pack(*qkv),
            qkv_bias=self._bias(*qkv) if arch.qkv_bias else None,
            q_norm=self._read(f"{prefix}self_attn.q_norm.weight") if arch.qk_norm else None,
            k_norm=self._read(f"{prefix}self_attn.k_norm.weight") if arch.qk_norm else None,
            o=self._pack(o),
            o_bias=self._bias(o) if arch.o_bias else None,
            mlp_norm=self._read(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._pack(*mlp),
            gate_up_bias=self._bias(*mlp) if arch.mlp_bias else None,
            down=self._pack(down),
            down_bias=self._bias(down) if arch.mlp_bias else None,
        )

    def _pack(self, *modules: str) -> PackedWeight:
        """Reads below one another and packs. Memory touched for the first time is slow: the buffer is used again."""
        names = [f"{module}.weight" for module in modules]
        num_rows, columns = sum(self.shapes[name][0] for name in names), self.shapes[names[0]][1]
        if self._scratch.numel() < num_rows * columns:
            self._scratch = torch.empty(num_rows * columns, dtype=self.dtype)
        fused = self._scratch[: num_rows * columns].view(num_rows, columns)
        self._fill(fused, names)
        packed = pack_weight(fused, exact=self.exact)
        if _shares(packed, self._scratch):
            self._scratch = torch.empty(0, dtype=self.dtype)  # it is the weight now
        return packed

    def _bias(self, *modules: str) -> Tensor:
        return self._read(*(f"{module}.bias" for module in modules))

    def _read(self, *names: str) -> Tensor:
        """The named tensors below one another as one."""
        shapes = [self.shapes[name] for name in names]
        fused = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=self.dtype)
        self._fill(fused, list(names))
        return fused

    def _fill(self, fused: Tensor, names: list[str]) -> None:
        first = 0
        for name in names:
            num_rows = self.shapes[name][0]
            self.source.read(name, fused[first : first + num_rows])
            first += num_rows
        flat = fused.view(-1)
        sample = flat[:: max(1, flat.numel() // DIGEST_SAMPLES)].contiguous()
        self.digest.update(f"{names}{tuple(fused.shape)}{fused.dtype}".encode())
        self.digest.update(sample.view(torch.uint8).numpy().tobytes())


def _shares(packed: PackedWeight, buffer: Tensor) -> bool:
    """Whether any tensor of the packed weight, whatever it is for, lies in the buffer's memory."""
    kept = [value for field in fields(packed) if isinstance(value := getattr(packed, field.name), Tensor)]
    return any(one.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for one in kept)


class SafetensorsSource:
    """Tensors of one or more safetensors files, mapped and copied one by one."""

    def __init__(self, shards: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._of: dict[str, tuple[Path, Callable[[str], Tensor], str]] = {}
        for shard in shards:
            try:
                file = safe_open(shard, framework="pt")
                for name in file.keys():  # type: ignore[no-untyped-call]
                    kind = str(file.get_slice(name).get_dtype())  # type: ignore[no-untyped-call]
                    self._of[name] = (shard, file.get_tensor, kind)
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{shard}: not a whole safetensors file ({error}); it may be cut off: fetch it again"
                ) from error

    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._of)

    def read(self, name: str, out: Tensor) -> None:
        """Copies the tensor into `out`, cast to its dtype."""
        if name not in self._of:
            raise ModelError(f"tensor {name} is missing from the safetensors files; fetch the model again")
        shard, get_tensor, kind = self._of[name]
        if kind not in FLOATS:
            raise ModelError(f"{shard}: tensor {name} is stored as {kind}; supported are {', '.join(FLOATS)}")
        tensor = get_tensor(name)
        if tensor.shape != out.shape:
            raise ModelError(
                f"{shard}: tensor {name} has shape {tuple(tensor.shape)}, the config asks for {tuple(out.shape)}"
            )
        out.copy_(tensor)
