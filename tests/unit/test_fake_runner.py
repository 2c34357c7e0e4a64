"""The fake runner: equal to its oracle through any blocks and chunks, and wrong as soon as one block is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fake_runner import FakeRunner, expected_tokens, fake_layout
from engine.kv_pool import KVPool
from engine.runner import Runner
from engine.step import StepPlan, StepRow
from tandem.request import RequestId, Sampling

VOCAB = 50_000
GREEDY = Sampling()


def row(tokens: list[int], start: int, end: int, blocks: list[int], sampling: Sampling = GREEDY) -> StepRow:
    return StepRow(
        request_id=RequestId("r"),
        tokens=tuple(tokens[start:end]),
        start=start,
        blocks=tuple(blocks),
        sample=end == len(tokens),
        sampling=sampling,
        num_prompt_tokens=len(tokens),
    )


def next_token(runner: FakeRunner, tokens: list[int], blocks: list[int], computed: int = 0) -> int:
    drawn = runner.run(StepPlan(rows=(row(tokens, computed, len(tokens), blocks),)))[0]
    assert drawn is not None
    return drawn.token_id


def new_runner() -> FakeRunner:
    return FakeRunner(num_blocks=16, block_size=4, vocab_size=VOCAB)


def test_is_a_runner() -> None:
    runner: Runner = new_runner()
    assert runner.layout.block_bytes == 32


@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
    cuts=st.sets(st.integers(1, 39)),
    blocks=st.permutations(range(16)),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_tokens_do_not_depend_on_chunks_or_blocks(
    prompt: list[int], cuts: set[int], blocks: list[int], seed: int, temperature: float
) -> None:
    sampling = Sampling(seed=seed, temperature=temperature)
    runner = new_runner()
    tokens, start = list(prompt), 0
    bounds = [cut for cut in sorted(cuts) if cut < len(prompt)] + list(range(len(prompt), len(prompt) + 5))
    for end in bounds:
        assert end <= len(tokens)
        drawn = runner.run(StepPlan(rows=(row(tokens, start, end, blocks, sampling),)))[0]
        start = end
        if drawn is not None:
            tokens.append(drawn.token_id)
    assert tokens[len(prompt) :] == expected_tokens(prompt, sampling, 5, VOCAB)


def test_seed_matters_only_with_a_temperature() -> None:
    prompt = [1, 2, 3]
    assert expected_tokens(prompt, Sampling(seed=1), 4, VOCAB) == expected_tokens(prompt, Sampling(seed=2), 4, VOCAB)
    drawn = [expected_tokens(prompt, Sampling(seed=seed, temperature=1.0), 4, VOCAB) for seed in (1, 2)]
    assert drawn[0] != drawn[1]


def test_oracle_goes_on_from_any_token() -> None:
    whole = expected_tokens([5, 6], GREEDY, 8, VOCAB)
    assert expected_tokens([5, 6, *whole[:3]], GREEDY, 5, VOCAB) == whole[3:]


@pytest.mark.parametrize("block", [0, 1, 2])
def test_any_damaged_block_changes_the_token(block: int) -> None:
    prompt, blocks = list(range(11)), [7, 3, 9]
    for damage in ("poison", "stale", "lost", "half"):
        runner = new_runner()
        next_token(runner, prompt, blocks)
        tokens = [*prompt, expected_tokens(prompt, GREEDY, 1, VOCAB)[0]]
        if damage == "poison":
            runner.poison([blocks[block]])
        elif damage == "stale":
            other = [token + 1 for token in prompt]
            next_token(runner, other, [0, 1, 2])
            runner.write_block(blocks[block], runner.read_block(block))
        elif damage == "lost":
            runner.write_block(blocks[block], bytes(32))
        else:
            content = runner.read_block(blocks[block])
            runner.write_block(blocks[block], bytes(16) + content[16:])
        assert next_token(runner, tokens, blocks, computed=11) != expected_tokens(prompt, GREEDY, 2, VOCAB)[1], damage


def test_swapped_blocks_change_the_token() -> None:
    prompt, blocks = list(range(11)), [7, 3, 9]
    runner = new_runner()
    tokens = [*prompt, next_token(runner, prompt, blocks)]
    right = next_token(runner, tokens, blocks, computed=11)
    assert right == expected_tokens(prompt, GREEDY, 2, VOCAB)[1]
    assert next_token(runner, tokens, [3, 7, 9], computed=11) != right


def test_blocks_moved_to_another_pool_go_on_there() -> None:
    prompt = list(range(10))
    source, target = new_runner(), new_runner()
    tokens = [*prompt, next_token(source, prompt, [1, 2, 3])]
    for here, there in zip([1, 2, 3], [15, 0, 8], strict=True):
        target.write_block(there, source.read_block(here))
    assert next_token(target, tokens, [15, 0, 8], computed=10) == expected_tokens(prompt, GREEDY, 2, VOCAB)[1]


def test_shares_given_memory() -> None:
    memory = bytearray(16 * 32)
    runner = FakeRunner(num_blocks=16, block_size=4, vocab_size=VOCAB, memory=memoryview(memory))
    next_token(runner, [1, 2], [4])
    assert memory[4 * 32 : 4 * 32 + 16] != bytes(16)
    assert memory[: 4 * 32] == bytes(4 * 32)


def test_runs_on_a_shared_pool() -> None:
    pool = KVPool(num_blocks=16, block_bytes=32)
    runner = FakeRunner(num_blocks=16, block_size=4, vocab_size=VOCAB, memory=pool.view)
    prompt = list(range(10))
    tokens = [*prompt, next_token(runner, prompt, [1, 2, 3])]
    for here, there in ((1, 11), (2, 12), (3, 13)):
        pool.block(there)[:] = pool.block(here)
    assert next_token(runner, tokens, [11, 12, 13], computed=10) == expected_tokens(prompt, GREEDY, 2, VOCAB)[1]
    pool.close()  # though the runner is still there


def test_logprobs_where_asked() -> None:
    drawn = new_runner().run(StepPlan(rows=(row([1, 2], 0, 2, [0], Sampling(logprobs=2)),)))[0]
    assert drawn is not None
    assert drawn.logprob == drawn.top[0][1]
    assert drawn.top[0][0] == drawn.token_id
    assert len(drawn.top) == 2


def test_refuses_a_layout_of_other_size() -> None:
    with pytest.raises(ValueError, match="must be 4 tokens"):
        FakeRunner(num_blocks=2, block_size=4, vocab_size=9, layout=fake_layout(block_size=8))
