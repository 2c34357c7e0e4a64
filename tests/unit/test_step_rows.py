"""Who gets the rows of a step when there are fewer than could be filled."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_step import CONFIG, Engine, prompt_of

from engine.step import StepPlan
from tandem.request import RequestId


def decoding(engine: Engine, num: int, num_tokens: int) -> list[RequestId]:
    """So many sequences that have been prefilled."""
    requests = [engine.add(f"d{each}", prompt_of(2, salt=each), num=num_tokens) for each in range(num)]
    while engine.batch.prefill_backlog_tokens:
        engine.step()
    return requests


def plan_of(engine: Engine) -> StepPlan:
    step = engine.step()
    assert step is not None
    return step[0]


@pytest.mark.parametrize("max_rows", [1, 2, 6])
def test_decodes_that_fill_all_rows_do_not_starve_prefill(max_rows: int) -> None:
    engine = Engine(config=replace(CONFIG, max_rows=max_rows))
    decodes = decoding(engine, max_rows, 60)
    prompt = engine.add("p", prompt_of(16), num=1)
    for _ in range(4):  # two chunks, and turns with the only row
        assert len(plan_of(engine).rows) == max_rows
    assert engine.answer(prompt)
    engine.run()
    assert all(len(engine.answer(each)) == 60 for each in decodes)


@pytest.mark.parametrize("max_rows", [1, 2, 6])
def test_prefills_that_never_end_do_not_starve_a_decode(max_rows: int) -> None:
    engine = Engine(config=replace(CONFIG, max_rows=max_rows))
    decodes = decoding(engine, max_rows, 60)
    for turn in range(40):
        engine.add(f"p{turn}", prompt_of(8, salt=turn), num=1)
        engine.step()
    assert all(len(engine.answer(each)) >= 10 for each in decodes)


def test_a_row_that_no_prefill_can_take_is_a_decodes() -> None:
    engine = Engine(num_blocks=8, config=replace(CONFIG, max_rows=2))
    decodes = decoding(engine, 2, 10)
    prompt = engine.add("p", prompt_of(28), num=1)  # there is no room before one of the others has ended
    assert [row.request_id for row in plan_of(engine).rows] == decodes
    engine.run()
    assert engine.answer(prompt)
