"""`tandem bench`: offers a workload to a running cluster and prints what its requests saw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from benchmarks.figures import Slo
from benchmarks.serving import ServingOptions, as_json, as_text, run
from cli.options import Port, RunDir, running_cluster
from cluster.member_access import client_options, dial_routers, key_metadata
from tandem import Client

TIMEOUT_S = 10.0


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
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    run_dir: RunDir = None,
) -> None:
    """Offer requests in an open loop: TTFT, TPOT, ITL percentiles and goodput under both SLOs together."""
    found = running_cluster(run_dir, port)
    with Client(found.grpc_address, timeout_s=TIMEOUT_S, **client_options(found)) as client:
        [model, *_] = client.models()
    options = ServingOptions(
        address=found.grpc_address,
        dial=lambda address: dial_routers(found),
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
    if json:
        print(as_json(run(options)))
        return
    with Progress(transient=True) as progress:
        task = progress.add_task("requests", total=requests)
        figures = run(options, progress=lambda ended, total: progress.update(task, completed=ended, total=total))
    print(as_text(figures))
