"""Who has requests moved in a world: operators who ask for anything, also for nonsense, and the rebalancer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.events import MoveRequested
from router.move import MoveReason
from simulator.choices import Choices
from tandem.request import RequestId, WorkerId

if TYPE_CHECKING:
    from simulator.world import World

REASONS = tuple(MoveReason)


class Movers:
    """Asks for moves until the world is healed; each has a ticket of its own."""

    def __init__(self, world: World, choices: Choices) -> None:
        self._world = world
        self._choices = choices
        self._num_tickets = 0

    def act(self) -> None:
        """Now, and again after a while."""
        world, choices = self._world, self._choices
        if world.healed or not world.options.moves:
            return
        if choices.chance(world.options.moves):
            for _ in range(1 + choices.choose(3) // 2):
                self._ask()
        world.schedule.after(5 + choices.choose(100), self.act)

    def _ask(self) -> None:
        """Any request, any target: mostly such as make sense."""
        choices = self._choices
        waiting = self._world.checks.unended()
        nonsense = choices.choose(20)
        if not waiting or nonsense == 19:
            request_id = RequestId("nobody's")
        else:
            request_id = waiting[choices.choose(len(waiting))]
        workers = list(self._world.workers)
        to = None if choices.choose(3) == 0 else workers[choices.choose(len(workers))]
        if nonsense == 18:
            to = WorkerId("nowhere")
        self.ask(request_id, to, REASONS[choices.choose(len(REASONS))], "because")

    def ask(self, request_id: RequestId, to: WorkerId | None, reason: MoveReason, why: str) -> None:
        """One MoveRequested, whose answer is awaited."""
        self._num_tickets += 1
        ticket, world = self._num_tickets, self._world
        world.tell(f"move {ticket}: {request_id} to {to} ({reason.value})")
        world.checks.move_asked(world.clock.now_ms, ticket, request_id)
        world.feed(MoveRequested(request_id=request_id, to=to, reason=reason, why=why, ticket=ticket))
