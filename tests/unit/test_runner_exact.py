"""In exact mode nothing around a request changes its tokens and logits: batch, chunks, prefix hits, place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_models import answers, build, ledger_of, prompts, row

from engine.blocks import BlockLedger
from engine.cpu_runner import CpuRunner
from engine.step import StepPlan
from kernels import build as kernels_build
from tandem.request import Sampling

NUM_TOKENS = 24
ASKED = prompts([3, 17, 40, 64, 90, 33, 16, 8], seed=11)
SAMPLINGS = {
    "greedy": Sampling(max_tokens=NUM_TOKENS, ignore_eos=True),
    "seeded": Sampling(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.9, top_p=0.95, seed=7),
}


@pytest.fixture(scope="module", params=["llama-llama3-gqa", "mistral-window", "qwen3-norms"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuRunner]:
    """An exact float32 runner."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    loaded = CpuRunner.load(str(folder), num_blocks=192, block_size=8)
    yield loaded
    loaded.close()


@pytest.fixture(params=sorted(SAMPLINGS))
def sampling(request: pytest.FixtureRequest) -> Sampling:
    """How tokens are drawn."""
    return SAMPLINGS[request.param]


@pytest.fixture
def alone(runner: CpuRunner, sampling: Sampling) -> list[list[int]]:
    """Each prompt's answer with nothing beside it, prefilled in one go, in a fresh pool."""
    return [answers(runner, [prompt], NUM_TOKENS, ledger=ledger_of(runner), sampling=sampling)[0] for prompt in ASKED]


@pytest.mark.parametrize("max_rows", [1, 3, 8])
@pytest.mark.parametrize("chunk_tokens", [8, 24, 256])
def test_batch_and_chunks_change_no_token(
    runner: CpuRunner, sampling: Sampling, alone: list[list[int]], max_rows: int, chunk_tokens: int
) -> None:
    """Any batch size and any chunk size give the tokens of the lone run."""
    ledger = ledger_of(runner)
    found = answers(
        runner, ASKED, NUM_TOKENS, ledger=ledger, max_rows=max_rows, chunk_tokens=chunk_tokens, sampling=sampling
    )
    assert found == alone


def test_prefix_hits_change_no_token(runner: CpuRunner, sampling: Sampling, alone: list[list[int]]) -> None:
    """A prompt whose prefix was computed by others, in other chunks and in decode, gets the tokens of the lone run."""
    ledger = ledger_of(runner)
    assert answers(runner, ASKED, NUM_TOKENS, ledger=ledger, chunk_tokens=16, sampling=sampling) == alone
    # Now the answers' own blocks, which decode wrote, are prefixes too.
    longer = [prompt + answer[: NUM_TOKENS // 2] for prompt, answer in zip(ASKED, alone, strict=True)]
    rest = Sampling(
        max_tokens=NUM_TOKENS - NUM_TOKENS // 2,
        ignore_eos=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    assert ledger.counts().cached > 0
    found = answers(runner, longer, NUM_TOKENS, ledger=ledger, sampling=rest)
    assert found == [answer[NUM_TOKENS // 2 :] for answer in alone]


def test_a_pool_too_small_for_all_changes_no_token(
    runner: CpuRunner, sampling: Sampling, alone: list[list[int]]
) -> None:
    """Preempted and prefilled again, requests get the tokens of the lone run."""
    ledger = BlockLedger(num_blocks=20, block_size=runner.layout.block_size)
    assert answers(runner, ASKED, NUM_TOKENS, ledger=ledger, chunk_tokens=32, sampling=sampling) == alone


def test_logits_have_equal_bits(runner: CpuRunner) -> None:
    """The logits of a row are bit for bit those of the lone row, in prefill and in decode, wherever its blocks lie."""
    if kernels_build.library() is None:
        pytest.skip("the torch twins promise tokens, not bits")
    lone = runner.logits(StepPlan(rows=(row(ASKED[4]),)))[0].clone()
    several = runner.logits(
        StepPlan(rows=(row(ASKED[3], first_block=32), row(ASKED[4], first_block=64), row(ASKED[0], first_block=96)))
    )
    assert torch.equal(several[1], lone)
    for position, token in enumerate(ASKED[4]):
        stepped = runner.logits(StepPlan(rows=(row([token], start=position, first_block=128),)))
    assert torch.equal(stepped[0], lone)


def test_the_self_test_holds_where_the_kernels_are_built(runner: CpuRunner) -> None:
    """With the C kernels exact mode keeps its promise, and says so."""
    assert runner.exact
    if kernels_build.library() is None:
        pytest.skip("the torch twins promise tokens, not bits")
    assert runner.exact_ok, runner.exact_reason
