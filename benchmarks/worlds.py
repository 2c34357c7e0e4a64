"""Many seeded worlds of the protocol: how many of them broke a promise, and what happened in them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

from benchmarks import report
from simulator.run import Tally, run_many

PART = 1000  # worlds after which the state is written


def main() -> int:
    """Runs all and writes benchmarks/results/worlds.md; exit status 1 when a promise broke, 2 for a wrong state."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worlds", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100_000, help="how many worlds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; all cores")
    parser.add_argument("--state", type=Path, help="a file to keep what has run in, and to go on from after a break")
    parser.add_argument("--no-write", action="store_true", help="print only, and leave benchmarks/results as it is")
    options = parser.parse_args()
    logging.disable()  # routers warn of what a world does to them
    seeds = range(options.first, options.first + options.seeds)
    try:
        total, took_s = resumed(options.state, report.commit(), seeds)
    except ValueError as error:
        print(f"{options.state}: {error}", file=sys.stderr)
        return 2
    while total.num < len(seeds):
        began_s = time.perf_counter()
        part = seeds[total.num : total.num + PART]
        total.add(run_many(part, jobs=options.jobs, failures=len(part), say=lambda line: None))
        took_s += time.perf_counter() - began_s
        print(
            f"{total.num} of {len(seeds)} worlds, {len(total.broken)} broke a promise, "
            f"{took_s / total.num * (len(seeds) - total.num) / 60:.0f} minutes to go",
            file=sys.stderr,
            flush=True,
        )
        keep(options.state, report.commit(), seeds, total, took_s)
    body = shown(total, seeds, took_s=took_s, jobs=options.jobs)
    if options.no_write:
        print(body)
    else:
        report.write("worlds", "Seeded worlds of the protocol", body)
    return 1 if total.broken else 0


def keep(path: Path | None, commit: str, seeds: range, total: Tally, took_s: float) -> None:
    """Writes what has run to the file, if there is one: whole, or not at all."""
    if path is None:
        return
    so_far = {each.name: getattr(total, each.name) for each in fields(total)}
    ran = {"commit": commit, "first": seeds.start, "took_s": took_s, "total": so_far}
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(ran))
    new.replace(path)


def resumed(path: Path | None, commit: str, seeds: range) -> tuple[Tally, float]:
    """What has run by that file, and for how many seconds; nothing, when there is none.

    Raises ValueError when that was other code, began at another seed, or is more than is wanted.
    """
    if path is None or not path.exists():
        return Tally(), 0.0
    ran = json.loads(path.read_text())
    total = Tally(**ran["total"])
    total.moves = Counter(total.moves)
    total.broken = [(seed, problem) for seed, problem in total.broken]
    if ran["commit"] != commit:
        raise ValueError(f"its worlds ran at commit {ran['commit']}, and this is {commit}")
    if ran["first"] != seeds.start or total.num > len(seeds):
        raise ValueError(f"it has {total.num} seeds from {ran['first']}, wanted are {len(seeds)} from {seeds.start}")
    return total, ran["took_s"]


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
