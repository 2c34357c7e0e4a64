"""`tandem chaos run`: shoots at a running cluster while a load checks every token, and says what came of it."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.down import run_dir_of
from cli.migrate import Refused
from cluster.chaos import ChaosRun, Load, NotReady
from cluster.chaos_plan import Fault, FaultKind, parse_kinds, plan
from cluster.chaos_tally import Harm, Tally
from cluster.config import ConfigError
from cluster.run_file import find

chaos = typer.Typer(name="chaos", help="Faults on purpose.", no_args_is_help=True)


@chaos.callback()
def group() -> None:
    """Faults on purpose, on a cluster of this machine."""


@chaos.command("run")
def run(
    seed: Annotated[int, typer.Option(help="of faults, victims and questions: the same seed, the same plan")] = 1,
    faults: Annotated[str, typer.Option(help="kinds of faults, with commas")] = ",".join(FaultKind),
    duration: Annotated[float, typer.Option(help="seconds", min=1, max=86_400)] = 60.0,
    every: Annotated[float, typer.Option(help="seconds between faults, about", min=0.5, max=600)] = 8.0,
    clients: Annotated[int, typer.Option(help="streams at once", min=1, max=1000)] = 8,
    recovery: Annotated[float, typer.Option(help="seconds that streams may take to go on after a fault")] = 10.0,
    port: Annotated[int | None, typer.Option(help="HTTP port of the cluster; needed when several run")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    run_dir: Annotated[Path | None, typer.Option(help="folder of run files (or TANDEM_RUN_DIR)")] = None,
) -> None:
    """Kill, stop and cancel under a load that compares each token with an undisturbed answer.

    Exit status 1 when a token was lost, doubled or wrong, a block leaked, or streams took too long to go on.
    """
    try:
        planned = plan(
            random.Random(seed).randrange,
            kinds=parse_kinds(faults),
            duration_ms=round(duration * 1000),
            every_ms=round(every * 1000),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    shooting = ChaosRun(
        find(run_dir_of(run_dir), port).grpc_address,
        load=Load(num_clients=clients),
        seed=seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    try:
        tally = asyncio.run(shooting.run(planned, round(duration * 1000)))
    except NotReady as error:
        raise Refused(str(error)) from None
    broken = tally.failures(recovery_limit_ms=round(recovery * 1000))
    if as_json:
        print(json.dumps(to_document(tally, planned, seed, broken), indent=2))
    else:
        Console().print(to_table(tally))
        print(summary(tally))
    if broken:
        raise Refused("; ".join([*broken, *tally.examples[:3]]))


def to_document(tally: Tally, planned: tuple[Fault, ...], seed: int, broken: list[str]) -> dict[str, object]:
    """All of a run as JSON's types."""
    return {
        "seed": seed,
        "streams": tally.num_streams,
        "tokens": tally.num_tokens,
        "finished": tally.num_finished,
        "cancelled": tally.num_cancelled,
        "refused": tally.num_refused,
        **{harm.value: tally.harm[harm] for harm in Harm},
        "leaks": tally.leaks,
        "worst_gap_ms": tally.worst_gap_ms,
        "planned": len(planned),
        "faults": [
            {
                "at_ms": strike.at_ms,
                "fault": str(strike.fault),
                "where": strike.where,
                "in_flight": strike.in_flight,
                **{harm.value: strike.harm[harm] for harm in Harm},
                "recovered_ms": strike.recovered_ms,
                "gap_ms": strike.gap_ms,
            }
            for strike in tally.strikes
        ],
        "broken": broken,
        "examples": tally.examples,
    }


def to_table(tally: Tally) -> Table:
    """A row for each kind of fault and victim."""
    table = Table(show_edge=False)
    for column in ("fault", "times", "in flight", *Harm, "recovered in", "worst gap"):
        fault = column == "fault"
        table.add_column(column, justify="left" if fault else "right", no_wrap=fault)
    for row in tally.rows():
        recovered = "never" if row.recovered_ms is None else f"{row.recovered_ms / 1000:.1f} s"
        harm = (str(row.harm[each]) for each in Harm)
        table.add_row(row.what, str(row.num), str(row.in_flight), *harm, recovered, f"{row.gap_ms / 1000:.1f} s")
    return table


def summary(tally: Tally) -> str:
    """The run in two lines."""
    harm = ", ".join(f"{harm} {tally.harm[harm]}" for harm in Harm)
    return (
        f"{harm}, leaked {len(tally.leaks)}; worst gap {tally.worst_gap_ms / 1000:.1f} s\n"
        f"{tally.num_streams} streams, {tally.num_tokens} tokens: {tally.num_finished} finished, "
        f"{tally.num_cancelled} cancelled, {tally.num_refused} refused"
    )
