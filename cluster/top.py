"""What `tandem top` shows: rows made of one status after another, and what only two of them together tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from router.request import ENDED, RequestState
from tandem.v1 import admin_pb2 as pb

NOTE_S = 30.0  # a change that no later status tells of is shown for so long
NOTES_MAX = 3  # the newest
BLOCK_STATES = ("owned", "exported", "granted", "quarantined", "cached", "free")  # as a bar shows them
ROLES = ("prefill", "decode", "mixed")


class Sort(StrEnum):
    """How requests are sorted, in the order in which a key goes through them."""

    AGE = "age"
    TOKENS = "tokens"
    TTFT = "TTFT"
    MOVES = "moves"
    WORKER = "worker"

    @property
    def next(self) -> Sort:
        """The one after it."""
        known = list(Sort)
        return known[(known.index(self) + 1) % len(known)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """One worker. `was`: the role that it had until a moment ago. Rates are None until two looks are there."""

    id: str
    role: str
    was: str
    state: str
    reason: str
    incarnation: int
    running: int
    waiting: int
    swapped: int
    blocks: dict[str, int]
    blocks_total: int
    step_ms: float | None  # None: no step since the look before
    tokens_read_per_s: float | None
    tokens_written_per_s: float | None
    audit: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """One request that runs, or waits to."""

    id: str
    state: str
    reason: str
    prefill_worker: str
    decode_worker: str
    moving_to: str
    prompt_tokens: int
    tokens: int
    tokens_per_s: float | None
    ttft_ms: int | None
    age_ms: int
    num_moves: int
    last_move: str  # its reason; empty: none that is remembered
    priority: int
    router: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRow:
    """One move; the newest are first."""

    ago_s: float
    request: str
    source: str
    target: str
    reason: str
    why: str
    outcome: str
    error: str
    pause_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRow:
    """The cluster as a whole; what is of the last minute is of all its clients together."""

    model: str
    http_address: str
    grpc_address: str
    store: str
    not_ready: str
    routers_up: int
    routers: int
    running: int
    waiting: int
    tokens_per_s: float | None
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_p50_ms: float | None
    tpot_p95_ms: float | None
    refused: int
    moved: int
    recovered: int


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is shown at one time. `notes`: what has changed a moment ago."""

    cluster: ClusterRow
    workers: tuple[WorkerRow, ...]
    requests: tuple[RequestRow, ...]
    moves: tuple[MoveRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """Something is different. `was`: the role that `worker` had."""

    text: str
    worker: str = ""
    was: str = ""


class Top:
    """Takes each status in, with the time, and makes the view of it. Times in seconds: of a steady clock, and Unix."""

    def __init__(self) -> None:
        self._before: pb.StatusResponse | None = None
        self._before_s = 0.0
        self._changes: list[tuple[float, Change]] = []  # lately, by when they were seen

    def look(self, now_s: float, unix_s: float, status: pb.StatusResponse) -> View:
        """The view now."""
        before = self._before or pb.StatusResponse()
        elapsed_s = now_s - self._before_s if self._before is not None else 0.0
        self._changes += [(now_s, each) for each in changes(before, status)]
        self._changes = [(at_s, each) for at_s, each in self._changes if now_s - at_s < NOTE_S]
        was = {each.worker: each.was for _, each in self._changes if each.worker}
        known = {(each.id, each.incarnation): each for each in before.workers}
        tokens_before = _tokens_by_id(before.requests)
        last_moves = {each.request: each.reason for each in status.moves}  # the newest come last
        self._before, self._before_s = status, now_s
        return View(
            cluster=_cluster(before, status, elapsed_s),
            workers=tuple(
                _worker(known.get((each.id, each.incarnation)), each, was.get(each.id, ""), elapsed_s)
                for each in sorted(status.workers, key=_pool_order)
            ),
            requests=tuple(
                _request(each, tokens_before.get(each.id), last_moves.get(each.id, ""), elapsed_s)
                for each in status.requests
                if each.state not in ENDED
            ),
            moves=tuple(_move(each, unix_s) for each in reversed(status.moves)),
            notes=tuple(each.text for _, each in self._changes[-NOTES_MAX:]),
        )


def changes(before: pb.StatusResponse, now: pb.StatusResponse) -> list[Change]:
    """What is different, and would else not be seen: processes that were started again, roles that were changed."""
    found = []
    routers = {each.id: each for each in before.routers}
    for router in now.routers:
        old = routers.get(router.id)
        if old is not None and old.pid and router.pid and old.pid != router.pid:
            found.append(Change(f"{router.id} was started again: pid {old.pid}, now {router.pid}"))
    workers = {each.id: each for each in before.workers}
    for worker in now.workers:
        known = workers.get(worker.id)
        if known is None:
            continue
        if known.incarnation < worker.incarnation:
            found.append(Change(f"{worker.id} was started again: incarnation {worker.incarnation}"))
        if known.role != worker.role:
            text = f"{worker.id} is {worker.role} now; it was {known.role}"
            found.append(Change(text, worker.id, known.role))
    return found


def sort_requests(rows: Iterable[RequestRow], by: Sort) -> list[RequestRow]:
    """The rows, largest first, by age where they are alike; by the name of their worker in the order of names."""
    keys: dict[Sort, Callable[[RequestRow], tuple[Any, ...]]] = {
        Sort.AGE: lambda row: (-row.age_ms,),
        Sort.TOKENS: lambda row: (-row.tokens, -row.age_ms),
        Sort.TTFT: lambda row: (-row.age_ms if row.ttft_ms is None else -row.ttft_ms, -row.age_ms),
        Sort.MOVES: lambda row: (-row.num_moves, -row.age_ms),
        Sort.WORKER: lambda row: (row.decode_worker or row.prefill_worker, -row.age_ms),
    }
    key = keys[by]
    return sorted(rows, key=lambda row: (*key(row), row.id))


def percentile(values: Iterable[float], share: float) -> float | None:
    """The least of the values that this share of them does not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(share * len(ordered))) - 1] if ordered else None


def _pool_order(worker: pb.WorkerStatus) -> tuple[int, str, int, str]:
    place = ROLES.index(worker.role) if worker.role in ROLES else len(ROLES)
    name, _, number = worker.id.rpartition("-")
    return place, name, int(number) if number.isdigit() else 0, worker.id


def _cluster(before: pb.StatusResponse, status: pb.StatusResponse, elapsed_s: float) -> ClusterRow:
    minutes = [each.last_minute for each in status.routers if each.HasField("last_minute")]
    ttfts, tpots = [ms for each in minutes for ms in each.ttft_ms], [ms for each in minutes for ms in each.tpot_ms]
    running = [each for each in status.requests if each.state not in ENDED]
    return ClusterRow(
        model=status.model,
        http_address=status.http_address,
        grpc_address=status.grpc_address,
        store=status.store,
        not_ready=status.not_ready,
        routers_up=sum(each.up for each in status.routers),
        routers=len(status.routers),
        running=len(running),
        waiting=sum(each.state == RequestState.ADMITTED for each in running),
        tokens_per_s=_tokens_per_s(before, status, elapsed_s),
        ttft_p50_ms=percentile(ttfts, 0.5),
        ttft_p95_ms=percentile(ttfts, 0.95),
        tpot_p50_ms=percentile(tpots, 0.5),
        tpot_p95_ms=percentile(tpots, 0.95),
        refused=sum(each.refused for each in minutes),
        moved=sum(each.moved for each in minutes),
        recovered=sum(each.recovered for each in minutes),
    )


def _tokens_per_s(before: pb.StatusResponse, status: pb.StatusResponse, elapsed_s: float) -> float | None:
    """Of all routers' clients; of a router that was not there before, or as another process, nothing is known yet."""
    if elapsed_s <= 0:
        return None
    known = {(each.id, each.pid): each.tokens_total for each in before.routers}
    return sum(
        _rate(known[each.id, each.pid], each.tokens_total, elapsed_s)
        for each in status.routers
        if (each.id, each.pid) in known
    )


def _rate(before: int, now: int, elapsed_s: float) -> float:
    return max(0, now - before) / elapsed_s


def _worker(before: pb.WorkerStatus | None, worker: pb.WorkerStatus, was: str, elapsed_s: float) -> WorkerRow:
    stepped = before is None or worker.steps != before.steps
    old = before if elapsed_s > 0 else None
    return WorkerRow(
        id=worker.id,
        role=worker.role,
        was=was,
        state=worker.state,
        reason=worker.reason,
        incarnation=worker.incarnation,
        running=worker.running,
        waiting=worker.waiting,
        swapped=worker.swap.requests,
        blocks={state: getattr(worker.kv_blocks, state) for state in BLOCK_STATES},
        blocks_total=worker.kv_blocks.total,
        step_ms=round(worker.last_step_ms, 3) if stepped and worker.steps else None,
        tokens_read_per_s=_rate(old.tokens_read, worker.tokens_read, elapsed_s) if old else None,
        tokens_written_per_s=_rate(old.tokens_written, worker.tokens_written, elapsed_s) if old else None,
        audit=tuple(worker.audit),
    )


def _tokens_by_id(requests: Iterable[pb.RequestStatus]) -> dict[str, int]:
    """A request that another router has taken over is told of by both: the one with more tokens goes on."""
    tokens: dict[str, int] = {}
    for each in requests:
        tokens[each.id] = max(each.tokens, tokens.get(each.id, 0))
    return tokens


def _request(request: pb.RequestStatus, before: int | None, last_move: str, elapsed_s: float) -> RequestRow:
    return RequestRow(
        id=request.id,
        state=request.state,
        reason=request.reason,
        prefill_worker=request.prefill_worker,
        decode_worker=request.decode_worker,
        moving_to=request.moving_to,
        prompt_tokens=request.prompt_tokens,
        tokens=request.tokens,
        tokens_per_s=None if before is None or elapsed_s <= 0 else _rate(before, request.tokens, elapsed_s),
        ttft_ms=request.ttft_ms if request.HasField("ttft_ms") else None,
        age_ms=request.age_ms,
        num_moves=request.num_moves,
        last_move=last_move,
        priority=request.priority,
        router=request.router,
    )


def _move(move: pb.MoveStatus, unix_s: float) -> MoveRow:
    return MoveRow(
        ago_s=max(0.0, round(unix_s - move.at_ms / 1000, 3)),
        request=move.request,
        source=getattr(move, "from"),
        target=move.to,
        reason=move.reason,
        why=move.why,
        outcome=move.outcome,
        error=move.error,
        pause_ms=move.pause_ms if move.outcome == "moved" else None,
    )
