"""`tandem explain`: why a request went where it did, what its first token waited for, and how it was moved."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.completion import requests
from cli.migrate import sentence
from cli.options import AsJson, Port, RunDir, running_cluster
from cli.reach import admin
from cli.shown import console
from cluster.documents import record_document
from tandem.v1 import admin_pb2 as pb

TIMEOUT_S = 10.0
BAR_CHARACTERS = 40
WIDTH = 200  # where no terminal cuts reasons off


def explain(
    request: Annotated[
        str, typer.Argument(help="id of a request, or how it ends", show_default=False, autocompletion=requests)
    ],
    port: Port = None,
    as_json: AsJson = False,
    run_dir: RunDir = None,
) -> None:
    """Show what is remembered of a request: placements with their scores, the stages of TTFT, and its moves."""
    run = running_cluster(run_dir, port)
    with admin(run) as stub:
        record = stub.Explain(pb.ExplainRequest(request_id=request), timeout=TIMEOUT_S)
    if as_json:
        print(json.dumps(record_document(record), indent=2))
        return
    show(record, console(WIDTH, highlight=False))


def show(record: pb.FlightRecord, out: Console) -> None:
    """The record, for people."""
    request = record.request
    size = f"{request.prompt_tokens} prompt tokens, {request.tokens} answered"
    out.print(f"{request.id} is {request.state} at {request.router}: {size}", markup=False)
    if request.error:
        out.print(request.error, markup=False)
    if record.HasField("ttft_ms"):
        out.print(f"\nTTFT {record.ttft_ms:.1f} ms")
        out.print(_stages(record))
    for placement in record.placements:
        way = placement.prefill_worker
        if placement.decode_worker != way:
            way += f" -> {placement.decode_worker}"
        out.print(f"\nplaced after {placement.at_ms} ms on {way}: {placement.reason}", markup=False)
        out.print(_candidates(placement))
    if record.moves:
        out.print()
    for move in record.moves:
        out.print(f"{sentence(move)}; {move.reason}: {move.why}", markup=False)
    out.print()
    for moment in record.story:
        out.print(f"{moment.at_ms:8d} ms  {moment.what}", markup=False)


def _stages(record: pb.FlightRecord) -> Table:
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for stage in record.stages:
        share = stage.ms / record.ttft_ms if record.ttft_ms else 0.0
        table.add_row(stage.name, f"{stage.ms:.1f} ms", "#" * round(share * BAR_CHARACTERS))
    return table


def _candidates(placement: pb.PlacementStatus) -> Table:
    table = Table(box=None, pad_edge=True)
    for name in ("", "considered", "for", "score"):
        table.add_column(name, no_wrap=True)
    table.add_column("of it")
    for each in placement.candidates:
        terms = ", ".join(f"{term.name} {term.value:.1f}".removesuffix(".0") for term in each.terms)
        table.add_row("*" if each.chosen else "", each.worker, each.part, f"{each.score_ms:.1f} ms", terms)
    return table
