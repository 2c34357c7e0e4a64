"""`tandem chaos run`: shoots at a running cluster while a load checks every token, and says what came of it."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cli.migrate import Refused
from cli.options import AsJson, Port, RunDir, running_cluster
from cli.shown import console
from cluster.chaos import ChaosRun, NotReady, Place
from cluster.chaos_load import Load
from cluster.chaos_plan import FaultKind, check_duration, deck, parse_kinds, parse_states, parse_victims, plan
from cluster.chaos_report import COLUMNS, cells, states_line, summary, to_document
from cluster.chaos_tally import Tally
from cluster.config import ConfigError

WIDTH = 120  # where no terminal cuts it
ANYWHERE = ",".join((FaultKind.KILL, FaultKind.STOP, FaultKind.CANCEL))  # on any cluster of this machine
chaos = typer.Typer(name="chaos", add_completion=False, help="Faults on purpose.", no_args_is_help=True)


@chaos.callback()
def group() -> None:
    """Faults on purpose, on a cluster of this machine."""


@chaos.command("run")
def run(
    seed: Annotated[int, typer.Option(help="of faults, victims and questions: the same seed, the same plan")] = 1,
    faults: Annotated[str, typer.Option(help=f"kinds of faults, with commas: {', '.join(FaultKind)}")] = ANYWHERE,
    states: Annotated[str, typer.Option(help="kill and stop also in these protocol states, with commas; or all")] = "",
    victims: Annotated[
        str, typer.Option(help='only whom these name, with commas, such as "decode worker"', show_default="all")
    ] = "",
    kill_router: Annotated[
        bool | None, typer.Option(help="kill routers too; else if the cluster has Redis", show_default=False)
    ] = None,
    duration: Annotated[float, typer.Option(help="seconds", min=1, max=86_400)] = 60.0,
    every: Annotated[float, typer.Option(help="seconds between faults, about", min=0.5, max=600)] = 8.0,
    clients: Annotated[int, typer.Option(help="streams at once", min=1, max=1000)] = 8,
    questions: Annotated[int, typer.Option(help="asked over and over; each first undisturbed", min=1, max=1000)] = 12,
    output_tokens: Annotated[int, typer.Option(help="of the longest answers", min=1, max=100_000)] = 96,
    audit_every: Annotated[int, typer.Option(help="faults between moments in which all must be back", min=1)] = 10,
    recovery: Annotated[float, typer.Option(help="seconds that streams may take to go on after a fault")] = 10.0,
    gap: Annotated[float | None, typer.Option(help="seconds that a stream may be silent between tokens")] = None,
    port: Port = None,
    as_json: AsJson = False,
    timeline: Annotated[Path | None, typer.Option(help="file for a line of each fault, move, gap and audit")] = None,
    run_dir: RunDir = None,
) -> None:
    """Strike a cluster under a load that compares each token with an undisturbed answer.

    Exit status 1 when a token was lost, doubled or wrong, a block leaked, or streams took too long to go on.
    """
    duration_ms, every_ms = round(duration * 1000), round(every * 1000)
    try:
        kinds, wanted_states, wanted_victims = parse_kinds(faults), parse_states(states), parse_victims(victims)
        check_duration(duration_ms, every_ms)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    run_file = running_cluster(run_dir, port)
    shooting = ChaosRun(
        Place.of(run_file),
        load=Load(num_clients=clients, num_questions=questions, output_tokens_max=output_tokens),
        seed=seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        audit_every=audit_every,
    )
    try:
        ground = asyncio.run(shooting.ground())
        try:
            suits = deck(ground, kinds=kinds, states=wanted_states, victims=wanted_victims, router_dies=kill_router)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        planned = plan(random.Random(seed).randrange, suits=suits, duration_ms=duration_ms, every_ms=every_ms)
        tally = asyncio.run(shooting.run(planned, duration_ms))
    except NotReady as error:
        raise Refused(str(error)) from None
    broken = tally.failures(
        recovery_limit_ms=round(recovery * 1000), gap_limit_ms=None if gap is None else round(gap * 1000)
    )
    if timeline is not None:
        timeline.write_text("".join(f"{entry}\n" for entry in tally.timeline))
    if as_json:
        print(json.dumps(to_document(tally, num_planned=len(planned), seed=seed, broken=broken), indent=2))
    else:
        console(WIDTH).print(to_table(tally))
        print(summary(tally))
        print(states_line(tally))
    if broken:
        raise Refused("; ".join([*broken, *tally.examples[:3]]))


def to_table(tally: Tally) -> Table:
    """A row for each kind of fault and victim."""
    table = Table(show_edge=False)
    for column in COLUMNS:
        fault = column == "fault"
        table.add_column(column, justify="left" if fault else "right", no_wrap=fault)
    for row in tally.rows():
        table.add_row(*cells(row))
    return table
