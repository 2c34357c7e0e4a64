"""An ambush strikes when a transfer enters its state: at its beginning, on its way, and in the moment of its end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

from cluster.ambush import Ambush, WatchedCore
from cluster.chaos_states import STATES, first_of, name_of, role_in
from cluster.worker_core import WorkerCore
from kv_transfer.handoff_source import SourceState
from kv_transfer.handoff_target import TargetState
from kv_transfer.migration_source import MigrationState
from tandem.messages import Role


@dataclass(eq=False)
class At:
    """A transfer that is in a state."""

    state: StrEnum


@dataclass
class Side:
    """One role's transfers."""

    open: list[At] = field(default_factory=list)
    moves: Any = None

    def machines(self) -> list[At]:
        return self.open


class Script:
    """A core in which each event is a function that does something to its transfers."""

    def __init__(self) -> None:
        self.prefill, self.decode = Side(), Side(moves=Side())
        self.done: list[str] = []

    def handle(self, now_ms: int, event: Any) -> list[object]:
        event(self)
        self.done.append("handled")
        return []


def _watched() -> tuple[Script, WatchedCore, list[str]]:
    script = Script()
    return script, WatchedCore(cast(WorkerCore, script)), []


def _lay(core: WatchedCore, struck: list[str], state: str, *, for_s: float = 60.0, after_ms: int = 0) -> None:
    def strike() -> None:
        struck.append(state)

    core.lay(Ambush(state=state, strike=strike, after_ms=after_ms, until_s=time.monotonic() + for_s))


def _begin(state: StrEnum) -> Any:
    def event(core: Script) -> None:
        side = {SourceState: core.prefill, TargetState: core.decode, MigrationState: core.decode.moves}[type(state)]
        side.open.append(At(state))

    return event


def _go(state: StrEnum, *, close: bool = False) -> Any:
    def event(core: Script) -> None:
        for side in (core.prefill, core.decode, core.decode.moves):
            for each in list(side.open):
                if type(each.state) is type(state):
                    each.state = state
                    if close:
                        side.open.remove(each)

    return event


def test_a_state_that_is_entered_is_struck_once() -> None:
    _, core, struck = _watched()
    core.handle(0, _begin(SourceState.OFFERED))
    _lay(core, struck, "handoff.sending")
    core.handle(1, _go(SourceState.OFFERED))
    assert struck == []
    core.handle(2, _go(SourceState.SENDING))
    assert struck == ["handoff.sending"]
    core.handle(3, _go(SourceState.SENDING))
    core.handle(4, _begin(SourceState.SENDING))
    assert struck == ["handoff.sending"]


def test_one_that_was_in_the_state_before_is_not_struck() -> None:
    _, core, struck = _watched()
    core.handle(0, _begin(TargetState.SEALED))
    _lay(core, struck, "target.sealed")
    core.handle(1, _go(TargetState.SEALED))
    assert struck == []
    core.handle(2, _begin(TargetState.SEALED))
    assert struck == ["target.sealed"]


def test_the_last_state_is_seen_although_the_core_forgets_the_transfer_with_it() -> None:
    _, core, struck = _watched()
    core.handle(0, _begin(MigrationState.HANDED))
    _lay(core, struck, "migration.freed")
    core.handle(1, _go(MigrationState.FREED, close=True))
    assert struck == ["migration.freed"]


def test_a_transfer_that_begins_has_been_in_its_first_state() -> None:
    _, core, struck = _watched()
    _lay(core, struck, "migration.running")
    core.handle(0, _begin(MigrationState.OFFERED))
    assert struck == ["migration.running"]


def test_an_ambush_is_forgotten_when_its_time_is_over() -> None:
    _, core, struck = _watched()
    _lay(core, struck, "target.none", for_s=-1.0)
    core.handle(0, _begin(TargetState.NONE))
    assert struck == []


def test_every_state_has_a_name_a_role_and_a_table() -> None:
    states = [*SourceState, *MigrationState, *TargetState]
    assert [name_of(each) for each in states] == list(STATES)
    assert {role_in(each) for each in STATES if each.startswith("handoff.")} == {Role.PREFILL}
    assert {role_in(each) for each in STATES if not each.startswith("handoff.")} == {Role.DECODE}
    assert [first_of(each) for each in (SourceState.FREED, TargetState.ACTIVE)] == ["handoff.holding", "target.none"]


def test_while_no_ambush_is_laid_nothing_is_looked_at() -> None:
    script, core, _ = _watched()
    del script.prefill  # looking would raise
    assert core.handle(0, lambda script: None) == []
