"""A worker's core that is watched for the moment in which one of its transfers enters a state, to be struck there.

Only a cluster that allows faults has one. It looks at the machines' states, which it does not touch, and at nothing at
all while no ambush is laid.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cluster.chaos_states import first_of, name_of
from cluster.worker_core import WorkerCore
from engine.step import Drawn, StepPlan
from kv_transfer.handoff import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Ambush:
    """What to do when a transfer enters a state. `strike` must not block."""

    state: str
    strike: Callable[[], None]
    after_ms: int  # 0: before what the state brings with it is done or said
    until_s: float  # on the monotonic clock; then it is forgotten


class WatchedCore:
    """A `Core` of engine/loop.py: the worker's own, with an ambush now and then."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core
        self._ambush: Ambush | None = None  # set on any thread, taken on the core's
        self._seen: dict[int, tuple[Machine[Any], StrEnum]] | None = None  # by identity; None: not since it was laid

    def lay(self, ambush: Ambush) -> None:
        """Waits for the state from now on, instead of what was waited for."""
        self._ambush = ambush

    # ---- what the loop calls -----------------------------------------------------------------------------------------

    def handle(self, now_ms: int, event: object) -> list[object]:
        """As the core."""
        if self._ambush is None:
            return self._core.handle(now_ms, event)
        self._look()
        actions = self._core.handle(now_ms, event)
        self._look()
        return actions

    def next_plan(self, now_ms: int) -> StepPlan | None:
        """As the core."""
        return self._core.next_plan(now_ms)

    def step_done(self, now_ms: int, plan: StepPlan, sampled: Sequence[Drawn | None]) -> list[object]:
        """As the core."""
        actions = self._core.step_done(now_ms, plan, sampled)
        if self._ambush is not None:
            self._look()
        return actions

    def next_deadline_ms(self) -> int | None:
        """As the core."""
        return self._core.next_deadline_ms()

    def story(self) -> list[str]:
        """As the core."""
        return self._core.story()

    # ---- the ambush --------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Compares all machines with the last look, those that have been closed since included."""
        ambush = self._ambush
        if ambush is None:
            return
        if time.monotonic() > ambush.until_s:
            self._ambush, self._seen = None, None
            return
        core = self._core
        open_now: list[Machine[Any]] = [
            *core.prefill.machines(),
            *core.decode.machines(),
            *core.decode.moves.machines(),
        ]
        first, seen = self._seen is None, self._seen or {}
        entered: set[str] = set()
        for machine in {id(each): each for each in [*(one for one, _ in seen.values()), *open_now]}.values():
            _, before = seen.get(id(machine), (machine, None))
            if before is None:
                entered |= {name_of(machine.state), first_of(machine.state)}
            elif machine.state is not before:
                entered.add(name_of(machine.state))
        self._seen = {id(each): (each, each.state) for each in open_now}
        if not first and ambush.state in entered:
            self._ambush, self._seen = None, None
            if ambush.after_ms:
                timer = threading.Timer(ambush.after_ms / 1000, ambush.strike)
                timer.daemon = True  # a worker that ends in order waits for no fault
                timer.start()
            else:
                ambush.strike()
