"""Pages of documentation that are printed from tables which production runs, so that they cannot lie.

`python -m cluster.pictures` writes docs/protocol.md (the state machines), docs/metrics.md, docs/configuration.md and
Grafana's boards in helm/tandem/dashboards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from cluster.boards import as_json
from cluster.membership import TRANSITIONS, MemberState
from cluster.panels import BOARDS
from kv_transfer.handoff import mermaid
from kv_transfer.handoff_source import SOURCE_TABLE, SourceState
from kv_transfer.handoff_target import TARGET_TABLE, TargetState
from kv_transfer.migration_source import MIGRATION_TABLE, MigrationState
from router.core import TABLE
from router.request import RequestState
from tandem.metrics import CLUSTER_METRICS, LABEL_VALUES, ROUTER_METRICS

HEAD = """# The protocol's state machines

Printed by `python -m cluster.pictures` from the tables that production runs; a test compares. A pair of state and event
that has no row is a late or doubled message from outside and has no effect; an event from inside always has its row.
"""

METRICS_HEAD = """# Metrics

Printed by `python -m cluster.pictures` from the table in tandem/metrics.py; a test compares. `GET /metrics` has them in
Prometheus' text format: those of every router, whichever one answers, each with its name as label `router`, and those
of the cluster once, as the answering router sees it. Labels take their values from closed sets.
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


def metrics_page() -> str:
    """All metrics, as Markdown tables."""
    parts = [METRICS_HEAD]
    for title, metrics in (("Of each router", ROUTER_METRICS), ("Of the cluster", CLUSTER_METRICS)):
        rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
        rows += [
            f"| `{each.name}` | {each.kind} | {', '.join(f'`{name}`' for name in each.labels)} | {each.help} |"
            for each in metrics
        ]
        parts.append(f"## {title}\n\n" + "\n".join(rows) + "\n")
    rows = ["| label | values |", "|---|---|", *(f"| `{name}` | {values} |" for name, values in LABEL_VALUES.items())]
    parts.append("## Labels\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


PAGES: dict[str, Callable[[], str]] = {
    "docs/protocol.md": page,
    "docs/metrics.md": metrics_page,
    **{f"helm/tandem/dashboards/{board.name}.json": partial(as_json, board) for board in BOARDS},
}


if __name__ == "__main__":
    for name, printed in PAGES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(printed())
