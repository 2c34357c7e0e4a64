"""Decides which running requests are moved, where to and why: drain, pressure, priority, balance, de-fragmentation.

Form of algorithms.md 14 (3): a move must be worth more than it costs, and must take more than a tenth off what it is
against; a worker takes part in one move in and one out at a time; a request that moved stays for a while, and a pair
that failed is left alone for a while. Llumnix (OSDI'24, 3.3) pairs by freeness alone; here each reason has the measure
that it is about. Waiting counts by the priority of who waits; so priority and balance never undo each other's moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

from cluster.outlook import ClusterView, Outlook, RunningRequest, WaitingRequest, WorkerView
from router.move import MoveReason
from tandem.request import RequestId, WorkerId, weight_of

# Bounds of what one decision costs.
QUICKEST = 4  # workers that a balancing move is weighed for
ROOMIEST = 4  # workers that room is looked for on
GRAINS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancerConfig:
    """Bounds of the rebalancer. Sources: algorithms.md, by section; "ours" where nobody gives a figure.

    Raises ValueError naming the key when a value cannot be used.
    """

    dwell_ms: int = 5_000  # 14 (3), 16: between two moves of one request
    return_ms: int = 30_000  # 14 (8), dwell: until a request may go back to where it was
    backoff_ms: int = 5_000  # 14 (3), edge 1: of a pair after a failure
    improvement_least: float = 0.10  # 14 (3): of what is too much
    left_over_copy: float = 4.0  # 14 (3): predicted time left of a request, over the time of its pre-copy
    fixed_cost_ms: float = 20.0  # ours: two round trips, the fence and the commit
    pressure_ms: int = 5_000  # ours: as far ahead as a request may not move again
    watermark_share: float = 0.02  # decode_worker/config.py: of a pool, kept free
    fill_share: float = 0.85  # 16, bands: a target is filled so far at its peak, and no further
    recompute_token_ms: float = 1.0  # router/cost.py's first guess: of what a preempted request runs again
    imbalance_least: float = 1.25  # ours, hysteresis: step time of the source over the target's
    balance_ms: int = 10_000  # 16, interval of 10 s: a better balance is not counted on for longer
    hold_ms: int = 1_000  # ours: a request waits so long before others are moved for it

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not value > 0 or not math.isfinite(value):
                raise ValueError(f"{each.name}: is {value!r}, must be more than 0")
        for name in ("improvement_least", "watermark_share", "fill_share"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}: is {getattr(self, name)!r}, must be less than 1")
        if self.imbalance_least <= 1:
            raise ValueError(f"imbalance_least: is {self.imbalance_least!r}, must be more than 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMove:
    """A move to be asked for. `why` is for people; gain and cost are predicted milliseconds of all requests together.

    A drain's gain is infinite: it was asked for.
    """

    request_id: RequestId
    source: WorkerId
    target: WorkerId
    reason: MoveReason
    why: str
    gain_ms: float
    cost_ms: float


@dataclass(slots=True)
class Rebalancer:
    """Plans moves from one view after another. Remembers what failed, nothing else."""

    config: RebalancerConfig = field(default_factory=RebalancerConfig)
    _failed_pairs: dict[tuple[WorkerId, WorkerId], int] = field(default_factory=dict)
    _failed_requests: dict[RequestId, int] = field(default_factory=dict)

    def refused(self, now_ms: int, request_id: RequestId) -> None:
        """A move was not begun at all: others of its source come before this request for a while."""
        self._failed_requests[request_id] = now_ms

    def failed(self, now_ms: int, request_id: RequestId, source: WorkerId, target: WorkerId) -> None:
        """A move failed: the pair is left alone for a while, and others of the source come before this request."""
        self._failed_pairs[source, target] = now_ms
        self._failed_requests[request_id] = now_ms

    def gone(self, worker_id: WorkerId) -> None:
        """The worker is over: whoever comes under its name has failed nobody."""
        self._failed_pairs = {pair: at_ms for pair, at_ms in self._failed_pairs.items() if worker_id not in pair}

    def plan(self, now_ms: int, view: ClusterView, *, drains_only: bool = False) -> list[PlannedMove]:
        """The moves to begin now, in the order of their reasons. The caller begins all of them."""
        since_ms = now_ms - self.config.backoff_ms
        self._failed_pairs = {pair: at_ms for pair, at_ms in self._failed_pairs.items() if at_ms > since_ms}
        self._failed_requests = {each: at_ms for each, at_ms in self._failed_requests.items() if at_ms > since_ms}
        case = _Case(self.config, view, now_ms, self._failed_pairs, self._failed_requests)
        for rule in RULES[:1] if drains_only else RULES:
            rule(case)
        return case.moves


class _Case:
    """One decision: the workers with their requests, and what has been planned so far."""

    def __init__(
        self,
        config: RebalancerConfig,
        view: ClusterView,
        now_ms: int,
        failed_pairs: dict[tuple[WorkerId, WorkerId], int],
        failed_requests: dict[RequestId, int],
    ) -> None:
        self.config = config
        self.view = view
        self.now_ms = now_ms
        self.failed_requests = failed_requests
        self.moves: list[PlannedMove] = []
        self._failed_pairs = failed_pairs
        self._sources: set[WorkerId] = set()  # with a move out
        self._targets: set[WorkerId] = set()  # with a move in
        self._outlooks = {each.worker_id: Outlook(each, view.step) for each in view.workers}
        for request in view.running:
            if request.worker_id in self._outlooks:
                self._outlooks[request.worker_id].requests.append(request)
        for request in view.running:
            if request.moving_to is not None:
                self._book(request, request.worker_id, request.moving_to)

    def workers(self) -> Iterator[Outlook]:
        """All workers, in the order of the view."""
        return iter(self._outlooks.values())

    def sources(self) -> list[Outlook]:
        """Workers that stay and may give a request away now."""
        return [each for each in self.workers() if each.worker.ready and self._may_give(each.worker)]

    def draining(self) -> list[Outlook]:
        """Workers that leave and may give a request away now."""
        return [each for each in self.workers() if each.worker.draining and self._may_give(each.worker)]

    def targets(self, source: Outlook) -> list[Outlook]:
        """Workers that may take a request of the source now."""
        name = source.worker.worker_id
        return [
            each
            for each in self.workers()
            if each.worker.ready
            and each.worker.worker_id not in (name, *self._targets)
            and (name, each.worker.worker_id) not in self._failed_pairs
        ]

    def movable(self, source: Outlook) -> list[RunningRequest]:
        """Requests of the source that may move: not moving, at rest long enough, and with enough ahead of them."""
        found, step_ms = [], source.step_ms
        for each in source.requests:
            rested = each.moved_ms is None or self.now_ms - each.moved_ms >= self.config.dwell_ms
            left_ms = each.left_tokens * step_ms
            if each.moving_to is None and rested and left_ms > self.config.left_over_copy * self.copy_ms(source, each):
                found.append(each)
        return found

    def copy_ms(self, source: Outlook, request: RunningRequest) -> float:
        """Time of copying the request's blocks."""
        return source.blocks_of(request) * source.worker.block_bytes / self.view.bytes_per_ms

    def cost_ms(self, source: Outlook, request: RunningRequest) -> float:
        """bytes / bandwidth + fixed, and two steps for which the request stands still."""
        return self.copy_ms(source, request) + self.config.fixed_cost_ms + 2 * source.step_ms

    def capacity(self, worker: WorkerView) -> int:
        """Blocks that may be held."""
        return worker.total_blocks - math.ceil(worker.total_blocks * self.config.watermark_share)

    def steps_ahead(self, outlook: Outlook) -> float:
        """Steps that the worker takes in the time that pressure is foreseen for."""
        return self.config.pressure_ms / max(outlook.step_ms, 0.1)

    def shortage(self, outlook: Outlook, without: RunningRequest | None = None) -> int:
        """Blocks that will be missing at the worker's peak."""
        left = [each for each in outlook.requests if each is not without and _stays(outlook, each)]
        gone = sum(outlook.blocks_of(each) for each in outlook.requests if each not in left)
        peak = outlook.peak_blocks(self.steps_ahead(outlook), left, -gone)
        return max(0, peak - self.capacity(outlook.worker))

    def suits(self, target: Outlook, request: RunningRequest) -> bool:
        """Whether the target stays within its band at its peak, and is not where the request was a while ago."""
        since_ms = self.now_ms - self.config.return_ms
        if any(home == target.worker.worker_id and left_ms > since_ms for home, left_ms in request.homes):
            return False
        if not _has_room(target, request):
            return False
        blocks = target.blocks_of(request)
        peak = target.peak_blocks(self.steps_ahead(target), [*target.requests, request], blocks)
        return peak <= self.config.fill_share * target.worker.total_blocks

    def take(self, move: PlannedMove, request: RunningRequest) -> None:
        """Plans the move: both workers are taken."""
        self.moves.append(move)
        self._book(request, move.source, move.target)

    def _book(self, request: RunningRequest, source: WorkerId, target: WorkerId) -> None:
        self._sources.add(source)
        self._targets.add(target)
        giver, taker = self._outlooks.get(source), self._outlooks.get(target)
        moving = replace(request, moving_to=target)
        if giver is not None:
            giver.requests = [moving if each.request_id == request.request_id else each for each in giver.requests]
        if taker is not None:
            taker.requests.append(moving)
            taker.given_blocks += taker.blocks_of(request)

    def _may_give(self, worker: WorkerView) -> bool:
        return worker.worker_id not in self._sources


def _stays(outlook: Outlook, request: RunningRequest) -> bool:
    """Whether the request is not on its way from here. One on its way to here is as good as here."""
    return request.moving_to in (None, outlook.worker.worker_id)


def _has_room(target: Outlook, request: RunningRequest) -> bool:
    """Whether the router would let the request go there."""
    return target.worker.room_blocks >= request.reserve_blocks


# ---- the reasons ---------------------------------------------------------------------------------------------------


def _drain(case: _Case) -> None:
    """What runs on a worker that leaves goes to the freest that has room. The longest first: short ones end anyway."""
    for source in case.draining():
        here = [each for each in source.requests if each.moving_to is None]  # others may still be on their way to here
        here.sort(key=lambda each: (each.request_id in case.failed_requests, -each.left_tokens))
        targets = sorted(case.targets(source), key=lambda each: -each.freeness)
        for request in here:
            blocks = source.blocks_of(request)
            target = next((each for each in targets if each.free_blocks > blocks and _has_room(each, request)), None)
            if target is None:
                continue
            why = (
                f"{source.worker.worker_id} drains; {target.worker.worker_id} is the freest with room: "
                f"{target.free_blocks} blocks, {len(target.requests)} requests"
            )
            case.take(_planned(MoveReason.DRAIN, source, target, request, why, math.inf, case), request)
            break


def _pressure(case: _Case) -> None:
    """A source that runs out of blocks gives away what relieves it longest for the bytes that it costs."""
    short = [(case.shortage(each), each) for each in case.sources()]
    for shortage, source in sorted(short, key=lambda each: -each[0]):
        if shortage == 0:
            break
        steps = case.steps_ahead(source)
        best: tuple[tuple[int, float], PlannedMove, RunningRequest] | None = None
        for request in case.movable(source):
            relieved = shortage - case.shortage(source, request)
            if relieved <= case.config.improvement_least * shortage:
                continue
            gain_ms = relieved * source.worker.block_size * case.config.recompute_token_ms
            fitting = [each for each in case.targets(source) if case.suits(each, request)]
            if not fitting or gain_ms <= case.cost_ms(source, request):
                continue
            target = max(fitting, key=lambda each: each.freeness)
            stays = min(request.left_tokens, steps)
            blocks = source.blocks_of(request)
            relief = (blocks + stays / source.worker.block_size) * stays / blocks
            why = (
                f"{source.worker.worker_id} will be {shortage} blocks short within {case.config.pressure_ms} ms; "
                f"this saves {relieved}, {target.worker.worker_id} has {target.free_blocks} free"
            )
            move = _planned(MoveReason.PRESSURE, source, target, request, why, gain_ms, case)
            rank = -request.priority, relief  # lower priorities make room for higher ones
            if best is None or rank > best[0]:
                best = rank, move, request
        if best is not None:
            case.take(best[1], best[2])


def _priority(case: _Case) -> None:
    """Who has a high priority should not wait for a batch of others: they leave while all waiting gets less for it."""
    mixed = [each for each in case.sources() if any(other.priority < each.priority for other in each.requests)]
    for source in sorted(mixed, key=lambda each: (-each.priority, -each.weight)):
        high = [each for each in source.requests if each.priority == source.priority]
        alone_ms = case.view.step.of(len(high), sum(each.num_tokens for each in high))
        worthwhile_ms = case.config.improvement_least * (source.step_ms - alone_ms)
        movable = [each for each in case.movable(source) if each.priority < source.priority]
        found = []
        for target in sorted(case.targets(source), key=lambda each: (each.weight, each.step_ms))[:QUICKEST]:
            for change in _changes(case, source, target, movable):
                cost_ms = case.cost_ms(source, change.request)
                if source.step_ms - change.source_ms > worthwhile_ms and change.gain_ms > cost_ms:
                    why = (
                        f"{len(high)} requests of priority {source.priority} wait {source.step_ms:.1f} ms a step on "
                        f"{source.worker.worker_id}; without this one {change.source_ms:.1f} ms"
                    )
                    move = _planned(MoveReason.PRIORITY, source, target, change.request, why, change.gain_ms, case)
                    found.append((change.gain_ms - cost_ms, change, move))
        _take_best(case, found)


def _balance(case: _Case) -> None:
    """Every token waits for its worker's step: the slowest batch gives to the quickest while that saves waiting.

    One request of twenty cannot take a tenth off the maximum. All moves to come can, if `imbalance_least` holds (the
    even share is then at most 0.9 of it); each takes more than a tenth of what they can.
    """
    for source in sorted(case.sources(), key=lambda each: -each.step_ms):
        found: list[tuple[float, _Change, PlannedMove]] = []
        movable = case.movable(source)
        for target in sorted(case.targets(source), key=lambda each: each.step_ms)[:QUICKEST]:
            if not movable or source.step_ms < case.config.imbalance_least * target.step_ms:
                continue
            worthwhile_ms = case.config.improvement_least * (source.step_ms - target.step_ms) / 2
            for change in _changes(case, source, target, movable):
                cost_ms = case.cost_ms(source, change.request)
                taken_off_ms = source.step_ms - max(change.source_ms, change.target_ms)
                if taken_off_ms > worthwhile_ms and change.gain_ms > cost_ms:
                    why = (
                        f"a step takes {source.step_ms:.1f} ms on {source.worker.worker_id} and {target.step_ms:.1f} "
                        f"ms on {target.worker.worker_id}; after this {change.source_ms:.1f} and "
                        f"{change.target_ms:.1f} ms"
                    )
                    move = _planned(MoveReason.BALANCE, source, target, change.request, why, change.gain_ms, case)
                    found.append((change.gain_ms - cost_ms, change, move))
        _take_best(case, found)


@dataclass(frozen=True, slots=True)
class _Change:
    """What moving one request would make of the steps of two workers, and the waiting that it saves."""

    request: RunningRequest
    target: Outlook
    source_ms: float
    target_ms: float
    gain_ms: float


def _changes(case: _Case, source: Outlook, target: Outlook, movable: list[RunningRequest]) -> Iterator[_Change]:
    """What each move would bring: the waiting that all requests of both workers are spared, counted by priority.

    As long as the request runs, in bounds.
    """
    step, source_ms, target_ms = case.view.step, source.step_ms, target.step_ms
    num_here, num_there = source.num_rows, target.num_rows
    tokens_here, tokens_there = source.num_tokens, target.num_tokens
    weight_here, weight_there = source.weight, target.weight
    before = weight_here * source_ms + weight_there * target_ms
    steps_max = case.config.balance_ms / max(source_ms, 0.1)
    for request in movable:
        weight = weight_of(request.priority)
        here_ms = step.of(num_here - 1, tokens_here - request.num_tokens)
        there_ms = step.of(num_there + 1, tokens_there + request.num_tokens)
        after = (weight_here - weight) * here_ms + (weight_there + weight) * there_ms
        gain_ms = (before - after) * min(request.left_tokens, steps_max)
        yield _Change(request, target, here_ms, there_ms, gain_ms)


def _take_best(case: _Case, found: list[tuple[float, _Change, PlannedMove]]) -> None:
    """The move that brings most, of those whose target stays within its band."""
    found.sort(key=lambda each: -each[0])
    best = next((each for each in found if case.suits(each[1].target, each[1].request)), None)
    if best is not None:
        case.take(best[2], best[1].request)


def _defragment(case: _Case) -> None:
    """The first in line fits no worker, though it would fit what is free in all: the cheapest set of one makes room."""
    if not case.view.waiting:
        return
    head = case.view.waiting[0]
    waits_ms = case.now_ms - head.since_ms
    hosts = sorted(case.sources(), key=lambda each: -each.worker.room_blocks)[:ROOMIEST]
    if waits_ms < case.config.hold_ms or any(each.worker.room_blocks >= head.num_blocks for each in case.workers()):
        return
    best: tuple[float, Outlook, list[tuple[RunningRequest, Outlook]]] | None = None
    for host in hosts:
        chosen = _cheapest_set(case, host, head.num_blocks - host.worker.room_blocks)
        if chosen and (best is None or _cost_of(case, host, chosen) < best[0]):
            best = _cost_of(case, host, chosen), host, chosen
    if best is None:
        return
    cost_ms, host, chosen = best
    gain_ms = _natural_wait_ms(host, head) - cost_ms  # it waits for the moves as well
    if cost_ms > (1 - case.config.improvement_least) * (gain_ms + cost_ms) or gain_ms <= cost_ms:
        return
    request, target = max(chosen, key=lambda each: each[0].num_tokens)
    why = (
        f"{head.request_id} waits for {head.num_blocks} blocks since {waits_ms} ms; {host.worker.worker_id} has "
        f"{host.worker.room_blocks}, and {len(chosen)} requests less would make room"
    )
    case.take(_planned(MoveReason.DEFRAGMENT, host, target, request, why, gain_ms, case), request)


def _cheapest_set(case: _Case, host: Outlook, wanted: int) -> list[tuple[RunningRequest, Outlook]]:
    """Requests of the host, each with its target, that free the blocks wanted for the least copying; empty: none do.

    Blocks are counted in GRAINSths of what is wanted, a request's rounded down.
    """
    grain = -(-wanted // GRAINS)
    full = -(-wanted // grain)
    cheapest: dict[int, tuple[float, tuple[RunningRequest, ...]]] = {0: (0.0, ())}  # by grains freed, up to `full`
    for request in case.movable(host):
        request_ms, grains = case.cost_ms(host, request), host.blocks_of(request) // grain
        for freed, (cost_ms, chosen) in list(cheapest.items()):
            more, total_ms = min(full, freed + grains), cost_ms + request_ms
            if more not in cheapest or total_ms < cheapest[more][0]:
                cheapest[more] = total_ms, (*chosen, request)
    if full not in cheapest:
        return []
    room = {each.worker.worker_id: each.worker.room_blocks for each in case.targets(host)}
    targets = {each.worker.worker_id: each for each in case.targets(host)}
    placed = []
    for request in sorted(cheapest[full][1], key=lambda each: -each.num_tokens):
        fitting = [name for name in room if room[name] > host.blocks_of(request) and case.suits(targets[name], request)]
        if not fitting:
            return []
        name = max(fitting, key=lambda each: room[each])
        room[name] -= host.blocks_of(request)
        placed.append((request, targets[name]))
    return placed


def _cost_of(case: _Case, host: Outlook, chosen: list[tuple[RunningRequest, Outlook]]) -> float:
    return sum(case.cost_ms(host, request) for request, _ in chosen)


def _natural_wait_ms(host: Outlook, head: WaitingRequest) -> float:
    """When the host will have room by itself, as its requests end."""
    room = host.worker.room_blocks
    for request in sorted(host.requests, key=lambda each: each.left_tokens):
        room += host.blocks_of(request)
        if room >= head.num_blocks:
            return request.left_tokens * host.step_ms
    return math.inf


def _planned(
    reason: MoveReason,
    source: Outlook,
    target: Outlook,
    request: RunningRequest,
    why: str,
    gain_ms: float,
    case: _Case,
) -> PlannedMove:
    return PlannedMove(
        request_id=request.request_id,
        source=source.worker.worker_id,
        target=target.worker.worker_id,
        reason=reason,
        why=why,
        gain_ms=gain_ms,
        cost_ms=case.cost_ms(source, request),
    )


# In this order; drain is the first.
RULES: tuple[Callable[[_Case], None], ...] = (_drain, _pressure, _priority, _balance, _defragment)
