"""Each family's decoder against transformers' own, on small random models: tokens, logits, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import CONFIGS, answers, build, expected_tokens, last_logits, ledger_of, prompts

from engine.cpu_runner import CpuRunner
from engine.model import rope_tables
from engine.model_files import find_model, read_arch

NUM_TOKENS = 40
Case = tuple[transformers.PreTrainedModel, Path]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    return build(request.param, folder), folder


@pytest.fixture(params=[True, False], ids=["exact", "fast"])
def runner(case: Case, request: pytest.FixtureRequest) -> Iterator[CpuRunner]:
    """Our runner over the same files."""
    loaded = CpuRunner.load(str(case[1]), exact=request.param, num_blocks=128, block_size=8)
    yield loaded
    loaded.close()


def test_greedy_tokens_equal_transformers(case: Case, runner: CpuRunner) -> None:
    """Paged, chunked and all in one batch, the answers are those of `generate` alone."""
    asked = prompts([3, 17, 40, 64, 90])
    found = answers(runner, asked, NUM_TOKENS, ledger=ledger_of(runner), chunk_tokens=16)
    assert found == [expected_tokens(case[0], prompt, NUM_TOKENS) for prompt in asked]


@torch.inference_mode()
def test_logits_are_close_in_float32(case: Case, runner: CpuRunner) -> None:
    """The logits differ by rounding alone."""
    for prompt in prompts([1, 33, 100], seed=6):
        expected = case[0](torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(last_logits(runner, prompt), expected, rtol=1e-4, atol=2e-5 * expected.abs().max())


@torch.inference_mode()
def test_bfloat16_is_as_near_to_float32_as_transformers_is(case: Case) -> None:
    """In bfloat16 our error against float32 is at most one and a half times that of transformers."""
    model, folder = case
    low = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours = CpuRunner.load(str(folder), dtype="bfloat16", exact=False, num_blocks=32, block_size=8)
    mine = theirs = 0.0
    for prompt in prompts([5, 33, 70, 100], seed=7):
        expected = model(torch.tensor([prompt])).logits[0, -1]
        theirs += float((low(torch.tensor([prompt])).logits[0, -1].float() - expected).square().mean())
        mine += float((last_logits(ours, prompt) - expected).square().mean())
    ours.close()
    assert theirs > 0
    assert mine <= 1.5**2 * theirs


def test_rotary_tables_equal_transformers_bit_for_bit(case: Case) -> None:
    """Cosines and sines of every position, in both dtypes."""
    model, folder = case
    arch = read_arch(find_model(str(folder)))
    positions = torch.arange(arch.context_tokens)[None]
    for dtype in (torch.float32, torch.bfloat16):
        expected = model.model.rotary_emb(torch.empty(1, dtype=dtype), positions)
        for found, table in zip(rope_tables(arch, arch.context_tokens, dtype), expected, strict=True):
            assert torch.equal(found, table[0])
