"""Goodput of one prefill and one decode worker beside the same two engines as mixed workers with chunked prefill.

A scaled real trace is offered in an open loop to each cluster in turn (A/B/A/B). Both are printed, whoever wins.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.figures import Slo, summary
from benchmarks.load import offer
from benchmarks.local_cluster import LocalCluster
from benchmarks.workload import Offered, Scale, from_trace, random_prompts, uniform

SHAPES = {
    "1 prefill + 1 decode": ["--prefill", "1", "--decode", "1", "--mixed", "0"],
    "2 mixed, chunked prefill": ["--prefill", "0", "--decode", "0", "--mixed", "2"],
}


def one_run(arguments: list[str], offered: list[Offered], slo: Slo, seed: int) -> dict[str, Any]:
    """Offers the workload once to a fresh cluster (so no run finds the prefix cache of another)."""
    prompts = random_prompts(offered, vocab_size=49152, seed=seed)
    with LocalCluster([*arguments, "--dtype", "float32", "--exact", "--threads", "1"]) as cluster:
        warm = [Offered(arrival_s=0, prompt_tokens=64, output_tokens=8)] * 2
        asyncio.run(offer(cluster.grpc_address, warm, random_prompts(warm, vocab_size=49152, seed=seed + 99)))
        return summary(asyncio.run(offer(cluster.grpc_address, offered, prompts)), slo=slo)


def main() -> int:
    """Measures and writes benchmarks/results/goodput.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, help="a trace file; without it lengths are uniform around 256 / 32")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--length-scale", type=float, default=0.125)
    parser.add_argument("--ttft-ms", type=float, default=2000)
    parser.add_argument("--tpot-ms", type=float, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    slo = Slo(ttft_ms=options.ttft_ms, tpot_ms=options.tpot_ms)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SHAPES}
    for repeat in range(options.repeats):
        seed = options.seed + repeat
        if options.trace is None:
            offered = uniform(
                num_requests=options.requests, rate=options.rate, prompt_tokens=256, output_tokens=32,
                spread=0.5, seed=seed,
            )  # fmt: skip
        else:
            scale = Scale(length=options.length_scale, rate=options.rate, prompt_tokens_max=1024, output_tokens_max=128)
            offered = from_trace(options.trace, num_requests=options.requests, scale=scale, seed=seed)
        for name, arguments in SHAPES.items():
            runs[name].append(one_run(arguments, offered, slo, seed))
    rows = []
    for name, results in runs.items():
        rows.append(
            [
                name,
                median(r["good_share"] for r in results),
                median(r["goodput_per_s"] for r in results),
                *(median(r[series][p] for r in results) for series in ("ttft_ms", "tpot_ms") for p in ("p50", "p99")),
                median(r["itl_ms"]["p99"] for r in results),
                sum(len(r["errors"]) for r in results),
            ]
        )
    source = "uniform lengths 256/32" if options.trace is None else f"trace {options.trace.name}"
    body = report.table(
        ["workers", "good share", "goodput /s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "ITL p99", "errors"],
        rows,
    )
    body += (
        f"\n\n{options.requests} requests of {source}, lengths x {options.length_scale}, {options.rate}/s, open loop, "
        f"{options.repeats} interleaved repetitions, medians. SLO: TTFT <= {slo.ttft_ms:.0f} ms and TPOT <= "
        f"{slo.tpot_ms:.0f} ms together; refused and failed requests are misses. Times in ms. float32, exact mode.\n"
    )
    report.write("goodput", "Goodput: disaggregated beside mixed", body, seed=options.seed, threads="1 a worker")
    return 0


if __name__ == "__main__":
    sys.exit(main())
