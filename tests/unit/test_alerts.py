"""The alerts of helm/tandem/alerts.yaml: Prometheus takes them; each fires when it should, none when all is well."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "helm/tandem/alerts.yaml"
RUNBOOKS = ROOT / "docs/runbooks"
MINUTES = 100
EVER = f"x{MINUTES}"

# A cluster that is well, a sample a minute: value, or value+growth.
WELL = {
    'tandem_routers{cluster="c", state="answering"}': f"2{EVER}",
    'tandem_routers{cluster="c", state="silent"}': f"0{EVER}",
    'tandem_router_ready_pairs{cluster="c"}': f"2{EVER}",
    'tandem_router_requests_total{cluster="c", router="r", api="chat", outcome="stop"}': f"0+600{EVER}",
    'tandem_router_requests_total{cluster="c", router="r", api="chat", outcome="cancelled"}': f"0+60{EVER}",
    'tandem_router_requests_total{cluster="c", router="r", api="chat", outcome="internal"}': f"0{EVER}",
    'tandem_router_refused_requests_total{cluster="c", router="r", api="chat", code="overloaded"}': f"0+6{EVER}",
    'tandem_router_refused_requests_total{cluster="c", router="r", api="chat", code="invalid_request"}': f"0+300{EVER}",
    'tandem_router_ttft_seconds_bucket{cluster="c", router="r", le="2.5"}': f"0+597{EVER}",
    'tandem_router_ttft_seconds_count{cluster="c", router="r"}': f"0+600{EVER}",
    'tandem_router_tpot_seconds_bucket{cluster="c", router="r", le="0.1"}': f"0+597{EVER}",
    'tandem_router_tpot_seconds_count{cluster="c", router="r"}': f"0+600{EVER}",
    'tandem_router_waiting_requests{cluster="c", router="r"}': f"3{EVER}",
    'tandem_worker_kv_blocks{cluster="c", worker="d0", role="decode", state="free"}': f"10{EVER}",
    'tandem_worker_kv_blocks{cluster="c", worker="d0", role="decode", state="cached"}': f"80{EVER}",
    'tandem_worker_kv_blocks{cluster="c", worker="d0", role="decode", state="owned"}': f"900{EVER}",
    'tandem_worker_kv_blocks{cluster="c", worker="d0", role="decode", state="granted"}': f"10{EVER}",
    'tandem_workers{cluster="c", role="decode", state="ready"}': f"2{EVER}",
    'tandem_workers{cluster="c", role="decode", state="dead"}': f"0{EVER}",
    'tandem_worker_steps_total{cluster="c", worker="d0", role="decode"}': f"0+900{EVER}",
    'tandem_worker_running_requests{cluster="c", worker="d0", role="decode"}': f"4{EVER}",
    'tandem_worker_audit_findings{cluster="c", worker="d0", role="decode"}': f"0{EVER}",
    'tandem_worker_damaged_frames_total{cluster="c", worker="d0", role="decode"}': f"7{EVER}",
    'tandem_router_handoff_seconds_bucket{cluster="c", router="r", le="0.05"}': f"0+599{EVER}",
    'tandem_router_handoff_seconds_bucket{cluster="c", router="r", le="1.0"}': f"0+600{EVER}",
    'tandem_router_handoff_seconds_bucket{cluster="c", router="r", le="+Inf"}': f"0+600{EVER}",
    'tandem_router_migrations_total{cluster="c", router="r", reason="balance", result="moved"}': f"0+10{EVER}",
    'tandem_router_migrations_total{cluster="c", router="r", reason="balance", result="failed"}': f"0+2{EVER}",
    'tandem_router_store_away_seconds{cluster="c", router="r"}': f"0{EVER}",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is otherwise from some minute on, and what fires at `at`. A series that is None is missing."""

    name: str
    other: Mapping[str, str | None]
    at: str
    fires: set[tuple[str, str]] = field(default_factory=set)


def series(word: str) -> str:
    """The one series of WELL that all of the words name."""
    [found] = [name for name in WELL if all(each in name for each in word.split())]
    return found


def after(minutes: int, before: str, then: str) -> str:
    """Values of the first minutes, and of the rest."""
    return f"{before}x{minutes - 1} {then}x{MINUTES - minutes}"


LOST = series("tandem_workers dead")
STEPS = series("steps_total")
LATE = {series("ttft_seconds_bucket"): after(60, "0+597", f"{60 * 597}+300")}
SLOW = {series("tpot_seconds_bucket"): after(60, "0+597", f"{60 * 597}+300")}
A_LITTLE_LATE = {series("ttft_seconds_bucket"): f"0+540{EVER}"}
A_LITTLE_SLOW = {series("tpot_seconds_bucket"): f"0+540{EVER}"}
CRITICAL, WARNING = "critical", "warning"

CASES = (
    Case(name="all is well", other={}, at="95m"),
    Case(name="no pair", other={series("ready_pairs"): after(60, "2", "0")}, at="62m",
         fires={("TandemNoPairServes", CRITICAL)}),
    Case(name="no pair for half a minute", other={series("ready_pairs"): f"2x60 0 2{EVER}"}, at="62m"),
    Case(name="nobody answers", other={name: None for name in WELL}, at="3m",
         fires={("TandemNoRouterAnswers", CRITICAL)}),
    Case(name="a router is silent", other={series("routers silent"): after(60, "0", "1")}, at="63m",
         fires={("TandemRouterSilent", WARNING)}),
    Case(name="a router is started again", other={series("routers silent"): f"0x60 1 0{EVER}"}, at="62m"),
    Case(name="requests fail", other={series("outcome=\"internal\""): after(60, "0", "0+12")}, at="70m",
         fires={("TandemRequestsFail", CRITICAL)}),
    Case(name="few requests fail", other={series("outcome=\"internal\""): f"0+3{EVER}"}, at="70m"),
    Case(name="clients leave", other={series("cancelled"): f"0+600{EVER}"}, at="70m"),
    Case(name="half of the first tokens are late", other=LATE, at="81m", fires={("TandemTtftBudgetBurns", CRITICAL)}),
    Case(name="they have been late", other={series("ttft_seconds_bucket"):
         f"0+597x20 {20 * 597}+300x30 {20 * 597 + 30 * 300}+600{EVER}"}, at="85m"),
    Case(name="a tenth of the first tokens is late", other=A_LITTLE_LATE, at="95m",
         fires={("TandemTtftBudgetBurns", WARNING)}),
    Case(name="tokens are slow", other=SLOW, at="81m", fires={("TandemTpotBudgetBurns", CRITICAL)}),
    Case(name="tokens are a little slow", other=A_LITTLE_SLOW, at="95m", fires={("TandemTpotBudgetBurns", WARNING)}),
    Case(name="nobody asks for anything", at="95m", other={name: f"0{EVER}" for name in WELL if "_seconds_" in name}),
    Case(name="a queue", other={series("waiting"): after(60, "0", "40")}, at="75m",
         fires={("TandemQueueGrows", WARNING)}),
    Case(name="a queue for two minutes", other={series("waiting"): f"0x60 40x2 0{EVER}"}, at="65m"),
    Case(name="overload", other={series("overloaded"): after(60, "0", "0+100")}, at="70m",
         fires={("TandemRefuses", WARNING)}),
    Case(name="clients ask nonsense", other={series("invalid_request"): f"0+3000{EVER}"}, at="70m"),
    Case(name="full", other={series("free"): f"0{EVER}", series("cached"): f"30{EVER}", series("owned"): f"960{EVER}"},
         at="20m", fires={("TandemKvNearlyFull", WARNING)}),
    Case(name="full of cache", other={series("free"): f"0{EVER}", series("cached"): f"90{EVER}"}, at="20m"),
    Case(name="a worker is lost", other={LOST: after(60, "0", "1")}, at="65m", fires={("TandemWorkerLost", WARNING)}),
    Case(name="a worker was lost", other={LOST: f"0x60 1x1 0{EVER}"}, at="65m"),
    Case(name="a worker dies again and again", other={STEPS: f"0+900x60 0+900x4 0+900x4 0+900{EVER}"}, at="72m",
         fires={("TandemWorkerDiesAgain", WARNING)}),
    Case(name="a worker died once", other={STEPS: f"0+900x60 0+900{EVER}"}, at="72m"),
    Case(name="wedged", other={STEPS: after(60, "0+900", "54000")}, at="65m",
         fires={("TandemWorkerWedged", CRITICAL)}),
    Case(name="idle", other={STEPS: after(60, "0+900", "54000"), series("running_requests"): f"0{EVER}"}, at="65m"),
    Case(name="a leak", other={series("audit"): after(60, "0", "2")}, at="62m",
         fires={("TandemAuditFindings", CRITICAL)}),
    Case(name="slow handoffs", other={series("handoff 0.05"): f"0+500{EVER}"}, at="40m",
         fires={("TandemHandoffSlow", WARNING)}),
    Case(name="moves fail", other={series("result=\"failed\""): f"0+20{EVER}"}, at="40m",
         fires={("TandemMigrationsFail", WARNING)}),
    Case(name="three moves fail, there are no others", at="70m", other={
         series("result=\"moved\""): f"0{EVER}", series("result=\"failed\""): f"0x60 1+1x1 3{EVER}"}),
    Case(name="damage", other={series("damaged"): after(60, "7", "9")}, at="65m",
         fires={("TandemFramesDamaged", WARNING)}),
    Case(name="damage long ago", other={series("damaged"): after(60, "7", "9")}, at="90m"),
    Case(name="no store", other={series("store_away"): after(60, "0", "30+60")}, at="63m",
         fires={("TandemStoreAway", CRITICAL)}),
    Case(name="the store was started again", other={series("store_away"): f"0x60 5 0{EVER}"}, at="61m"),
)  # fmt: skip


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed")
    return found


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    for alert in alerts():
        assert re.fullmatch(r"Tandem[A-Za-z]+", alert["alert"])
        assert alert["labels"]["severity"] in (CRITICAL, WARNING)
        assert re.fullmatch(r"\d+[smh]", alert["for"]), alert["alert"]
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
        assert all(text.strip() for text in alert["annotations"].values())
        assert (ROOT / alert["annotations"]["runbook_url"]).is_file(), alert["alert"]


def test_every_runbook_is_an_alerts() -> None:
    """It says which, and has the parts that somebody woken at night looks for."""
    used: dict[str, set[str]] = {}
    for alert in alerts():
        used.setdefault(Path(alert["annotations"]["runbook_url"]).stem, set()).add(alert["alert"])
    pages = {path.stem: path.read_text() for path in RUNBOOKS.glob("*.md") if path.stem != "index"}
    assert set(pages) == set(used)
    for name, text in pages.items():
        assert [line for line in text.splitlines() if line.startswith("## ")] == [
            "## What it means", "## What users see", "## How to look", "## What to do", "## When it can be ignored",
        ], name  # fmt: skip
        assert set(re.findall(r"Tandem[A-Z][A-Za-z]+", text)) >= used[name], name


def test_every_alert_fires_in_a_case() -> None:
    wanted = {(alert["alert"], alert["labels"]["severity"]) for alert in alerts()}
    assert set().union(*(case.fires for case in CASES)) == wanted


@pytest.mark.prometheus
def test_prometheus_takes_the_rules() -> None:
    done = subprocess.run([promtool(), "check", "rules", str(RULES)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    apart = [case for case in CASES if None in case.other.values()]
    together = [case for case in CASES if case not in apart]
    done = _tested([_as_test(*together), *map(_as_test, apart)], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
def test_an_alert_that_does_not_fire_is_missed(tmp_path: Path) -> None:
    done = _tested(
        [_as_test(Case(name="planted", other={}, at="95m", fires={("TandemStoreAway", CRITICAL)}))], tmp_path
    )
    assert done.returncode == 1
    assert "TandemStoreAway" in done.stdout + done.stderr


@pytest.mark.prometheus
def test_what_an_alert_says_has_its_values(tmp_path: Path) -> None:
    """The text of each one whose sentences hold a value, as somebody gets it."""
    case = next(case for case in CASES if case.name == "full")
    said = {
        "summary": "The KV memory of d0 is nearly full.",
        "description": "97% of its blocks have been held for ten minutes. Requests wait, move away, or lose their "
        "blocks.",
        "runbook_url": "docs/runbooks/kv-nearly-full.md",
    }
    test = _as_test(case)
    test["alert_rule_test"] = [{
        "alertname": "TandemKvNearlyFull", "eval_time": case.at,
        "exp_alerts": [{
            "exp_labels": {"severity": WARNING, "cluster": case.name, "worker": "d0", "role": "decode"},
            "exp_annotations": said,
        }],
    }]  # fmt: skip
    done = _tested([test], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def _as_test(*cases: Case) -> dict[str, Any]:
    """The cases beside one another: each is a cluster of its own."""
    given, asked = [], []
    for case in cases:
        for name, value in {**WELL, **case.other}.items():
            if value is not None:
                given.append({"series": name.replace('cluster="c"', f'cluster="{case.name}"'), "values": value})
        mine = f'ALERTS{{alertstate="firing", cluster=~"{case.name}|"}}'  # one that is absent has no cluster
        asked.append({
            "expr": f"count by (alertname, severity) ({mine})", "eval_time": case.at,
            "exp_samples": [
                {"labels": f'{{alertname="{name}", severity="{severity}"}}', "value": 1}
                for name, severity in sorted(case.fires)
            ],
        })  # fmt: skip
    return {"interval": "1m", "input_series": given, "promql_expr_test": asked}


def _tested(tests: list[dict[str, Any]], folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "alerts.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    return subprocess.run([promtool(), "test", "rules", str(path)], capture_output=True, text=True, timeout=100)
