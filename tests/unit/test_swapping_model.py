"""Swapping under a real model: the bytes that come back are the bytes that went, so the tokens are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import answers, build, ledger_of, prompts

from engine.blocks import BlockLedger
from engine.cpu_runner import CpuRunner
from engine.sequence import Sequence
from engine.step import Batch, BatchConfig
from engine.swap_space import SwapSpace
from engine.swapping import Swapping
from engine.swapping_runner import SwappingRunner
from tandem.request import RequestId, Sampling

NUM_TOKENS = 60
BLOCK = 8


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_model_under_pressure_writes_what_it_writes_alone(temperature: float, tmp_path: Path) -> None:
    build("llama-llama3-gqa", tmp_path)
    runner = CpuRunner.load(str(tmp_path), num_blocks=192, block_size=BLOCK)
    asked = prompts([30, 17, 25, 33], seed=11)
    sampling = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=temperature, seed=7)
    swapping = Swapping(BLOCK, space=SwapSpace(40))
    swapping.pressure.recompute_ms = lambda tokens: 1e6  # never
    config = BatchConfig(context_tokens=runner.arch.context_tokens)
    batch = Batch(BlockLedger(num_blocks=26, block_size=BLOCK, prefix_cache=False), config, swapping)
    swapper = SwappingRunner(runner, pool=runner.pool.view, num_slots=40)
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(asked):
        name = RequestId(f"r{number}")
        found[name] = []
        batch.add(
            Sequence(request_id=name, epoch=1, tokens=list(prompt), num_prompt_tokens=len(prompt), sampling=sampling)
        )
    num_tokens = 0
    while len(batch):
        plan = batch.compose()
        assert plan is not None
        num_tokens += plan.num_tokens
        for token in batch.apply(plan, swapper.run(plan)).tokens:
            found[token.request_id].append(token.token_id)
    assert swapping.num_out == swapping.num_back > 0
    assert num_tokens == sum(map(len, asked)) + len(asked) * (NUM_TOKENS - 1), "nothing is computed twice"
    for prompt, answer in zip(asked, found.values(), strict=True):
        (alone,) = answers(runner, [prompt], NUM_TOKENS, ledger=ledger_of(runner), sampling=sampling)
        assert answer == alone
    swapper.close()
    runner.close()
