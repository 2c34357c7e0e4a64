"""What is installed beside Tandem, and what the machine has room for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from cluster.config import MiB, load
from cluster.installation import clash
from cluster.memory import OTHER_BYTES, shortage
from engine.arch import arch_from_config
from engine.tensor_shapes import num_parameters

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = arch_from_config({
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000, "tie_word_embeddings": True,
    "hidden_act": "silu",
})  # fmt: skip


def test_transformers_works_beside_our_kernels() -> None:
    """It would ask a package of this name for compiled layers, were its version one that it likes."""
    from transformers.utils.import_utils import is_kernels_available

    assert kernels.__file__ is not None
    assert Path(kernels.__file__).parent == ROOT / "kernels"
    assert not is_kernels_available()
    assert clash() is None


def test_another_distribution_of_that_name_is_refused_before_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise SystemExit('imported')\n")
    metadata = tmp_path / "kernels-0.11.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 1\n")
    command = [sys.executable, "-c", "import sys; sys.argv[:] = ['tandem', 'serve']; from cli.main import main; main()"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the distribution `kernels` is installed")
    assert done.stderr.count("\n") == 1


def test_weights_are_counted() -> None:
    assert num_parameters(SMOLLM2) == 134_515_008


@pytest.mark.parametrize(
    ("missing_bytes", "hint"),
    [
        (1, "1 MiB too little: lower --kv-memory to 511MiB or the number of workers"),
        (3 * 100 * MiB, "300 MiB too little: lower --kv-memory to 412MiB or the number of workers"),
        (
            3 * 512 * MiB,
            (
                "1536 MiB too little: lower --kv-memory and --swap-memory or the number of workers "
                "(--prefill, --decode, --mixed)"
            ),
        ),
    ],
)
def test_too_little_memory_is_told_with_what_helps(missing_bytes: int, hint: str) -> None:
    config = load({}, {}).config
    needed = 3 * (134_515_008 * 4 + 512 * MiB + 128 * MiB + OTHER_BYTES)
    assert shortage(config, SMOLLM2, available_bytes=needed) is None
    told = shortage(config, SMOLLM2, available_bytes=needed - missing_bytes)
    assert told is not None
    needs = "513 MiB of weights, 512 MiB of KV, 128 MiB to swap it to and about 192 MiB besides each"
    assert told.startswith(f"kv_memory: 3 workers need {needs}")
    assert hint in told
