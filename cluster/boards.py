"""A Grafana board as data: its panels, what each asks of Prometheus and how it says it; and its JSON.

The boards themselves are in cluster/panels.py; `python -m cluster.pictures` prints them to helm/tandem/dashboards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tandem.metrics import CLUSTER_METRICS, Metric, MetricKind

COLUMNS = 24  # of Grafana's grid
SCHEMA_VERSION = 39  # of Grafana 10.4; later ones read it
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
DOCS_DEFAULT = "http://127.0.0.1:8001"  # where `make docs-serve` shows them
CLUSTER = 'cluster=~"$cluster"'  # the label comes from the scrape's configuration; without it `All` finds everything


class Look(StrEnum):
    """How a panel shows its series."""

    LINES = "timeseries"
    STACK = "stack"  # lines that add up to something
    FIGURE = "stat"  # the newest value of each


class Format(StrEnum):
    """Grafana's names of the units in use."""

    SECONDS = "s"
    SHARE = "percentunit"
    COUNT = "short"
    BYTES = "bytes"
    BYTES_A_SECOND = "Bps"
    REQUESTS_A_SECOND = "reqps"
    EACH_SECOND = "cps"  # anything else, counted
    CORES = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What a panel asks, and how Grafana names each series of the answer."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture. `runbook`: the page of docs/runbooks that it is looked at with.

    `red_from`, `red_below`: the value from which on, or below which, the newest one is no longer well.
    """

    title: str
    description: str
    format: Format
    queries: tuple[Query, ...]
    look: Look = Look.LINES
    width: int = 8
    runbook: str = ""
    red_from: float | None = None
    red_below: float | None = None

    @property
    def height(self) -> int:
        """In units of the grid."""
        return 4 if self.look is Look.FIGURE else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Panels under one heading; a line of the grid holds those that fit."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A choice at the top of a board: the values of `label` among the series of `selector`."""

    name: str
    selector: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A page of panels. `name` is that of its file."""

    name: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    @property
    def panels(self) -> Iterator[Panel]:
        """All of them, from the top."""
        for row in self.rows:
            yield from row.panels


# ---- what is asked ---------------------------------------------------------------------------------------------------


def series(metric: Metric, *matches: str, suffix: str = "") -> str:
    """The metric's series of the clusters chosen; `matches` are further matchers."""
    own = () if metric in CLUSTER_METRICS else ('router=~"$router"',)
    return f"{metric.name}{suffix}{{{', '.join((CLUSTER, *own, *matches))}}}"


def rate(metric: Metric, *matches: str, suffix: str = "") -> str:
    """How much it grows in a second. For a counter, or with a suffix a histogram's."""
    assert (metric.kind is MetricKind.HISTOGRAM) is bool(suffix), f"{metric.name}: no rate of {suffix or 'it'}"
    assert metric.kind is not MetricKind.GAUGE, f"{metric.name}: a gauge has no rate"
    return f"rate({series(metric, *matches, suffix=suffix)}[$__rate_interval])"


def total(expr: str, *labels: str) -> str:
    """The sum, for each value of the labels."""
    return f"sum by ({', '.join(labels)}) ({expr})" if labels else f"sum({expr})"


def mean(metric: Metric, *labels: str) -> str:
    """The mean of a histogram's observations, for each value of the labels."""
    return f"{total(rate(metric, suffix='_sum'), *labels)} / {total(rate(metric, suffix='_count'), *labels)}"


def quantile(share: float, metric: Metric, *matches: str, by: tuple[str, ...] = ()) -> str:
    """The value that `share` of the observations do not exceed."""
    return f"histogram_quantile({share:g}, {total(rate(metric, *matches, suffix='_bucket'), 'le', *by)})"


def quantiles(metric: Metric, *matches: str) -> tuple[Query, ...]:
    """The three that are looked at."""
    return tuple(
        Query(expr=quantile(share, metric, *matches), legend=f"p{100 * share:g}") for share in (0.5, 0.9, 0.99)
    )


# ---- JSON ------------------------------------------------------------------------------------------------------------


def as_json(board: Board) -> str:
    """The file that Grafana takes."""
    return json.dumps(_board(board), indent=1) + "\n"


def _board(board: Board) -> dict[str, Any]:
    return {
        "uid": f"tandem-{board.name}",
        "title": board.title,
        "description": board.description,
        "tags": ["tandem"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,  # one cross-hair for all panels
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "links": [
            {"type": "dashboards", "tags": ["tandem"], "title": "Tandem", "asDropdown": True, "keepTime": True,
             "includeVars": True},
            {"type": "link", "title": "Documentation", "url": "${docs}", "icon": "doc", "targetBlank": True},
        ],
        "templating": {"list": [*_fixed_variables(), *map(_variable, board.variables)]},
        "annotations": {"list": []},
        "panels": list(_grid(board)),
    }  # fmt: skip


def _fixed_variables() -> list[dict[str, Any]]:
    cluster = Variable(name="cluster", selector="tandem_routers", label="cluster")
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0},
        {"name": "docs", "label": "Documentation", "type": "textbox", "query": DOCS_DEFAULT, "hide": 2,
         "current": {"text": DOCS_DEFAULT, "value": DOCS_DEFAULT}},
        _variable(cluster),
    ]  # fmt: skip


def _variable(variable: Variable) -> dict[str, Any]:
    query = f"label_values({variable.selector}, {variable.label})"
    return {
        "name": variable.name,
        "label": variable.name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": variable.name},
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def _grid(board: Board) -> Iterator[dict[str, Any]]:
    """Rows and panels with their places, from the left and from the top."""
    top, number = 0, 0
    for row in board.rows:
        number += 1
        yield {
            "id": number, "type": "row", "title": row.title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
        }  # fmt: skip
        top, left, height = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, height = top + height, 0, 0
            number += 1
            yield _panel(panel, number, {"x": left, "y": top, "w": panel.width, "h": panel.height})
            left, height = left + panel.width, max(height, panel.height)
        top += height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    figure = panel.look is Look.FIGURE
    return {
        "id": number,
        "type": "stat" if figure else "timeseries",
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
        "datasource": DATASOURCE,
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": each.expr, "legendFormat": each.legend,
             "instant": figure, "range": not figure}
            for index, each in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _FIGURE if figure else _LINES,
        "links": [] if not panel.runbook else [
            {"title": f"Runbook: {panel.runbook}", "url": f"${{docs}}/runbooks/{panel.runbook}/", "targetBlank": True}
        ],
    }  # fmt: skip


_LINES: dict[str, Any] = {
    "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"], "showLegend": True},
    "tooltip": {"mode": "multi", "sort": "desc"},
}
_FIGURE: dict[str, Any] = {
    "colorMode": "value",
    "graphMode": "none",
    "textMode": "auto",
    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
}


def _field(panel: Panel) -> dict[str, Any]:
    stacked = panel.look is Look.STACK
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.red_below}]
    if panel.red_from is not None:
        steps.append({"color": "red", "value": panel.red_from})
    shown = len(steps) > 1 and panel.look is not Look.FIGURE
    return {
        "unit": panel.format.value,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if panel.look is Look.FIGURE else "palette-classic"},
        "custom": {} if panel.look is Look.FIGURE else {
            "lineWidth": 1,
            "fillOpacity": 40 if stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if stacked else "none"},
            "thresholdsStyle": {"mode": "dashed" if shown else "off"},
        },
    }  # fmt: skip
