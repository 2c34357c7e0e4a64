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
        self.ask(request_id, to, reason, "because")

    def ask(self, request_id: RequestId, to: WorkerId | None, reason: MoveReason, why: str) -> None:
        """One MoveRequested, whose answer is awaited."""
        self._num_tickets += 1
        ticket, world = self._num_tickets, self._world
        world.tell(f"move {ticket}: {request_id} to {to} ({reason.value})")
        world.checks.move_asked(world.clock.now_ms, ticket, request_id)
        world.feed(MoveRequested(request_id=request_id, to=to, reason=reason, why=why, ticket=ticket))
