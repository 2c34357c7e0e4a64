"""Swapping: who loses its blocks gets them back as they were, whatever happens meanwhile, and no slot is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_step import CONFIG, SIZE, VOCAB, Engine, prompt_of

from engine.fake_runner import FakeRunner, expected_tokens
from engine.pressure import Answer, Pressure
from engine.sequence import Sequence
from engine.step import Batch, BatchConfig, Preemption, StepOutcome, StepPlan
from engine.swap_space import SwapSpace
from engine.swapping import Swapping
from engine.swapping_runner import SwappingRunner, copy_bytes_per_ms
from tandem.request import CANARY_PREFIX, RequestId, Sampling

A, B, C = (RequestId(f"r{number}") for number in range(3))


class SwapEngine(Engine):
    """An engine that swaps. `between` is called while a step runs: after it is composed, and before it is booked."""

    def __init__(self, *, num_blocks: int = 12, num_slots: int = 12, config: BatchConfig = CONFIG) -> None:
        super().__init__(num_blocks=num_blocks, config=config)
        memory = bytearray(num_blocks * SIZE * 8)
        self.runner = FakeRunner(num_blocks=num_blocks, block_size=SIZE, vocab_size=VOCAB, memory=memory)
        self.space = SwapSpace(num_slots)
        self.batch = Batch(self.ledger, config, Swapping(SIZE, space=self.space))
        self.swapper = SwappingRunner(self.runner, pool=memoryview(memory), num_slots=num_slots)
        self.between: Callable[[StepPlan], None] = lambda plan: None
        self.preempted: list[Preemption] = []
        self.late = False  # the step reads and writes memory at its end

    def step(self) -> tuple[StepPlan, StepOutcome] | None:
        plan = self.batch.compose()
        self.preempted += self.batch.take_preempted()
        if plan is None:
            return None
        if plan.rows:
            self.check(plan)
        drawn = None if self.late else self.swapper.run(plan)
        self.between(plan)
        drawn = self.swapper.run(plan) if drawn is None else drawn
        outcome = self.batch.apply(plan, drawn)
        for token in outcome.tokens:
            self.tokens.setdefault(token.request_id, []).append(token)
        self.failed += outcome.failed
        self.poison()
        assert self.ledger.audit() == []
        assert self.space.audit(each.owner for each in self.batch.sequences()) == []
        return plan, outcome

    def sequence(self, request: RequestId) -> Sequence:
        found = self.batch.get(request)
        assert found is not None
        return found

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            assert self.step() is not None
        raise AssertionError("never came true")

    def is_swapped(self, request: RequestId) -> bool:
        sequence = self.batch.get(request)
        return sequence is not None and not sequence.started and bool(self.space.slots_of(sequence.owner))


def three(engine: SwapEngine, num: int = 20) -> None:
    for number in range(3):
        engine.add(f"r{number}", prompt_of(9, salt=number), num=num)


def whole(engine: SwapEngine, *requests: RequestId, num: int = 20) -> None:
    for request in requests:
        salt = int(request[1:])
        assert engine.answer(request) == expected_tokens(prompt_of(9, salt=salt), Sampling(), num, VOCAB)


def at_rest(engine: SwapEngine) -> bool:
    counts = engine.ledger.counts()
    return counts.free + counts.cached == counts.total and engine.space.num_free == engine.space.num_slots


def test_who_is_swapped_out_computes_nothing_again() -> None:
    engine = SwapEngine()
    three(engine)
    computed = 0
    while (step := engine.step()) is not None:
        computed += step[0].num_tokens
    assert [each.swapped for each in engine.preempted].count(True) == len(engine.preempted) > 0
    assert "swapping costs" in engine.preempted[0].reason
    assert computed == 3 * (9 + 19)
    whole(engine, A, B, C)
    assert at_rest(engine)
    swapping = engine.batch.swapping
    assert swapping.num_out == swapping.num_back == len(engine.preempted)
    assert engine.batch.swapping.counts().recomputed == 0


def test_without_room_or_where_it_does_not_pay_tokens_are_computed_again() -> None:
    full = SwapEngine(num_slots=2)
    three(full)
    full.run()
    assert "do not fit the swap memory, 2 of 2 are free" in full.preempted[0].reason
    dear = SwapEngine()
    dear.batch.swapping.pressure = Pressure(block_bytes=1 << 30, copy_bytes_per_ms=1.0, recompute_ms=lambda num: 1.0)
    three(dear)
    dear.run()
    off = SwapEngine(num_slots=0)
    three(off)
    off.run()
    assert "no swap memory" in off.preempted[0].reason
    for engine in (full, dear, off):
        assert not any(each.swapped for each in engine.preempted)
        whole(engine, A, B, C)
        assert at_rest(engine)


def test_the_one_who_wants_the_blocks_waits_one_step_and_nobody_else_is_swapped_for_it() -> None:
    engine = SwapEngine(num_blocks=12)
    three(engine)
    engine.until(lambda: bool(engine.preempted))
    (victim,) = {each.request_id for each in engine.preempted}
    assert victim == C
    assert engine.batch.swapping.num_out == 1
    before = {request: len(engine.tokens[request]) for request in (A, B)}
    engine.step()
    assert all(len(engine.tokens[request]) == before[request] + 1 for request in (A, B))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("when", ["out", "swapped", "back"])
@pytest.mark.parametrize("what", ["end", "remove"])
def test_who_leaves_in_any_state_leaves_nothing_behind(when: str, what: str, late: bool) -> None:
    engine = SwapEngine()
    engine.late = late
    three(engine)

    def leave() -> None:
        sequence = engine.sequence(C)
        if what == "end":
            engine.batch.end(C)
        else:
            engine.batch.remove(C)
            engine.ledger.release(sequence.owner)
        left.append(C)

    def between(plan: StepPlan) -> None:
        copies = plan.copies_out if when == "out" else plan.copies_back
        if copies and not left and C in engine.batch and engine.sequence(C).copying:
            leave()

    left: list[RequestId] = []
    engine.between = between
    if when == "swapped":
        engine.until(lambda: engine.is_swapped(C))
        leave()
    engine.run()
    assert left == [C]
    whole(engine, A, B)
    assert at_rest(engine)


@pytest.mark.parametrize("mark", ["leaving", "held"])
def test_who_begins_to_move_while_it_is_copied_out_keeps_its_blocks(mark: str) -> None:
    """Migration is the better answer: the copy was for nothing."""
    engine = SwapEngine()
    three(engine)
    marked: list[Sequence] = []

    def between(plan: StepPlan) -> None:
        if plan.copies_out and not marked:
            marked.append(engine.sequence(C))
            setattr(marked[0], mark, True)

    engine.between = between
    engine.until(lambda: bool(marked))
    assert marked[0].started
    assert engine.space.num_free == engine.space.num_slots
    setattr(marked[0], mark, False)
    engine.run()
    whole(engine, A, B, C)


def test_who_is_copied_is_not_to_be_read_by_others() -> None:
    """Its blocks are not all there, or will not be: it does not count as decoding, so nobody begins to move it."""
    engine = SwapEngine()
    three(engine)
    seen: list[tuple[bool, bool]] = []

    def between(plan: StepPlan) -> None:
        seen.extend((bool(plan.copies_out), each.decoding) for each in engine.batch.swapping.copies)

    engine.between = between
    engine.run()
    assert {out for out, _ in seen} == {True, False}
    assert not any(decoding for _, decoding in seen)


def test_what_stayed_in_the_prefix_cache_is_not_copied_back() -> None:
    engine = SwapEngine(num_blocks=13)
    three(engine)
    engine.until(lambda: engine.is_swapped(C))
    kept = engine.ledger.match(engine.sequence(C).hashes)
    num_slots = len(engine.space.slots_of(engine.sequence(C).owner))
    num_back: list[int] = []
    engine.between = lambda plan: num_back.append(len(plan.copies_back)) if plan.copies_back else None
    engine.batch.end(A)
    engine.batch.end(B)
    engine.until(lambda: bool(num_back))
    assert kept > 0
    assert num_back == [num_slots - kept]
    engine.run()
    whole(engine, C)


@given(st.integers(0, 10_000))
def test_every_request_gets_its_own_tokens_whatever_is_swapped(seed: int) -> None:
    rng = random.Random(seed)
    config = replace(CONFIG, max_rows=rng.choice([2, 4, 8]), max_tokens_per_step=rng.choice([8, 16, 40]))
    engine = SwapEngine(num_blocks=rng.choice([10, 14, 20]), num_slots=rng.choice([0, 3, 8, 30]), config=config)
    asked: dict[RequestId, tuple[list[int], Sampling]] = {}
    gone: set[RequestId] = set()

    def meddle(plan: StepPlan | None = None) -> None:
        for sequence in engine.batch.sequences():
            roll = rng.random()
            if roll < 0.01:
                engine.batch.end(sequence.request_id)
                gone.add(sequence.request_id)
            elif roll < 0.05:
                sequence.held = not sequence.held
            elif roll < 0.08:
                sequence.leaving = not sequence.leaving

    engine.between = meddle
    for turn in range(120):
        engine.late = bool(rng.randrange(2))
        if rng.random() < 0.3:
            prompt = prompt_of(rng.randrange(1, 12), salt=rng.randrange(2)) + prompt_of(rng.randrange(8), salt=turn)
            sampling = Sampling(max_tokens=rng.randrange(1, 24), temperature=rng.choice([0.0, 1.0]), seed=turn)
            asked[engine.add(f"r{turn}", prompt, sampling=sampling)] = (prompt, sampling)
        meddle()
        engine.step()
    engine.between = lambda plan: None
    for sequence in engine.batch.sequences():
        sequence.held = sequence.leaving = False
    engine.run()
    assert at_rest(engine)
    assert engine.failed == []
    for request, (prompt, sampling) in asked.items():
        answer = engine.answer(request)
        assert answer == expected_tokens(prompt, sampling, len(answer), VOCAB)
        assert len(answer) == sampling.max_tokens or request in gone


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_cheaper_one() -> None:
    pressure = Pressure(block_bytes=1_000, copy_bytes_per_ms=1_000.0, recompute_ms=lambda tokens: tokens / 10)
    cheap = pressure.answer(num_blocks=4, num_tokens=100, num_free_slots=4, num_slots=9)
    assert (cheap.answer, cheap.swap_ms, cheap.recompute_ms) == (Answer.SWAP, 8.0, 10.0)
    assert pressure.answer(num_blocks=4, num_tokens=70, num_free_slots=4, num_slots=9).answer is Answer.RECOMPUTE
    assert pressure.answer(num_blocks=4, num_tokens=100, num_free_slots=3, num_slots=9).answer is Answer.RECOMPUTE


def test_the_space_finds_what_is_wrong_with_it() -> None:
    space = SwapSpace(4)
    assert space.take("a", 3) == (0, 1, 2)
    assert space.audit(["a"]) == []
    assert space.audit([]) == ["swap slots of a, who is not here"]
    with pytest.raises(AssertionError):
        space.take("a", 1)
    with pytest.raises(AssertionError):
        space.take("b", 2)
    space._free.append(0)
    assert space.audit(["a"])
    with pytest.raises(ValueError, match="num_slots is -1"):
        SwapSpace(-1)


def test_the_runner_copies_out_before_back_and_both_before_the_rows() -> None:
    memory = bytearray(3 * SIZE * 8)
    runner = FakeRunner(num_blocks=3, block_size=SIZE, vocab_size=VOCAB, memory=memory)
    swapper = SwappingRunner(runner, pool=memoryview(memory), num_slots=2)
    for block in range(3):
        runner.write_block(block, bytes([block + 1]) * SIZE * 8)
    before = swapper.progress
    assert swapper.run(StepPlan(rows=(), copies_out=((0, 1), (1, 0)))) == []
    assert swapper.run(StepPlan(rows=(), copies_out=((2, 0),), copies_back=((0, 1), (1, 2)))) == []
    assert [runner.read_block(block)[0] for block in range(3)] == [1, 3, 1]
    assert swapper.progress == before + 5
    swapper.close()
    swapper.close()


def test_the_speed_of_memory_is_measured() -> None:
    assert copy_bytes_per_ms() > 10_000


def test_a_canary_starts_before_those_that_wait_for_memory() -> None:
    engine = SwapEngine(num_blocks=8)
    engine.add("r0", prompt_of(9), num=20)
    engine.step()
    engine.step()
    engine.add("waits", prompt_of(24, salt=1), num=4)
    canary = engine.add(f"{CANARY_PREFIX}1", [1, 2, 3], num=2, priority=-2.0)
    engine.step()
    assert len(engine.answer(canary)) == 1
    assert not engine.sequence(RequestId("waits")).started
    engine.run()
    assert at_rest(engine)
