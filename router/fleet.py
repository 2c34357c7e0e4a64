"""What the router sees of each worker: role, state, load, and the account of what it was given since it reported."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeVar

from router.cost import CostModel
from tandem.messages import Role, WorkerAddress, WorkerInfo, WorkerLoad
from tandem.request import Pair, RequestId, WorkerId, weight_of

_Key = TypeVar("_Key", bound=tuple[float, int])

COSTS_MAX = 64  # classes of workers that are remembered
DEAD_MAX = 32  # dead workers that status still shows


class WorkerState(StrEnum):
    """How far the router may use a worker."""

    JOINING = "joining"  # registered; no stream yet
    READY = "ready"
    SUSPECT = "suspect"  # its stream broke, or its heartbeats are missing: it gets nothing new
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(slots=True)
class _Dispatch:
    """A prefill given to a worker whose first token is not here yet."""

    at_ms: int
    predicted_ms: float
    num_uncached: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class Worker:
    """One incarnation of a worker. `slot` is its bit in the prefix index."""

    slot: int
    info: WorkerInfo
    incarnation: int
    cost: CostModel
    state: WorkerState = WorkerState.JOINING
    link: WorkerState = WorkerState.JOINING  # READY while the router's stream stands
    suspected: bool = False
    draining: bool = False
    load: WorkerLoad | None = None
    free_at_ms: float = 0.0  # when the prefills it has are predicted to be done
    reserved: dict[RequestId, int] = field(default_factory=dict)  # blocks in this router's account
    num_reserved_blocks: int = 0
    urgent: dict[RequestId, int] = field(default_factory=dict)  # of them, by how much more than others they count
    arriving: dict[RequestId, int] = field(default_factory=dict)  # of them, those whose blocks are yet to come
    num_arriving_blocks: int = 0
    dispatches: dict[RequestId, _Dispatch] = field(default_factory=dict)
    last_first_token_ms: int = 0
    lost_reason: str = ""

    @property
    def worker_id(self) -> WorkerId:
        return self.info.worker_id

    @property
    def key(self) -> tuple[WorkerId, int]:
        return self.info.worker_id, self.incarnation

    @property
    def address(self) -> WorkerAddress:
        """Where peers reach it."""
        return WorkerAddress(
            worker_id=self.info.worker_id,
            incarnation=self.incarnation,
            control=self.info.control,
            endpoint=self.info.endpoint,
        )

    @property
    def num_requests(self) -> int:
        """Requests that hold or will hold its memory: this router's account, or its own count when that is more."""
        own = len(self.reserved)
        return own if self.load is None else max(own, self.load.running + self.load.waiting)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a new request may count on: what is neither reported as taken nor promised already."""
        left = self.info.total_blocks - self.num_reserved_blocks
        if self.load is not None:
            counts = self.load.blocks
            unseen = max(0, self.num_arriving_blocks - counts.granted)  # promised, and not in its report yet
            # What is swapped out there wants its blocks back.
            left = min(left, counts.free + counts.cached - unseen - self.load.swap.used)
        return left

    @property
    def urgency(self) -> int:
        """How much more its requests of higher priority count than as many others; 0: there are none."""
        return sum(self.urgent.values())

    def queue_ms(self, now_ms: int) -> float:
        """Predicted wait of a prefill that is given to it now."""
        return max(0.0, self.free_at_ms - now_ms)


class Fleet:
    """All workers, with the two orders that placement scans from the front: soonest free, and fewest requests."""

    def __init__(self, *, report_lag_ms: int) -> None:
        self._report_lag_ms = report_lag_ms
        self._workers: dict[WorkerId, Worker] = {}
        self._by_slot: dict[int, Worker] = {}
        self._dead: dict[WorkerId, Worker] = {}
        self._costs: dict[str, CostModel] = {}
        self._served_ms: dict[Pair, int] = {}
        self._free_slots: list[int] = []
        self._next_slot = 0
        self.ready = dict.fromkeys(Role, 0)  # bit masks of slots
        self._by_free_at: dict[Role, list[tuple[float, int]]] = {role: [] for role in Role}
        self._by_requests: dict[Role, list[tuple[int, int]]] = {role: [] for role in Role}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def get(self, worker_id: WorkerId, incarnation: int) -> Worker | None:
        """The worker, if this incarnation of it is the current one."""
        worker = self._workers.get(worker_id)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def current(self, worker_id: WorkerId) -> Worker | None:
        """Whatever incarnation of the worker is known."""
        return self._workers.get(worker_id)

    def at(self, slot: int) -> Worker:
        """The worker of a slot that is in use."""
        return self._by_slot[slot]

    def dead(self) -> Iterator[Worker]:
        """The last workers lost that have not come back."""
        return iter(self._dead.values())

    def join(self, info: WorkerInfo, incarnation: int) -> Worker:
        """Takes a new incarnation in. The caller has removed an older one."""
        assert info.worker_id not in self._workers, f"{info.worker_id} joined while it was there"
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot = self._next_slot
            self._next_slot += 1
        cost = self._costs.setdefault(f"{info.fingerprint}/{info.dtype}/{info.model}", CostModel())
        if len(self._costs) > COSTS_MAX:  # classes of workers that come no more
            alive = [cost, *(each.cost for each in self._workers.values())]
            self._costs = {name: each for name, each in self._costs.items() if any(each is one for one in alive)}
        worker = Worker(slot=slot, info=info, incarnation=incarnation, cost=cost)
        self._workers[info.worker_id] = worker
        self._by_slot[slot] = worker
        self._dead.pop(info.worker_id, None)
        return worker

    def leave(self, worker: Worker, reason: str) -> None:
        """Removes an incarnation for good; its slot may be given anew."""
        self._unlist(worker)
        self.ready[worker.info.role] &= ~(1 << worker.slot)
        worker.state = WorkerState.DEAD
        worker.lost_reason = reason
        del self._workers[worker.worker_id]
        del self._by_slot[worker.slot]
        self._free_slots.append(worker.slot)
        self._served_ms = {pair: at_ms for pair, at_ms in self._served_ms.items() if worker.key not in pair}
        self._dead[worker.worker_id] = worker
        while len(self._dead) > DEAD_MAX:
            del self._dead[next(iter(self._dead))]

    def served(self, pair: Pair, at_ms: int) -> None:
        """The first of the pair prefilled and the second decoded, to its end, what they were given at that time."""
        if all(self.get(*key) is not None for key in pair):
            self._served_ms[pair] = max(at_ms, self._served_ms.get(pair, at_ms))

    def served_ms(self, pair: Pair) -> int | None:
        """When the pair was last given something that it has served; None: never."""
        return self._served_ms.get(pair)

    def linked(self, worker: Worker, up: bool) -> None:
        """The router's stream to the worker stands, or broke."""
        broken = WorkerState.JOINING if worker.link is WorkerState.JOINING else WorkerState.SUSPECT
        worker.link = WorkerState.READY if up else broken
        self._refresh(worker)

    def suspected(self, worker: Worker, suspected: bool) -> None:
        """The worker misses heartbeats or stands still, or does so no more."""
        worker.suspected = suspected
        self._refresh(worker)

    def drain(self, worker: Worker, draining: bool = True) -> None:
        """The worker gets nothing new, or gets work again."""
        worker.draining = draining
        self._refresh(worker)

    def flip(self, worker: Worker, role: Role) -> None:
        """The worker has another role, and is a candidate for that one alone."""
        self._unlist(worker)
        self.ready[worker.info.role] &= ~(1 << worker.slot)
        worker.info = replace(worker.info, role=role)
        self._list(worker)
        self._refresh(worker)

    def _refresh(self, worker: Worker) -> None:
        """Moves the worker into or out of the candidates."""
        state = WorkerState.DRAINING if worker.draining else WorkerState.SUSPECT if worker.suspected else worker.link
        bit = 1 << worker.slot
        self._unlist(worker)
        worker.state = state
        if state is WorkerState.READY:
            self.ready[worker.info.role] |= bit
        else:
            self.ready[worker.info.role] &= ~bit
        self._list(worker)

    def soonest_free(self, role: Role) -> Iterator[Worker]:
        """Ready workers of the role, the shortest predicted queue first."""
        return (self._by_slot[slot] for _, slot in self._by_free_at[role])

    def fewest_requests(self, role: Role) -> Iterator[Worker]:
        """Ready workers of the role, those with the fewest requests first."""
        return (self._by_slot[slot] for _, slot in self._by_requests[role])

    # ---- the dispatch-time account (algorithms.md 14 (1): the biggest single effect measured) ---------------------

    def charge_prefill(
        self,
        worker: Worker,
        request_id: RequestId,
        *,
        now_ms: int,
        predicted_ms: float,
        num_uncached: int,
        num_tokens: int,
    ) -> None:
        """A prefill was given to the worker: its queue is longer from now on."""
        self._unlist(worker)
        worker.dispatches[request_id] = _Dispatch(now_ms, predicted_ms, num_uncached, num_tokens)
        worker.free_at_ms = max(worker.free_at_ms, float(now_ms)) + predicted_ms
        self._list(worker)

    def reserve(
        self, worker: Worker, request_id: RequestId, num_blocks: int, *, arriving: bool = False, priority: int = 0
    ) -> None:
        """The request counts as one of the worker's, with this much memory. `arriving`: by a transfer, until `arrived`.

        Two placements or moves do not fill the same memory, though the worker's reports know of neither yet.
        """
        self._unlist(worker)
        worker.num_reserved_blocks += num_blocks - worker.reserved.get(request_id, 0)
        worker.reserved[request_id] = num_blocks
        if priority:
            worker.urgent[request_id] = weight_of(priority) - 1
        if arriving:
            worker.num_arriving_blocks += num_blocks - worker.arriving.get(request_id, 0)
            worker.arriving[request_id] = num_blocks
        self._list(worker)

    def arrived(self, worker: Worker, request_id: RequestId) -> None:
        """The request's blocks are there, and in the worker's own count."""
        worker.num_arriving_blocks -= worker.arriving.pop(request_id, 0)

    def first_token(self, worker: Worker, request_id: RequestId, now_ms: int) -> None:
        """The prefill is done: the cost model learns from it."""
        dispatch = worker.dispatches.pop(request_id, None)
        if dispatch is None:
            return
        # Served in order: it began when it came, or when the one before it was done.
        began_ms = max(dispatch.at_ms, worker.last_first_token_ms)
        worker.last_first_token_ms = now_ms
        worker.cost.learn_prefill(dispatch.num_uncached, dispatch.num_tokens, now_ms - began_ms)
        if not worker.dispatches and worker.load is None:
            self._unlist(worker)
            worker.free_at_ms = float(now_ms)
            self._list(worker)

    def forget(self, worker: Worker, request_id: RequestId) -> None:
        """The request is no longer this worker's."""
        self._unlist(worker)
        worker.num_reserved_blocks -= worker.reserved.pop(request_id, 0)
        worker.urgent.pop(request_id, None)
        self.arrived(worker, request_id)
        dispatch = worker.dispatches.pop(request_id, None)
        if dispatch is not None:
            worker.free_at_ms -= dispatch.predicted_ms
        self._list(worker)

    def report(self, worker: Worker, load: WorkerLoad, now_ms: int) -> None:
        """The worker says what it has to do; what was dispatched too late to be in it is added."""
        self._unlist(worker)
        previous, worker.load = worker.load, load
        since_ms = now_ms - self._report_lag_ms
        own_ms = sum(each.predicted_ms for each in worker.dispatches.values() if each.at_ms >= since_ms)
        backlog = load.prefill_backlog_tokens
        reported_ms = worker.cost.prefill_ms(backlog, backlog) if backlog else 0.0
        worker.free_at_ms = now_ms + reported_ms + own_ms
        if backlog == 0 and load.running and previous is not None and load.steps > previous.steps:
            worker.cost.learn_step(load.running, load.last_step_ms)
        self._list(worker)

    def _list(self, worker: Worker) -> None:
        if worker.state is WorkerState.READY:
            role = worker.info.role
            insort(self._by_free_at[role], (worker.free_at_ms, worker.slot))
            insort(self._by_requests[role], (worker.num_requests, worker.slot))

    def _unlist(self, worker: Worker) -> None:
        if worker.state is WorkerState.READY:
            role = worker.info.role
            _remove(self._by_free_at[role], (worker.free_at_ms, worker.slot))
            _remove(self._by_requests[role], (worker.num_requests, worker.slot))


def _remove(order: list[_Key], key: _Key) -> None:
    at = bisect_left(order, key)
    assert order[at : at + 1] == [key], f"{key} is not in its order"
    del order[at]
