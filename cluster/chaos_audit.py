"""What a status says that must not be: blocks that do not add up, and what is held by nobody once all is still."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tandem.v1.admin_pb2 import BlockCountsStatus, StatusResponse, WorkerStatus

Key = TypeVar("Key", bound=Hashable)

HELD = ("owned", "exported", "granted", "quarantined")  # by somebody; the rest is free or prefix cache
OWN = ("supervisor", "router", "pools", "worker", "agent")  # processes that are started again when they die
# So long a worker may hold blocks that no client's request has a part in: a canary whose peer stands still has 5 s, and
# what a stopped agent may still write to is held for 6 s more, until that is killed.
IDLE_MS = 12_000
IDLE_LOOKS = 4  # and so many looks in a row: nothing is known of the time in which the router that is asked was away
FILES_MORE_MAX = 24  # descriptors of a process beyond those at the first still moment: links to peers come and go


def unbalanced(worker: WorkerStatus) -> list[str]:
    """What is wrong with a worker's blocks at any moment, under any load."""
    blocks = worker.kv_blocks
    states = blocks.free + blocks.cached + sum(_held(blocks).values())
    problems = [f"{worker.id}: {problem}" for problem in worker.audit]
    if states != blocks.total:
        problems.append(f"{worker.id}: the states of its blocks sum to {states}, its pool has {blocks.total}")
    return problems


def held(status: StatusResponse, wanted: Iterable[str] = ()) -> list[str]:
    """What keeps the cluster from being as it was before any load; empty: nothing.

    `wanted`: workers that must be there, which a router that was just started may not know yet.
    """
    known = {worker.id for worker in status.workers}
    problems = [f"{name} is not known" for name in sorted(set(wanted) - known)]
    for worker in status.workers:
        if worker.state == "left":
            continue
        if worker.state != "ready":
            problems.append(f"{worker.id} is {worker.state}")
            continue
        problems += [f"{worker.id} has {num} blocks {name}" for name, num in _held(worker.kv_blocks).items() if num]
        if worker.running or worker.waiting:
            problems.append(f"{worker.id} has {worker.running} requests running and {worker.waiting} waiting")
    return problems


class Lasting:
    """Tells what stays, look after look, from what comes and goes."""

    def __init__(self, for_ms: int, *, num_looks: int = 1) -> None:
        self._for_ms = for_ms
        self._num_looks = num_looks
        self._found: dict[Hashable, tuple[int, int]] = {}  # since when, in how many looks

    def look(self, now_ms: int, found: Iterable[Key]) -> list[Key]:
        """Those of `found` that every look has found for `for_ms`, and `num_looks` looks at least."""
        now = list(found)
        self._found = {
            each: (since_ms, num + 1) for each in now for since_ms, num in [self._found.get(each, (now_ms, 0))]
        }
        return [
            each
            for each in now
            if now_ms - self._found[each][0] >= self._for_ms and self._found[each][1] >= self._num_looks
        ]


class IdleWatch:
    """Finds, while a load runs, workers that hold blocks although no request has a part in them."""

    def __init__(self) -> None:
        self._lasting = Lasting(IDLE_MS, num_looks=IDLE_LOOKS)
        self._told: set[tuple[str, int]] = set()  # by worker and incarnation

    def look(self, now_ms: int, status: StatusResponse) -> list[str]:
        """Takes the next status; says, once, who has held something for nobody for IDLE_MS."""
        busy = {name for each in status.requests for name in (each.prefill_worker, each.decode_worker, each.moving_to)}
        holding = {
            (worker.id, worker.incarnation): num
            for worker in status.workers
            if worker.state == "ready" and worker.id not in busy and not worker.running and not worker.waiting
            if (num := sum(_held(worker.kv_blocks).values()))
        }
        lasting, told = self._lasting.look(now_ms, holding), self._told
        self._told = set(lasting)
        return [
            f"{key[0]} holds {holding[key]} blocks, and no request has a part in it"
            for key in lasting
            if key not in told
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """How many processes of one name there are, and what they have open."""

    num_processes: int
    num_files: int  # open in all of them


def missing(before: Mapping[str, Footprint], now: Mapping[str, Footprint]) -> list[str]:
    """Processes of the cluster's own that there were at a still moment before, and that nobody has replaced."""
    return [
        f"{num} processes {name} run, {before[name].num_processes} did before"
        for name in OWN
        if name in before and (num := now[name].num_processes if name in now else 0) < before[name].num_processes
    ]


def grown(before: Mapping[str, Footprint], now: Mapping[str, Footprint]) -> list[str]:
    """Processes and open files that there were not at a still moment before."""
    problems = []
    for name, footprint in now.items():
        then = before.get(name)
        if then is None or footprint.num_processes > then.num_processes:
            num = then.num_processes if then is not None else 0
            problems.append(f"{footprint.num_processes} processes {name} run, {num} did before")
        elif footprint.num_files > then.num_files + FILES_MORE_MAX * then.num_processes:
            problems.append(f"{name} has {footprint.num_files} open files, {then.num_files} before")
    return problems


def exact_and_here(status: StatusResponse, local_pids: Iterable[int]) -> str:
    """Why the cluster cannot be struck from here; empty when it can."""
    inexact = [each.id for each in status.workers if each.state == "ready" and not each.exact]
    if inexact:
        return f"{', '.join(inexact)}: not in exact mode, so tokens cannot be compared"
    here = set(local_pids)
    strange = [each.id for each in status.workers if each.state == "ready" and each.pid not in here]
    if strange:
        return f"{', '.join(strange)}: runs on another machine, where no fault can be made from here"
    return ""


def _held(blocks: BlockCountsStatus) -> dict[str, int]:
    return {name: getattr(blocks, name) for name in HELD}
