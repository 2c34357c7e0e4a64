"""What goes wrong with routers, with the store that they share, and on the way to their clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.choices import Choices
from simulator.router import VirtualRouter

if TYPE_CHECKING:
    from simulator.world import World


class RouterMisfortune:
    """From time to time something breaks, until the world is healed."""

    def __init__(self, world: World, choices: Choices) -> None:
        self._world = world
        self._choices = choices
        self._stopped_ms: dict[str, int] = {}  # since when, by name
        options = world.options
        store_faults = options.store_faults if options.shared else 0
        faults = (
            (options.router_kills, self._kill_router),
            (options.router_stops, self._stop_router),
            (store_faults, self._store_fault),
            (options.breaks, self._break_client),
        )
        self._faults = [(permille, fault) for permille, fault in faults if permille]

    def strike(self) -> None:
        """Now, and again after a while."""
        world, choices = self._world, self._choices
        if world.healed or not self._faults:
            return
        for permille, fault in self._faults:
            if choices.chance(permille):
                fault()
        world.schedule.after(50 + choices.choose(250), self.strike)

    def heal(self) -> None:
        """All go on; the store is there; every router knows every worker, and none that is not."""
        world = self._world
        for router in world.routers:
            self._go_on(router)
        world.store.up, world.store.slow_ms = True, 0
        for router in world.routers:
            self._tell_all(router)

    # ---- routers -----------------------------------------------------------------------------------------------------

    def start_router(self) -> None:
        """Another life of a router, under a name that none had. Where the store is away, its own clock must do."""
        world, choices = self._world, self._choices
        world.num_routers += 1
        store = world.store
        if world.options.shared and store.up:
            born_us = store.now_us()
        else:
            skew_ms = choices.choose(2 * world.options.clock_skew_ms + 1) - world.options.clock_skew_ms
            born_us = store.now_us() + 1_000 * skew_ms
        router = VirtualRouter(world, f"router-{world.num_routers}", config=world.config, born_us=born_us)
        world.tell(f"{router.name} starts, born at {born_us}")
        world.routers.append(router)
        self._tell_all(router)
        world.movers.router_came(router)

    def _tell_all(self, router: VirtualRouter) -> None:
        """Workers register with every router that they find."""
        for worker in self._world.workers.values():
            if worker.alive:
                router.tell(
                    lambda router, worker=worker: router.worker_joined(worker.info, worker.address.incarnation)  # type: ignore[misc]
                )

    def _one(self) -> VirtualRouter | None:
        routers = self._world.routers
        return routers[self._choices.choose(len(routers))] if routers else None

    def _kill_router(self) -> None:
        """The process is gone with all that it knew; after a while another one takes its place."""
        world, router = self._world, self._one()
        if router is None:
            return
        world.tell(f"{router.name} is killed")
        world.routers.remove(router)
        router.kill()
        world.checks.router_died(router.name)
        world.clients.router_died(router)
        world.schedule.after(self._choices.choose(2_000), self.start_router)

    def _stop_router(self) -> None:
        """It hears nothing and says nothing for a while, and then everything late."""
        world, router = self._world, self._one()
        if router is None or not router.loop.hears:
            return
        duration_ms = 100 * (1 + self._choices.choose(60))
        world.tell(f"{router.name} stands still for {duration_ms} ms")
        router.loop.freeze()
        self._stopped_ms[router.name] = world.schedule.now_ms
        world.schedule.after(duration_ms, lambda: self._go_on(router))

    def _go_on(self, router: VirtualRouter) -> None:
        since_ms = self._stopped_ms.pop(router.name, None)
        if since_ms is not None and router.alive:
            self._world.checks.router_stood_still(router.name, 2 * (self._world.schedule.now_ms - since_ms))
            router.loop.thaw()

    # ---- the store ---------------------------------------------------------------------------------------------------

    def _store_fault(self) -> None:
        """It is away for a while, and comes again with all that it had, or empty; or it is slow."""
        world, choices, store = self._world, self._choices, self._world.store
        duration_ms = 100 * (1 + choices.choose(30))
        kind = choices.choose(3)
        if not store.up:
            return
        if kind == 0:
            store.slow_ms = 1 + choices.choose(600)
            world.tell(f"the store is slow, up to {store.slow_ms} ms, for {duration_ms} ms")
        else:
            store.up = False
            world.tell(f"the store is away for {duration_ms} ms")

        def again() -> None:
            if kind == 2:
                world.tell("the store has forgotten everything")
                store.model.clear()
                world.checks.readers.store_forgot()
            store.up, store.slow_ms = True, 0

        world.schedule.after(duration_ms, again)

    # ---- clients -----------------------------------------------------------------------------------------------------

    def _break_client(self) -> None:
        """Of those that wait; it resumes, at whichever router."""
        waiting = [each for each in self._world.clients.all if not each.ended]
        if waiting:
            client = waiting[self._choices.choose(len(waiting))]
            self._world.tell(f"the connection of client {client.number} breaks")
            client.broken()
