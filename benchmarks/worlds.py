"""Many seeded worlds of the protocol: how many of them broke a promise, and what happened in them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

from benchmarks import report
from simulator.run import Tally, run_many


def main() -> int:
    """Runs all and writes benchmarks/results/worlds.md; exit status 1 when a promise broke."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worlds", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100_000, help="how many worlds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; all cores")
    parser.add_argument("--no-write", action="store_true", help="print only, and leave benchmarks/results as it is")
    options = parser.parse_args()
    logging.disable()  # routers warn of what a world does to them
    seeds = range(options.first, options.first + options.seeds)
    began_s = time.perf_counter()
    total = run_many(
        seeds, jobs=options.jobs, failures=len(seeds), say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    body = shown(total, seeds, took_s=time.perf_counter() - began_s, jobs=options.jobs)
    if options.no_write:
        print(body)
    else:
        report.write("worlds", "Seeded worlds of the protocol", body)
    return 1 if total.broken else 0


def shown(total: Tally, seeds: range, *, took_s: float, jobs: int) -> str:
    """The table, and the seeds that broke a promise."""
    header = ["worlds", "broke a promise", "events", "tokens delivered"]
    row: list[object] = [f"{num:,}" for num in (total.num, len(total.broken), total.events, total.tokens)]
    for how in sorted(total.moves):
        header.append(f"moves: {how}")
        row.append(f"{total.moves[how]:,}")
    lines = [f"- seeds: {seeds.start:,} to {seeds.stop - 1:,}; {took_s / 60:.0f} minutes, {jobs} processes", ""]
    lines += [report.table(header, [row]), "", *(f"- seed {seed}: {problem}" for seed, problem in total.broken)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
