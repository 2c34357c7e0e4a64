"""The default model: its weights are those that transformers reads, bit for bit, and its greedy tokens the oracle's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import answers, last_logits, ledger_of
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.cpu_runner import CpuRunner
from engine.gguf_weights import GgufSource
from engine.model_files import DEFAULT_MODEL, find_model, read_arch
from engine.tensor_shapes import expected_shapes

ORACLE = json.loads((Path(__file__).parent.parent / "testdata" / "oracle_smollm2.json").read_text())
PROMPTS = ORACLE["prompts"]
SOME = (0, 9, 21, 33, 44, 63)  # text to continue, questions, passages: 5 to 202 tokens
NUM_TOKENS = 24

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def runner() -> Iterator[CpuRunner]:
    """The default model, float32 and exact."""
    loaded = CpuRunner.load(DEFAULT_MODEL, num_blocks=256)
    yield loaded
    loaded.close()


def test_the_oracle_is_whole() -> None:
    """64 prompts, 128 tokens each, made as the file says."""
    assert len(PROMPTS) == 64
    assert {len(one["tokens"]) for one in PROMPTS} == {ORACLE["num_tokens"]} == {128}
    assert "benchmarks.make_oracle" in ORACLE["command"]


@pytest.mark.parametrize("max_rows", [1, 6])
def test_greedy_tokens_are_the_oracles(runner: CpuRunner, max_rows: int) -> None:
    """One at a time and all in a batch, in chunks of 64."""
    asked = [PROMPTS[number]["prompt"] for number in SOME]
    found = answers(runner, asked, NUM_TOKENS, ledger=ledger_of(runner), chunk_tokens=64, max_rows=max_rows)
    assert found == [PROMPTS[number]["tokens"][:NUM_TOKENS] for number in SOME]


@pytest.mark.slow
def test_weights_equal_those_of_transformers_bit_for_bit() -> None:
    """Every tensor of transformers' own GGUF loader equals ours, and the bfloat16 model is as near as theirs."""
    files = find_model(DEFAULT_MODEL)
    arch = read_arch(files)
    config = AutoConfig.from_pretrained(files.path.parent, gguf_file=files.path.name)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    theirs = load_gguf_checkpoint(str(files.path), return_tensors=True, model_to_load=empty)["tensors"]  # type: ignore[no-untyped-call]
    source = GgufSource(files.path, arch)
    shapes = expected_shapes(arch)
    assert set(theirs) - {"lm_head.weight"} == set(shapes)
    for name, shape in shapes.items():
        ours = torch.empty(shape)
        source.read(name, ours)
        assert torch.equal(ours, theirs[name].float()), name


def test_bfloat16_ranks_tokens_like_float32(runner: CpuRunner) -> None:
    """Teacher-forced over an oracle answer, bfloat16's first token is float32's wherever the two best lie apart."""
    low = CpuRunner.load(DEFAULT_MODEL, dtype="bfloat16", exact=False, num_blocks=16)
    one = PROMPTS[30]
    tokens = one["prompt"] + one["tokens"]
    agreed = apart = 0
    for end in range(len(one["prompt"]), len(one["prompt"]) + 12):
        expected, found = last_logits(runner, tokens[:end]), last_logits(low, tokens[:end])
        best = expected.topk(2).values
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()
        if best[0] - best[1] > 0.5:
            apart += 1
            agreed += int(found.argmax() == expected.argmax())
    low.close()
    assert apart > 3
    assert agreed == apart
