"""The protocol states that a fault may strike at: those of the three tables, by name, and whose worker is in them."""

from __future__ import annotations

from enum import StrEnum

from kv_transfer.handoff_source import SourceState
from kv_transfer.handoff_target import TargetState
from kv_transfer.migration_source import MigrationState
from tandem.messages import Role

# A table's name, its states (the first is where each attempt begins), and the workers that come into them.
TABLES: dict[str, tuple[type[StrEnum], Role]] = {
    "handoff": (SourceState, Role.PREFILL),
    "migration": (MigrationState, Role.DECODE),
    "target": (TargetState, Role.DECODE),
}
NAMES = {states: name for name, (states, _) in TABLES.items()}
STATES: tuple[str, ...] = tuple(f"{name}.{state}" for name, (states, _) in TABLES.items() for state in states)


def name_of(state: StrEnum) -> str:
    """The state as it is named here, such as "target.sealed"."""
    return f"{NAMES[type(state)]}.{state}"


def role_in(state: str) -> Role:
    """The role of the workers that come into a state of STATES."""
    return TABLES[state.partition(".")[0]][1]


def first_of(state: StrEnum) -> str:
    """The state in which the attempts of this state's table begin."""
    return name_of(next(iter(type(state))))
