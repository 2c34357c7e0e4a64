"""Small random models of each family, written by transformers, and what drives a runner over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from engine.blocks import BlockLedger
from engine.cpu_runner import CpuRunner
from engine.sequence import Sequence as Running
from engine.step import Batch, BatchConfig, StepPlan, StepRow
from tandem.request import RequestId, Sampling

VOCAB_SIZE = 320
WINDOW = 24

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}

CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama-llama3-gqa": transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-tied-biases": transformers.LlamaConfig(
        **SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama-linear": transformers.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama-yarn": transformers.LlamaConfig(**SHAPE, rope_parameters=YARN),
    "mistral-window": transformers.MistralConfig(**SHAPE, head_dim=16, sliding_window=WINDOW),
    "qwen2-bias": transformers.Qwen2Config(**SHAPE),
    "qwen2-window": transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3-norms": transformers.Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
}


def build(name: str, folder: Path) -> transformers.PreTrainedModel:
    """Writes the model `name` to `folder` as safetensors and returns it. Biases and norms are random too."""
    torch.manual_seed(sum(name.encode()))
    model = cast(
        transformers.PreTrainedModel,
        transformers.AutoModelForCausalLM.from_config(CONFIGS[name]),  # type: ignore[no-untyped-call]
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(folder)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def prompts(lengths: Sequence[int], *, seed: int = 5) -> list[list[int]]:
    """Random prompts of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def expected_tokens(model: transformers.PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers' greedy `generate` says, one prompt alone, without stopping."""
    output = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def answers(
    runner: CpuRunner,
    asked: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    ledger: BlockLedger,
    chunk_tokens: int = 256,
    max_rows: int = 64,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """The tokens that the engine's own batching gives, all prompts at once, as far as `max_rows` lets them."""
    config = BatchConfig(
        max_tokens_per_step=max(512, chunk_tokens),
        max_rows=max_rows,
        chunk_tokens=chunk_tokens,
        context_tokens=runner.arch.context_tokens,
        namespace=runner.layout.namespace.encode(),
    )
    batch = Batch(ledger, config)
    sampling = sampling or Sampling(max_tokens=num_tokens, ignore_eos=True)
    for number, prompt in enumerate(asked):
        name = RequestId(f"r{number}")
        batch.add(
            Running(request_id=name, epoch=1, tokens=list(prompt), num_prompt_tokens=len(prompt), sampling=sampling)
        )
    found: dict[str, list[int]] = {f"r{number}": [] for number in range(len(asked))}
    while len(batch):
        plan = batch.compose()
        assert plan is not None
        for token in batch.apply(plan, runner.run(plan)).tokens:
            found[token.request_id].append(token.token_id)
    assert ledger.audit() == []
    return list(found.values())


def ledger_of(runner: CpuRunner) -> BlockLedger:
    """An empty ledger over the runner's pool."""
    return BlockLedger(num_blocks=runner.pool.num_blocks, block_size=runner.layout.block_size)


def row(tokens: Sequence[int], *, start: int = 0, first_block: int = 0, num_blocks: int = 16) -> StepRow:
    """A sampled row whose block table is a run of blocks."""
    return StepRow(
        request_id=RequestId(f"r{first_block}"),
        tokens=tuple(tokens),
        start=start,
        blocks=tuple(range(first_block, first_block + num_blocks)),
        sample=True,
        sampling=Sampling(),
        num_prompt_tokens=start + len(tokens),
    )


def last_logits(runner: CpuRunner, tokens: Sequence[int]) -> torch.Tensor:
    """The logits after the last of `tokens`, prefilled in one go."""
    return runner.logits(StepPlan(rows=(row(tokens),)))[0]
