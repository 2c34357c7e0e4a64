"""A small cluster in one thread: the real router core and worker cores over a virtual network that misbehaves.

Everything that happens follows from `Choices`, so a seed makes the same world each time. First faults reign, then all
is healed, and then every promise is due: each request ended once, and every pool is back at its baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from cluster.readiness import pairs_of
from cluster.worker_core import WorkerCore, WorkerCoreConfig
from decode_worker.config import AdmissionConfig, DecodeConfig
from engine.blocks import BlockLedger
from engine.fake_runner import FakeRunner, fake_layout
from engine.step import Batch, BatchConfig
from engine.swap_space import SwapSpace
from engine.swapping import Swapping
from kv_transfer.handoff import HandoffConfig
from kv_transfer.messages import CommitRequest, TransferMessage
from prefill_worker.config import PrefillConfig
from router.config import GRACE_MS, RouterConfig
from router.events import Action, Deliver, Fail, Finish, MoveEnded, MoveRefused, NewRequest, SendToWorker
from simulator.agents import AgentFaults, VirtualAgent
from simulator.checks import Checks, Violation, at_baseline
from simulator.choices import Choices
from simulator.clients import CLIENTS, PROMPT_MAX, Clients
from simulator.faults import Misfortune, Partition
from simulator.moves import Movers
from simulator.network import Clock, Schedule, Stream
from simulator.options import Options, draw_options
from simulator.router import NumberTokenizer, VirtualRouter
from simulator.router_faults import RouterMisfortune
from simulator.store import STORE, StoreServer
from simulator.worker import VirtualWorker
from tandem.messages import Role, WorkerAddress, WorkerInfo, WorkerReport
from tandem.request import CANARY_PREFIX, RequestId, Sampling, WorkerId

M = TypeVar("M")

BLOCK_SIZE = 4
VOCAB_SIZE = 50_000
NAMESPACE = "fake"
TICK_MS = 100
QUEUE_WAIT_MS = 60_000
UNHELD_MAX_MS = 3_000  # a worker has a request that no router has for no longer
HEAL_LIMIT_MS = 300_000  # and as long as all requests of the world may wait for one another
EVENTS_MAX = 400_000  # a world that does not come to rest is a violation, not a hang

HANDOFF = HandoffConfig(
    lease_ms=3_000,
    renew_ms=1_000,
    resend_ms=200,
    offer_limit_ms=3_000,
    quiet_limit_ms=2_000,
    quarantine_warn_ms=200_000,
    credits=2,
    max_frame_bytes=2 * BLOCK_SIZE * 8,
)
HASTY_HANDOFF = replace(HANDOFF, fence_limit_ms=60, fence_resend_ms=20)


def worker_config(handoff: HandoffConfig, *, pressed: bool) -> WorkerCoreConfig:
    """All workers of a world have the same. `pressed`: they expect short answers, and get long ones."""
    optimism = AdmissionConfig(wait_limit_ms=2_000, unknown_output_tokens=2, alpha=0.9)
    admission = optimism if pressed else AdmissionConfig(wait_limit_ms=2_000)
    return WorkerCoreConfig(
        prefill=PrefillConfig(handoff=handoff), decode=DecodeConfig(handoff=handoff, admission=admission)
    )


BATCH = BatchConfig(max_tokens_per_step=16, chunk_tokens=8, context_tokens=200, namespace=NAMESPACE.encode())
TOKENIZER = NumberTokenizer(VOCAB_SIZE)
ROUTER_CONFIG = RouterConfig(
    handoff_deadline_ms=6_000,
    decode_stall_ms=6_000,
    tick_ms=TICK_MS,
    local_prefill_tokens=8,
    move_deadline_ms=4_000,
    move_dwell_ms=300,
)


class World:
    """One run. `run()` raises Violation (or the AssertionError of a core) when a promise is broken."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.options = draw_options(choices)
        self.block_size, self.vocab_size = BLOCK_SIZE, VOCAB_SIZE
        self.tokenizer = TOKENIZER
        self.schedule = Schedule(events_max=EVENTS_MAX)
        self.checks = Checks(
            block_size=BLOCK_SIZE,
            vocab_size=VOCAB_SIZE,
            namespace=NAMESPACE,
            # The last of it is the wait for the first token after the move, whose lack is noticed like any other's.
            move_limit_ms=ROUTER_CONFIG.move_deadline_ms + GRACE_MS + ROUTER_CONFIG.decode_stall_ms,
            excused=self.options.excuses,
        )
        self.config = replace(
            ROUTER_CONFIG, decode_reserve_tokens=self.options.reserve_tokens, queue_wait_ms=_queue_wait_ms(self.options)
        )
        self.store = StoreServer(self)
        self.routers: list[VirtualRouter] = []  # those that live
        self.num_routers = 0  # that ever were
        self.workers: dict[WorkerId, VirtualWorker] = {}
        self.sessions: dict[tuple[str, int], Stream[WorkerReport]] = {}  # the way up, by the worker's address
        self.peers: dict[tuple[WorkerId, int, WorkerId, int], Stream[TransferMessage]] = {}
        self.partition: Partition | None = None
        self.healed = False
        self.story: list[str] = []
        self.clients = Clients(self)
        self.movers = Movers(self, choices)
        self.agent_faults = AgentFaults(
            loss=self.options.loss,
            corruption=self.options.corruption,
            delay_max_ms=self.options.delay_max_ms,
        )
        self._agents: dict[str, VirtualAgent] = {}
        self._misfortune = Misfortune(self, choices)
        self.router_misfortune = RouterMisfortune(self, choices)
        self._incarnation = 0
        self._num_canaries = 0
        self._unheld_ms: dict[tuple[WorkerId, int, RequestId], int] = {}

    def run(self) -> None:
        """Faults, then healing, then the reckoning."""
        options = self.options
        for _ in range(options.num_routers):
            self.router_misfortune.start_router()
        for role, num in ((Role.PREFILL, options.num_prefill), (Role.DECODE, options.num_decode)):
            for each in range(num):
                self.start_worker(WorkerId(f"{role.value}-{each}"), role)
        for each in range(options.num_mixed):
            self.start_worker(WorkerId(f"mixed-{each}"), Role.MIXED)
        for _ in range(options.num_requests):
            self.schedule.after(50 + self.choices.choose(options.faulty_ms), self.clients.submit)
        if options.canaries:
            self.schedule.after(200, self._ask_pair)
        self._look()
        self._misfortune.strike()
        self.router_misfortune.strike()
        self.movers.look()
        self.schedule.run(until_ms=50 + options.faulty_ms)
        self._heal()
        limit_ms = HEAL_LIMIT_MS + self.config.queue_wait_ms
        self.schedule.run(until_ms=self.schedule.now_ms + limit_ms, unless=self._at_rest)
        self._reckon()

    def _ask_pair(self) -> None:
        """A canary of one of the routers through one of the pairs that it knows, until the world is healed."""
        if self.healed:
            return
        self.schedule.after(200 + self.choices.choose(400), self._ask_pair)
        asking = [each for each in self.routers if each.loop.hears]
        if not asking:
            return
        router = asking[self.choices.choose(len(asking))]
        pairs, _ = pairs_of(router.core.fleet)
        if not pairs:
            return
        self._num_canaries += 1
        request = NewRequest(
            request_id=RequestId(f"{CANARY_PREFIX}{self._num_canaries}"),
            tokens=(7, 7, 7),
            sampling=Sampling(max_tokens=2, ignore_eos=True),
            deadline_ms=2_000,
            canary=pairs[self.choices.choose(len(pairs))],
        )
        self.checks.submitted(request.request_id, request.tokens, request.sampling, request.cache_salt)
        router.ask_itself(request)

    # ---- routers -----------------------------------------------------------------------------------------------------

    def any_router(self, asker: str) -> VirtualRouter | None:
        """Whichever takes a connection: a router that stands still does, too."""
        there = [each for each in self.routers if not self.parts(asker, each.name)]
        return there[self.choices.choose(len(there))] if there else None

    def tell_routers(self, tell: Callable[[VirtualRouter], None]) -> None:
        """Each hears it in its own time."""
        for router in self.routers:
            router.tell(tell)

    def router_wants(self, router: VirtualRouter, action: Action) -> None:
        """What a router's core wants done, before it is."""
        checks, name = self.checks, router.name
        match action:
            case SendToWorker():
                checks.router_said(name, action.worker_id, action.incarnation, action.message)
            case Deliver():
                checks.delivered(name, action)
            case Finish() | Fail():
                self.tell(f"{action.request_id} ended at {name}: {action}")
                checks.ended(name, action)
            case MoveRefused() | MoveEnded():
                self.tell(f"move {action.ticket}: {action}")
                checks.move_answered(router.clock.now_ms, action)

    def _look(self) -> None:
        """What is promised at any time, looked at from time to time."""
        for router in self.routers:
            if router.loop.hears:
                self.checks.moves_in_time(router.clock.now_ms, router.name)
                self._look_at_owners(router)
                fleet, line = router.core.fleet, router.core.line
                if line.lacks_workers and any(fleet.ready.values()):
                    raise Violation(f"{line.blocked} though a worker is ready, and any serves alone if it must")
        self._look_at_workers()
        self.schedule.after(TICK_MS, self._look)

    def _look_at_owners(self, router: VirtualRouter) -> None:
        """A request whose owner does not know of it is lost until the router's patience ends."""
        for request_id in router.core.request_ids():
            record = router.driver.owner(request_id)
            if record is None:
                continue
            worker = self.workers[record.worker_id]
            heard = worker.address.incarnation == record.incarnation and self._is_heard(router, worker)
            # Of two routers that serve it the older does not know yet that workers listen to the other.
            heard = heard and self.checks.is_newest(router.name, request_id)
            known = not heard or worker.knows(request_id, record.epoch)
            runs = not heard or not worker.stands_with(request_id)
            self.checks.owner_is(router.clock.now_ms, router.name, request_id, known=known, runs=runs)

    def _is_heard(self, router: VirtualRouter, worker: VirtualWorker) -> bool:
        """Whether router and worker can hear one another now."""
        apart = self.parts(router.name, worker.worker_id) or self.parts(worker.worker_id, router.name)
        return worker.hears and router.link_to(worker) is not None and not apart

    def _look_at_workers(self) -> None:
        """What no router has, no worker has for long, as long as it can hear that."""
        now_ms, unheld = self.schedule.now_ms, {}
        served = {request_id for router in self.routers for request_id in router.core.request_ids()}
        hear = all(router.loop.hears for router in self.routers) and self.partition is None
        for worker in self.workers.values():
            for request_id in worker.request_ids() - served if worker.hears and hear else ():
                key = worker.worker_id, worker.address.incarnation, request_id
                unheld[key] = self._unheld_ms.get(key, now_ms)
                if now_ms - unheld[key] > UNHELD_MAX_MS:
                    raise Violation(f"{key} is had by no router for {now_ms - unheld[key]} ms")
        self._unheld_ms = unheld

    def report(self, worker: VirtualWorker, session: int, report: WorkerReport) -> None:
        self.checks.reported(worker.worker_id, worker.address.incarnation, report)
        up = self.sessions.get((worker.address.control, session))
        if up is not None:
            up.send(report)

    # ---- the network -------------------------------------------------------------------------------------------------

    def cut_link(self, worker: VirtualWorker, reason: str) -> None:
        """The stream of one of the routers to this worker breaks."""
        links = [link for link in (router.link_to(worker) for router in self.routers) if link is not None]
        if links:
            links[self.choices.choose(len(links))].cut(reason)

    def cut_links(self, worker: VirtualWorker, reason: str) -> None:
        """All of them."""
        for link in [router.link_to(worker) for router in self.routers]:
            if link is not None:
                link.cut(reason)

    def parts(self, sender: str, receiver: str) -> bool:
        return self.partition is not None and self.partition.parts(sender, receiver)

    def names(self) -> list[str]:
        """All that a partition may cut off."""
        return [*self.workers, *(each.name for each in self.routers), STORE, CLIENTS]

    def hold_streams(self) -> None:
        """Lets every stream stall that crosses the partition, and no other."""
        for router in self.routers:
            for link in router.links:
                link.hold()
        self.clients.hold()
        for (mine, _, other, _), stream in self.peers.items():
            self.hold(stream, mine, other)

    def hold(self, stream: Stream[M], sender: str, receiver: str) -> None:
        if self.parts(sender, receiver):
            stream.hold()
        else:
            stream.let_go()

    # ---- workers -----------------------------------------------------------------------------------------------------

    def start_worker(self, worker_id: WorkerId, role: Role) -> None:
        """A process starts, and registers."""
        incarnation = self._next_incarnation(worker_id)
        address = WorkerAddress(
            worker_id=worker_id,
            incarnation=incarnation,
            control=f"{worker_id}/{incarnation}",
            endpoint=f"{worker_id}/{incarnation}",
        )
        layout = fake_layout(block_size=BLOCK_SIZE, namespace=NAMESPACE)
        ledger = BlockLedger(num_blocks=self.options.num_blocks, block_size=BLOCK_SIZE)
        batch = Batch(
            ledger=ledger,
            config=BATCH,
            swapping=Swapping(BLOCK_SIZE, space=SwapSpace(self.options.swap_slots)),
        )
        memory = bytearray(self.options.num_blocks * layout.block_bytes)
        handoff = HASTY_HANDOFF if self.options.hasty_fences else HANDOFF
        config = worker_config(handoff, pressed=self.options.pressed)
        worker = VirtualWorker(
            info=self._info(address, role),
            address=address,
            core=WorkerCore(
                me=address,
                layout=layout,
                ledger=ledger,
                batch=batch,
                config=config,
            ),
            runner=FakeRunner(
                num_blocks=self.options.num_blocks, block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE, memory=memory
            ),
            memory=memoryview(memory),
            ledger=ledger,
            schedule=self.schedule,
            clock=self.new_clock(),
            choices=self.choices,
            checks=self.checks,
            step_max_ms=self.options.step_max_ms,
            slow_steps=0 if self.healed else self.options.slow_steps,
            to_router=self.report,
            to_peer=self._to_peer,
        )
        self.workers[worker_id] = worker
        self.start_agent(worker)
        self.tell(f"{worker_id} starts as incarnation {address.incarnation}")
        self.tell_routers(lambda router: router.worker_joined(worker.info, incarnation))

    def _next_incarnation(self, worker_id: WorkerId) -> int:
        self._incarnation += 1
        return self._incarnation

    def _info(self, address: WorkerAddress, role: Role) -> WorkerInfo:
        return WorkerInfo(
            worker_id=address.worker_id,
            role=role,
            control=address.control,
            endpoint=address.endpoint,
            pid=1,
            agent_pid=1,
            model="fake",
            namespace=NAMESPACE,
            fingerprint="fake",
            exact=True,
            dtype="float32",
            block_size=BLOCK_SIZE,
            total_blocks=self.options.num_blocks,
            context_tokens=200,
            block_bytes=BLOCK_SIZE * 8,
        )

    def start_agent(self, worker: VirtualWorker) -> None:
        agent = VirtualAgent(
            schedule=self.schedule,
            choices=self.choices,
            faults=self.agent_faults,
            runner=worker.runner,
            ledger=worker.ledger,
            tell=worker.agent_said,
            find=self._agents.get,
            parts=self.parts,
            name=worker.worker_id,
            endpoint=worker.address.endpoint,
        )
        worker.agent = agent
        self._agents[worker.address.endpoint] = agent

    def kill(self, worker: VirtualWorker) -> None:
        """The process and its agent are gone."""
        worker.kill()
        self._agents.pop(worker.address.endpoint, None)

    def restart(self, worker: VirtualWorker) -> None:
        """Another incarnation takes the place of one that is gone."""
        if self.workers[worker.worker_id] is worker and not worker.alive:
            self.start_worker(worker.worker_id, worker.info.role)

    def leaves(self, worker: VirtualWorker) -> None:
        """It has been drained: its process ends, and another one starts."""
        self.tell(f"{worker.worker_id} leaves")
        if any(self._is_heard(router, worker) for router in self.routers):
            self.checks.leaves(worker.worker_id, worker.ledger, _num_held(worker))
        address = worker.address
        self.tell_routers(lambda router: router.worker_lost(address.worker_id, address.incarnation, "drained"))
        self.kill(worker)
        self.later(lambda: self.restart(worker), 50)

    def kill_agent(self, worker: VirtualWorker) -> None:
        """Only the agent."""
        if worker.agent is not None:
            worker.agent.kill()
        self._agents.pop(worker.address.endpoint, None)

    def _to_peer(self, sender: VirtualWorker, to: WorkerAddress, message: TransferMessage) -> None:
        """One stream for each pair of incarnations and direction, opened by its first message."""
        mine = sender.address
        key = mine.worker_id, mine.incarnation, to.worker_id, to.incarnation
        self.checks.peer_said(*key[:2], message)
        if isinstance(message.body, CommitRequest):
            self._misfortune.commit_asked((mine.worker_id, to.worker_id))
        stream = was = self.peers.get(key)
        if stream is None or not stream.open:

            def arrive(said: TransferMessage) -> None:
                peer = self.workers.get(to.worker_id)
                if peer is not None and peer.alive and peer.address.incarnation == to.incarnation:
                    peer.post(said)
                elif self.choices.choose(2):
                    sender.peer_gone(to)

            stream = Stream(self.schedule, self.choices, delay_max_ms=self.options.delay_max_ms, arrive=arrive)
            self.peers[key] = stream
            self.hold(stream, mine.worker_id, to.worker_id)
            if was is not None and was.last is not None and self.choices.choose(2):
                stream.send(was.last)  # nobody knows whether it got through, so it goes again
        stream.send(message)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _heal(self) -> None:
        """No more faults; who is dead comes back; two more requests must end well."""
        self.tell("healed")
        self.healed = True
        self.agent_faults.loss = self.agent_faults.corruption = 0
        for worker in self.workers.values():
            worker.slow_steps = 0
        self._misfortune.heal()
        self.router_misfortune.heal()
        self.schedule.after(15_000, self.clients.submit)
        self.schedule.after(15_000, self.clients.submit)

    def _at_rest(self) -> bool:
        if self.clients.num_requests != self.options.num_requests + 2 or self.checks.readers.unended():
            return False
        rest = all(router.rests for router in self.routers) and all(map(self._rests, self.workers.values()))
        return rest and not self.checks.moves().get("none")

    @staticmethod
    def _rests(worker: VirtualWorker) -> bool:
        return worker.alive and at_baseline(worker.ledger) and _num_held(worker) == 0

    def _reckon(self) -> None:
        if waiting := self.checks.readers.unended():
            raise Violation(f"long after healing these clients still wait: {waiting}")
        for worker in self.workers.values():
            self.checks.final_worker(worker.worker_id, worker.ledger, worker.runner, _num_held(worker))
        for router in self.routers:
            self.checks.final_router(router.core, router.driver.num_owners, router.driver.num_streams)
        if self.options.shared:
            for router in self.routers:
                self.checks.final_writes(router.name, router.driver.transcripts.pending())
            self.checks.final_store(self.store.model, [each.name for each in self.routers])

    def later(self, do: Callable[[], None], factor: int) -> None:
        """After a while: up to `factor` times the network's delay."""
        self.schedule.after(1 + self.choices.choose(factor * self.options.delay_max_ms), do)

    def new_clock(self) -> Clock:
        """Each process has its own time."""
        drift = self.options.clock_drift
        if not drift:
            return Clock(self.schedule)
        choices = self.choices
        return Clock(self.schedule, offset_ms=choices.choose(1_000_000), drift=choices.choose(2 * drift + 1) - drift)

    def tell(self, what: str) -> None:
        """Adds to the world's story."""
        self.story.append(f"{self.schedule.now_ms} {what}")


def _queue_wait_ms(options: Options) -> int:
    """What has memory for one request at a time serves them one after another: to give up before that would be early.

    A step takes half of its bound on average, which leaves room for what is computed twice.
    """
    num_steps = options.answer_tokens_max + 1 + PROMPT_MAX // BATCH.chunk_tokens
    return max(QUEUE_WAIT_MS, (options.num_requests + 2) * num_steps * options.step_max_ms)


def _num_held(worker: VirtualWorker) -> int:
    core = worker.core
    swapped = core.batch.swapping.space.num_owners
    return len(core.prefill) + core.prefill.num_attempts + len(core.decode) + core.decode.num_attempts + swapped
