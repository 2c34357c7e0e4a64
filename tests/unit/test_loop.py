"""The engine loop: events in, tokens out, deadlines kept, crashes told, stopped in time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from engine.blocks import BlockLedger
from engine.events import Tick
from engine.fake_runner import FakeRunner, expected_tokens
from engine.loop import EngineLoop, InboxFull, now_ms
from engine.sequence import Sequence as EngineSequence
from engine.step import Batch, BatchConfig, Drawn, Sampled, StepPlan
from tandem.request import RequestId, Sampling, Token

VOCAB = 1000
WAIT_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Wants `num` tokens after the prompt."""

    request_id: RequestId
    prompt: tuple[int, ...]
    num: int


class PlainCore:
    """The smallest core that serves: every Ask becomes a sequence."""

    def __init__(self) -> None:
        ledger = BlockLedger(num_blocks=64, block_size=4)
        self.batch = Batch(ledger, BatchConfig(chunk_tokens=8, max_tokens_per_step=32))
        self.deadline_ms: int | None = None
        self.seen: list[str] = []

    def handle(self, now_ms: int, event: object) -> list[object]:
        self.seen.append(type(event).__name__)
        match event:
            case Ask():
                self.batch.add(
                    EngineSequence(
                        request_id=event.request_id,
                        epoch=1,
                        tokens=list(event.prompt),
                        num_prompt_tokens=len(event.prompt),
                        sampling=Sampling(max_tokens=event.num),
                    )
                )
                return []
            case Tick():
                self.deadline_ms = None
                return ["ticked"]
            case int():
                self.deadline_ms = now_ms + event
                return []
        raise TypeError(f"what is {event!r}")

    def next_plan(self, now_ms: int) -> StepPlan | None:
        return self.batch.compose()

    def step_done(self, now_ms: int, plan: StepPlan, sampled: Sequence[Drawn | None]) -> list[object]:
        return list(self.batch.apply(plan, sampled).tokens)

    def next_deadline_ms(self) -> int | None:
        return self.deadline_ms

    def story(self) -> list[str]:
        return self.seen


class GatedRunner(FakeRunner):
    """Runs a step when the gate is open, and not before."""

    def __init__(self) -> None:
        super().__init__(num_blocks=64, block_size=4, vocab_size=VOCAB)
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()

    def run(self, plan: StepPlan) -> list[Sampled | None]:
        if not self.gate.is_set():
            self.waiting.set()
            assert self.gate.wait(WAIT_S)
        return super().run(plan)


class Shell:
    """Collects what the loop tells."""

    def __init__(self, *, inbox_events_max: int = 1000) -> None:
        self.runner = GatedRunner()
        self.core = PlainCore()
        self.actions: queue.Queue[object] = queue.Queue()
        self.crashes: queue.Queue[tuple[BaseException, str]] = queue.Queue()
        self.loop = EngineLoop(
            core=self.core,
            runner=self.runner,
            perform=self.perform,
            on_crash=lambda error, story: self.crashes.put((error, story)),
            inbox_events_max=inbox_events_max,
        )

    def perform(self, actions: list[object]) -> None:
        for action in actions:
            self.actions.put(action)

    def tokens(self, num: int) -> list[Token]:
        taken = [self.actions.get(timeout=WAIT_S) for _ in range(num)]
        return [token for token in taken if isinstance(token, Token)]


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.runner.gate.set()
    assert shell.loop.stop(deadline_ms=WAIT_S * 1000)


def test_serves_what_is_posted_from_many_threads(shell: Shell) -> None:
    shell.loop.start()
    asks = [Ask(request_id=RequestId(f"r{i}"), prompt=tuple(range(i, 3 * i + 5)), num=6) for i in range(8)]
    posters = [threading.Thread(target=shell.loop.post, args=(ask,)) for ask in asks]
    for poster in posters:
        poster.start()
    tokens = shell.tokens(8 * 6)
    for poster in posters:
        poster.join(WAIT_S)
    for ask in asks:
        mine = [token for token in tokens if token.request_id == ask.request_id]
        assert [token.index for token in mine] == list(range(6))
        assert [token.token_id for token in mine] == expected_tokens(ask.prompt, Sampling(), 6, VOCAB)
    assert shell.loop.num_steps >= 6
    assert shell.loop.last_step_ms > 0
    assert shell.loop.step_began_ms is None or shell.loop.alive


def test_ticks_at_the_deadline_though_idle(shell: Shell) -> None:
    shell.loop.start()
    began = now_ms()
    shell.loop.post(30)
    assert shell.actions.get(timeout=WAIT_S) == "ticked"
    assert 30 <= now_ms() - began < 900  # well before the idle wait ends by itself


def test_wakes_from_idleness_by_an_event(shell: Shell) -> None:
    shell.loop.start()
    shell.loop.post(Ask(request_id=RequestId("a"), prompt=(1, 2), num=1))
    shell.tokens(1)
    began = now_ms()
    shell.loop.post(Ask(request_id=RequestId("b"), prompt=(1, 2), num=1))
    shell.tokens(1)
    assert now_ms() - began < 900


def test_events_are_heard_and_deadlines_kept_while_a_step_runs(shell: Shell) -> None:
    shell.loop.start()
    shell.runner.gate.clear()
    shell.loop.post(Ask(request_id=RequestId("a"), prompt=(1, 2), num=2))
    assert shell.runner.waiting.wait(WAIT_S)
    assert shell.loop.step_began_ms is not None
    shell.loop.post(20)
    assert shell.actions.get(timeout=WAIT_S) == "ticked"
    assert shell.loop.num_steps == 0
    shell.runner.gate.set()
    assert [token.token_id for token in shell.tokens(2)] == expected_tokens((1, 2), Sampling(), 2, VOCAB)


def test_progress_stands_still_when_a_step_hangs_though_events_are_heard(shell: Shell) -> None:
    shell.loop.start()
    shell.runner.gate.clear()
    shell.loop.post(Ask(request_id=RequestId("a"), prompt=(1, 2), num=1))
    assert shell.runner.waiting.wait(WAIT_S)
    before = shell.loop.progress
    for _ in range(5):
        shell.loop.post(1)
        assert shell.actions.get(timeout=WAIT_S) == "ticked"
    assert shell.loop.progress == before
    shell.runner.gate.set()
    shell.tokens(1)
    shell.loop.post(1)
    shell.actions.get(timeout=WAIT_S)
    assert shell.loop.progress > before


def test_stop_says_when_the_step_under_way_does_not_end() -> None:
    shell = Shell()
    shell.loop.start()
    shell.runner.gate.clear()
    shell.loop.post(Ask(request_id=RequestId("a"), prompt=(1, 2), num=1))
    assert shell.runner.waiting.wait(WAIT_S)
    assert not shell.loop.stop(deadline_ms=50)
    shell.runner.gate.set()
    assert shell.loop.stop(deadline_ms=WAIT_S * 1000)


def test_inbox_is_bounded() -> None:
    shell = Shell(inbox_events_max=2)
    shell.loop.post(1)
    shell.loop.post(2)
    with pytest.raises(InboxFull, match="at most 2"):
        shell.loop.post(3)
    assert shell.loop.num_inbox_events == 2
    assert shell.loop.stop(deadline_ms=0)


def test_a_crash_of_the_core_is_told_with_its_story(shell: Shell) -> None:
    shell.loop.start()
    shell.loop.post(Ask(request_id=RequestId("a"), prompt=(1,), num=1))
    shell.loop.post("nonsense")
    error, story = shell.crashes.get(timeout=WAIT_S)
    assert isinstance(error, TypeError)
    assert story == "Ask\nstr"
    assert shell.loop.stop(deadline_ms=WAIT_S * 1000)
    assert not shell.loop.alive


def test_a_crash_of_the_runner_is_told(shell: Shell) -> None:
    shell.core.batch.ledger = BlockLedger(num_blocks=99, block_size=4)  # more blocks than the runner's pool has
    shell.core.batch.ledger.allocate("somebody", 64)
    shell.loop.start()
    shell.loop.post(Ask(request_id=RequestId("a"), prompt=(1,), num=1))
    error, _ = shell.crashes.get(timeout=WAIT_S)
    assert isinstance(error, IndexError)


def test_stops_within_its_deadline_while_serving() -> None:
    shell = Shell()
    shell.loop.start()
    shell.loop.post(Ask(request_id=RequestId("a"), prompt=(1, 2, 3), num=200))
    shell.tokens(3)
    assert shell.loop.stop(deadline_ms=WAIT_S * 1000)
    assert not shell.loop.alive
    assert shell.crashes.empty()


def test_a_loop_is_busy_until_it_rests_and_when_its_core_hangs(shell: Shell) -> None:
    """The core's thread may hang where no step is under way and no event waits: it must not look idle."""
    shell.loop.start()
    assert wait_for(lambda: not shell.loop.busy)
    shell.runner.gate.clear()
    shell.loop.post(Ask(request_id=RequestId("a"), prompt=(1, 2), num=2))
    assert shell.runner.waiting.wait(WAIT_S)
    assert shell.loop.busy
    hangs, goes_on = threading.Event(), threading.Event()

    def performs(actions: list[object]) -> None:
        hangs.set()
        assert goes_on.wait(WAIT_S)

    shell.loop._perform = performs
    shell.runner.gate.set()
    assert hangs.wait(WAIT_S)
    before = shell.loop.progress
    assert shell.loop.num_inbox_events == 0
    assert shell.loop.step_began_ms is None
    assert shell.loop.busy
    assert shell.loop.progress == before
    goes_on.set()
    assert wait_for(lambda: not shell.loop.busy)


def wait_for(condition: Callable[[], bool]) -> bool:
    until_ms = now_ms() + WAIT_S * 1000
    while not condition() and now_ms() < until_ms:
        threading.Event().wait(0.005)
    return condition()
