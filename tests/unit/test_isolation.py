"""A request that breaks steps ends alone and by name; an engine that breaks on everything ends as a whole."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_models
from role_cores import BLOCK, LAYOUT, ME, VOCAB, assign, parts, told
from tiny_models import ledger_of

from cluster.worker_core import WorkerCore, WorkerCoreConfig
from engine.cpu_runner import CpuRunner
from engine.fake_runner import FakeRunner, expected_tokens
from engine.isolation import FAILURES_MAX, IsolatingRunner
from engine.layout import KVLayout
from engine.loop import EngineLoop
from engine.sequence import Sequence as Running
from engine.step import Batch, BatchConfig, Drawn, Sampled, StepPlan, StepRow, Undrawn
from tandem.errors import StepFailed
from tandem.messages import AssignMode, RequestFailed
from tandem.request import RequestId, Sampling, Token

POISON = 9  # a token that no kernel can digest
WAIT_S = 20


class Brittle:
    """A fake runner that writes part of a step and then raises, when a row holds the poison token."""

    def __init__(self, raises: Callable[[], BaseException] = lambda: IndexError("index 9 is out of range")) -> None:
        self.healthy = FakeRunner(num_blocks=32, block_size=BLOCK, vocab_size=VOCAB)
        self.raises = raises
        self.num_runs = 0

    @property
    def layout(self) -> KVLayout:
        return self.healthy.layout

    @property
    def progress(self) -> int:
        return self.num_runs

    def run(self, plan: StepPlan) -> Sequence[Drawn | None]:
        self.num_runs += 1
        before: list[StepRow] = []
        for row in plan.rows:
            if POISON in row.tokens:
                if before:
                    self.healthy.run(StepPlan(rows=tuple(before)))
                raise self.raises()
            before.append(row)
        return self.healthy.run(plan)


def row(number: int, *, poisoned: bool = False) -> StepRow:
    """One token of a request with a block of its own."""
    return StepRow(
        request_id=RequestId(f"r{number}"),
        tokens=(POISON if poisoned else 20 + number,),
        start=0,
        blocks=(number,),
        sample=True,
        sampling=Sampling(),
        num_prompt_tokens=1,
    )


def plan(pattern: str) -> StepPlan:
    """A row for each letter: `x` is poisoned, `o` is not."""
    return StepPlan(rows=tuple(row(number, poisoned=letter == "x") for number, letter in enumerate(pattern)))


def outcome(runner: IsolatingRunner, pattern: str) -> str:
    """`o` for each row that was sampled, `x` for each that came to nothing."""
    letters = {Sampled: "o", Undrawn: "x"}
    return "".join(letters[type(each)] for each in runner.run(plan(pattern)) if each is not None)


@pytest.mark.parametrize("pattern", ["oxo", "xoo", "oox", "xxo", "xoxox", "x"])
def test_only_rows_that_break_by_themselves_come_to_nothing(pattern: str) -> None:
    brittle = Brittle()
    runner = IsolatingRunner(brittle)
    drawn = runner.run(plan(pattern))
    for number, (letter, result) in enumerate(zip(pattern, drawn, strict=True)):
        if letter == "x":
            assert isinstance(result, Undrawn)
            assert result.code == StepFailed.code == "step_failed"
            assert result.reason == "IndexError: index 9 is out of range (in Brittle.run)"
        else:
            assert result == Sampled(token_id=expected_tokens((20 + number,), Sampling(), 1, VOCAB)[0])
    assert runner.layout == brittle.layout
    assert runner.progress == brittle.num_runs == 1 + len(pattern)


def test_a_step_that_fails_only_as_a_whole_ends_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class TooLarge(Brittle):
        def run(self, plan: StepPlan) -> Sequence[Drawn | None]:
            if len(plan.rows) > 1:
                raise MemoryError
            return super().run(plan)

    assert outcome(IsolatingRunner(TooLarge()), "ooooo") == "ooooo"
    (message,) = caplog.messages
    assert message.startswith("a step of 5 rows failed, though none of them does alone: MemoryError (in ")


def test_rows_that_are_not_sampled_stay_so() -> None:
    chunk = StepRow(
        request_id=RequestId("chunk"), tokens=(1, 2), start=0, blocks=(30,), sample=False, sampling=Sampling(),
        num_prompt_tokens=9,
    )  # fmt: skip
    drawn = IsolatingRunner(Brittle()).run(StepPlan(rows=(chunk, *plan("ox").rows)))
    assert [type(each) for each in drawn] == [type(None), Sampled, Undrawn]


@pytest.mark.parametrize("pattern", ["xx", "xxx", "oxxxo", "xxxx"])
def test_a_step_that_tells_of_a_broken_engine_raises(pattern: str) -> None:
    with pytest.raises(IndexError, match="index 9"):
        IsolatingRunner(Brittle()).run(plan(pattern))


def test_an_engine_that_fails_one_lone_request_after_another_raises() -> None:
    runner = IsolatingRunner(Brittle())
    for _ in range(FAILURES_MAX - 1):
        assert outcome(runner, "x") == "x"
    with pytest.raises(IndexError):
        runner.run(plan("x"))


@pytest.mark.parametrize("between", ["o", "oxo", "xo"])
def test_a_row_that_succeeds_shows_that_the_engine_works(between: str) -> None:
    runner = IsolatingRunner(Brittle())
    for _ in range(4 * FAILURES_MAX):
        assert outcome(runner, "x") == "x"
        assert outcome(runner, between) == between


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_order_to_end_is_no_failure_of_a_row(error: type[BaseException]) -> None:
    brittle = Brittle(raises=error)
    with pytest.raises(error):
        IsolatingRunner(brittle).run(plan("oxo"))
    assert brittle.num_runs == 1


def test_each_failure_is_one_line_without_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    runner = IsolatingRunner(Brittle(raises=lambda: RuntimeError("a" * 5000 + "\nTensor([20, 9, 22])")))
    runner.run(plan("oxo"))
    (message,) = caplog.messages
    assert message.startswith("request=r1 fails alone at position 0: RuntimeError: aaaa")
    assert len(message) < 300
    assert "Tensor" not in message


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="failures_max is 0, must be at least 1"):
        IsolatingRunner(Brittle(), failures_max=0)


# ---- over the loop of an engine, and with a real model -------------------------------------------------------------


def test_over_the_loop_of_a_worker_the_neighbours_go_on_and_the_router_hears_why() -> None:
    ledger, batch, _ = parts()
    core = WorkerCore(me=ME, layout=LAYOUT, ledger=ledger, batch=batch, config=WorkerCoreConfig())
    acted: queue.Queue[list[object]] = queue.Queue()
    crashed: queue.Queue[BaseException] = queue.Queue()
    loop = EngineLoop(
        core=core,
        runner=IsolatingRunner(Brittle()),
        perform=acted.put,
        on_crash=lambda error, story: crashed.put(error),
    )
    prompts = {name: tuple(range(first, first + 11)) for name, first in (("a", 20), ("b", 40), ("c", 60))}
    for name, prompt in prompts.items():
        loop.post(assign(name, mode=AssignMode.LOCAL, tokens=prompt, max_tokens=20))
    for name, prompt in prompts.items():
        loop.post(assign(f"bad-{name}", mode=AssignMode.LOCAL, tokens=(*prompt, 1, 2, POISON, 3)))
    loop.start()
    answers: dict[str, list[int]] = {}
    failed: list[RequestFailed] = []
    while sum(map(len, answers.values())) < 60 or len(failed) < 3:
        actions = acted.get(timeout=WAIT_S)
        for token in told(actions, Token):
            assert isinstance(token, Token)
            answers.setdefault(token.request_id, []).append(token.token_id)
        failed += [each for each in told(actions, RequestFailed) if isinstance(each, RequestFailed)]
    assert loop.stop(deadline_ms=WAIT_S * 1000)
    assert crashed.empty()
    for name, prompt in prompts.items():
        assert answers.pop(name) == expected_tokens(prompt, Sampling(), 20, VOCAB)
    assert not answers, "a poisoned request was answered"
    assert sorted(each.request_id for each in failed) == ["bad-a", "bad-b", "bad-c"]
    assert {(each.code, each.retryable) for each in failed} == {(StepFailed.code, False)}
    assert all("IndexError: index 9 is out of range" in each.message for each in failed)
    assert not ledger.audit()


def test_over_the_loop_an_engine_that_fails_everything_ends() -> None:
    ledger, batch, _ = parts()
    core = WorkerCore(me=ME, layout=LAYOUT, ledger=ledger, batch=batch, config=WorkerCoreConfig())
    acted: queue.Queue[list[object]] = queue.Queue()
    crashed: queue.Queue[BaseException] = queue.Queue()
    loop = EngineLoop(
        core=core,
        runner=IsolatingRunner(Brittle()),
        perform=acted.put,
        on_crash=lambda error, story: crashed.put(error),
    )
    for number in range(5):
        loop.post(assign(f"r{number}", mode=AssignMode.LOCAL, tokens=(POISON, 2, 3, 4, 5, number)))
    loop.start()
    assert isinstance(crashed.get(timeout=WAIT_S), IndexError)
    assert loop.stop(deadline_ms=WAIT_S * 1000)
    failed = [each for actions in list(acted.queue) for each in told(actions, RequestFailed)]
    assert len(failed) < FAILURES_MAX, "the rest are placed elsewhere"


def test_a_real_model_answers_the_neighbours_of_a_token_that_it_does_not_have(tmp_path: Path) -> None:
    tiny_models.build("llama-tied", tmp_path)
    cpu = CpuRunner.load(str(tmp_path), num_blocks=64, block_size=8)
    sampling = Sampling(max_tokens=6, ignore_eos=True, temperature=0.8, seed=5)
    prompts = {f"r{number}": prompt for number, prompt in enumerate(tiny_models.prompts([9, 30, 17]))}

    def answers(asked: dict[str, list[int]]) -> tuple[dict[str, list[int]], list[tuple[str, str]]]:
        ledger = ledger_of(cpu)
        batch = Batch(ledger, BatchConfig(context_tokens=cpu.arch.context_tokens))
        runner = IsolatingRunner(cpu)
        for name, prompt in asked.items():
            batch.add(
                Running(
                    request_id=RequestId(name), epoch=1, tokens=list(prompt), num_prompt_tokens=len(prompt),
                    sampling=sampling,
                )
            )  # fmt: skip
        found: dict[str, list[int]] = {}
        failed: list[tuple[str, str]] = []
        while (step := batch.compose()) is not None:
            booked = batch.apply(step, runner.run(step))
            for token in booked.tokens:
                found.setdefault(token.request_id, []).append(token.token_id)
            failed += [(each.request_id, each.code) for each in booked.failed]
        assert not ledger.audit()
        return found, failed

    alone = {name: answers({name: prompt})[0][name] for name, prompt in prompts.items()}
    poisoned = {
        "r0": prompts["r0"],
        "bad": [5, 6, tiny_models.VOCAB_SIZE + 7],
        "r1": prompts["r1"],
        "r2": prompts["r2"],
    }
    assert answers(poisoned) == (alone, [("bad", StepFailed.code)])
    cpu.close()
