"""A small cluster in one thread: the real router core and worker cores over a virtual network that misbehaves.

Everything that happens follows from `Choices`, so a seed makes the same world each time. First faults reign, then all
is healed, and then every promise is due: each request ended once, and every pool is back at its baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.worker_core import WorkerCore, WorkerCoreConfig
from decode_worker.config import AdmissionConfig, DecodeConfig
from engine.blocks import BlockLedger
from engine.fake_runner import FakeRunner, fake_layout
from engine.step import Batch, BatchConfig
from kv_transfer.actions import AgentLost, Registered
from kv_transfer.handoff import HandoffConfig
from kv_transfer.messages import TransferMessage
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from router.core import RouterCore
from router.events import (
    ClientGone,
    Deliver,
    Event,
    Fail,
    Finish,
    LinkLost,
    LinkUp,
    NewRequest,
    Refuse,
    ReportArrived,
    SendToWorker,
    StopRequested,
    Submitted,
    Tick,
    WorkerJoined,
    WorkerLost,
)
from simulator.agents import AgentFaults, VirtualAgent
from simulator.checks import Checks, Violation, at_baseline
from simulator.choices import Choices
from simulator.network import Schedule, Stream
from simulator.worker import VirtualWorker
from tandem.messages import Role, RouterMessage, WorkerAddress, WorkerInfo, WorkerReport
from tandem.request import RequestId, Sampling, WorkerId

BLOCK_SIZE = 4
VOCAB_SIZE = 50_000
NAMESPACE = "fake"
TICK_MS = 100
HEAL_LIMIT_MS = 300_000
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
WORKER = WorkerCoreConfig(
    prefill=PrefillConfig(handoff=HANDOFF),
    decode=DecodeConfig(handoff=HANDOFF, admission=AdmissionConfig(wait_limit_ms=2_000)),
)
ROUTER = RouterConfig(
    handoff_deadline_ms=6_000, decode_stall_ms=6_000, queue_wait_ms=60_000, tick_ms=TICK_MS, local_prefill_tokens=8
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The swarm options of one world: its size, and which faults it has how often (in a thousand)."""

    num_prefill: int
    num_decode: int
    num_mixed: int
    num_blocks: int
    reserve_tokens: int  # of each answer that the router counts in advance: none leaves it to preemption
    num_requests: int
    faulty_ms: int
    delay_max_ms: int
    step_max_ms: int
    link_breaks: int
    peer_breaks: int
    crashes: int
    false_deaths: int
    pauses: int
    agent_kills: int
    client_leaves: int
    loss: int
    corruption: int


def draw_options(choices: Choices) -> Options:
    """Each fault is there in half of the worlds."""

    def sometimes(most: int) -> int:
        return choices.choose(2) * choices.choose(most + 1)

    return Options(
        num_prefill=1 + choices.choose(2),
        num_decode=1 + choices.choose(3),
        num_mixed=choices.choose(4) // 3,
        num_blocks=16 + 4 * choices.choose(8),
        reserve_tokens=16 * choices.choose(2),
        num_requests=3 + choices.choose(12),
        faulty_ms=1_000 + 1_000 * choices.choose(4),
        delay_max_ms=1 + choices.choose(30),
        step_max_ms=(1 + choices.choose(20)) * (1 + 24 * (choices.choose(3) // 2)),
        link_breaks=sometimes(300),
        peer_breaks=sometimes(400),
        crashes=sometimes(200),
        false_deaths=sometimes(150),
        pauses=sometimes(300),
        agent_kills=sometimes(200),
        client_leaves=sometimes(300),
        loss=sometimes(300),
        corruption=sometimes(300),
    )


@dataclass(slots=True, eq=False)
class _Link:
    """One session between the router and a worker incarnation; a None in it is the hello."""

    worker: VirtualWorker
    session: int
    down: Stream[RouterMessage | None]
    up: Stream[WorkerReport]


class World:
    """One run. `run()` raises Violation (or the AssertionError of a core) when a promise is broken."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self.options = draw_options(choices)
        self.schedule = Schedule()
        self.checks = Checks(block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE, namespace=NAMESPACE)
        self.router = RouterCore(replace(ROUTER, decode_reserve_tokens=self.options.reserve_tokens))
        self.workers: dict[WorkerId, VirtualWorker] = {}
        self.story: list[str] = []
        self._links: dict[tuple[WorkerId, int], _Link] = {}
        self._peers: dict[tuple[WorkerId, int, WorkerId, int], Stream[TransferMessage]] = {}
        self._agents: dict[str, VirtualAgent] = {}
        self._incarnation = 0
        self._session = 0
        self._num_requests = 0
        self._healed = False
        self._agent_faults = AgentFaults(
            loss=self.options.loss,
            corruption=self.options.corruption,
            delay_max_ms=self.options.delay_max_ms,
        )

    def run(self) -> None:
        """Faults, then healing, then the reckoning."""
        options = self.options
        for role, num in ((Role.PREFILL, options.num_prefill), (Role.DECODE, options.num_decode)):
            for each in range(num):
                self._start_worker(WorkerId(f"{role.value}-{each}"), role)
        for each in range(options.num_mixed):
            self._start_worker(WorkerId(f"mixed-{each}"), Role.MIXED)
        for _ in range(options.num_requests):
            self.schedule.after(50 + self._choices.choose(options.faulty_ms), self._submit)
        self._tick()
        self._misfortune()
        self.schedule.run(until_ms=50 + options.faulty_ms, unless=self._spins)
        self._heal()
        limit_ms = self.schedule.now_ms + HEAL_LIMIT_MS
        self.schedule.run(until_ms=limit_ms, unless=self._at_rest)
        if self._spins():
            raise Violation(f"{self.schedule.num_events} events and no rest: something spins")
        self._reckon()

    # ---- clients -----------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        """Prompts begin alike, so that there are prefixes to share."""
        choices = self._choices
        self._num_requests += 1
        shared = [100 * choices.choose(2) + each for each in range(4 * choices.choose(6))]
        own = [1_000 * self._num_requests + each for each in range(1 + choices.choose(20))]
        sampled = choices.choose(2)
        sampling = Sampling(
            temperature=float(sampled),
            seed=choices.choose(1_000) * sampled,
            max_tokens=2 + choices.choose(16),
            ignore_eos=True,
        )
        request = NewRequest(request_id=RequestId(f"r{self._num_requests}"), tokens=(*shared, *own), sampling=sampling)
        self.tell(f"{request.request_id}: {len(request.tokens)} tokens, then {sampling.max_tokens}")
        self.checks.submitted(request, healthy=self._healed)
        self._feed(Submitted(request=request))
        if choices.chance(self.options.client_leaves) and not self._healed:
            self.schedule.after(choices.choose(500), lambda: self._leave(request.request_id))

    def _leave(self, request_id: RequestId) -> None:
        """The client hangs up, or its answer has met a stop string."""
        seen = self.checks.num_seen(request_id)
        if seen and self._choices.choose(2):
            index = self._choices.choose(seen)
            if request_id in self.checks.unended():
                self.checks.stop_asked(request_id, index)
            self._feed(StopRequested(request_id=request_id, index=index))
        else:
            self.checks.client_gone(request_id)
            self._feed(ClientGone(request_id=request_id, reason="hung up"))

    # ---- the router's shell ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._feed(Tick())
        self.schedule.after(TICK_MS, self._tick)

    def _feed(self, event: Event) -> None:
        for action in self.router.handle(self.schedule.now_ms, event):
            match action:
                case SendToWorker():
                    self.checks.router_said(action.worker_id, action.incarnation, action.message)
                    link = self._links.get((action.worker_id, action.incarnation))
                    if link is not None:
                        link.down.send(action.message)
                case Deliver():
                    self.checks.delivered(action)
                case Finish() | Fail():
                    self.tell(f"{action.request_id} ended: {action}")
                    self.checks.ended(action)
                case Refuse():
                    raise Violation(f"{action.request_id} was refused: {action.error}")

    # ---- links between the router and workers ------------------------------------------------------------------------

    def _connect(self, worker: VirtualWorker) -> None:
        """A new session, if the worker is still whom the router looks for."""
        key = worker.address.worker_id, worker.address.incarnation
        if not worker.alive or key in self._links or self.router.fleet.get(*key) is None:
            return
        self._session += 1
        session = self._session

        def down(message: RouterMessage | None) -> None:
            if message is None:
                worker.joined(session)
            else:
                worker.said(session, message)

        def up(report: WorkerReport) -> None:
            self._feed(ReportArrived(report=report))

        delay_ms = self.options.delay_max_ms
        link = _Link(
            worker,
            session,
            Stream(self.schedule, self._choices, delay_max_ms=delay_ms, arrive=down),
            Stream(self.schedule, self._choices, delay_max_ms=delay_ms, arrive=up),
        )
        self._links[key] = link
        link.down.send(None)
        self._feed(LinkUp(worker_id=key[0], incarnation=key[1]))

    def _cut(self, link: _Link, reason: str) -> None:
        """Both ends notice, each in its own time; the router dials again after that."""
        key = link.worker.address.worker_id, link.worker.address.incarnation
        self.tell(f"link to {key} cut: {reason}")
        link.down.cut()
        link.up.cut()
        self._later(lambda: link.worker.gone(link.session), 20)

        def noticed() -> None:
            if self._links.get(key) is link:
                del self._links[key]
                self._feed(LinkLost(worker_id=key[0], incarnation=key[1], reason=reason))
                self._later(lambda: self._connect(link.worker), 10)

        self._later(noticed, 20)

    def _report(self, worker: VirtualWorker, session: int, report: WorkerReport) -> None:
        self.checks.reported(worker.worker_id, worker.address.incarnation, report)
        link = self._links.get((worker.worker_id, worker.address.incarnation))
        if link is not None and link.session == session:
            link.up.send(report)

    # ---- workers -----------------------------------------------------------------------------------------------------

    def _start_worker(self, worker_id: WorkerId, role: Role) -> None:
        """A process starts, and registers."""
        self._incarnation += 1
        address = WorkerAddress(
            worker_id=worker_id,
            incarnation=self._incarnation,
            control=str(worker_id),
            endpoint=f"agent-{self._incarnation}",
        )
        layout = fake_layout(block_size=BLOCK_SIZE, namespace=NAMESPACE)
        ledger = BlockLedger(num_blocks=self.options.num_blocks, block_size=BLOCK_SIZE)
        batch = Batch(
            ledger=ledger,
            config=BatchConfig(
                max_tokens_per_step=16, chunk_tokens=8, context_tokens=200, namespace=NAMESPACE.encode()
            ),
        )
        worker = VirtualWorker(
            info=self._info(address, role),
            address=address,
            core=WorkerCore(me=address, layout=layout, ledger=ledger, batch=batch, config=WORKER),
            runner=FakeRunner(num_blocks=self.options.num_blocks, block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE),
            ledger=ledger,
            schedule=self.schedule,
            choices=self._choices,
            step_max_ms=self.options.step_max_ms,
            to_router=self._report,
            to_peer=self._to_peer,
        )
        self.workers[worker_id] = worker
        self._start_agent(worker)
        self.tell(f"{worker_id} starts as incarnation {address.incarnation}")
        self._feed(WorkerJoined(info=worker.info, incarnation=address.incarnation))
        self._later(lambda: self._connect(worker), 5)

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

    def _start_agent(self, worker: VirtualWorker) -> None:
        agent = VirtualAgent(
            schedule=self.schedule,
            choices=self._choices,
            faults=self._agent_faults,
            runner=worker.runner,
            tell=worker.agent_said,
            find=self._agents.get,
        )
        worker.agent = agent
        self._agents[worker.address.endpoint] = agent

    def _to_peer(self, sender: VirtualWorker, to: WorkerAddress, message: TransferMessage) -> None:
        """One stream for each pair of incarnations and direction, opened by its first message."""
        mine = sender.address
        key = mine.worker_id, mine.incarnation, to.worker_id, to.incarnation
        stream = self._peers.get(key)
        if stream is None or not stream.open:

            def arrive(said: TransferMessage) -> None:
                peer = self.workers.get(to.worker_id)
                if peer is not None and peer.alive and peer.address.incarnation == to.incarnation:
                    peer.post(said)
                elif self._choices.choose(2):
                    sender.peer_gone(to)

            stream = Stream(self.schedule, self._choices, delay_max_ms=self.options.delay_max_ms, arrive=arrive)
            self._peers[key] = stream
        stream.send(message)

    # ---- faults ------------------------------------------------------------------------------------------------------

    def _misfortune(self) -> None:
        """From time to time something breaks, somewhere."""
        if self._healed:
            return
        options, choices = self.options, self._choices
        faults: tuple[tuple[int, Callable[[VirtualWorker], None]], ...] = (
            (options.link_breaks, self._break_link),
            (options.peer_breaks, self._break_peers),
            (options.crashes, self._crash),
            (options.false_deaths, self._declare_dead),
            (options.pauses, self._pause),
            (options.agent_kills, self._kill_agent),
        )
        for permille, fault in faults:
            if choices.chance(permille):
                alive = [each for each in self.workers.values() if each.alive]
                if alive:
                    fault(alive[choices.choose(len(alive))])
        self.schedule.after(50 + choices.choose(250), self._misfortune)

    def _break_link(self, worker: VirtualWorker) -> None:
        link = self._links.get((worker.address.worker_id, worker.address.incarnation))
        if link is not None:
            self._cut(link, "broken")

    def _break_peers(self, worker: VirtualWorker) -> None:
        """Streams with peers break; either end may hear of it, or not."""
        self.tell(f"peer streams of {worker.worker_id} broken")
        for (mine, _, other, incarnation), stream in self._peers.items():
            if stream.open and worker.worker_id in (mine, other):
                stream.cut()
                source = self.workers[mine]
                if self._choices.choose(2):
                    target = self.workers[other].address
                    if target.incarnation == incarnation:
                        self._later(lambda source=source, target=target: source.peer_gone(target), 5)  # type: ignore[misc]

    def _crash(self, worker: VirtualWorker) -> None:
        """The process dies with its agent; it is noticed, and started again, in any order."""
        self.tell(f"{worker.worker_id} (incarnation {worker.address.incarnation}) crashes")
        address = worker.address
        worker.kill()
        self._agents.pop(address.endpoint, None)
        self._break_link(worker)
        lost = WorkerLost(worker_id=address.worker_id, incarnation=address.incarnation, reason="crashed")
        self._later(lambda: self._feed(lost), 60)
        for other in self.workers.values():
            if other is not worker and self._choices.choose(2):
                self._later(lambda other=other: other.peer_gone(address), 30)  # type: ignore[misc]
        self._later(lambda: self._restart(worker), 50)

    def _restart(self, worker: VirtualWorker) -> None:
        if self.workers[worker.worker_id] is worker and not worker.alive:
            self._start_worker(worker.worker_id, worker.info.role)

    def _declare_dead(self, worker: VirtualWorker) -> None:
        """The router takes a living worker for dead; it goes on for a while, then it is ended and started anew."""
        address = worker.address
        self.tell(f"{worker.worker_id} (incarnation {address.incarnation}) is taken for dead")
        link = self._links.pop((address.worker_id, address.incarnation), None)
        if link is not None:
            link.down.cut()
            link.up.cut()
            self._later(lambda: worker.gone(link.session), 20)
        self._feed(WorkerLost(worker_id=address.worker_id, incarnation=address.incarnation, reason="silent"))

        def end() -> None:
            if worker.alive:
                worker.kill()
                self._agents.pop(worker.address.endpoint, None)
                self._restart(worker)

        self._later(end, 50)

    def _pause(self, worker: VirtualWorker) -> None:
        duration_ms = 100 * (1 + self._choices.choose(80))
        self.tell(f"{worker.worker_id} stands still for {duration_ms} ms")
        worker.pause(duration_ms)

    def _kill_agent(self, worker: VirtualWorker) -> None:
        """The agent dies; once it is reaped, a new one takes its place, under an endpoint of its own."""
        self.tell(f"the agent of {worker.worker_id} is killed")
        dead = worker.agent
        if dead is None or not dead.alive:
            return
        dead.kill()
        self._agents.pop(worker.address.endpoint, None)

        def reaped() -> None:
            if worker.alive:
                dead.bury()
                worker.address = replace(worker.address, endpoint=f"{worker.address.endpoint}+")
                self._start_agent(worker)
                worker.post(AgentLost(reason="killed"))
                worker.post(Registered(address=worker.address))

        self._later(reaped, 20)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _heal(self) -> None:
        """No more faults; who is dead comes back; two more requests must end well."""
        self.tell("healed")
        self._healed = True
        self._agent_faults.loss = self._agent_faults.corruption = 0
        for worker in self.workers.values():
            worker.paused_until_ms = min(worker.paused_until_ms, self.schedule.now_ms + 1)
        self.schedule.after(15_000, self._submit)
        self.schedule.after(15_000, self._submit)

    def _at_rest(self) -> bool:
        done = self._num_requests == self.options.num_requests + 2 and not self.checks.unended()
        return self._spins() or (done and all(self._rests(each) for each in self.workers.values()))

    def _spins(self) -> bool:
        return self.schedule.num_events > EVENTS_MAX

    @staticmethod
    def _rests(worker: VirtualWorker) -> bool:
        return worker.alive and at_baseline(worker.ledger) and _num_held(worker) == 0

    def _reckon(self) -> None:
        if waiting := self.checks.unended():
            raise Violation(f"{HEAL_LIMIT_MS} ms after healing these have not ended: {waiting}")
        for worker in self.workers.values():
            self.checks.final_worker(worker.worker_id, worker.ledger, worker.runner, _num_held(worker))
        self.checks.final_router(self.router)

    def _later(self, do: Callable[[], None], factor: int) -> None:
        """After a while: up to `factor` times the network's delay."""
        self.schedule.after(1 + self._choices.choose(factor * self.options.delay_max_ms), do)

    def tell(self, what: str) -> None:
        """Adds to the world's story."""
        self.story.append(f"{self.schedule.now_ms} {what}")


def _num_held(worker: VirtualWorker) -> int:
    core = worker.core
    return len(core.prefill) + core.prefill.num_attempts + len(core.decode) + core.decode.num_attempts
