"""What comes and goes while a step runs: its blocks stay where they are, and its rows are nobody else's."""

from __future__ import annotations

from test_step import SIZE, VOCAB, Engine, prompt_of

from engine.blocks import BlockState
from engine.fake_runner import expected_tokens
from engine.sequence import Sequence
from engine.step import Undrawn
from tandem.request import Sampling


def test_a_row_whose_sequence_left_meanwhile_has_no_effect() -> None:
    engine = Engine()
    gone, stays = engine.add("gone", prompt_of(3), num=4), engine.add("stays", prompt_of(3, salt=1), num=4)
    plan = engine.batch.compose()
    assert plan is not None
    sampled = engine.runner.run(plan)
    engine.batch.end(gone)
    outcome = engine.batch.apply(plan, sampled)
    assert [token.request_id for token in outcome.tokens] == [stays]
    assert engine.batch.end(gone) is None
    assert engine.ledger.audit() == []


def test_a_sequence_that_leaves_in_a_step_keeps_its_blocks_until_the_step_ends() -> None:
    engine = Engine()
    request = engine.add("a", list(range(10)))
    plan = engine.batch.compose()
    assert plan is not None
    blocks = plan.rows[0].blocks
    engine.batch.end(request)
    assert {engine.ledger.state(block) for block in blocks} == {BlockState.OWNED}
    taken = engine.ledger.grant("transfer", engine.ledger.num_available)
    assert taken is not None
    assert not set(taken) & set(blocks)
    outcome = engine.batch.apply(plan, engine.runner.run(plan))
    assert not outcome.tokens
    assert not outcome.computed
    assert {engine.ledger.state(block) for block in blocks} == {BlockState.FREE}


def test_a_namesake_that_comes_in_a_step_is_not_taken_for_the_one_that_ran() -> None:
    engine = Engine()
    request = engine.add("a", list(range(10)))
    plan = engine.batch.compose()
    assert plan is not None
    engine.batch.end(request)
    engine.batch.add(
        Sequence(
            request_id=request,
            epoch=2,
            tokens=list(range(20, 30)),
            num_prompt_tokens=10,
            sampling=Sampling(max_tokens=8),
            owner="a again",
        )
    )
    outcome = engine.batch.apply(plan, engine.runner.run(plan))
    assert not outcome.tokens
    assert not outcome.computed
    while engine.batch.sequences():
        following = engine.batch.compose()
        assert following is not None
        for token in engine.batch.apply(following, engine.runner.run(following)).tokens:
            engine.tokens.setdefault(request, []).append(token)
    answer = [token.token_id for token in engine.tokens[request]]
    assert answer == expected_tokens(range(20, 30), Sampling(), 8, VOCAB)


def test_what_left_in_a_step_that_was_not_finite_is_not_shared() -> None:
    engine = Engine()
    request = engine.add("a", list(range(3 * SIZE)))
    engine.step()
    assert engine.ledger.hashes()
    plan = engine.batch.compose()
    assert plan is not None
    engine.batch.end(request)
    engine.batch.apply(plan, [Undrawn(reason="a NaN")])
    assert engine.ledger.hashes() == ()
