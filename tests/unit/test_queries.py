"""Whatever asks Prometheus for something - boards, alerts, pages of documentation - asks for what the code tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql import Wrong, check, filled, metric_of, names_in

from cluster.panels import BOARDS

ROOT = Path(__file__).resolve().parents[2]
BOARD_FILES = sorted((ROOT / "helm/tandem/dashboards").glob("*.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNBOOKS = ROOT / "docs/runbooks"


def rules() -> list[dict[str, Any]]:
    """All rules of the alerts' file, in their order."""
    groups = yaml.safe_load((ROOT / "helm/tandem/alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded() -> dict[str, set[str]]:
    """The labels of each recorded series. Raises Wrong where its expression asks for what nobody tells."""
    return {rule["record"]: check(rule["expr"]) for rule in rules() if "record" in rule}


def test_every_board_is_in_the_repository_and_no_other() -> None:
    assert [path.stem for path in BOARD_FILES] == sorted(board.name for board in BOARDS)


@pytest.mark.parametrize("path", BOARD_FILES, ids=lambda path: str(path.stem))
def test_a_board_asks_for_what_there_is(path: Path) -> None:
    board = json.loads(path.read_text())
    variables = {each["name"] for each in board["templating"]["list"]}
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len(panels) >= 9
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            used = set(re.findall(r"\$([a-z]+)", target["expr"]))
            assert "cluster" in used, panel["title"]
            assert used <= variables, f"{panel['title']}: {used - variables} is no variable of this board"
            left = check(filled(target["expr"]))
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert shown == left, f"{panel['title']}: series differ by {left}, their legend by {shown}"
    for each in board["templating"]["list"]:
        if each["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", each["definition"]).groups()  # type: ignore[union-attr]
            assert label in check(filled(selector))


@pytest.mark.parametrize("path", BOARD_FILES, ids=lambda path: str(path.stem))
def test_a_board_says_what_it_shows(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == f"tandem-{path.stem}"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for link in panel["links"]:
            name = re.fullmatch(r"\$\{docs\}/runbooks/([a-z-]+)/", link["url"]).group(1)  # type: ignore[union-attr]
            assert (RUNBOOKS / f"{name}.md").is_file(), f"{panel['title']}: no runbook {name}"
    taken = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken)), "panels overlap"


def test_rules_ask_for_what_there_is() -> None:
    known = recorded()
    assert len(known) == 9
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 15
    for rule in alerts:
        labels = check(rule["expr"], known)
        named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert named <= labels, f"{rule['alert']}: {named - labels} is no label of it"
        if "absent(" not in rule["expr"]:
            assert "cluster" in labels, f"{rule['alert']} does not say which cluster"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.name))
def test_a_page_names_metrics_that_there_are(path: Path) -> None:
    text = path.read_text()
    for name in names_in(text):
        assert metric_of(name)[0] is not None, f"{name}: there is no such metric"
    for expr in re.findall(r"```promql\n(.*?)```", text, re.DOTALL):
        check(expr, recorded())


@pytest.mark.parametrize(
    ("expr", "says"),
    [
        ("sum(tandem_router_missing_requests)", "there is no such metric"),
        ("sum(rate(tandem_router_ttft_seconds_bucket{phase='x'}[5m]))", "phase is no label of it"),
        ("sum by (role) (tandem_router_waiting_requests)", "is no label of it"),
        ("sum(rate(tandem_router_waiting_requests[5m]))", "a gauge is not asked like this"),
        ("sum(tandem_router_requests_total)", "a counter is not asked like this"),
        ("sum(rate(tandem_router_ttft_seconds[5m]))", "is a histogram"),
        ("sum(tandem_workers{state=~'deaad|suspect'})", "state is never 'deaad'"),
        ("sum(tandem_worker_kv_blocks{state='dead'})", "state is never 'dead'"),
        ("sum(rate(tandem_router_ttft_seconds_bucket{le='3'}[5m]))", "has no bucket up to 3"),
        ("histogram_quantile(0.9, sum(rate(tandem_router_ttft_seconds_bucket[5m])))", "no quantile without le"),
        (
            "sum by (stage) (rate(tandem_router_ttft_stage_seconds_sum[5m])) "
            "/ sum(rate(tandem_router_ttft_seconds_count[5m]))",
            "never matches",
        ),
        ("sum without (worker) (tandem_worker_running_requests)", "say by which labels"),
    ],
)
def test_a_planted_mistake_is_found(expr: str, says: str) -> None:
    with pytest.raises(Wrong, match=says):
        check(expr)
