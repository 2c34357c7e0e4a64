"""`make fuzz`: a million frames and other targets under atheris, then HTTP, gRPC and idle clients on a real cluster.

Writes benchmarks/results/fuzz.md, by default with all parts. Exit status 1 when a promise broke; the input is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from grpc_calls import TOKEN, Peer
from idlers import ATTACKS, Target, raise_open_files
from siege import Siege
from targets import FRAMES, targets

from benchmarks import report

HERE = Path(__file__).resolve().parent
CHUNK_RUNS = 20_000  # of a target, by one process; the corpus stays
HTTP_OPERATIONS = (
    ("POST", "/v1/completions", 12),
    ("POST", "/v1/chat/completions", 12),
    ("GET", "/v1/models/{model_id}", 1),
)
COVERED = re.compile(r"DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)/")
Row = list[object]


class Broken(Exception):
    """A promise broke; the message shows the input."""


def guided(name: str, goal: int, *, frames: bool, seed: int, jobs: int, folder: Path) -> Row:
    """Runs one target until `goal` inputs, or frames, are through."""
    target = targets()[name]
    corpus = folder / name.replace(" ", "-")
    corpus.mkdir()
    for number, data in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(data)
    began_s, inputs, held, number, covered = time.monotonic(), 0, 0, 0, 0
    while (held if frames else inputs) < goal:
        seeds = [seed + number + job for job in range(jobs)]
        number += jobs
        left = goal - (held if frames else inputs)
        kept = len(list(corpus.iterdir()))  # read first by each process, which counts them as runs
        runs = CHUNK_RUNS if frames else min(CHUNK_RUNS, max(500, left // jobs) + kept)
        with ThreadPoolExecutor(jobs) as pool:
            for done in pool.map(partial(chunk, name, runs=runs, corpus=corpus, folder=folder), seeds):
                inputs, held, covered = inputs + done[0], held + done[1], max(covered, done[2])
        print(f"{name}: {inputs:,} inputs, {held:,} {target.holds}, {covered} edges", file=sys.stderr, flush=True)
    return [name, f"{inputs:,}", f"{held:,} {target.holds}", covered, f"{time.monotonic() - began_s:.0f} s"]


def chunk(name: str, seed: int, *, runs: int, corpus: Path, folder: Path) -> tuple[int, int, int]:
    """One process of the fuzzer: inputs, what they held, edges covered."""
    tally = folder / f"tally-{name.replace(' ', '-')}-{seed}"
    flags = [f"-runs={runs}", f"-seed={seed}", f"-artifact_prefix={folder}/", str(corpus)]
    done = subprocess.run(
        [sys.executable, str(HERE / "guided.py"), name, str(tally), *flags],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    found = COVERED.search(done.stderr + done.stdout)
    if done.returncode != 0 or found is None:
        raise Broken(f"{name}, seed {seed}:\n{(done.stdout + done.stderr)[-4000:]}")
    counts = json.loads(tally.read_text())
    return counts["inputs"], counts["held"], int(found[1])


def script(file: str, *arguments: str, **environment: str) -> dict[str, int]:
    """Another script of this folder to its end: what it counted."""
    done = subprocess.run(
        [sys.executable, str(HERE / file), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode != 0:
        raise Broken(f"{file} {' '.join(arguments)}:\n{(done.stdout + done.stderr)[-6000:]}")
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def http(cluster: Siege, num: int, seed: int, jobs: int) -> list[Row]:
    """`num` requests that schemathesis makes of the document."""
    weight = sum(each for _, _, each in HTTP_OPERATIONS)
    began_s = time.monotonic()
    work = []
    for method, path, share in HTTP_OPERATIONS:
        for job in range(jobs):
            how_many = -(-num * share // weight // jobs)
            work.append((method, path, str(how_many), str(seed + 1000 * job)))
    statuses: Counter[str] = Counter()
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(lambda each: script("http_cases.py", cluster.url, *each, TANDEM_FUZZ_NARROW="1"), work):
            statuses.update(found)
    return [["HTTP, by the document", f"{sum(statuses.values()):,}", _told(statuses), took(began_s)]]


def grpc(cluster: Siege, num: int, seed: int, jobs: int) -> list[Row]:
    """`num` calls."""

    def peer(each: Peer) -> str:
        return f"{each.name}={each.address}@{each.incarnation}"

    began_s, ended = time.monotonic(), Counter[str]()
    peers = [peer(each) for each in cluster.peers()]
    os.environ[TOKEN] = cluster.access.token
    with ThreadPoolExecutor(jobs) as pool:
        work = [(str(-(-num // jobs)), str(seed + job), cluster.grpc_address, *peers) for job in range(jobs)]
        for found in pool.map(lambda each: script("grpc_calls.py", *each), work):
            ended.update(found)
    codes: Counter[str] = Counter()
    for name, number in ended.items():
        codes[name.split()[1]] += number
    return [["gRPC, router and workers", f"{sum(ended.values()):,}", _told(codes), took(began_s)]]


def clients(cluster: Siege, share: float) -> list[Row]:
    """Clients that hold on, or do not listen, while another one asks well."""
    raise_open_files()
    rows: list[Row] = []
    target = Target(http_port=cluster.port, grpc_port=int(cluster.grpc_address.rsplit(":", 1)[1]))
    for name, (attack, num) in ATTACKS.items():
        began_s = time.monotonic()
        cluster.before()
        with cluster.asker() as asker:
            asyncio.run(attack(target, max(1, round(num * share))))
        calm = cluster.after()
        told = f"{asker.num} answers meanwhile, the slowest {asker.slowest_s:.2f} s; {calm}"
        rows.append([name, f"{max(1, round(num * share)):,}", told, took(began_s)])
        print(f"{name}: {told}", file=sys.stderr, flush=True)
    return rows


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {num:,}" for name, num in sorted(counts.items()))


def took(began_s: float) -> str:
    """Since then."""
    return f"{time.monotonic() - began_s:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000, help="to the receiving agent")
    parser.add_argument("--inputs", type=int, default=200_000, help="to each reader; the deciders get a share of that")
    parser.add_argument("--http", type=int, default=50_000)
    parser.add_argument("--grpc", type=int, default=50_000)
    parser.add_argument("--clients", type=float, default=1.0, help="share of the clients that hold on or do not listen")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    read: list[Row] = []
    edges: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tandem-fuzz-") as name:
        folder = Path(name)
        try:
            for each, target in targets().items():
                goal = options.frames if each == FRAMES else options.inputs * target.share // 50
                if goal:
                    frames = each == FRAMES
                    row = guided(each, goal, frames=frames, seed=options.seed, jobs=options.jobs, folder=folder)
                    read.append(row)
            if options.http or options.grpc or options.clients:
                edges = against_a_cluster(options, folder)
        except (Broken, AssertionError) as error:
            print(error, file=sys.stderr)
            return 1
    body = "Under atheris, guided by coverage of our own packages:\n\n"
    body += report.table(["target", "inputs", "in them", "edges covered", "took"], read)
    body += "\n\nAgainst `tandem serve --model fake`, 1 prefill and 2 decode workers:\n\n"
    body += report.table(["what", "how many", "how they ended", "took"], edges)
    body += "\n\nNo crash, no hang, no 5xx, INTERNAL or UNKNOWN; afterwards the same processes, every block free or "
    body += "cached, open files and memory as before.\n"
    report.write("fuzz", "Fuzzing", body, seed=options.seed)
    return 0


def against_a_cluster(options: argparse.Namespace, folder: Path) -> list[Row]:
    """One cluster for all of it; after each part it is as before."""
    edges: list[Row] = []
    with Siege(run_dir=folder / "run") as cluster:
        for part, num in ((http, options.http), (grpc, options.grpc)):
            if num:
                cluster.before()
                with cluster.asker():
                    edges += part(cluster, num, options.seed, options.jobs)
                print(edges[-1], cluster.after(), file=sys.stderr, flush=True)
        if options.clients:
            edges += clients(cluster, options.clients)
    return edges


if __name__ == "__main__":
    sys.exit(main())
