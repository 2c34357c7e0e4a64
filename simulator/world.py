"""A small cluster in one thread: the real router core and worker cores over a virtual network that misbehaves.

Everything that happens follows from `Choices`, so a seed makes the same world each time. First faults reign, then all
is healed, and then every promise is due: each request ended once, and every pool is back at its baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from router.core import RouterCore
from router.events import (
    ClientGone,
    Deliver,
    Event,
    Fail,
    Finish,
    LinkLost,
    LinkUp,
    MoveEnded,
    MoveRefused,
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
from router.store import EmbeddedOwners
from simulator.agents import AgentFaults, VirtualAgent
from simulator.checks import Checks, Violation, at_baseline
from simulator.choices import Choices
from simulator.faults import ROUTER, Misfortune, Partition
from simulator.moves import Movers
from simulator.network import Clock, Schedule, Stream
from simulator.options import draw_options
from simulator.worker import VirtualWorker
from tandem.messages import Role, RouterMessage, WorkerAddress, WorkerInfo, WorkerReport
from tandem.request import CANARY_PREFIX, RequestId, Sampling, WorkerId

M = TypeVar("M")

BLOCK_SIZE = 4
VOCAB_SIZE = 50_000
NAMESPACE = "fake"
TICK_MS = 100
REDIAL_MS = 300
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
HASTY_HANDOFF = replace(HANDOFF, fence_limit_ms=60, fence_resend_ms=20)


def worker_config(handoff: HandoffConfig, *, pressed: bool) -> WorkerCoreConfig:
    """All workers of a world have the same. `pressed`: they expect short answers, and get long ones."""
    optimism = AdmissionConfig(wait_limit_ms=2_000, unknown_output_tokens=2, alpha=0.9)
    admission = optimism if pressed else AdmissionConfig(wait_limit_ms=2_000)
    return WorkerCoreConfig(
        prefill=PrefillConfig(handoff=handoff), decode=DecodeConfig(handoff=handoff, admission=admission)
    )


ROUTER_CONFIG = RouterConfig(
    handoff_deadline_ms=6_000,
    decode_stall_ms=6_000,
    queue_wait_ms=60_000,
    tick_ms=TICK_MS,
    local_prefill_tokens=8,
    move_deadline_ms=4_000,
    move_dwell_ms=300,
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
        self.schedule = Schedule(events_max=EVENTS_MAX)
        self.clock = self._new_clock()  # the router's
        self.checks = Checks(
            block_size=BLOCK_SIZE,
            vocab_size=VOCAB_SIZE,
            namespace=NAMESPACE,
            # The last of it is the wait for the first token after the move, whose lack is noticed like any other's.
            move_limit_ms=ROUTER_CONFIG.move_deadline_ms + GRACE_MS + ROUTER_CONFIG.decode_stall_ms,
        )
        self.owners = EmbeddedOwners()
        config = replace(ROUTER_CONFIG, decode_reserve_tokens=self.options.reserve_tokens)
        self.router = RouterCore(config, owners=self.owners)
        self.workers: dict[WorkerId, VirtualWorker] = {}
        self.peers: dict[tuple[WorkerId, int, WorkerId, int], Stream[TransferMessage]] = {}
        self.partition: Partition | None = None
        self.healed = False
        self.story: list[str] = []
        self._links: dict[tuple[WorkerId, int], _Link] = {}
        self._agents: dict[str, VirtualAgent] = {}
        self._misfortune = Misfortune(self, choices)
        self.movers = Movers(self, choices)
        self._incarnation = 0
        self._session = 0
        self._num_requests = 0
        self._num_canaries = 0
        self.agent_faults = AgentFaults(
            loss=self.options.loss,
            corruption=self.options.corruption,
            delay_max_ms=self.options.delay_max_ms,
        )

    def run(self) -> None:
        """Faults, then healing, then the reckoning."""
        options = self.options
        for role, num in ((Role.PREFILL, options.num_prefill), (Role.DECODE, options.num_decode)):
            for each in range(num):
                self.start_worker(WorkerId(f"{role.value}-{each}"), role)
        for each in range(options.num_mixed):
            self.start_worker(WorkerId(f"mixed-{each}"), Role.MIXED)
        for _ in range(options.num_requests):
            self.schedule.after(50 + self._choices.choose(options.faulty_ms), self._submit)
        if options.canaries:
            self.schedule.after(200, self._ask_pair)
        self._tick()
        self._misfortune.strike()
        self.movers.look()
        self.schedule.run(until_ms=50 + options.faulty_ms)
        self._heal()
        self.schedule.run(until_ms=self.schedule.now_ms + HEAL_LIMIT_MS, unless=self._at_rest)
        self._reckon()

    # ---- clients -----------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        """Prompts begin alike, so that there are prefixes to share."""
        choices = self._choices
        self._num_requests += 1
        shared = [100 * choices.choose(2) + each for each in range(4 * choices.choose(6))]
        own = [1_000 * self._num_requests + each for each in range(1 + choices.choose(20))]
        sampled = choices.choose(2)
        room = self.options.num_blocks * BLOCK_SIZE - len(shared) - len(own)  # of a pool: it could never end else
        sampling = Sampling(
            temperature=float(sampled),
            seed=choices.choose(1_000) * sampled,
            max_tokens=min(2 + choices.choose(self.options.answer_tokens_max), room),
            ignore_eos=True,
        )
        request = NewRequest(
            request_id=RequestId(f"r{self._num_requests}"),
            tokens=(*shared, *own),
            sampling=sampling,
            priority=max(0, choices.choose(6) - 3),
            cache_salt=b"" if self._num_requests % 8 else b"another tenant's",
        )
        self.tell(f"{request.request_id}: {len(request.tokens)} tokens, then {sampling.max_tokens}")
        self.checks.submitted(request, healthy=self.healed)
        self.feed(Submitted(request=request))
        if choices.chance(self.options.client_leaves) and not self.healed:
            self.schedule.after(choices.choose(500), lambda: self._leave(request.request_id))

    def _ask_pair(self) -> None:
        """A canary through one of the pairs that there are, until the world is healed."""
        if self.healed:
            return
        self.schedule.after(200 + self._choices.choose(400), self._ask_pair)
        pairs, _ = pairs_of(self.router.fleet)
        if not pairs:
            return
        self._num_canaries += 1
        request = NewRequest(
            request_id=RequestId(f"{CANARY_PREFIX}{self._num_canaries}"),
            tokens=(7, 7, 7),
            sampling=Sampling(max_tokens=2, ignore_eos=True),
            deadline_ms=2_000,
            canary=pairs[self._choices.choose(len(pairs))],
        )
        self.checks.submitted(request, healthy=False)
        self.feed(Submitted(request=request))

    def _leave(self, request_id: RequestId) -> None:
        """The client hangs up, or its answer has met a stop string."""
        seen = self.checks.num_seen(request_id)
        if seen and self._choices.choose(2):
            index = self._choices.choose(seen)
            if request_id in self.checks.unended():
                self.checks.stop_asked(request_id, index)
            self.feed(StopRequested(request_id=request_id, index=index))
        else:
            self.checks.client_gone(request_id)
            self.feed(ClientGone(request_id=request_id, reason="hung up"))

    # ---- the router's shell ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self.feed(Tick())
        self.checks.moves_in_time(self.clock.now_ms)
        if self.router.line.lacks_workers and any(self.router.fleet.ready.values()):
            raise Violation(f"{self.router.line.blocked} though a worker is ready, and any serves alone if it must")
        self._look_at_owners()
        self.schedule.after(TICK_MS, self._tick)

    def _look_at_owners(self) -> None:
        """A request whose owner does not know of it is lost until the router's patience ends."""
        for request_id in self.checks.unended():
            record = self.owners.get(request_id)
            if record is None:
                continue
            worker = self.workers[record.worker_id]
            heard = worker.address.incarnation == record.incarnation and self._is_heard(worker)
            known = not heard or worker.knows(request_id, record.epoch)
            runs = not heard or not worker.stands_with(request_id)
            self.checks.owner_is(self.clock.now_ms, request_id, known=known, runs=runs)

    def _is_heard(self, worker: VirtualWorker) -> bool:
        """Whether router and worker can hear one another now."""
        worker_id = worker.worker_id
        link = self._links.get((worker_id, worker.address.incarnation))
        apart = self._parts(ROUTER, worker_id) or self._parts(worker_id, ROUTER)
        return worker.hears and link is not None and link.down.open and not apart

    def feed(self, event: Event) -> None:
        """Something happens to the router."""
        for action in self.router.handle(self.clock.now_ms, event):
            match action:
                case SendToWorker():
                    self.checks.router_said(action.worker_id, action.incarnation, action.message)
                    link = self._links.get((action.worker_id, action.incarnation))
                    if link is not None:
                        link.down.send(action.message)
                case Deliver():
                    self.checks.delivered(action)
                    self.movers.delivered(action.request_id)
                case Finish() | Fail():
                    self.tell(f"{action.request_id} ended: {action}")
                    self.checks.ended(action)
                case MoveRefused() | MoveEnded():
                    self.tell(f"move {action.ticket}: {action}")
                    self.checks.move_answered(self.clock.now_ms, action)
                case Refuse():
                    raise Violation(f"{action.request_id} was refused: {action.error}")

    # ---- links between the router and workers ------------------------------------------------------------------------

    def _connect(self, worker: VirtualWorker) -> None:
        """A new session, if the worker is still whom the router looks for and can be reached."""
        key = worker.address.worker_id, worker.address.incarnation
        if not worker.alive or key in self._links or self.router.fleet.get(*key) is None:
            return
        if self._parts(ROUTER, key[0]) or self._parts(key[0], ROUTER):
            self.schedule.after(REDIAL_MS, lambda: self._connect(worker))
            return
        self._session += 1
        session = self._session

        def down(message: RouterMessage | None) -> None:
            if message is None:
                worker.joined(session)
            else:
                worker.said(session, message)

        def up(report: WorkerReport) -> None:
            self.feed(ReportArrived(report=report))

        delay_ms = self.options.delay_max_ms
        link = _Link(
            worker,
            session,
            Stream(self.schedule, self._choices, delay_max_ms=delay_ms, arrive=down),
            Stream(self.schedule, self._choices, delay_max_ms=delay_ms, arrive=up),
        )
        self._links[key] = link
        link.down.send(None)
        self.feed(LinkUp(worker_id=key[0], incarnation=key[1]))

    def cut_link(self, worker: VirtualWorker, reason: str) -> None:
        """Both ends notice, each in its own time; the router dials again after that."""
        key = worker.address.worker_id, worker.address.incarnation
        link = self._links.get(key)
        if link is None:
            return
        self.tell(f"link to {key} cut: {reason}")
        link.down.cut()
        link.up.cut()
        self.later(lambda: worker.gone(link.session), 20)

        def noticed() -> None:
            if self._links.get(key) is link:
                del self._links[key]
                self.feed(LinkLost(worker_id=key[0], incarnation=key[1], reason=reason))
                self.later(lambda: self._connect(worker), 10)

        self.later(noticed, 20)

    def drop_link(self, worker: VirtualWorker) -> None:
        """The router ends the session, and looks for this incarnation no more."""
        link = self._links.pop((worker.address.worker_id, worker.address.incarnation), None)
        if link is not None:
            link.down.cut()
            link.up.cut()
            self.later(lambda: worker.gone(link.session), 20)

    def _report(self, worker: VirtualWorker, session: int, report: WorkerReport) -> None:
        self.checks.reported(worker.worker_id, worker.address.incarnation, report)
        link = self._links.get((worker.worker_id, worker.address.incarnation))
        if link is not None and link.session == session:
            link.up.send(report)

    def _parts(self, sender: str, receiver: str) -> bool:
        return self.partition is not None and self.partition.parts(sender, receiver)

    def hold_streams(self) -> None:
        """Lets every stream stall that crosses the partition, and no other."""
        for (worker_id, _), link in self._links.items():
            self._hold(link.down, ROUTER, worker_id)
            self._hold(link.up, worker_id, ROUTER)
        for (mine, _, other, _), stream in self.peers.items():
            self._hold(stream, mine, other)

    def _hold(self, stream: Stream[M], sender: str, receiver: str) -> None:
        if self._parts(sender, receiver):
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
            control=str(worker_id),
            endpoint=f"{worker_id}/{incarnation}",
        )
        layout = fake_layout(block_size=BLOCK_SIZE, namespace=NAMESPACE)
        ledger = BlockLedger(num_blocks=self.options.num_blocks, block_size=BLOCK_SIZE)
        batch = Batch(
            ledger=ledger,
            config=BatchConfig(
                max_tokens_per_step=16, chunk_tokens=8, context_tokens=200, namespace=NAMESPACE.encode()
            ),
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
            clock=self._new_clock(),
            choices=self._choices,
            checks=self.checks,
            step_max_ms=self.options.step_max_ms,
            slow_steps=self.options.slow_steps,
            to_router=self._report,
            to_peer=self._to_peer,
        )
        self.workers[worker_id] = worker
        self.start_agent(worker)
        self.tell(f"{worker_id} starts as incarnation {address.incarnation}")
        self.feed(WorkerJoined(info=worker.info, incarnation=address.incarnation))
        self.later(lambda: self._connect(worker), 5)

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
            choices=self._choices,
            faults=self.agent_faults,
            runner=worker.runner,
            ledger=worker.ledger,
            tell=worker.agent_said,
            find=self._agents.get,
            parts=self._parts,
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
        if self._is_heard(worker):
            self.checks.leaves(worker.worker_id, worker.ledger, _num_held(worker))
        address = worker.address
        self.drop_link(worker)
        self.feed(WorkerLost(worker_id=address.worker_id, incarnation=address.incarnation, reason="drained"))
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
                elif self._choices.choose(2):
                    sender.peer_gone(to)

            stream = Stream(self.schedule, self._choices, delay_max_ms=self.options.delay_max_ms, arrive=arrive)
            self.peers[key] = stream
            self._hold(stream, mine.worker_id, to.worker_id)
            if was is not None and was.last is not None and self._choices.choose(2):
                stream.send(was.last)  # nobody knows whether it got through, so it goes again
        stream.send(message)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _heal(self) -> None:
        """No more faults; who is dead comes back; two more requests must end well."""
        self.tell("healed")
        self.healed = True
        self.agent_faults.loss = self.agent_faults.corruption = 0
        self._misfortune.heal()
        self.schedule.after(15_000, self._submit)
        self.schedule.after(15_000, self._submit)

    def _at_rest(self) -> bool:
        done = self._num_requests == self.options.num_requests + 2 and not self.checks.unended()
        return done and not self.checks.moves().get("none") and all(map(self._rests, self.workers.values()))

    @staticmethod
    def _rests(worker: VirtualWorker) -> bool:
        return worker.alive and at_baseline(worker.ledger) and _num_held(worker) == 0

    def _reckon(self) -> None:
        if waiting := self.checks.unended():
            raise Violation(f"{HEAL_LIMIT_MS} ms after healing these have not ended: {waiting}")
        for worker in self.workers.values():
            self.checks.final_worker(worker.worker_id, worker.ledger, worker.runner, _num_held(worker))
        self.checks.final_router(self.router, len(self.owners))

    def later(self, do: Callable[[], None], factor: int) -> None:
        """After a while: up to `factor` times the network's delay."""
        self.schedule.after(1 + self._choices.choose(factor * self.options.delay_max_ms), do)

    def _new_clock(self) -> Clock:
        """Each process has its own time."""
        drift = self.options.clock_drift
        if not drift:
            return Clock(self.schedule)
        choices = self._choices
        return Clock(self.schedule, offset_ms=choices.choose(1_000_000), drift=choices.choose(2 * drift + 1) - drift)

    def tell(self, what: str) -> None:
        """Adds to the world's story."""
        self.story.append(f"{self.schedule.now_ms} {what}")


def _num_held(worker: VirtualWorker) -> int:
    core = worker.core
    swapped = core.batch.swapping.space.num_owners
    return len(core.prefill) + core.prefill.num_attempts + len(core.decode) + core.decode.num_attempts + swapped
