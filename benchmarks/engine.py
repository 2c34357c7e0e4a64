"""Our engine, fast and exact, against Hugging Face's `generate`: tokens a second of prefill and decode, same threads.

    python -m benchmarks.engine --threads 1

Engines take turns within each repetition and start with another one each time; figures are medians. Prefill is the
time to the first token of the whole batch, decode the time of the tokens after it. Prompts are random and differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Before torch is imported: idle OpenMP threads that spin would take the cores from the kernels' own.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import report
from engine.arch import ArchSpec
from engine.blocks import BlockLedger
from engine.cpu_runner import CpuRunner
from engine.gguf_weights import GgufSource
from engine.model_files import DEFAULT_MODEL, find_model, read_arch
from engine.sequence import Sequence as Running
from engine.step import Batch, BatchConfig
from tandem.request import RequestId, Sampling

SEED = 20240601
Prompts = list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One run of one batch."""

    prefill_s: float
    decode_s: float


class Ours:
    """A CpuRunner under its own batching, without prefix hits."""

    def __init__(self, *, dtype: str, exact: bool, threads: int, num_blocks: int) -> None:
        self.runner = CpuRunner.load(DEFAULT_MODEL, dtype=dtype, exact=exact, num_blocks=num_blocks, threads=threads)

    def __call__(self, prompts: Prompts, num_tokens: int) -> Timing:
        """Answers all prompts at once."""
        ledger = BlockLedger(num_blocks=self.runner.pool.num_blocks, block_size=self.runner.layout.block_size)
        batch = Batch(ledger, BatchConfig(publish=False))
        sampling = Sampling(max_tokens=num_tokens + 1, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            batch.add(
                Running(
                    request_id=RequestId(f"r{number}"),
                    epoch=1,
                    tokens=list(prompt),
                    num_prompt_tokens=len(prompt),
                    sampling=sampling,
                )
            )
        prefilled = began = time.perf_counter()
        waiting = len(prompts)
        decoded_early = 0
        while len(batch):
            plan = batch.compose()
            assert plan is not None
            tokens = batch.apply(plan, self.runner.run(plan)).tokens
            if waiting:
                waiting -= sum(token.index == 0 for token in tokens)
                decoded_early += sum(token.index > 0 for token in tokens)
                prefilled = time.perf_counter()
        ended = time.perf_counter()
        # Decodes that ran beside the others' prefill are no longer to be done after it.
        share = 1 - decoded_early / (len(prompts) * num_tokens)
        return Timing(prefill_s=prefilled - began, decode_s=(ended - prefilled) / share)


class HuggingFace:
    """transformers' LlamaForCausalLM with its default attention, over the same weights."""

    def __init__(self, *, dtype: str) -> None:
        files = find_model(DEFAULT_MODEL)
        arch = read_arch(files)
        self.model = LlamaForCausalLM(hf_config(arch)).to(getattr(torch, dtype)).eval()
        source = GgufSource(files.path, arch)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                source.read(name, parameter.data)

    @torch.inference_mode()
    def __call__(self, prompts: Prompts, num_tokens: int) -> Timing:
        """Two runs of `generate`: to the first token, and to the end."""
        took = []
        for wanted in (1, num_tokens + 1):
            ids = torch.tensor(prompts)
            began = time.perf_counter()
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=wanted,
                eos_token_id=None,
                pad_token_id=0,
            )
            took.append(time.perf_counter() - began)
            assert output.shape[1] == ids.shape[1] + wanted
        return Timing(prefill_s=took[0], decode_s=took[1] - took[0])


def hf_config(arch: ArchSpec) -> LlamaConfig:
    """The config of the default model."""
    return LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        rms_norm_eps=arch.norm_eps,
        max_position_embeddings=arch.context_tokens,
        tie_word_embeddings=arch.tied,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope.theta},
    )


def measure(
    engines: dict[str, Callable[[Prompts, int], Timing]], prompts: Prompts, num_tokens: int, repetitions: int
) -> dict[str, Timing]:
    """Medians over interleaved repetitions; the first of all warms up and does not count."""
    found: dict[str, list[Timing]] = {name: [] for name in engines}
    names = list(engines)
    for repetition in range(repetitions + 1):
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            timing = engines[name](prompts, num_tokens)
            if repetition:
                found[name].append(timing)
    return {
        name: Timing(
            prefill_s=statistics.median(one.prefill_s for one in timings),
            decode_s=statistics.median(one.decode_s for one in timings),
        )
        for name, timings in found.items()
    }


def rows_of(dtype: str, batch: int, length: int, num_tokens: int, medians: dict[str, Timing]) -> list[Sequence[object]]:
    """Table rows: tokens a second of the whole batch, and the ratio to Hugging Face."""
    base = medians["Hugging Face"]
    return [
        (
            dtype,
            batch,
            name,
            round(batch * length / timing.prefill_s),
            base.prefill_s / timing.prefill_s,
            round(batch * num_tokens / timing.decode_s, 1),
            base.decode_s / timing.decode_s,
        )
        for name, timing in medians.items()
    ]


def main() -> None:
    """Prints one table and writes it to results/engine.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()

    generator = torch.Generator().manual_seed(SEED)
    length, num_tokens = arguments.prompt_tokens, arguments.new_tokens
    num_blocks = max(arguments.batches) * (-(-(length + num_tokens + 1) // 16) + 1)
    rows: list[Sequence[object]] = []
    for dtype in arguments.dtypes:
        engines: dict[str, Callable[[Prompts, int], Timing]] = {
            "Hugging Face": HuggingFace(dtype=dtype),
            "ours, fast": Ours(dtype=dtype, exact=False, threads=arguments.threads, num_blocks=num_blocks),
        }
        engines["ours, exact"] = Ours(dtype=dtype, exact=True, threads=arguments.threads, num_blocks=num_blocks)
        for batch in arguments.batches:
            prompts = torch.randint(3, 49152, (batch, length), generator=generator).tolist()
            medians = measure(engines, prompts, num_tokens, arguments.repetitions)
            rows += rows_of(dtype, batch, length, num_tokens, medians)
            print(report.table(["row"] * 7, rows[-len(engines) :]), flush=True)
    header = ("dtype", "batch", "engine", "prefill tok/s", "x HF", "decode tok/s", "x HF")
    note = (
        f"SmolLM2-135M-Instruct, {length} prompt tokens and {num_tokens + 1} new ones a row, medians of "
        f"{arguments.repetitions}, interleaved. Ratios above 1: ours is faster."
    )
    report.write(
        "engine",
        "Engine against Hugging Face generate",
        f"{note}\n\n{report.table(header, rows)}",
        seed=SEED,
        threads=f"{arguments.threads} each, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}",
    )


if __name__ == "__main__":
    main()
