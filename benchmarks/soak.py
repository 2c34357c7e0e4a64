"""An hour of mixed load with a fault every 30 s: neither memory nor open files nor processes may grow.

A process's memory is regressed on its age, over all processes of one name, each with a level of its own; so those that
are killed and started again count too. What is stated as noise is twice the standard error of the slope, taken over
means of BLOCK_S: what a process holds at one moment it mostly holds 5 s later, so that samples are not independent.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks import fat_kv_model, report
from benchmarks.chaos import SMALL, running
from cluster.chaos import ChaosRun, Place
from cluster.chaos_plan import FaultKind, deck, parse_kinds, parse_states, plan
from cluster.chaos_processes import Taken, listening_ports, taken
from cluster.chaos_report import markdown, summary
from cluster.chaos_tally import Tally

DURATION_S, EVERY_S, SAMPLE_S = 3600.0, 30.0, 5.0
SHORTEST_S = 1200.0  # of a run that can tell a slope from a warm-up
WARM_UP_S = 120.0  # of a process: it imports, fills its caches, remembers its first requests
# A router remembers requests for five minutes, an agent ended attempts for two; a worker comes to touch its buffers.
WARM_UP_LONG_S = {"router": 420.0, "worker": 300.0, "agent": 300.0, "Ray": 300.0}
GROWTH_SHARE_MAX = 0.02  # of the memory there is, in an hour: less is no growth, whatever the noise
KINDS_S = 60.0
AGES = 8
BLOCK_S = 180.0  # longer than a stream
MB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """How a figure of the processes of one name changes with their age, in an hour."""

    name: str
    num_processes: int
    num_samples: int
    mean: float
    per_hour: float
    noise_per_hour: float

    @property
    def grows(self) -> bool:
        """Whether it rises beyond its noise, and by more than is worth a word."""
        return self.per_hour > self.noise_per_hour and self.per_hour > GROWTH_SHARE_MAX * self.mean


@dataclass(slots=True)
class Sampler:
    """Looks at every process each SAMPLE_S, on a thread of its own; once in KINDS_S at what their open files are."""

    supervisor_pid: int
    samples: list[Taken] = field(default_factory=list)
    kinds: dict[str, list[tuple[float, dict[str, int]]]] = field(default_factory=lambda: defaultdict(list))
    _kinds_s: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until `stop`."""
        while not self._over.wait(SAMPLE_S):
            newest = taken(self.supervisor_pid)
            self.samples += newest
            if time.monotonic() > self._kinds_s + KINDS_S:
                self._kinds_s = time.monotonic()
                for each in newest:
                    if each.age_s > WARM_UP_LONG_S.get(each.name, WARM_UP_S):
                        self.kinds[each.name].append((each.age_s, file_kinds(each.pid)))

    def stop(self) -> None:
        """Ends `run`."""
        self._over.set()


def file_kinds(pid: int) -> dict[str, int]:
    """How many open files a process has of each kind; connections by whose port they came to, or go to."""
    try:
        connections = psutil.Process(pid).net_connections("all")
        paths = list(Path(f"/proc/{pid}/fd").iterdir())
    except (psutil.Error, OSError):
        return {}
    links = []
    for path in paths:
        with suppress(OSError):  # closed meanwhile
            links.append(os.readlink(path))
    kinds = Counter(_kind(link) for link in links if not link.startswith("socket:"))
    listening = listening_ports(connections)
    for each in connections:
        if each.family == socket.AF_UNIX:
            kinds["unix socket"] += 1
        elif each.status == psutil.CONN_LISTEN:
            kinds["listening"] += 1
        elif each.laddr and each.laddr.port in listening:
            kinds[f"came to port {each.laddr.port}"] += 1
        else:
            kinds[f"goes to port {each.raddr.port}" if each.raddr else "goes nowhere"] += 1
    return dict(kinds)


def _kind(link: str) -> str:
    if link.startswith("anon_inode:"):
        return link.removeprefix("anon_inode:").strip("[]")
    return "memory" if "memfd:" in link else link.partition(":")[0] if ":" in link else "file"


def kinds_table(kinds: dict[str, list[tuple[float, dict[str, int]]]]) -> str:
    """What was open at the first look and at the last one, of the oldest process of each name, where that differs."""
    rows = []
    for name, looks in sorted(kinds.items()):
        (_, first), (_, last) = min(looks, key=lambda each: each[0]), max(looks, key=lambda each: each[0])
        changed = [kind for kind in sorted({*first, *last}) if first.get(kind, 0) != last.get(kind, 0)]
        rows += [(name, kind, first.get(kind, 0), last.get(kind, 0)) for kind in changed]
    return (
        report.table(("process", "open files", "young", "old"), rows) if rows else "The same kinds of files are open."
    )


def slope(name: str, points: Sequence[tuple[int, float, float]]) -> Slope | None:
    """Least squares of a figure on age, over (process, age in seconds, figure); None: too few to tell."""
    blocks: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for process, age_s, figure in points:
        blocks[process, int(age_s // BLOCK_S)].append((age_s / 3600, figure))
    groups: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for (process, _), block in blocks.items():
        groups[process].append((sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block)))
    centred: list[tuple[float, float]] = []
    for group in groups.values():
        mean_x = sum(x for x, _ in group) / len(group)
        mean_y = sum(y for _, y in group) / len(group)
        centred += [(x - mean_x, y - mean_y) for x, y in group]
    spread = sum(x * x for x, _ in centred)
    freedom = len(centred) - len(groups) - 1
    if freedom < 2 or not spread:
        return None
    per_hour = sum(x * y for x, y in centred) / spread
    rest = sum((y - per_hour * x) ** 2 for x, y in centred)
    return Slope(
        name=name,
        num_processes=len(groups),
        num_samples=len(points),
        mean=sum(figure for _, _, figure in points) / len(points),
        per_hour=per_hour,
        noise_per_hour=2 * math.sqrt(rest / freedom / spread),
    )


def ages_table(samples: Sequence[Taken]) -> str:
    """Memory of the oldest process of each name at AGES ages, to tell a warm-up from a leak."""
    of: dict[tuple[str, int], list[Taken]] = defaultdict(list)
    for each in samples:
        of[each.name, each.pid].append(each)
    rows = []
    for name in sorted({name for name, _ in of}):
        oldest = max((each for (whose, _), each in of.items() if whose == name), key=lambda each: each[-1].age_s)
        shown = [oldest[(len(oldest) - 1) * number // (AGES - 1)] for number in range(AGES)]
        rows.append((name, *(f"{each.heap_bytes / MB:.1f} ({each.age_s / 60:.0f})" for each in shown)))
    return report.table(("oldest", *["MB (minutes)"] * AGES), rows)


def slopes(samples: Sequence[Taken], figure: Callable[[Taken], int]) -> list[Slope]:
    """A slope for each name of processes, of those past their warm-up."""
    points: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for each in samples:
        if each.age_s > WARM_UP_LONG_S.get(each.name, WARM_UP_S):
            points[each.name].append((each.pid, each.age_s, float(figure(each))))
    found = (slope(name, values) for name, values in sorted(points.items()))
    return [each for each in found if each is not None]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when nothing grew and every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--duration", type=float, default=DURATION_S, help="seconds")
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between faults, about")
    parser.add_argument("--model", default=fat_kv_model.NAME)
    parser.add_argument("--redis", action="store_true", help="the cluster keeps its state in a Redis of its own")
    parser.add_argument("--samples", type=Path, help="a CSV file for each sample: process, pid, age, heap, files")
    parser.add_argument("--no-write", action="store_true", help="print only, and leave benchmarks/results as it is")
    flags = parser.parse_args(arguments)
    tally, sampler = _soak(flags)
    samples = sampler.samples
    if flags.samples is not None:
        rows = [f"{s.name},{s.pid},{s.age_s:.1f},{s.heap_bytes},{s.num_files}" for s in samples]
        flags.samples.write_text("\n".join(["name,pid,age_s,heap_bytes,num_files", *rows, ""]))
    memory, files = slopes(samples, lambda each: each.heap_bytes), slopes(samples, lambda each: each.num_files)
    broken = []
    if flags.duration >= SHORTEST_S:
        broken += [f"memory of {each.name} grows by {each.per_hour / MB:.1f} MB/h" for each in memory if each.grows]
        broken += [f"open files of {each.name} grow by {each.per_hour:.1f} an hour" for each in files if each.grows]
    broken += tally.failures(recovery_limit_ms=10_000)
    body = "\n\n".join(
        [
            report.table(
                ("process", "processes", "samples", "heap MB", "slope MB/h", "noise MB/h", "grows"),
                [
                    (
                        s.name,
                        s.num_processes,
                        s.num_samples,
                        s.mean / MB,
                        s.per_hour / MB,
                        s.noise_per_hour / MB,
                        s.grows,
                    )
                    for s in memory
                ],
            ),
            report.table(
                ("process", "open files", "slope /h", "noise /h", "grows"),
                [(s.name, s.mean, s.per_hour, s.noise_per_hour, s.grows) for s in files],
            ),
            ages_table(samples),
            kinds_table(sampler.kinds),
            markdown(tally),
            summary(tally),
            "Nothing grows, and every promise was kept." if not broken else "\n".join(f"- {each}" for each in broken),
        ]
    )
    if flags.no_write:
        print(body)
    else:
        report.write("soak", "Soak", body, seed=flags.seed, threads="1 a worker")
    return 1 if broken else 0


def _soak(flags: argparse.Namespace) -> tuple[Tally, Sampler]:
    with running(flags.model, redis=flags.redis) as cluster:
        sampler = Sampler(cluster.pid)
        thread = threading.Thread(target=sampler.run, name="sampler", daemon=True)
        shooting = ChaosRun(
            Place.of(cluster.run_file()),
            load=SMALL,
            seed=flags.seed,
            say=lambda line: print(line, file=sys.stderr, flush=True),
            audit_every=10,
        )
        kinds = parse_kinds(",".join(kind for kind in FaultKind if kind is not FaultKind.REDIS_DOWN or flags.redis))
        faults = plan(
            random.Random(flags.seed).randrange,
            suits=deck(asyncio.run(shooting.ground()), kinds=kinds, states=parse_states("all")),
            duration_ms=round(flags.duration * 1000),
            every_ms=round(flags.every * 1000),
        )
        thread.start()
        began_s = time.monotonic()
        tally = asyncio.run(shooting.run(faults, round(flags.duration * 1000)))
        sampler.stop()
        thread.join()
        print(f"{len(sampler.samples)} samples in {time.monotonic() - began_s:.0f} s", file=sys.stderr)
        return tally, sampler


if __name__ == "__main__":
    raise SystemExit(main())
