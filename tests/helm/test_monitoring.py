"""Boards and rules that lie in the chart's folder come out of it as they are, however many there are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml
from chart import CHART, MONITORED, NAME, render
from test_objects import SCHEMAS

pytestmark = pytest.mark.helm

RULES = """# A comment with {{ braces }}.
groups:
  - name: tandem.alerts
    rules:
      - record: tandem:late:ratio
        expr: |
          1 - sum by (cluster) (rate(x_bucket{le="2.5"}[5m]))
      - alert: NobodyServes
        expr: tandem_router_ready_pairs == 0
        for: 1m
        labels: {severity: critical}
        annotations:
          summary: "{{ $labels.cluster }} has {{ $value | humanize }} pairs"
"""
BOARD = {"title": "Überblick", "panels": [{"legendFormat": "{{worker}} {{ .x }}", "expr": 'a{b="c"}'}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The chart without any boards and rules of its own."""
    folder = tmp_path / "tandem"
    shutil.copytree(CHART, folder, ignore=shutil.ignore_patterns("dashboards", "alerts.yaml"))
    return folder


def test_without_files_there_is_nothing_to_render(folder: Path) -> None:
    release = render(MONITORED, folder=folder)
    assert not release.of("PrometheusRule")
    assert not [each for each in release.of("ConfigMap") if "-board-" in each["metadata"]["name"]]


def test_rules_and_boards_come_out_as_they_are(folder: Path) -> None:
    (folder / "alerts.yaml").write_text(RULES)
    (folder / "dashboards").mkdir()
    for name in ("overview.json", "Work_ers.json"):
        (folder / "dashboards" / name).write_text(json.dumps(BOARD, indent=2))
    release = render(MONITORED, folder=folder)
    [rule] = release.of("PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES)
    jsonschema.validate(rule, SCHEMAS["prometheusrule"])
    boards = {
        each["metadata"]["name"]: each for each in release.of("ConfigMap") if "-board-" in each["metadata"]["name"]
    }
    assert set(boards) == {f"{NAME}-board-overview", f"{NAME}-board-work-ers"}
    for board in boards.values():
        [(file, content)] = board["data"].items()
        assert file.endswith(".json")
        assert json.loads(content) == BOARD
        assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert board["metadata"]["annotations"] == {"folder": "LLM"}


def test_what_lies_there_now_is_taken() -> None:
    """Whatever boards and rules the chart has: the operators take them, and none is too large for a ConfigMap."""
    release = render(MONITORED)
    assert len(release.of("PrometheusRule")) == (CHART / "alerts.yaml").exists()
    for rule in release.of("PrometheusRule"):
        jsonschema.validate(rule, SCHEMAS["prometheusrule"])
    boards = [each for each in release.of("ConfigMap") if "-board-" in each["metadata"]["name"]]
    assert len(boards) == len(list(CHART.glob("dashboards/*.json")))
    for board in boards:
        [content] = board["data"].values()
        assert len(content.encode()) < 1_000_000
        assert json.loads(content)["title"]


def test_nothing_is_rendered_where_it_is_not_asked_for(folder: Path) -> None:
    (folder / "alerts.yaml").write_text(RULES)
    kinds = {each["kind"] for each in render(folder=folder).objects}
    assert not kinds & {"PrometheusRule", "ServiceMonitor", "PodMonitor"}
