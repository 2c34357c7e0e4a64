"""Which workers serve a request: predicted-completion routing over a short list of candidates.

Form of algorithms.md 14 (1): queue + w * prefill, where w grows with utilisation (a busy pool pays for recomputing
what another worker has cached), from the warmest and soonest free workers only: its cost does not grow with the fleet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from typing import NamedTuple

from router.config import RouterConfig
from router.fleet import Fleet, Worker, WorkerState
from router.prefix_index import PrefixIndex
from tandem.messages import AssignMode, Role, WorkerAddress
from tandem.request import Incarnation, Pair, WorkerId, weight_of

WARMEST = 4  # candidates by match
SOONEST = 4  # candidates by queue
LEAST_LOADED = 8  # decode candidates by number of requests
SCAN_MAX = 64  # how many workers without memory are passed over
HORIZON_STEPS = 64  # decode steps that a decode worker's batch is judged over
UTILISATION_WINDOW_MS = 10_000.0

WorkerKey = Incarnation


class Part(StrEnum):
    """What a worker was considered for."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class Candidate(NamedTuple):
    """A worker that was considered, and what it would cost: the least wins. `terms` are what the score is made from."""

    worker_id: WorkerId
    part: Part
    score_ms: float
    terms: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a request goes and why. With LOCAL both workers are the same."""

    mode: AssignMode  # PREFILL: two workers and a handoff; LOCAL: one
    prefill_worker: WorkerAddress
    decode_worker: WorkerAddress
    num_cached_tokens: int  # expected in the prefill worker's cache
    predicted_ms: float  # until the first token
    prefill_ms: float  # of it, the prefill itself
    reason: str
    candidates: tuple[Candidate, ...]

    @property
    def source(self) -> WorkerKey:
        """Who prefills."""
        return self.prefill_worker.worker_id, self.prefill_worker.incarnation


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the best placement now would give a request, beside the wait for it. `num_rows`: of the batch, with it."""

    ttft_ms: float
    num_rows: int
    step_ms: Callable[[int], float]

    @property
    def tpot_ms(self) -> float:
        """Between two tokens."""
        return self.step_ms(self.num_rows)

    def rows_over(self, tpot_ms: float) -> float:
        """How many requests of the batch would have to end for a step to take that long; inf: no number would do."""
        if self.step_ms(1) > tpot_ms:
            return math.inf
        return next(num for num in range(self.num_rows) if self.step_ms(self.num_rows - num) <= tpot_ms)


class Why(StrEnum):
    """Why there is no placement now."""

    NO_WORKERS = "no_workers"
    NO_MEMORY = "no_memory"
    NEVER_FITS = "never_fits"


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlacement:
    """The request has to wait, or can never be served (NEVER_FITS)."""

    why: Why
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What placement needs to know of a request. `num_tokens`: prompt and delivered; `num_more`: yet to be written."""

    num_tokens: int
    num_more: int
    priority: int = 0
    hashes: Sequence[bytes] = ()
    avoid: frozenset[WorkerKey] = field(default=frozenset())  # for this request
    resting: frozenset[tuple[WorkerKey, WorkerKey]] = field(default=frozenset())  # sources and targets, for any
    recovers: bool = False  # it was placed before: what it had computed is not to be computed again
    pinned: Pair | None = None  # who is to prefill and to decode it, and nobody else


@dataclass(frozen=True, slots=True)
class _Option:
    """One worker that could prefill the request."""

    worker: Worker
    score_ms: float
    queue_ms: float
    prefill_ms: float
    num_cached: int
    batch_ms: float = 0.0  # of decoding it there, where it would be

    def candidate(self, part: Part) -> Candidate:
        """As it is told."""
        terms: tuple[tuple[str, float], ...] = (
            ("queue_ms", self.queue_ms),
            ("prefill_ms", self.prefill_ms),
            ("cached_tokens", self.num_cached),
        )
        if part is Part.BOTH and self.batch_ms:
            terms += (("batch_ms", self.batch_ms),)
        return Candidate(self.worker.worker_id, part, self.score_ms, terms)


class _Case:
    """One decision: what is looked up for it is looked up once."""

    def __init__(self, fleet: Fleet, index: PrefixIndex, ask: Ask, now_ms: int, weight: float) -> None:
        self._fleet = fleet
        self._index = index
        self.ask = ask
        self.now_ms = now_ms
        self.weight = weight  # of the prefill against the queue
        self._depths: dict[int, int] = {}
        self._warm: dict[Role, list[Worker]] = {}

    def depth(self, worker: Worker) -> int:
        """Leading blocks of the request that the worker holds."""
        depth = self._depths.get(worker.slot)
        if depth is None:
            depth = self._depths[worker.slot] = self._index.depth(worker.slot, self.ask.hashes)
        return depth

    def cached(self, worker: Worker) -> int:
        """Tokens of the request that the worker need not run: whole blocks, and never the last token."""
        size = worker.info.block_size
        return min(self.depth(worker), (self.ask.num_tokens - 1) // size) * size

    def warm(self, role: Role) -> list[Worker]:
        """The ready workers of the role that hold most of it, deepest first."""
        if role not in self._warm:
            slots = self._index.deepest(self.ask.hashes, self._fleet.ready[role], WARMEST)
            self._warm[role] = [self._fleet.at(slot) for slot in slots]
        return self._warm[role]


class Placer:
    """Chooses workers; keeps nothing but the pool's recent utilisation."""

    def __init__(self, fleet: Fleet, index: PrefixIndex, config: RouterConfig) -> None:
        self._fleet = fleet
        self._index = index
        self._config = config
        self._work_ms = 0.0
        self._work_at_ms = 0

    def place(self, now_ms: int, ask: Ask) -> Placement | NoPlacement:
        """The best placement now. Does not charge any account."""
        ready = self._fleet.ready
        if not any(ready.values()):
            return NoPlacement(why=Why.NO_WORKERS, reason="no worker is ready")
        never = self._never_fits(ask)
        if never is not None:
            return never
        case = _Case(self._fleet, self._index, ask, now_ms, self._weight(now_ms))
        if ask.pinned is not None:
            return self._pinned(case, *ask.pinned)
        if not ready[Role.DECODE] and not ready[Role.MIXED]:
            return self._local(case, (Role.PREFILL,), "no decode worker is ready")
        if not ready[Role.PREFILL]:
            return self._local(case, (Role.DECODE, Role.MIXED), "no prefill worker is ready")
        warm = self._warm_decode(case)
        if warm is not None:
            return warm
        return self._disaggregated(case)

    def forecast(self, now_ms: int, ask: Ask) -> Forecast | None:
        """What the request could expect now; None when there is no place for it."""
        found = self.place(now_ms, ask)
        if isinstance(found, NoPlacement):
            return None
        address = found.decode_worker
        target = self._fleet.get(address.worker_id, address.incarnation)
        assert target is not None, f"{address} was placed on, and is not in the fleet"
        return Forecast(ttft_ms=found.predicted_ms, num_rows=target.num_requests + 1, step_ms=target.cost.step_ms)

    def charge(self, now_ms: int, prefill_ms: float) -> None:
        """Counts a dispatched prefill into the pool's utilisation."""
        self._work_ms = self._recent_work_ms(now_ms) + prefill_ms
        self._work_at_ms = now_ms

    def num_blocks(self, ask: Ask, worker: Worker) -> int:
        """Blocks that the request is counted with on a worker: its tokens and the expected part of its answer."""
        expected = ask.num_tokens + min(ask.num_more, self._config.decode_reserve_tokens)
        return min(-(-expected // worker.info.block_size), worker.info.total_blocks)

    def fits(self, ask: Ask, worker: Worker) -> bool:
        """Whether the worker has memory for the request, as far as reports and promises tell."""
        return self.num_blocks(ask, worker) <= worker.num_free_blocks

    def shortest_wait_ms(self, now_ms: int) -> float:
        """Predicted wait on the worker that is soonest free to prefill."""
        waits = [each.queue_ms(now_ms) for role in Role for each in islice(self._fleet.soonest_free(role), 1)]
        return min(waits, default=0.0)

    # ---- the ways to place -----------------------------------------------------------------------------------------

    def _disaggregated(self, case: _Case) -> Placement | NoPlacement:
        """The best of: a prefill worker with a decode worker, or a mixed worker alone."""
        options = self._options(case, Role.PREFILL)
        decode = self._decode(case, Role.DECODE, options) or self._decode(case, Role.MIXED, options)
        fresh = [each for each in options if each.worker.key not in case.ask.avoid]
        if decode is not None and case.ask.resting:
            fresh = [each for each in fresh if (each.worker.key, decode[0].key) not in case.ask.resting] or fresh
        alone = self._options(case, Role.MIXED)
        alone = [each for each in alone if self.fits(case.ask, each.worker) and each.worker.key not in case.ask.avoid]
        tried = not fresh or (decode is not None and decode[0].key in case.ask.avoid)
        if tried and not alone:
            roles = (Role.DECODE, Role.MIXED)
            return self._local(case, roles, "every other pair was tried: no handoff")
        if (decode is None or tried) and not alone:
            return NoPlacement(why=Why.NO_MEMORY, reason="no decode worker has memory for it")
        best = self._best(alone if decode is None or tried else fresh + alone)
        considered = tuple(each.candidate(Part.PREFILL) for each in fresh)
        considered += tuple(each.candidate(Part.BOTH) for each in alone)
        if best.worker.info.role is Role.MIXED:
            return self._placement(
                best, best.worker, AssignMode.LOCAL, "mixed worker with the shortest completion", considered
            )
        assert decode is not None
        target, targets = decode
        reason = (
            f"prefill: wait {best.queue_ms:.0f} ms, run {best.prefill_ms:.0f} ms, {best.num_cached} tokens cached; "
            f"decode: {target.num_requests} requests, {target.num_free_blocks} blocks free"
        )
        return self._placement(best, target, AssignMode.PREFILL, reason, considered + targets)

    def _pinned(self, case: _Case, source_key: WorkerKey, target_key: WorkerKey) -> Placement | NoPlacement:
        """On these two, or nowhere."""
        source, target = self._fleet.get(*source_key), self._fleet.get(*target_key)
        for (worker_id, _), worker in ((source_key, source), (target_key, target)):
            if worker is None or worker.state is not WorkerState.READY:
                return NoPlacement(why=Why.NO_WORKERS, reason=f"{worker_id} is not ready")
        assert source is not None, "checked"
        assert target is not None, "checked"
        for worker in (source, target):
            if not self.fits(case.ask, worker):
                return NoPlacement(why=Why.NO_MEMORY, reason=f"{worker.worker_id} has no memory for it")
        mode = AssignMode.LOCAL if source is target else AssignMode.PREFILL
        return self._placement(self._option(case, source), target, mode, "it was asked for this pair", ())

    def _warm_decode(self, case: _Case) -> Placement | None:
        """A decode worker that holds more of the prefix than every prefill worker prefills a short rest itself.

        Of a request that was lost also a longer one, if that is less than half of what a prefill worker would run.
        """
        limit = self._config.local_prefill_tokens
        if limit == 0:
            return None
        warmest = max((case.depth(each) for each in case.warm(Role.PREFILL)), default=0)
        if case.ask.recovers:
            elsewhere = max((case.cached(each) for each in case.warm(Role.PREFILL)), default=0)
            limit = max(limit, (case.ask.num_tokens - elsewhere) // 2)
        for worker in case.warm(Role.DECODE):
            cached = case.cached(worker)
            if case.depth(worker) <= warmest or case.ask.num_tokens - cached > limit:
                return None  # the next ones hold no more than this one
            if worker.key in case.ask.avoid or not self.fits(case.ask, worker):
                continue
            option = self._option(case, worker)
            reason = f"decode worker holds {cached} tokens, more than any prefill worker; the rest is short"
            return self._placement(option, worker, AssignMode.LOCAL, reason, (option.candidate(Part.BOTH),))
        return None

    def _local(self, case: _Case, roles: Sequence[Role], why: str) -> Placement | NoPlacement:
        """One worker does both, on any of the roles."""
        options = []
        for role in roles:
            for each in self._options(case, role):
                batch_ms = (_step_ms(each.worker) + _disturbed_ms(case.ask, each.worker)) * HORIZON_STEPS
                options.append(replace(each, score_ms=each.score_ms + batch_ms, batch_ms=batch_ms))
        options = [each for each in options if self.fits(case.ask, each.worker)]
        options = [each for each in options if each.worker.key not in case.ask.avoid] or options
        if not options:
            return NoPlacement(why=Why.NO_MEMORY, reason=f"{why}, and none of the others has memory for it")
        best = self._best(options)
        considered = tuple(each.candidate(Part.BOTH) for each in options)
        return self._placement(best, best.worker, AssignMode.LOCAL, why, considered)

    def _decode(
        self, case: _Case, role: Role, sources: Sequence[_Option]
    ) -> tuple[Worker, tuple[Candidate, ...]] | None:
        """The decode worker with memory whose batch and missing blocks cost least; of equal ones the emptiest.

        Tried ones only when all were, and then one that some source gets through to, as far as is known.
        """
        warm = case.warm(role)
        least = islice(self._fleet.fewest_requests(role), SCAN_MAX)
        few = islice((each for each in least if self.fits(case.ask, each)), LEAST_LOADED)
        candidates = [each for each in _distinct(warm, few) if self.fits(case.ask, each)]
        candidates = [each for each in candidates if each.key not in case.ask.avoid] or candidates
        if case.ask.resting:
            keys = [each.worker.key for each in sources if each.worker.key not in case.ask.avoid]
            reached = [each for each in candidates if any((key, each.key) not in case.ask.resting for key in keys)]
            candidates = reached or candidates
        scored = []
        for worker in candidates:
            missing = case.ask.num_tokens - case.cached(worker)
            num_bytes = -(-missing // worker.info.block_size) * worker.info.block_bytes
            batch_ms = (_step_ms(worker) + _disturbed_ms(case.ask, worker)) * HORIZON_STEPS
            copy_ms = num_bytes / self._config.transfer_bytes_per_ms
            terms = (("batch_ms", batch_ms), ("copy_ms", copy_ms), ("requests", worker.num_requests))
            scored.append((worker, Candidate(worker.worker_id, Part.DECODE, batch_ms + copy_ms, terms)))
        if not scored:
            return None
        chosen, _ = min(scored, key=lambda each: (each[1].score_ms, each[0].num_requests, each[0].slot))
        return chosen, tuple(candidate for _, candidate in scored)

    # ---- candidates and scores -------------------------------------------------------------------------------------

    def _options(self, case: _Case, role: Role) -> list[_Option]:
        """The warmest and the soonest free workers of a role, scored; tried ones beside as many others."""
        warm = case.warm(role)
        soon = islice(self._fleet.soonest_free(role), SOONEST + len(case.ask.avoid))
        return [self._option(case, each) for each in _distinct(warm, soon)]

    def _option(self, case: _Case, worker: Worker) -> _Option:
        cached = case.cached(worker)
        queue_ms = worker.queue_ms(case.now_ms)
        prefill_ms = worker.cost.prefill_ms(case.ask.num_tokens - cached, case.ask.num_tokens)
        return _Option(worker, queue_ms + case.weight * prefill_ms, queue_ms, prefill_ms, cached)

    def _best(self, options: Sequence[_Option]) -> _Option:
        """The least score; within the tie band the warmer, then the one with less cached, then the first joined."""
        limit = min(each.score_ms for each in options) * (1 + self._config.tie_percent / 100)
        near = [each for each in options if each.score_ms <= limit]
        return min(
            near, key=lambda each: (-each.num_cached, self._index.num_blocks(each.worker.slot), each.worker.slot)
        )

    def _placement(
        self, option: _Option, target: Worker, mode: AssignMode, reason: str, candidates: tuple[Candidate, ...]
    ) -> Placement:
        return Placement(
            mode=mode,
            prefill_worker=option.worker.address,
            decode_worker=target.address,
            num_cached_tokens=option.num_cached,
            predicted_ms=option.queue_ms + option.prefill_ms,
            prefill_ms=option.prefill_ms,
            reason=reason,
            candidates=candidates,
        )

    def _never_fits(self, ask: Ask) -> NoPlacement | None:
        """Whether the prompt is larger than the memory of every worker that is known."""
        for worker in self._fleet:  # the first one nearly always fits
            if ask.num_tokens + 1 <= worker.info.total_blocks * worker.info.block_size:
                return None
        largest = max(each.info.total_blocks * each.info.block_size for each in self._fleet)
        reason = f"has {ask.num_tokens} tokens, and the largest worker has memory for {largest - 1}"
        return NoPlacement(why=Why.NEVER_FITS, reason=reason)

    def _recent_work_ms(self, now_ms: int) -> float:
        return self._work_ms * math.exp((self._work_at_ms - now_ms) / UTILISATION_WINDOW_MS)

    def _weight(self, now_ms: int) -> float:
        """w = 1 + 2 clip((rho - 0.6) / 0.4, 0, 1)."""
        num = max(1, (self._fleet.ready[Role.PREFILL] | self._fleet.ready[Role.MIXED]).bit_count())
        utilisation = self._recent_work_ms(now_ms) / (UTILISATION_WINDOW_MS * num)
        return 1.0 + 2.0 * min(1.0, max(0.0, (utilisation - 0.6) / 0.4))


def _step_ms(worker: Worker) -> float:
    """A step of the worker with one request more."""
    return worker.cost.step_ms(worker.num_requests + 1)


def _disturbed_ms(ask: Ask, worker: Worker) -> float:
    """What that makes its requests of higher priority wait longer, a step, as this request's own waiting counts.

    Their head-room (Llumnix, OSDI'24, 3.3), as a price instead of a fixed amount of memory.
    """
    if not worker.urgency:
        return 0.0
    longer_ms = _step_ms(worker) - worker.cost.step_ms(worker.num_requests)
    return max(0.0, longer_ms) * worker.urgency / weight_of(ask.priority)


def _distinct(*groups: Iterable[Worker]) -> list[Worker]:
    """The workers of all groups, each once, in the order met."""
    return list({each.slot: each for group in groups for each in group}.values())
