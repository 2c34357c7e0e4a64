"""From an existing .venv to the first token: `tandem serve` until ready, then one request."""

from __future__ import annotations

import asyncio
import sys
import time
from statistics import median

from benchmarks import report
from benchmarks.disaggregation import ask
from benchmarks.local_cluster import LocalCluster


def main() -> int:
    """Measures and writes benchmarks/results/startup.md."""
    rows = []
    for repeat in range(5):
        start = time.perf_counter()
        with LocalCluster() as cluster:
            ready_s = cluster.ready_s
            outcome = asyncio.run(ask(cluster.grpc_address, list(range(2000, 2016))))
            first_token_s = outcome.token_times_s[0] - start
        rows.append([repeat, ready_s, first_token_s, time.perf_counter() - start])
    body = report.table(["run", "ready s", "first token s", "stopped again s"], rows)
    body += f"\n\nMedian to the first token: {median(row[2] for row in rows):.1f} s (1 prefill, 2 decode, SmolLM2).\n"
    report.write("startup", "Start-up", body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
