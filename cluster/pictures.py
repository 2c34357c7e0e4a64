"""The state machines as a page of documentation, printed from their tables, so that the pictures cannot lie.

python -m cluster.pictures > docs/protocol.md
"""

from __future__ import annotations

from cluster.membership import TRANSITIONS, MemberState
from kv_transfer.handoff import mermaid
from kv_transfer.handoff_source import SOURCE_TABLE, SourceState
from kv_transfer.handoff_target import TARGET_TABLE, TargetState
from kv_transfer.migration_source import MIGRATION_TABLE, MigrationState
from router.core import TABLE
from router.request import RequestState

HEAD = """# The protocol's state machines

Printed by `python -m cluster.pictures` from the tables that production runs; a test compares. A pair of state and event
that has no row is a late or doubled message from outside and has no effect; an event from inside always has its row.
"""


def membership() -> str:
    """The life of a worker incarnation as a Mermaid state diagram."""
    edges: dict[tuple[MemberState, MemberState], list[str]] = {}
    for (state, observation), following in TRANSITIONS.items():
        edges.setdefault((state, following), []).append(observation.name)
    lines = ["stateDiagram-v2", f"    [*] --> {MemberState.JOINING.name}"]
    lines += [f"    {a.name} --> {b.name}: {', '.join(names)}" for (a, b), names in edges.items()]
    return "\n".join(lines)


def requests() -> str:
    """Which events each state of a request answers to, as a Markdown table."""
    lines = ["| state | events that have a row |", "| --- | --- |"]
    for state in RequestState:
        events = sorted(event.__name__ for (other, event) in TABLE if other is state)
        lines.append(f"| {state.name} | {', '.join(events) or '(ended: none)'} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, machine in (
        ("Handoff: the source (prefill worker)", (SOURCE_TABLE, SourceState.HOLDING)),
        ("Live migration: the source (decode worker)", (MIGRATION_TABLE, MigrationState.RUNNING)),
        ("Handoff and live migration: the target (decode worker)", (TARGET_TABLE, TargetState.NONE)),
    ):
        parts.append(f"## {title}\n\n```mermaid\n{mermaid(*machine)}\n```\n")
    parts.append(f"## A worker incarnation\n\n```mermaid\n{membership()}\n```\n")
    parts.append(f"## A request at the router\n\n{requests()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
