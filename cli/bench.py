"""`tandem bench`: offers a workload to a running cluster and prints what its requests saw."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from benchmarks.curves import curves
from benchmarks.figures import Slo
from benchmarks.load import Ongoing
from benchmarks.plots import check_picture, in_terminal, write_picture
from benchmarks.serving import Served, ServingOptions, as_text, run, to_json
from cli.options import AsJson, Port, RunDir, running_cluster
from cluster.member_access import client_options, dial_routers, key_metadata
from tandem import Client

TIMEOUT_S = 10.0
TELL_S = 0.1  # more often would cost what is measured


def bench(
    trace: Annotated[Path | None, typer.Option(help="trace file; without it lengths are drawn")] = None,
    requests: Annotated[int, typer.Option(help="number of requests", min=1, max=1_000_000)] = 50,
    rate: Annotated[float | None, typer.Option(help="requests a second; a trace's own arrivals without it")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="mean prompt length without a trace", min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(help="mean answer length without a trace", min=1)] = 32,
    length_scale: Annotated[float, typer.Option(help="factor on a trace's lengths", min=0)] = 1.0,
    prompt_tokens_max: Annotated[int | None, typer.Option(help="longest prompt; default: half the context")] = None,
    output_tokens_max: Annotated[int, typer.Option(help="longest answer", min=1)] = 512,
    ttft_ms: Annotated[float, typer.Option(help="SLO: time to the first token")] = 2000,
    tpot_ms: Annotated[float, typer.Option(help="SLO: time per token after the first")] = 100,
    seed: Annotated[int, typer.Option(help="of lengths, arrivals and prompts")] = 1,
    port: Port = None,
    plot: Annotated[Path | None, typer.Option(help="file for a picture of the run: .svg, .png or .pdf")] = None,
    as_json: AsJson = False,
    run_dir: RunDir = None,
) -> None:
    """Offer requests in an open loop: TTFT, TPOT, ITL percentiles and goodput under both SLOs together."""
    if plot is not None:
        check_picture(plot)
    cluster = running_cluster(run_dir, port)
    with Client(cluster.grpc_address, timeout_s=TIMEOUT_S, **client_options(cluster)) as client:
        [model, *_] = client.models()
    options = ServingOptions(
        address=cluster.grpc_address,
        dial=lambda address: dial_routers(cluster),
        metadata=key_metadata(),
        trace=trace,
        num_requests=requests,
        rate=rate if rate is not None or trace is not None else 1.0,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        length_scale=length_scale,
        prompt_tokens_max=min(prompt_tokens_max or model.context_tokens, model.context_tokens // 2),
        output_tokens_max=min(output_tokens_max, model.context_tokens // 2),
        vocab_size=model.vocab_size,
        slo=Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms),
        seed=seed,
    )
    served = run_shown(options)
    drawn = curves(served.outcomes, options.slo)
    if plot is not None and drawn:
        write_picture(drawn, plot, f"{model.id}: {requests} requests, seed {seed}")
    if as_json:
        print(to_json(served.figures))
        return
    print(as_text(served.figures))
    console = Console(highlight=False)
    if console.is_terminal and not console.options.ascii_only:
        for curve in drawn:
            console.print()
            console.print(Text.from_ansi(in_terminal(curve, console.width, colours=not console.no_color)))
    if plot is not None:
        print(f"a picture is in {plot}" if drawn else "no request was answered: there is no picture")


def run_shown(options: ServingOptions) -> Served:
    """The run, with its progress on standard error where that is a terminal."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        return run(options)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("requests", total=options.num_requests)
        began_s = told_s = time.monotonic()

        def tell(ongoing: Ongoing) -> None:
            nonlocal told_s
            now_s = time.monotonic()
            if now_s < told_s + TELL_S and ongoing.ended < ongoing.num_requests:
                return
            told_s, seconds = now_s, max(1.0, now_s - began_s)
            failed = f", {ongoing.failed} failed" if ongoing.failed else ""
            what = f"{ongoing.sent - ongoing.ended} run{failed}, {ongoing.tokens / seconds:.0f} tokens/s"
            progress.update(task, total=ongoing.num_requests, completed=ongoing.ended, description=what)

        return run(options, progress=tell)
