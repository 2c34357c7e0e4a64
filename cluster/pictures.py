"""Pages of documentation that are printed from tables which production runs, so that they cannot lie.

`python -m cluster.pictures` writes docs/protocol.md (the state machines), docs/metrics.md, docs/configuration.md, the
docs/api-*.md and Grafana's boards in helm/tandem/dashboards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType
from typing import get_args

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from cluster.api_pages import grpc_page, http_page, python_page
from cluster.boards import as_json
from cluster.config import ENVIRONMENT_PREFIX, ClusterConfig, flag_of
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


CONFIGURATION_HEAD = """# Configuration

Printed by `python -m cluster.pictures` from the settings that `tandem config` knows; a test compares. Each is a flag of
`tandem serve` (`--kv-memory 1GiB`), a variable (`TANDEM_KV_MEMORY=1GiB`) and a key of the YAML file that `--config` or
`TANDEM_CONFIG` names (`kv_memory: 1GiB`). A flag beats a variable, a variable beats the file, the file the default. A
switch has a flag for either: `--exact`, `--no-exact`. How they work together is in [operating](operating.md).
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


def configuration_page() -> str:
    """All settings, as a Markdown table."""
    rows = ["| flag | variable | value | default | meaning |", "|---|---|---|---|---|"]
    for key, info in ClusterConfig.model_fields.items():
        cells = (
            f"`{flag_of(key)}`",
            f"`{ENVIRONMENT_PREFIX}{key.upper()}`",
            _value(info),
            _default(info),
            str(info.description),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return f"{CONFIGURATION_HEAD}\n" + "\n".join(rows) + "\n"


def _value(info: FieldInfo) -> str:
    """Type and limits of a setting."""
    kinds = [kind for kind in (get_args(info.annotation) or (info.annotation,)) if kind is not NoneType]
    if not all(isinstance(kind, type) for kind in kinds):  # what a Literal allows
        return ", ".join(f"`{kind}`" for kind in kinds)
    names = {bool: "switch", int: "whole number", float: "number", str: "text", Path: "path", ByteSize: "size"}
    words = [names[kind] for kind in kinds]
    for limit in info.metadata:
        for name, word in (("ge", "from"), ("le", "to")):
            if (value := getattr(limit, name, None)) is not None:
                words.append(f"{word} {value}")
    return " ".join(words)


def _default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return "`$XDG_RUNTIME_DIR/tandem`, else `~/.cache/tandem/run`"
    value = info.default
    if isinstance(value, bool):
        return "on" if value else "off"
    shown = value.human_readable() if isinstance(value, ByteSize) else value
    return "" if shown in ("", None) else f"`{shown}`"


PAGES: dict[str, Callable[[], str]] = {
    "docs/protocol.md": page,
    "docs/metrics.md": metrics_page,
    "docs/configuration.md": configuration_page,
    "docs/api-grpc.md": grpc_page,
    "docs/api-http.md": http_page,
    "docs/api-python.md": python_page,
    **{f"helm/tandem/dashboards/{board.name}.json": partial(as_json, board) for board in BOARDS},
}


if __name__ == "__main__":
    for name, printed in PAGES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(printed())
