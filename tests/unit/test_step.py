"""The batch: what each step runs, and that every request gets its own tokens whatever happens around it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.blocks import BlockLedger, BlockState
from engine.fake_runner import FakeRunner, expected_tokens
from engine.sequence import Sequence
from engine.step import Batch, BatchConfig, Failed, Sampled, StepOutcome, StepPlan, StepRow
from tandem.request import FinishReason, RequestId, Sampling, Token

VOCAB = 50_000
SIZE = 4
CONFIG = BatchConfig(max_tokens_per_step=16, max_rows=6, chunk_tokens=8, context_tokens=400)


class Engine:
    """A batch on a fake runner whose free blocks are poisoned, so that whoever reads one gets wrong tokens."""

    def __init__(self, *, num_blocks: int = 64, config: BatchConfig = CONFIG, kind: type[Batch] = Batch) -> None:
        self.ledger = BlockLedger(num_blocks=num_blocks, block_size=SIZE)
        self.batch = kind(self.ledger, config)
        self.runner = FakeRunner(num_blocks=num_blocks, block_size=SIZE, vocab_size=VOCAB)
        self.tokens: dict[RequestId, list[Token]] = {}
        self.failed: list[Failed] = []

    def add(
        self, name: str, prompt: list[int], *, num: int = 8, sampling: Sampling | None = None, priority: float = 0.0
    ) -> RequestId:
        request_id = RequestId(name)
        self.batch.add(
            Sequence(
                request_id=request_id,
                epoch=1,
                tokens=list(prompt),
                num_prompt_tokens=len(prompt),
                sampling=sampling or Sampling(max_tokens=num),
                priority=priority,
            )
        )
        return request_id

    def step(self) -> tuple[StepPlan, StepOutcome] | None:
        plan = self.batch.compose()
        if plan is None:
            return None
        self.check(plan)
        outcome = self.batch.apply(plan, self.runner.run(plan))
        for token in outcome.tokens:
            self.tokens.setdefault(token.request_id, []).append(token)
        self.failed += outcome.failed
        self.poison()
        return plan, outcome

    def poison(self) -> None:
        free = [b for b in range(self.ledger.num_blocks) if self.ledger.state(b) is BlockState.FREE]
        self.runner.poison(free)

    def check(self, plan: StepPlan) -> None:
        config = self.batch.config
        num_decodes = sum(len(row.tokens) == 1 for row in plan.rows)
        assert 0 < len(plan.rows) <= config.max_rows
        assert plan.num_tokens <= max(config.max_tokens_per_step, num_decodes + config.chunk_tokens)
        assert self.ledger.audit() == []
        written: set[int] = set()
        for row in plan.rows:
            assert self.ledger.blocks_of(row.request_id) == row.blocks
            assert row.start // config.chunk_tokens == (row.position - 1) // config.chunk_tokens, "over a chunk's end"
            assert row.sample or row.position % config.chunk_tokens == 0
            mine = set(row.blocks[row.start // SIZE : (row.position - 1) // SIZE + 1])
            assert not mine & written, "two rows write one block"
            assert all(self.ledger.hash_of(block) is None for block in mine), "a shared block is written"
            written |= mine

    def run(self, steps_max: int = 2000) -> int:
        for number in range(steps_max):
            if self.step() is None:
                return number
        raise AssertionError(f"still running after {steps_max} steps")

    def answer(self, request_id: RequestId) -> list[int]:
        tokens = self.tokens.get(request_id, [])
        assert [token.index for token in tokens] == list(range(len(tokens)))
        assert all(token.finish is None for token in tokens[:-1])
        return [token.token_id for token in tokens]


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(salt * 7919 + position * 31) % VOCAB for position in range(length)]


# ---- what a step contains -------------------------------------------------------------------------------------------


def test_chunks_end_at_absolute_multiples_and_only_the_last_samples() -> None:
    engine = Engine()
    engine.add("a", prompt_of(21), num=2)
    seen = []
    while (step := engine.step()) is not None:
        (row,) = step[0].rows
        seen.append((row.start, len(row.tokens), row.sample))
    assert seen == [(0, 8, False), (8, 8, False), (16, 5, True), (21, 1, True)]
    assert engine.answer(RequestId("a")) == expected_tokens(prompt_of(21), Sampling(), 2, VOCAB)


def test_a_prefix_hit_does_not_shift_the_chunks() -> None:
    engine = Engine()
    engine.add("a", prompt_of(21), num=1)
    engine.run()
    request = engine.add("b", [*prompt_of(12), *prompt_of(9, salt=3)], num=1)
    step = engine.step()
    assert step is not None
    assert (step[0].rows[0].start, step[0].rows[0].position) == (12, 16)
    assert step[1].computed == {request: 16}
    sequence = engine.batch.get(request)
    assert sequence is not None
    assert sequence.num_cached_tokens == 12


@pytest.mark.parametrize("length", [8, 9, 12])
def test_a_full_hit_still_computes_the_last_token_in_a_block_of_its_own(length: int) -> None:
    engine = Engine()
    engine.add("a", prompt_of(length), num=1)
    engine.run()
    engine.add("b", prompt_of(length), num=1)
    step = engine.step()
    assert step is not None
    assert step[0].rows[0].start == (length - 1) // SIZE * SIZE
    assert engine.answer(RequestId("b")) == engine.answer(RequestId("a"))


def test_decodes_go_before_prefill_and_within_the_budget() -> None:
    engine = Engine()
    for name in "abc":
        engine.add(name, prompt_of(4, salt=ord(name)), num=20)
    engine.step()
    for name in "xyz":
        engine.add(name, prompt_of(8, salt=ord(name)), num=20)
    step = engine.step()
    assert step is not None
    # 3 decodes and one chunk of 8 are 11 of 16; a second chunk does not fit.
    assert [row.request_id for row in step[0].rows] == ["a", "b", "c", "x"]
    assert step[0].num_tokens == 11


def test_many_decodes_do_not_starve_prefill() -> None:
    engine = Engine(config=replace(CONFIG, max_tokens_per_step=8, max_rows=12))
    for number in range(10):
        engine.add(f"d{number}", prompt_of(2, salt=number), num=40)
    while engine.batch.prefill_backlog_tokens:
        engine.step()
    engine.add("p", prompt_of(16), num=1)
    engine.step()
    step = engine.step()
    assert step is not None
    assert step[0].rows[-1].request_id == "p"
    assert engine.answer(RequestId("p"))


def test_more_decodes_than_rows_take_turns() -> None:
    engine = Engine(config=replace(CONFIG, max_rows=3))
    for number in range(8):
        engine.add(f"d{number}", prompt_of(2, salt=number), num=12)
    for _ in range(20):
        engine.step()
    lengths = [len(tokens) for tokens in engine.tokens.values()]
    assert len(lengths) == 8 or engine.batch.num_waiting
    engine.run()
    assert all(len(tokens) == 12 for tokens in engine.tokens.values())
    assert len(engine.tokens) == 8


def test_prefill_order_is_priority_then_arrival() -> None:
    engine = Engine(config=replace(CONFIG, max_tokens_per_step=8))
    for name, priority in (("late", 2.0), ("first", 1.0), ("second", 1.0), ("urgent", 0.5)):
        engine.add(name, prompt_of(8, salt=len(name)), num=1, priority=priority)
    order = []
    while (step := engine.step()) is not None:
        order += [row.request_id for row in step[0].rows]
    assert order == ["urgent", "first", "second", "late"]


def test_priority_can_change_while_waiting() -> None:
    engine = Engine(config=replace(CONFIG, max_tokens_per_step=8))
    for name in "ab":
        engine.add(name, prompt_of(16, salt=ord(name)), num=1)
    engine.step()
    b = engine.batch.get(RequestId("b"))
    assert b is not None
    b.priority = -1.0
    step = engine.step()
    assert step is not None
    assert step[0].rows[0].request_id == "b"


def test_context_is_given_where_penalties_need_it() -> None:
    engine = Engine()
    engine.add("plain", prompt_of(3), num=3)
    engine.add("penal", prompt_of(5), sampling=Sampling(max_tokens=3, repetition_penalty=1.2))
    for _ in range(2):
        step = engine.step()
        assert step is not None
        plain, penal = step[0].rows
        assert plain.context == ()
        assert len(penal.context) == penal.position
    assert penal.context[-1] == penal.tokens[-1]
    assert (penal.position, penal.index) == (6, 1)


def test_backlog_and_counts() -> None:
    engine = Engine()
    engine.add("a", prompt_of(20), num=4)
    engine.add("b", prompt_of(3), num=4)
    assert (engine.batch.prefill_backlog_tokens, engine.batch.num_running, engine.batch.num_waiting) == (23, 0, 2)
    engine.step()
    assert (engine.batch.prefill_backlog_tokens, engine.batch.num_running, engine.batch.num_waiting) == (12, 2, 0)


# ---- how a request ends ---------------------------------------------------------------------------------------------


def finish(sampling: Sampling, drawn: list[int], *, num_prompt: int = 3, config: BatchConfig = CONFIG) -> list[Token]:
    """The tokens of a request whose sampler draws these ids."""
    batch = Batch(BlockLedger(num_blocks=64, block_size=SIZE), config)
    batch.add(
        Sequence(
            request_id=RequestId("a"),
            epoch=3,
            tokens=prompt_of(num_prompt),
            num_prompt_tokens=num_prompt,
            sampling=sampling,
        )
    )
    tokens: list[Token] = []
    for token_id in drawn:
        plan = batch.compose()
        if plan is None:
            break
        tokens += batch.apply(plan, [Sampled(token_id=token_id, logprob=-1.5)]).tokens
    if tokens[-1].finish is not None:
        assert len(batch) == 0
        assert batch.ledger.counts().owned == 0
    return tokens


END = replace(CONFIG, eos_token_ids=(2, 3))


@pytest.mark.parametrize(
    ("sampling", "drawn", "num", "reason"),
    [
        (Sampling(max_tokens=3), [9, 9, 9, 9], 3, FinishReason.LENGTH),
        (Sampling(max_tokens=9), [9, 3, 9], 2, FinishReason.STOP),
        (Sampling(max_tokens=9), [2], 1, FinishReason.STOP),
        (Sampling(max_tokens=3, ignore_eos=True), [2, 3, 2], 3, FinishReason.LENGTH),
        (Sampling(max_tokens=9, stop_token_ids=(7,)), [9, 9, 7], 3, FinishReason.STOP),
        (Sampling(max_tokens=9, stop_token_ids=(7,), ignore_eos=True), [2, 7], 2, FinishReason.STOP),
        (Sampling(max_tokens=9, min_tokens=2), [2, 2, 2], 3, FinishReason.STOP),
        (Sampling(max_tokens=2), [9, 2], 2, FinishReason.STOP),
        (Sampling(max_tokens=9), [9, 9], 2, None),
    ],
)
def test_finish(sampling: Sampling, drawn: list[int], num: int, reason: FinishReason | None) -> None:
    tokens = finish(sampling, drawn, config=END)
    assert len(tokens) == num
    assert tokens[-1].finish is reason
    assert all(token.finish is None for token in tokens[:-1])
    assert tokens[0] == Token(
        request_id=RequestId("a"), epoch=3, index=0, token_id=drawn[0], logprob=-1.5, finish=tokens[0].finish
    )


def test_the_context_ends_a_request() -> None:
    tokens = finish(Sampling(max_tokens=50), [9] * 50, config=replace(CONFIG, context_tokens=8))
    assert (len(tokens), tokens[-1].finish) == (5, FinishReason.LENGTH)


def test_what_can_never_fit_is_refused_by_name() -> None:
    engine = Engine(num_blocks=4)
    with pytest.raises(ValueError, match=r"long needs 5 KV blocks for 17 tokens, the pool has 4"):
        engine.add("long", prompt_of(17))
    with pytest.raises(ValueError, match=r"deep has 400 tokens, the context holds 400"):
        engine.add("deep", prompt_of(400))
    assert len(engine.batch) == 0


def test_what_outgrows_the_pool_fails_by_name() -> None:
    engine = Engine(num_blocks=3)
    request = engine.add("a", prompt_of(8), num=20)
    engine.run()
    assert engine.answer(request) == expected_tokens(prompt_of(8), Sampling(), 5, VOCAB)
    (failed,) = engine.failed
    assert failed == Failed(
        request_id=request, epoch=1, code="out_of_blocks", reason="a has grown to 4 KV blocks, the pool has 3"
    )
    assert engine.ledger.counts().owned == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchConfig(max_tokens_per_step=0), "max_tokens_per_step is 0"),
        (lambda: BatchConfig(max_rows=0), "max_rows is 0"),
        (lambda: BatchConfig(chunk_tokens=0), "chunk_tokens is 0"),
        (lambda: BatchConfig(context_tokens=-1), "context_tokens is -1"),
        (
            lambda: BatchConfig(max_tokens_per_step=255),
            "max_tokens_per_step is 255, must be at least chunk_tokens, 256",
        ),
    ],
)
def test_config_names_what_is_wrong(make: Callable[[], BatchConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- running out of blocks ------------------------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_loses_nothing() -> None:
    engine = Engine(num_blocks=12)
    requests = [engine.add(f"r{number}", prompt_of(9, salt=number), num=20) for number in range(3)]
    preempted: list[RequestId] = []
    while engine.step() is not None:
        preempted += [each.request_id for each in engine.batch.take_preempted()]
    assert preempted
    assert requests[0] not in preempted
    for number, request in enumerate(requests):
        assert engine.answer(request) == expected_tokens(prompt_of(9, salt=number), Sampling(), 20, VOCAB)


def test_held_and_unpreemptible_sequences_keep_their_blocks() -> None:
    engine = Engine(num_blocks=12)
    requests = [engine.add(f"r{number}", prompt_of(9, salt=number), num=20) for number in range(3)]
    for _ in range(3):
        engine.step()
    engine.batch.hold(requests[2])
    second = engine.batch.get(requests[1])
    assert second is not None
    second.preemptible = False
    kept = [engine.ledger.blocks_of(request) for request in requests[1:]]
    for _ in range(40):
        engine.step()
    assert [each.request_id for each in engine.batch.take_preempted()] in ([], [requests[0]])
    for request, blocks in zip(requests[1:], kept, strict=True):
        assert request not in engine.batch or engine.ledger.blocks_of(request)[: len(blocks)] == blocks
    engine.batch.resume(requests[2])
    engine.run()
    for number, request in enumerate(requests):
        assert engine.answer(request) == expected_tokens(prompt_of(9, salt=number), Sampling(), 20, VOCAB)


def test_a_long_prompt_is_not_overtaken_forever() -> None:
    engine = Engine(num_blocks=16)
    engine.add("running", prompt_of(24, salt=1), num=12)
    engine.step()
    engine.add("long", prompt_of(48, salt=2), num=1)
    for number in range(4):
        engine.add(f"short{number}", prompt_of(4, salt=3 + number), num=1)
    began: list[str] = []
    while (step := engine.step()) is not None:
        began += [row.request_id for row in step[0].rows if row.start == 0]
    # One after the other would fit beside "running" at once.
    assert began == ["long", "short0", "short1", "short2", "short3"]


def test_a_started_prefill_is_not_robbed_by_a_younger_one() -> None:
    engine = Engine(num_blocks=12, config=replace(CONFIG, max_tokens_per_step=8))
    for number in range(3):
        engine.add(f"r{number}", prompt_of(30, salt=number), num=1)
    while engine.step() is not None:
        assert engine.batch.take_preempted() == ()
        assert engine.batch.num_running <= 1


# ---- what role cores do ---------------------------------------------------------------------------------------------


def hand_over(source: Engine, target: Engine, request: RequestId, transfer: str) -> bool:
    """Moves a held sequence between its steps, as a handoff or migration does; False when the target is full."""
    sequence = source.batch.get(request)
    assert sequence is not None
    hashes = sequence.hashes[: sequence.num_computed // SIZE]
    reused = target.ledger.acquire(request, hashes)
    granted = target.ledger.grant(transfer, len(sequence.blocks) - len(reused))
    if granted is None:
        target.ledger.release(request)
        return False
    source.ledger.export(transfer, sequence.blocks[len(reused) :])
    for here, there in zip(sequence.blocks[len(reused) :], granted, strict=True):
        target.runner.write_block(there, source.runner.read_block(here))
    source.ledger.end_export(transfer)
    target.batch.add(
        Sequence(
            request_id=request,
            epoch=sequence.epoch + 1,
            tokens=list(sequence.tokens),
            num_prompt_tokens=sequence.num_prompt_tokens,
            sampling=sequence.sampling,
            num_computed=sequence.num_computed,
            blocks=reused + target.ledger.accept(transfer, request),
        )
    )
    source.batch.end(request)
    source.poison()
    return True


def test_a_handoff_goes_on_with_the_second_token() -> None:
    source, target = Engine(), Engine()
    request = source.add("a", prompt_of(13), num=9)
    for _ in range(2):
        source.step()
    sequence = source.batch.get(request)
    assert sequence is not None
    assert (sequence.num_computed, sequence.index) == (13, 1)
    source.batch.hold(request)
    assert source.step() is None
    assert hand_over(source, target, request, "t")
    target.run()
    tokens = source.tokens[request] + target.tokens[request]
    assert [token.index for token in tokens] == list(range(9))
    assert [token.epoch for token in tokens] == [1] + [2] * 8
    assert [token.token_id for token in tokens] == expected_tokens(prompt_of(13), Sampling(), 9, VOCAB)
    assert target.ledger.match(sequence.hashes[:3]) == 3  # published where it went


def test_recovery_elsewhere_goes_on_from_the_delivered_tokens() -> None:
    prompt, sampling = prompt_of(10), Sampling(max_tokens=12, temperature=1.0, seed=99)
    whole = expected_tokens(prompt, sampling, 12, VOCAB)
    engine = Engine()
    engine.batch.add(
        Sequence(request_id=RequestId("a"), epoch=2, tokens=prompt + whole[:5], num_prompt_tokens=10, sampling=sampling)
    )
    engine.run()
    tokens = engine.tokens[RequestId("a")]
    assert [token.index for token in tokens] == list(range(5, 12))
    assert [token.token_id for token in tokens] == whole[5:]
    assert tokens[-1].finish is FinishReason.LENGTH


def test_remove_leaves_the_blocks_to_their_owner() -> None:
    engine = Engine()
    request = engine.add("a", prompt_of(8), num=4)
    engine.step()
    blocks = engine.ledger.blocks_of(request)
    sequence = engine.batch.remove(request)
    assert blocks
    assert tuple(sequence.blocks) == engine.ledger.blocks_of(request) == blocks
    engine.batch.add(sequence)
    engine.run()
    assert engine.answer(request) == expected_tokens(prompt_of(8), Sampling(), 4, VOCAB)


def test_adding_twice_or_with_other_blocks_is_our_own_mistake() -> None:
    engine = Engine()
    engine.add("a", prompt_of(8))
    with pytest.raises(AssertionError, match="here already"):
        engine.add("a", prompt_of(8))
    with pytest.raises(AssertionError, match="other blocks"):
        engine.batch.add(
            Sequence(
                request_id=RequestId("b"),
                epoch=1,
                tokens=prompt_of(4),
                num_prompt_tokens=3,
                sampling=Sampling(),
                num_computed=3,
                blocks=[1],
            )
        )


# ---- everything at once ---------------------------------------------------------------------------------------------


def run_world(seed: int, kind: type[Batch] = Batch) -> tuple[int, int]:
    """Two small engines under random arrivals, shared prefixes, cancellations, holds and moves between the two.

    Returns how many requests moved and how many were preempted, after checking every token of all.
    """
    rng = random.Random(seed)
    config = replace(CONFIG, max_rows=rng.choice([2, 4, 8]), max_tokens_per_step=rng.choice([8, 16, 40]))
    engines = [Engine(num_blocks=rng.choice([14, 20, 40]), config=config, kind=kind) for _ in range(2)]
    asked: dict[RequestId, tuple[list[int], Sampling]] = {}
    cancelled: set[RequestId] = set()
    num_moves = num_preempted = 0
    for turn in range(150):
        if rng.random() < 0.25:
            prompt = prompt_of(rng.randrange(1, 14), salt=rng.randrange(2)) + prompt_of(rng.randrange(8), salt=turn)
            sampling = Sampling(max_tokens=rng.randrange(1, 24), temperature=rng.choice([0.0, 1.0]), seed=turn)
            asked[rng.choice(engines).add(f"r{turn}", prompt, sampling=sampling)] = (prompt, sampling)
        engine, other = rng.sample(engines, 2)
        for sequence in engine.batch.sequences():
            roll = rng.random()
            if roll < 0.01:
                engine.batch.end(sequence.request_id)
                engine.poison()
                cancelled.add(sequence.request_id)
            elif roll < 0.06 and sequence.decoding:
                num_moves += hand_over(engine, other, sequence.request_id, f"t{turn}")
            elif roll < 0.12:
                sequence.held = not sequence.held
        engine.step()
        num_preempted += len(engine.batch.take_preempted())
    for engine in engines:
        for sequence in engine.batch.sequences():
            sequence.held = False
        engine.run()
        counts = engine.ledger.counts()
        assert counts.free + counts.cached == counts.total
        assert engine.failed == []
    for request, (prompt, sampling) in asked.items():
        tokens = sorted(
            (token for engine in engines for token in engine.tokens.get(request, [])), key=lambda t: t.index
        )
        assert [token.index for token in tokens] == list(range(len(tokens)))
        assert [t.token_id for t in tokens] == expected_tokens(prompt, sampling, len(tokens), VOCAB), request
        assert len(tokens) == sampling.max_tokens or request in cancelled
    return num_moves, num_preempted


def test_every_request_gets_its_own_tokens() -> None:
    results = [run_world(seed) for seed in range(60)]
    assert sum(moves for moves, _ in results) > 100
    assert sum(preempted for _, preempted in results) > 20


class SkipsATokenAfterAHit(Batch):
    def _start(self, sequence: Sequence) -> bool:
        started = super()._start(sequence)
        if sequence.num_cached_tokens and sequence.num_left > 1:
            sequence.num_computed += 1
        return started


class PublishesBeforeTheStep(Batch):
    def _row(self, sequence: Sequence, end: int) -> StepRow:
        computed, sequence.num_computed = sequence.num_computed, end
        self._publish(sequence)
        sequence.num_computed = computed
        return super()._row(sequence, end)


class ReleasesTooEarly(Batch):
    def _append(self, sequence: Sequence, drawn: Sampled) -> Token:
        if sequence.index == 3:
            self.ledger.release(sequence.owner)
            sequence.blocks = self.ledger.allocate(sequence.owner, len(sequence.blocks)) or []
            sequence.table = ()
        return super()._append(sequence, drawn)


class LeaksWhatItPreempts(Batch):
    def _preempt(self, sequence: Sequence) -> None:
        super()._preempt(sequence)
        self.ledger.allocate("nobody", 1)


class RepublishesUnderTheWrongHash(Batch):
    def _know_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        super()._know_hashes(sequence, num_blocks)
        if sequence.index == 5:
            sequence.hashes[:1] = [bytes(16)]


@pytest.mark.parametrize(
    "broken",
    [SkipsATokenAfterAHit, PublishesBeforeTheStep, ReleasesTooEarly, LeaksWhatItPreempts, RepublishesUnderTheWrongHash],
)
def test_planted_bug_is_found(broken: type[Batch]) -> None:
    def find() -> None:
        for seed in range(60):
            run_world(seed, broken)

    with pytest.raises(AssertionError):
        find()
