"""`tandem doctor`: looks at this machine, and at what the settings name, and says what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import grpc
import typer
from rich.markup import escape
from rich.table import Table

from cli.options import AsJson
from cli.reach import admin
from cli.settings import with_settings
from cli.shown import console
from cluster.config import ClusterConfig, Effective
from cluster.doctor import Facts, Finding, Verdict, judge
from cluster.run_file import NoCluster, find
from tandem.v1 import admin_pb2 as pb

TIMEOUT_S = 10.0
WIDTH = 160  # where no terminal cuts it
MARKS = {Verdict.OK: "ok", Verdict.WARN: "[yellow]warn[/yellow]", Verdict.BAD: "[red]BAD[/red]"}


@with_settings
def doctor(effective: Effective, *, as_json: AsJson = False) -> None:
    """Check packages, cores, memory, ports, model, Ray, Redis, clocks and GPUs for a cluster of these settings.

    Exit status 1 when something keeps it from serving.
    """
    from cluster.doctor_facts import gather  # brings torch, which the other commands do without

    findings = judge(with_cluster(gather(effective.config), effective.config))
    if as_json:
        print(json.dumps([asdict(each) for each in findings], indent=2))
    else:
        console(WIDTH).print(to_table(findings))
    if any(each.verdict is Verdict.BAD for each in findings):
        raise typer.Exit(1)


def with_cluster(facts: Facts, config: ClusterConfig) -> Facts:
    """With what a cluster says that runs at this port, if one does."""
    try:
        run = find(config.run_dir, config.port)
    except NoCluster:
        return facts
    name = f"the cluster at port {run.port}, pid {run.pid}"
    try:
        with admin(run) as stub:
            answer = stub.Status(pb.StatusRequest(), timeout=TIMEOUT_S)
    except (NoCluster, grpc.RpcError) as error:
        told = str(error) if isinstance(error, NoCluster) else f"{error.code().name}: {error.details()}"
        return replace(facts, cluster=name, cluster_not_ready=told)
    return replace(facts, cluster=name, cluster_not_ready=answer.not_ready)


def to_table(findings: Sequence[Finding]) -> Table:
    """A row for each, with what to do where something is to be done."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for each in findings:
        advice = f"\n[bold]{escape(each.advice)}[/bold]" if each.advice else ""
        table.add_row(MARKS[each.verdict], each.area, escape(each.says) + advice)
    return table
