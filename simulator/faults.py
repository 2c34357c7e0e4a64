"""What goes wrong in a world: links, streams, workers, agents and the network itself, drawn from time to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kv_transfer.actions import AgentLost, Registered
from simulator.choices import Choices
from simulator.clients import CLIENTS
from simulator.router import VirtualRouter
from simulator.worker import VirtualWorker
from tandem.request import WorkerId

if TYPE_CHECKING:
    from simulator.world import World


class Partition:
    """Which processes hear which: while there is one, nothing passes between its sides (or only in one direction)."""

    def __init__(self, side: frozenset[str], *, one_way: bool) -> None:
        self._side = side
        self._one_way = one_way

    def parts(self, sender: str, receiver: str) -> bool:
        """Whether what `sender` says does not reach `receiver`."""
        crosses = (sender in self._side) != (receiver in self._side)
        return crosses and not (self._one_way and receiver in self._side)


class Misfortune:
    """From time to time something breaks, somewhere, until the world is healed."""

    def __init__(self, world: World, choices: Choices) -> None:
        self._world = world
        self._choices = choices
        options = world.options
        faults: tuple[tuple[int, Callable[[VirtualWorker], None]], ...] = (
            (options.link_breaks, self._break_link),
            (options.peer_breaks, self._break_peers),
            (options.partitions, self._part),
            (options.crashes, self._crash),
            (options.false_deaths, self._declare_dead),
            (options.suspicions, self._suspect),
            (options.drains, self._drain),
            (options.pauses, self._pause),
            (options.agent_kills, self._kill_agent),
        )
        self._faults = [(permille, fault) for permille, fault in faults if permille]
        self._doubts = (self._pause, self._break_link, self._break_peers, self._part, self._kill_agent, self._crash)

    def strike(self) -> None:
        """Now, and again after a while."""
        world, choices = self._world, self._choices
        if world.healed or not self._faults:
            return
        for permille, fault in self._faults:
            if choices.chance(permille):
                alive = [each for each in world.workers.values() if each.alive]
                if alive:
                    fault(alive[choices.choose(len(alive))])
        world.schedule.after(50 + choices.choose(250), self.strike)

    def commit_asked(self, ends: tuple[WorkerId, WorkerId]) -> None:
        """A source has said its last word to a target: the worst moment for either to be disturbed."""
        world, choices = self._world, self._choices
        if world.healed or not choices.chance(world.options.doubts):
            return
        name, fault = ends[choices.choose(2)], self._doubts[choices.choose(len(self._doubts))]

        def strike() -> None:
            if world.workers[name].alive and not world.healed:
                fault(world.workers[name])

        world.schedule.after(choices.choose(2 * world.options.delay_max_ms), strike)

    def heal(self) -> None:
        """What still stands in the way of a good end goes."""
        world = self._world
        self._mend()
        for worker in world.workers.values():
            worker.resume()
            self._undrain(worker)

    # ---- the network -------------------------------------------------------------------------------------------------

    def _break_link(self, worker: VirtualWorker) -> None:
        self._world.cut_link(worker, "broken")

    def _break_peers(self, worker: VirtualWorker) -> None:
        """Streams with peers break; the sender may hear of it, or not, and what was on the way may still arrive."""
        world, choices = self._world, self._choices
        world.tell(f"peer streams of {worker.worker_id} broken")
        for (mine, _, other, incarnation), stream in world.peers.items():
            if stream.open and worker.worker_id in (mine, other):
                stream.cut(num_late=choices.choose(1 + stream.num_under_way))
                source, target = world.workers[mine], world.workers[other].address
                if choices.choose(2) and target.incarnation == incarnation:
                    world.later(lambda source=source, target=target: source.peer_gone(target), 5)  # type: ignore[misc]

    def _part(self, worker: VirtualWorker) -> None:
        """This worker and perhaps others, or the router, are cut off; the streams stall, and some of them break."""
        world, choices = self._world, self._choices
        if world.partition is not None:
            return
        anybody = world.names()
        first = worker.worker_id if choices.choose(2) == 0 else anybody[choices.choose(len(anybody))]
        side = {first, *(each for each in anybody if choices.choose(4) == 3)}
        partition = Partition(frozenset(side), one_way=bool(choices.choose(2)))
        duration_ms = 50 << choices.choose(8)
        world.tell(f"{sorted(side)} are cut off for {duration_ms} ms")
        world.partition = partition
        world.hold_streams()
        for link in [link for router in world.routers for link in router.links]:
            name, other = link.router.name, link.worker_id
            if choices.choose(2) and (partition.parts(name, other) or partition.parts(other, name)):
                world.schedule.after(choices.choose(duration_ms), lambda link=link: link.cut("cut off"))  # type: ignore[misc]
        for client in world.clients.all:
            if client.call is not None and choices.choose(2) and partition.parts(CLIENTS, client.call.router.name):
                world.schedule.after(choices.choose(duration_ms), client.broken)
        world.schedule.after(duration_ms, lambda: self._mend() if world.partition is partition else None)

    def _mend(self) -> None:
        world = self._world
        if world.partition is not None:
            world.tell("all hear one another again")
            world.partition = None
            world.hold_streams()

    # ---- workers -----------------------------------------------------------------------------------------------------

    def _crash(self, worker: VirtualWorker) -> None:
        """The process dies with its agent; it is noticed, and started again, in any order."""
        world, address = self._world, worker.address
        world.tell(f"{worker.worker_id} (incarnation {address.incarnation}) crashes")
        world.kill(worker)
        world.cut_links(worker, "broken")
        for router in world.routers:
            self._tell_death(router, worker, "crashed")
        for other in world.workers.values():
            if other is not worker and self._choices.choose(2):
                world.later(lambda other=other: other.peer_gone(address), 30)  # type: ignore[misc]
        world.later(lambda: world.restart(worker), 50)

    def _declare_dead(self, worker: VirtualWorker) -> None:
        """A router takes a living worker for dead, the others perhaps too; it goes on for a while, then it is ended
        and started anew."""
        world, address = self._world, worker.address
        world.tell(f"{worker.worker_id} (incarnation {address.incarnation}) is taken for dead")
        for router in world.routers:
            if len(world.routers) == 1 or self._choices.choose(2) == 0:
                router.worker_lost(address.worker_id, address.incarnation, "silent")
            else:
                self._tell_death(router, worker, "ended")

        def end() -> None:
            if worker.alive:
                world.kill(worker)
                world.restart(worker)

        world.later(end, 50)

    def _tell_death(self, router: VirtualRouter, worker: VirtualWorker, reason: str) -> None:
        """One router hears of it, on its own evidence and in its own time."""
        address = worker.address
        self._world.later(
            lambda: router.tell(lambda router: router.worker_lost(address.worker_id, address.incarnation, reason)), 60
        )

    def _suspect(self, worker: VirtualWorker) -> None:
        """Heartbeats are missing for a while."""
        world, address = self._world, worker.address

        router = world.routers[self._choices.choose(len(world.routers))] if world.routers else None
        if router is None:
            return

        def suspected(suspected: bool) -> None:
            router.worker_suspected(address.worker_id, address.incarnation, suspected)

        world.tell(f"{worker.worker_id} is suspected")
        suspected(True)
        world.schedule.after(100 * (1 + self._choices.choose(30)), lambda: suspected(False))

    def _drain(self, worker: VirtualWorker) -> None:
        """It gets nothing new; after a while it does again, or it leaves, or it gets another role."""
        world = self._world
        match self._choices.choose(3):
            case 1:
                world.tell(f"{worker.worker_id} is to leave")
                world.movers.drain(worker)
                return
            case 2:
                world.movers.flip(worker)
                return
        world.tell(f"{worker.worker_id} drains")
        self._tell_drain(worker, draining=True)
        world.schedule.after(100 * (1 + self._choices.choose(50)), lambda: self._undrain(worker))

    def _undrain(self, worker: VirtualWorker) -> None:
        self._tell_drain(worker, draining=False)

    def _tell_drain(self, worker: VirtualWorker, *, draining: bool) -> None:
        address = worker.address
        for router in self._world.routers:
            router.worker_draining(address.worker_id, address.incarnation, draining)

    def _pause(self, worker: VirtualWorker) -> None:
        duration_ms = 100 * (1 + self._choices.choose(80))
        self._world.tell(f"{worker.worker_id} stands still for {duration_ms} ms")
        worker.pause(duration_ms)

    def _kill_agent(self, worker: VirtualWorker) -> None:
        """The agent dies; once it is reaped, a new one takes its place, under an endpoint of its own."""
        world, dead = self._world, worker.agent
        world.tell(f"the agent of {worker.worker_id} is killed")
        if dead is None or not dead.alive:
            return
        world.kill_agent(worker)

        def reaped() -> None:
            if worker.alive:
                dead.bury()
                worker.address = replace(worker.address, endpoint=f"{worker.address.endpoint}+")
                world.start_agent(worker)
                worker.post(AgentLost(reason="killed"))
                worker.post(Registered(address=worker.address))

        world.later(reaped, 20)
