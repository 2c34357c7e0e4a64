"""The two threads of an engine: one carries events to a core and its actions out, one runs the core's steps."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engine.events import Tick
from engine.runner import Runner
from engine.step import Drawn, StepPlan

IDLE_WAIT_MS = 1000  # the longest sleep, whatever the core's deadline; a guard, not a poll


class Core(Protocol):
    """What decides on a worker: plain and synchronous, with the time in every call (milliseconds, monotonic).

    Between `next_plan` and `step_done` the step runs, and `handle` is called for what happens meanwhile.
    """

    def handle(self, now_ms: int, event: object) -> list[object]:
        """Takes an event in; returns what is to be done."""
        ...

    def next_plan(self, now_ms: int) -> StepPlan | None:
        """The next step, or None when there is nothing to run. Not called while a step runs."""
        ...

    def step_done(self, now_ms: int, plan: StepPlan, sampled: Sequence[Drawn | None]) -> list[object]:
        """The step has run; returns what is to be done."""
        ...

    def next_deadline_ms(self) -> int | None:
        """When a Tick is wanted at the latest; None: not at all."""
        ...


@runtime_checkable
class Storyteller(Protocol):
    """A core that keeps a bounded log of what it saw, for whoever has to explain a crash."""

    def story(self) -> list[str]:
        """The newest events and decisions, oldest first."""
        ...


class InboxFull(RuntimeError):
    """The engine did not keep up with its events; whoever posted must drop its connection or wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ran:
    """What became of a step."""

    plan: StepPlan
    sampled: Sequence[Drawn | None]
    step_ms: float


class EngineLoop:
    """Runs a core on one thread and a runner on another, from `start` until `stop` or the first error.

    The core goes on hearing events while a step runs: a commit that arrives need not wait for somebody else's chunk
    of prefill. Only one step runs at a time, and only the core's thread calls the core.

    `perform` gets the core's actions, and `on_crash` the error that ended the loop and the core's story; both are
    called on the core's thread and must not block. `post` may be called from any thread. Counters are written by the
    core's thread alone and may be read from anywhere.
    """

    def __init__(
        self,
        *,
        core: Core,
        runner: Runner,
        perform: Callable[[list[object]], None],
        on_crash: Callable[[BaseException, str], None],
        inbox_events_max: int = 65536,
        name: str = "engine",
    ) -> None:
        self._core = core
        self._runner = runner
        self._perform = perform
        self._on_crash = on_crash
        self._inbox: deque[object] = deque()
        self._inbox_events_max = inbox_events_max
        self._wake = threading.Condition()
        self._ran: _Ran | None = None  # a step that has run and is not booked
        self._broken: BaseException | None = None  # what ended the runner's thread
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._stopping = False
        self._ticked = False
        self._resting = False  # the core's thread waits, with nothing to do
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._step_thread = threading.Thread(target=self._run_steps, name=f"{name}-step", daemon=True)
        self._num_idle_turns = 0
        self.num_steps = 0
        self.last_step_ms = 0.0
        self.step_began_ms: int | None = None  # of the step under way

    def start(self) -> None:
        """Starts the threads. Once only."""
        self._step_thread.start()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the core's thread runs: False before `start`, after `stop` and after a crash."""
        return self._thread.is_alive()

    @property
    def num_inbox_events(self) -> int:
        """Events that wait."""
        return len(self._inbox)

    @property
    def progress(self) -> int:
        """Rises while the loop gets on: with what the runner does of a step, and with turns that find none under way.

        So it stands still when a step hangs, although events are still heard, and when the core does.
        """
        return self.num_steps + self._runner.progress + self._num_idle_turns

    @property
    def busy(self) -> bool:
        """Whether there is something to get on with: a step, events, or a turn of the core that has not ended."""
        return self.step_began_ms is not None or bool(self._inbox) or not self._resting

    def post(self, event: object) -> None:
        """Hands the core an event, from any thread. InboxFull when too many wait already; the event is not taken."""
        with self._wake:
            if len(self._inbox) >= self._inbox_events_max:
                raise InboxFull(f"{len(self._inbox)} events wait for the engine, at most {self._inbox_events_max} may")
            self._inbox.append(event)
            self._wake.notify()

    def stop(self, *, deadline_ms: int) -> bool:
        """Ends the loop after the step under way; events that still wait are dropped.

        False when the threads have not ended within `deadline_ms`. Not to be called on one of them.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        due = time.monotonic() + deadline_ms / 1000
        threads = [each for each in (self._thread, self._step_thread) if each.ident is not None]
        for thread in threads:
            thread.join(max(0.0, due - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    # ---- on the runner's thread --------------------------------------------------------------------------------------

    def _run_steps(self) -> None:
        try:
            while (plan := self._plans.get()) is not None:
                began = time.perf_counter()
                sampled = self._runner.run(plan)
                step_ms = (time.perf_counter() - began) * 1000
                with self._wake:
                    self._ran = _Ran(plan=plan, sampled=sampled, step_ms=step_ms)
                    self._wake.notify()
        except BaseException as error:  # the core's thread ends the loop with it
            with self._wake:
                self._broken = error
                self._wake.notify()

    # ---- on the core's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            wait = False
            while self._await(wait=wait):
                self._book()
                self._handle()
                wait = self.step_began_ms is not None or not self._begin()
        except BaseException as error:
            self._on_crash(error, self._story())
        finally:
            self._plans.put(None)

    def _await(self, *, wait: bool) -> bool:
        """Waits, if it has to, for an event, the step's end or the core's deadline; False: stop."""
        wait_ms = 0
        if wait:
            deadline_ms = self._core.next_deadline_ms()
            wait_ms = IDLE_WAIT_MS if deadline_ms is None else min(IDLE_WAIT_MS, deadline_ms - now_ms())
            if self._ticked:
                wait_ms = max(wait_ms, 1)  # a core whose deadline stays in the past costs a turn a millisecond, no more
        with self._wake:
            if wait_ms > 0 and not (self._inbox or self._ran or self._broken or self._stopping):
                self._resting = True
                self._wake.wait(wait_ms / 1000)
                self._resting = False
            if self._broken is not None:
                raise self._broken
            return not self._stopping

    def _book(self) -> None:
        """Tells the core of the step that has run, if one has."""
        with self._wake:
            ran, self._ran = self._ran, None
        if ran is None:
            return
        self.step_began_ms = None
        self.last_step_ms = ran.step_ms
        self.num_steps += 1
        self._do(self._core.step_done(now_ms(), ran.plan, ran.sampled))

    def _handle(self) -> None:
        with self._wake:
            events = list(self._inbox)
            self._inbox.clear()
        for event in events:
            self._do(self._core.handle(now_ms(), event))
        deadline_ms = self._core.next_deadline_ms()
        self._ticked = deadline_ms is not None and deadline_ms <= now_ms()
        if self._ticked:
            self._do(self._core.handle(now_ms(), Tick()))

    def _begin(self) -> bool:
        """Has the next step run; False when the core has nothing to run."""
        self._num_idle_turns += 1
        began_ms = now_ms()
        plan = self._core.next_plan(began_ms)
        if plan is None:
            return False
        self.step_began_ms = began_ms
        self._plans.put(plan)
        return True

    def _do(self, actions: list[object]) -> None:
        if actions:
            self._perform(actions)

    def _story(self) -> str:
        """The core's story; telling it may fail, which must not hide the error that is being told about."""
        if not isinstance(self._core, Storyteller):
            return ""
        try:
            return "\n".join(self._core.story())
        except Exception as error:
            return f"the story is lost: {error!r}"


def now_ms() -> int:
    """Milliseconds of the monotonic clock; the only place below the shells where time is read."""
    return time.monotonic_ns() // 1_000_000
