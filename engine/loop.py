"""The one thread of an engine: it carries events to a core, its actions to the shell, and its plans to a runner."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from engine.events import Tick
from engine.runner import Runner
from engine.step import Drawn, StepPlan

IDLE_WAIT_MS = 1000  # the longest sleep, whatever the core's deadline; a guard, not a poll


class Core(Protocol):
    """What decides on a worker: plain and synchronous, with the time in every call (milliseconds, monotonic)."""

    def handle(self, now_ms: int, event: object) -> list[object]:
        """Takes an event in; returns what is to be done."""
        ...

    def next_plan(self, now_ms: int) -> StepPlan | None:
        """The next step, or None when there is nothing to run."""
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


class EngineLoop:
    """Runs a core and a runner on one thread, from `start` until `stop` or the first error.

    `perform` gets the core's actions, and `on_crash` the error that ended the loop and the core's story; both are
    called on the engine thread and must not block. `post` may be called from any thread. Counters are written by the
    engine thread alone and may be read from anywhere.
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
        self._stopping = False
        self._ticked = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.num_steps = 0
        self.num_turns = 0
        self.last_step_ms = 0.0
        self.step_began_ms: int | None = None  # of the step under way: a health check sees one that hangs

    def start(self) -> None:
        """Starts the thread. Once only."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs: False before `start`, after `stop` and after a crash."""
        return self._thread.is_alive()

    @property
    def num_inbox_events(self) -> int:
        """Events that wait."""
        return len(self._inbox)

    def post(self, event: object) -> None:
        """Hands the core an event, from any thread. InboxFull when too many wait already; the event is not taken."""
        with self._wake:
            if len(self._inbox) >= self._inbox_events_max:
                raise InboxFull(f"{len(self._inbox)} events wait for the engine, at most {self._inbox_events_max} may")
            self._inbox.append(event)
            self._wake.notify()

    def stop(self, *, deadline_ms: int) -> bool:
        """Ends the loop after the step under way; events that still wait are dropped.

        False when the thread has not ended within `deadline_ms`. Not to be called on the engine thread.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(deadline_ms / 1000)
        return not self._thread.is_alive()

    # ---- on the engine thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            ran = False
            while True:
                events = self._await_events(wait=not ran)
                if events is None:
                    return
                self._handle(events)
                ran = self._step()
                self.num_turns += 1
        except BaseException as error:
            self._on_crash(error, self._story())

    def _await_events(self, *, wait: bool) -> list[object] | None:
        """All events that are here, after waiting for one or for the core's deadline; None: stop."""
        wait_ms = 0
        if wait:
            deadline_ms = self._core.next_deadline_ms()
            wait_ms = IDLE_WAIT_MS if deadline_ms is None else min(IDLE_WAIT_MS, deadline_ms - now_ms())
            if self._ticked:
                wait_ms = max(wait_ms, 1)  # a core whose deadline stays in the past costs a turn a millisecond, no more
        with self._wake:
            if wait_ms > 0 and not self._inbox and not self._stopping:
                self._wake.wait(wait_ms / 1000)
            if self._stopping:
                return None
            events = list(self._inbox)
            self._inbox.clear()
        return events

    def _handle(self, events: list[object]) -> None:
        for event in events:
            self._do(self._core.handle(now_ms(), event))
        deadline_ms = self._core.next_deadline_ms()
        self._ticked = deadline_ms is not None and deadline_ms <= now_ms()
        if self._ticked:
            self._do(self._core.handle(now_ms(), Tick()))

    def _step(self) -> bool:
        """Runs one step; False when the core has nothing to run."""
        began_ms = now_ms()
        plan = self._core.next_plan(began_ms)
        if plan is None:
            return False
        self.step_began_ms = began_ms
        began = time.perf_counter()
        sampled = self._runner.run(plan)
        self.last_step_ms = (time.perf_counter() - began) * 1000
        self.step_began_ms = None
        self.num_steps += 1
        self._do(self._core.step_done(now_ms(), plan, sampled))
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
