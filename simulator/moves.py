"""Who has requests moved in a world: operators who ask for anything, drains that let a worker leave, the rebalancer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from cluster.draining import Drain, Flip, Leave, Looked, TakeBack, last_of_its_kind, left_on
from cluster.observer import Observer
from cluster.rebalancer import Rebalancer, RebalancerConfig
from router.events import MoveRefused, MoveRequested
from router.move import MoveOutcome, MoveReason
from router.request import StatusSnapshot
from simulator.choices import Choices
from simulator.router import VirtualRouter
from simulator.worker import VirtualWorker
from tandem.messages import Role
from tandem.request import RequestId, WorkerId

if TYPE_CHECKING:
    from simulator.world import World

REASONS = tuple(MoveReason)
PERIOD_MS = 150
DRAIN_MS = 3_000
NOBODY_KNOWS = Looked(num_requests=1, num_blocks=0)
REBALANCER = RebalancerConfig(dwell_ms=300, return_ms=500, backoff_ms=300, fixed_cost_ms=1.0, hold_ms=100)


class Movers:
    """Asks for moves until the world is healed; each has a ticket of its own."""

    def __init__(self, world: World, choices: Choices) -> None:
        self._world = world
        self._choices = choices
        self._num_tickets = 0
        self._drains: list[Drain] = []
        self._balance: dict[str, tuple[Rebalancer, Observer]] = {}  # each router moves what it has

    def look(self) -> None:
        """Now, and again after a while."""
        world = self._world
        if world.healed:
            return
        if self._drains or world.options.rebalances:
            snapshots = [(each, each.core.status(each.clock.now_ms)) for each in world.routers if each.loop.hears]
            for router, snapshot in snapshots if world.options.rebalances else ():
                self._rebalance(router, snapshot)
            if len(snapshots) == len(world.routers):  # else somebody cannot be asked what is left
                of_all = [snapshot for _, snapshot in snapshots]
                self._drains = [each for each in self._drains if not self._is_over(each, of_all)]
        world.schedule.after(PERIOD_MS, self.look)

    # ---- the rebalancer ----------------------------------------------------------------------------------------------

    def _rebalance(self, router: VirtualRouter, snapshot: StatusSnapshot) -> None:
        if router.name not in self._balance:
            observer = Observer(reserve_tokens=self._world.options.reserve_tokens, bytes_per_ms=1_000)
            self._balance[router.name] = Rebalancer(REBALANCER), observer
        rebalancer, observer = self._balance[router.name]
        view, ended = observer.look(snapshot)
        for move in ended:
            if move.outcome is MoveOutcome.FAILED:
                rebalancer.failed(snapshot.now_ms, move.request_id, move.source, move.target)
        for planned in rebalancer.plan(snapshot.now_ms, view):
            if self._ask(router, planned.request_id, planned.target, planned.reason, planned.why):
                rebalancer.refused(snapshot.now_ms, planned.request_id)

    # ---- drains ------------------------------------------------------------------------------------------------------

    def flip(self, worker: VirtualWorker) -> None:
        """The worker is to get another role, unless nobody would do then what it does now."""
        roles = [each for each in Role if each is not worker.info.role]
        becomes = roles[self._choices.choose(len(roles))]
        others = [each.info.role for each in self._world.workers.values() if each is not worker]
        flips = any(each.becomes is not None for each in self._drains)
        if not flips and not last_of_its_kind(worker.worker_id, worker.info.role, others, becomes):
            self._world.tell(f"{worker.worker_id} is to be a {becomes} worker")
            self.drain(worker, becomes)

    def drain(self, worker: VirtualWorker, becomes: Role | None = None) -> None:
        """The worker is to leave once nothing is left on it, and to come back; or to be something else from then on."""
        address = worker.address
        known = [(each.worker_id, each.incarnation) for each in self._drains]
        if (address.worker_id, address.incarnation) in known:
            return
        now_ms = self._world.schedule.now_ms
        drain = Drain(
            worker_id=address.worker_id,
            incarnation=address.incarnation,
            role=worker.info.role,
            restart=becomes is None,
            becomes=becomes,
            began_ms=now_ms,
            deadline_ms=now_ms + DRAIN_MS,
            leave_ms=1_000,
            start_ms=1_000,
        )
        self._drains.append(drain)
        self._tell(drain, draining=True)

    def _is_over(self, drain: Drain, snapshots: list[StatusSnapshot]) -> bool:
        """Looks at a drain; it is over when its worker is gone, leaves, or takes work again."""
        world = self._world
        worker = world.workers[drain.worker_id]
        if not worker.alive or worker.address.incarnation != drain.incarnation:
            return True
        left = [left_on(snapshot, drain.worker_id, drain.incarnation, "") for snapshot in snapshots]
        looked = max(left, key=lambda each: (each.num_requests + each.num_blocks, each.obstacle), default=NOBODY_KNOWS)
        for action in drain.handle(world.schedule.now_ms, looked):
            match action:
                case Leave():
                    world.leaves(worker)
                case Flip(role=role):
                    self._has_flipped(worker, drain, role)
                case TakeBack():
                    self._tell(drain, draining=False)
            return True
        return False

    def _has_flipped(self, worker: VirtualWorker, drain: Drain, role: Role) -> None:
        """Nothing of it is needed; each router hears of its role in a while, and gives it work again."""
        world = self._world
        world.tell(f"{worker.worker_id} is a {role} worker")
        worker.info = replace(worker.info, role=role)

        def hear(router: VirtualRouter) -> None:
            router.worker_flipped(drain.worker_id, drain.incarnation, role)
            router.worker_draining(drain.worker_id, drain.incarnation, False)

        for router in world.routers:
            world.schedule.after(10 * self._choices.choose(10), partial(hear, router))

    def _tell(self, drain: Drain, *, draining: bool) -> None:
        for router in self._world.routers:
            router.worker_draining(drain.worker_id, drain.incarnation, draining)

    def router_came(self, router: VirtualRouter) -> None:
        """It is told which workers are to leave."""
        for drain in self._drains:
            router.worker_draining(drain.worker_id, drain.incarnation, True)

    # ---- operators ---------------------------------------------------------------------------------------------------

    def delivered(self, request_id: RequestId) -> None:
        """Tokens of this request came: it decodes, so that it may be moved."""
        world, choices = self._world, self._choices
        if not world.healed and choices.chance(world.options.moves):
            world.schedule.after(choices.choose(20), lambda: self._operate(request_id))

    def _operate(self, request_id: RequestId) -> None:
        """An operator asks for what mostly makes sense: any target, any reason, sometimes an id that nobody has."""
        choices = self._choices
        nonsense = choices.choose(40)
        workers = list(self._world.workers)
        to = None if choices.choose(3) < 2 else workers[choices.choose(len(workers))]
        if nonsense == 39:
            request_id = RequestId("nobody's")
        elif nonsense == 38:
            to = WorkerId("nowhere")
        reason = REASONS[max(0, choices.choose(2 * len(REASONS)) - len(REASONS))]
        hearing = [each for each in self._world.routers if each.loop.hears]
        serving = [each for each in hearing if each.core.has(request_id)] or hearing
        if serving:
            self._ask(serving[choices.choose(len(serving))], request_id, to, reason, "because")

    def _ask(
        self, router: VirtualRouter, request_id: RequestId, to: WorkerId | None, reason: MoveReason, why: str
    ) -> bool:
        """One MoveRequested, whose answer is awaited; whether it was refused."""
        self._num_tickets += 1
        ticket, world = self._num_tickets, self._world
        world.tell(f"move {ticket}: {request_id} to {to} ({reason.value})")
        world.checks.move_asked(router.clock.now_ms, router.name, ticket, request_id)
        router.move(MoveRequested(request_id=request_id, to=to, reason=reason, why=why, ticket=ticket))
        return isinstance(world.checks.answer(ticket), MoveRefused)
