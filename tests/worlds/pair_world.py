"""A small world for handoffs: real worker cores over fake runners, a scripted owner record, a network that errs.

Deterministic for a seed. Everything is one bag of things that may happen next; which one does is drawn. Words between
workers may be lost, doubled and overtaken; those of the router stay in order. Blocks that are FREE are poisoned all
the time, and an agent that is told to end an attempt while a frame is under way leaves garbage in its blocks, so that
whoever uses a block too early gets wrong tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from cluster.worker_core import WorkerCore, WorkerCoreConfig
from engine.blocks import BlockLedger, BlockState
from engine.events import PeerGone, RouterGone, Tick
from engine.fake_runner import FakeRunner, expected_tokens
from engine.step import Batch, BatchConfig, StepPlan
from kv_transfer.actions import AgentLost, FromRouter, Report, RouterJoined, SendTransfer
from kv_transfer.messages import (
    AgentEvent,
    EndTransfer,
    ExpectFrames,
    FrameAcked,
    FrameFailed,
    FrameHeader,
    FrameLanded,
    SendFrame,
    TransferMessage,
    TransferQuiet,
)
from tandem.messages import (
    Assign,
    AssignMode,
    CancelAssigned,
    CommitAsk,
    OwnerIs,
    OwnerQuery,
    RequestFailed,
    RouterMessage,
    TransferStats,
    WorkerAddress,
)
from tandem.request import FinishReason, RequestId, Sampling, Token, TransferId, WorkerId

VOCAB = 97
BLOCK = 4
SESSION = 1
Key = tuple[TransferId, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Chances of 0 to 1 per occasion."""

    lose: float = 0.0  # a word between workers
    double: float = 0.0
    overtake: bool = False
    fail_frame: float = 0.0
    kill: float = 0.0  # per request: a worker dies while it runs
    cancel: float = 0.0  # per request: its client leaves
    agent: float = 0.0  # per request: an agent dies while it runs
    leave_cancels: bool = False  # the router leaves it to the source to tell the target of an early end


@dataclass(slots=True)
class Asked:
    """A request as its router sees it."""

    request_id: RequestId
    prompt: tuple[int, ...]
    sampling: Sampling
    expected: list[int]
    local: bool = False
    epoch: int = 0
    owner: tuple[WorkerId, int] | None = None
    transfer: TransferId = field(default=TransferId(""))
    source: str = ""
    target: str = ""
    delivered: list[int] = field(default_factory=list)
    num_attempts: int = 0
    end: str = ""
    failures: list[str] = field(default_factory=list)


class Agent:
    """The transfer agent of one worker: frames are read and written when they land, not when they are sent."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.expected: dict[Key, dict[int, int]] = {}
        self.ended: set[Key] = set()
        self.landed: dict[tuple[Key, int], int] = {}
        self.under_way: dict[Key, int] = {}
        self.alive = True

    def command(self, command: object) -> None:
        """What the worker wants. A dead agent does nothing, until the worker has heard of its death."""
        if not self.alive:
            return
        match command:
            case ExpectFrames(transfer_id=transfer, epoch=epoch, blocks=blocks, generations=generations):
                self.expected[transfer, epoch] = dict(zip(blocks, generations, strict=True))
            case SendFrame(header=header, endpoint=endpoint):
                key = (header.transfer_id, header.epoch)
                target = self.world.agent_at(endpoint)
                self.under_way[key] = self.under_way.get(key, 0) + 1
                taken = target is not None and key not in target.ended  # else it is refused before it is written
                if target is not None and taken:
                    target.under_way[key] = target.under_way.get(key, 0) + 1
                self.world.later(lambda: self._land(key, header, target, taken), f"frame {header.transfer_id}")
            case EndTransfer(transfer_id=transfer, epoch=epoch):
                self.ended.add((transfer, epoch))
                self.quieten((transfer, epoch))
            case _:
                raise TypeError(f"{command}")

    def _land(self, key: Key, header: FrameHeader, target: Agent | None, taken: bool) -> None:
        """The frame arrives: checked, copied, told to both sides."""
        transfer, epoch = key
        checksum = 0
        source = self.world.worker(self.name)
        if source.agent is self:
            pinned = set(header.source_blocks) <= set(source.ledger.exported_by(transfer))
            assert pinned, f"{transfer} reads blocks that are not pinned: {self.world.tail()}"
        reason = "the target's agent is gone"
        if target is not None and target.alive and self.alive:
            granted = target.expected.get(key, {})
            again = (key, header.sequence) in target.landed
            pairs = list(zip(header.target_blocks, header.target_generations, strict=True))
            if key in target.ended:
                reason = "ended"
                if taken and granted and not again:
                    target.world.worker(target.name).runner.poison(header.target_blocks)  # torn
            elif any(granted.get(block) != generation for block, generation in pairs):
                reason = "not granted"
            elif not again and target.world.hits(target.world.faults.fail_frame):
                reason = "checksum"
                target.world.worker(target.name).runner.poison(header.target_blocks)
            else:
                reason = ""
                sink = self.world.worker(target.name)
                pairs_of_blocks = zip(header.source_blocks, header.target_blocks, strict=True)
                content = b"".join(source.runner.read_block(block) for block in header.source_blocks)
                checksum = target.landed.setdefault((key, header.sequence), hash(content) & ((1 << 64) - 1))
                if not again:
                    for read, written in pairs_of_blocks:
                        sink.runner.write_block(written, source.runner.read_block(read))
                landed = FrameLanded(
                    transfer_id=transfer,
                    epoch=epoch,
                    sequence=header.sequence,
                    target_blocks=header.target_blocks,
                    num_bytes=header.num_bytes,
                    checksum=checksum,
                )
                target.tell(landed)
        ended: AgentEvent = FrameAcked(transfer_id=transfer, epoch=epoch, sequence=header.sequence, checksum=checksum)
        if reason:
            ended = FrameFailed(transfer_id=transfer, epoch=epoch, sequence=header.sequence, reason=reason)
        self.tell(ended)
        for agent in (self, target if taken else None):
            if agent is not None:
                agent.under_way[key] -= 1
                agent.quieten(key)

    def quieten(self, key: Key) -> None:
        """Says once that the attempt is quiet, when it has ended and nothing is under way."""
        if key in self.ended and not self.under_way.get(key) and self.alive:
            self.tell(TransferQuiet(transfer_id=key[0], epoch=key[1]))

    def tell(self, event: AgentEvent) -> None:
        """To the own worker, in order."""
        if self.alive:
            self.world.post(self.name, event, channel=f"agent {self.name}")


class Worker:
    """One incarnation: core, ledger, runner, agent."""

    def __init__(self, world: World, name: str, incarnation: int, *, num_blocks: int, config: WorkerCoreConfig) -> None:
        self.name, self.incarnation = name, incarnation
        self.address = WorkerAddress(
            worker_id=WorkerId(name), incarnation=incarnation, control=name, endpoint=f"{name}#{incarnation}"
        )
        self.ledger = BlockLedger(num_blocks=num_blocks, block_size=BLOCK)
        batch = BatchConfig(max_tokens_per_step=16, chunk_tokens=8, context_tokens=256, max_rows=8)
        self.batch = Batch(self.ledger, batch)
        self.runner = FakeRunner(num_blocks=num_blocks, block_size=BLOCK, vocab_size=VOCAB)
        self.plan: StepPlan | None = None  # of the step under way
        self.core = WorkerCore(
            me=self.address, layout=self.runner.layout, ledger=self.ledger, batch=self.batch, config=config
        )
        self.agent = Agent(world, name)

    def problems(self) -> list[str]:
        """What is not back at its baseline."""
        counts = self.ledger.counts()
        held = counts.owned + counts.exported + counts.granted + counts.quarantined
        problems = [f"{self.name}: {each}" for each in self.ledger.audit()]
        if held or counts.free + counts.cached != counts.total:
            problems.append(f"{self.name}: not at its baseline: {counts}")
        if self.core.prefill.num_attempts or self.core.decode.num_attempts:
            problems.append(f"{self.name}: attempts are open: {self.core.story()[-4:]}")
        if len(self.core.prefill) or len(self.core.decode) or len(self.batch):
            problems.append(f"{self.name}: requests are left")
        return problems


class World:
    """Workers `names`, a router, and what may happen next."""

    def __init__(
        self,
        *,
        seed: int = 0,
        names: tuple[str, ...] = ("p0", "d0"),
        faults: Faults | None = None,
        num_blocks: int = 64,
        config: WorkerCoreConfig | None = None,
    ) -> None:
        self.random = Random(seed)
        self.faults = faults or Faults()
        self.now_ms = 1_000
        self.num_blocks = num_blocks
        self.config = config or WorkerCoreConfig()
        self.workers = {name: Worker(self, name, 1, num_blocks=num_blocks, config=self.config) for name in names}
        self.requests: dict[RequestId, Asked] = {}
        self.stats: list[TransferStats] = []
        self.log: list[str] = []
        self.words: list[TransferMessage] = []  # every one that was said between workers
        self.lose: Callable[[TransferMessage], bool] = lambda message: False  # a test's own rule
        self.hold_commits = False  # the owner record does not answer
        self._channels: dict[str, deque[tuple[str, Callable[[], None]]]] = {}
        self._bag: list[tuple[str, Callable[[], None]]] = []
        for name in names:
            self.post(name, RouterJoined(session=SESSION), channel=f"router {name}")

    # ---- what may happen ---------------------------------------------------------------------------------------------

    def hits(self, chance: float) -> bool:
        return chance > 0 and self.random.random() < chance

    def worker(self, name: str) -> Worker:
        return self.workers[name]

    def agent_at(self, endpoint: str) -> Agent | None:
        name, incarnation = endpoint.split("#")
        worker = self.workers[name]
        return worker.agent if worker.incarnation == int(incarnation) else None

    def later(self, happen: Callable[[], None], what: str) -> None:
        """At any later time, in any order."""
        self._bag.append((what, happen))

    def post(self, name: str, event: object, *, channel: str) -> None:
        """To this incarnation of the worker, after all that is in the channel already."""
        worker = self.workers[name]
        queue = self._channels.setdefault(channel, deque())
        queue.append((f"{name} <- {event}", lambda: self._give(worker, event)))

    def _give(self, worker: Worker, event: object) -> None:
        if self.workers[worker.name] is worker:
            self._perform(worker, worker.core.handle(self.now_ms, event))

    def _perform(self, worker: Worker, actions: list[object]) -> None:
        for action in actions:
            match action:
                case Report(piece=piece):
                    queue = self._channels.setdefault(f"{worker.name} router", deque())
                    queue.append((f"router <- {piece}", lambda piece=piece: self._reported(worker, piece)))  # type: ignore[misc]
                case SendTransfer(to=to, message=message):
                    self._say(worker.name, to, message)
                case _:
                    worker.agent.command(action)
        free = [block for block in range(self.num_blocks) if worker.ledger.state(block) is BlockState.FREE]
        worker.runner.poison(free)
        worker_problems = worker.ledger.audit()
        assert not worker_problems, f"{worker_problems}: {self.tail()}"
        here = worker.batch.sequences()
        counted = (worker.batch.num_running, worker.batch.prefill_backlog_tokens)
        recounted = (sum(each.started for each in here), sum(each.num_left for each in here if not each.decoding))
        assert counted == recounted, f"{counted} running and backlog, {recounted} counted anew: {self.tail()}"

    def _say(self, name: str, to: WorkerAddress, message: TransferMessage) -> None:
        self.words.append(message)
        if self.lose(message) or self.hits(self.faults.lose):
            return
        worker = self.workers[to.worker_id]
        for _ in range(2 if self.hits(self.faults.double) else 1):
            what = f"{to.worker_id} <- {message.body}"
            if worker.incarnation != to.incarnation:
                return
            if self.faults.overtake:
                self.later(lambda: self._give(worker, message), what)
            else:
                self.post(to.worker_id, message, channel=f"{name} {to.worker_id}")

    def step_one(self) -> bool:
        """Lets one thing happen; False when only time can help, or nothing."""
        ready = [("channel", name) for name, queue in self._channels.items() if queue]
        ready += [("bag", str(index)) for index in range(len(self._bag))]
        ready += [("engine", name) for name, worker in self.workers.items() if self._runnable(worker)]
        if not ready:
            return False
        kind, which = self.random.choice(ready)
        self.now_ms += self.random.randrange(3)
        if kind == "engine":
            self._run(self.workers[which])
        else:
            what, happen = self._channels[which].popleft() if kind == "channel" else self._bag.pop(int(which))
            self.log.append(f"{self.now_ms} {what}")
            happen()
        self._tick()
        return True

    def _runnable(self, worker: Worker) -> bool:
        return worker.plan is not None or any(not each.held for each in worker.batch.sequences())

    def _run(self, worker: Worker) -> None:
        """Begins a step, or ends the one that is under way; anything may happen between."""
        plan = worker.plan
        if plan is None:
            worker.plan = worker.core.next_plan(self.now_ms)
            self.now_ms += 5 * (worker.plan is None)
            return
        worker.plan = None
        sampled = worker.runner.run(plan)
        self.now_ms += 1
        self.log.append(
            f"{self.now_ms} {worker.name} ran {[(r.request_id, r.start, len(r.tokens)) for r in plan.rows]}"
        )
        self._perform(worker, worker.core.step_done(self.now_ms, plan, sampled))

    def _tick(self) -> None:
        for worker in list(self.workers.values()):
            due_ms = worker.core.next_deadline_ms()
            if due_ms is not None and due_ms <= self.now_ms:
                self._perform(worker, worker.core.handle(self.now_ms, Tick()))

    def run(self, *, until: Callable[[], bool] | None = None, max_events: int = 60_000) -> None:
        """Until `until`, or until nothing can happen any more."""
        for _ in range(max_events):
            if until is not None and until():
                return
            if not self.step_one():
                due = [worker.core.next_deadline_ms() for worker in self.workers.values()]
                times = [at for at in due if at is not None]
                if not times:
                    return
                self.now_ms = max(self.now_ms, min(times))
                self._tick()
        raise AssertionError(f"still going after {max_events} events: {self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log[-60:])

    # ---- faults ------------------------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """The worker dies with its memory; a new incarnation takes its place; all who knew it hear of it."""
        old = self.workers[name]
        old.agent.alive = False
        self._channels[f"{name} router"] = deque()
        self.workers[name] = Worker(self, name, old.incarnation + 1, num_blocks=self.num_blocks, config=self.config)
        self.log.append(f"{self.now_ms} {name} dies")
        self.post(name, RouterJoined(session=SESSION), channel=f"router {name}")
        for other in self.workers:
            if other != name:
                gone = PeerGone(worker_id=WorkerId(name), incarnation=old.incarnation)
                self.post(other, gone, channel=f"peers {other}")
        self.later(lambda: self._lost(name, old.incarnation), "the router hears of a death")

    def kill_agent(self, name: str) -> None:
        """The agent dies. Another takes its place when the worker hears of it, not before."""
        worker = self.workers[name]
        worker.agent.alive = False
        self._channels[f"agent {name}"] = deque([(f"{name} <- AgentLost", lambda: self._replace_agent(worker))])

    def _replace_agent(self, worker: Worker) -> None:
        worker.agent = Agent(self, worker.name)
        self._give(worker, AgentLost(reason="killed"))

    # ---- the router --------------------------------------------------------------------------------------------------

    def ask(
        self,
        name: str,
        prompt: tuple[int, ...],
        *,
        max_tokens: int = 6,
        source: str = "p0",
        target: str = "d0",
        local: bool = False,
        stop: tuple[int, ...] = (),
        deadline_ms: int = 60_000,
    ) -> Asked:
        """A request of this router, placed at once."""
        sampling = Sampling(max_tokens=max_tokens, stop_token_ids=stop)
        expected = expected_tokens(prompt, sampling, max_tokens, VOCAB)
        ends = [at for at, token in enumerate(expected) if token in stop]
        asked = Asked(
            request_id=RequestId(name),
            prompt=prompt,
            sampling=sampling,
            expected=expected[: ends[0] + 1] if ends else expected,
            local=local,
            source=source,
            target=target,
        )
        self.requests[asked.request_id] = asked
        self.deadline_ms = deadline_ms
        self.place(asked)
        return asked

    def place(self, asked: Asked) -> None:
        """A new attempt under the next epoch."""
        asked.epoch += 1
        asked.num_attempts += 1
        asked.transfer = TransferId("" if asked.local else f"{asked.request_id}:{asked.epoch}")
        source, target = self.workers[asked.source], self.workers[asked.target]
        first = target if asked.local else source
        asked.owner = (WorkerId(first.name), first.incarnation)
        base = Assign(
            request_id=asked.request_id,
            epoch=asked.epoch,
            mode=AssignMode.LOCAL,
            tokens=(*asked.prompt, *asked.delivered),
            num_prompt_tokens=len(asked.prompt),
            sampling=asked.sampling,
            transfer_id=asked.transfer,
            peer=None,
            deadline_ms=self.deadline_ms,
        )
        if asked.local:
            self.say(asked.target, base)
        else:
            self.say(asked.source, replace(base, mode=AssignMode.PREFILL, peer=target.address))
            self.say(asked.target, replace(base, mode=AssignMode.DECODE, peer=source.address))

    def say(self, name: str, message: RouterMessage) -> None:
        self.post(name, FromRouter(session=SESSION, message=message), channel=f"router {name}")

    def cancel(self, asked: Asked, reason: str) -> None:
        """The request ends, and its workers hear it."""
        asked.end = asked.end or reason
        self._cancel_epoch(asked, reason)

    def router_gone(self) -> None:
        """The router's streams end; it knows its requests no more."""
        for asked in self.requests.values():
            asked.end = asked.end or "the router is gone"
        for name in self.workers:
            self.post(name, RouterGone(session=SESSION), channel=f"router {name}")

    def _cancel_epoch(self, asked: Asked, reason: str) -> None:
        for name in dict.fromkeys((asked.source, asked.target)):
            self.say(name, CancelAssigned(request_id=asked.request_id, epoch=asked.epoch, reason=reason))

    def _lost(self, name: str, incarnation: int) -> None:
        for asked in self.requests.values():
            involved = asked.owner == (WorkerId(name), incarnation) or (
                name in (asked.source, asked.target) and asked.owner is not None and asked.owner[0] == asked.source
            )
            if not asked.end and involved:
                self._again(asked, f"{name} died")

    def _again(self, asked: Asked, reason: str) -> None:
        asked.failures.append(reason)
        self._cancel_epoch(asked, reason)
        if asked.num_attempts >= 12:
            asked.end = f"failed: {reason}"
        else:
            self.place(asked)

    def _reported(self, worker: Worker, piece: object) -> None:
        me = (WorkerId(worker.name), worker.incarnation)
        match piece:
            case Token():
                asked = self.requests[piece.request_id]
                assert piece.epoch <= asked.epoch, f"{me} writes under an epoch that nobody gave it: {self.tail()}"
                if not asked.end and piece.epoch == asked.epoch:
                    assert asked.owner == me, f"{me} writes for {asked.owner}: {self.tail()}"
                    self._deliver(asked, piece)
            case CommitAsk():
                self._commit(worker, self.requests[piece.request_id], piece)
            case OwnerQuery():
                self._answer(worker, self.requests[piece.request_id], piece.transfer_id)
            case RequestFailed():
                asked = self.requests[piece.request_id]
                if not asked.end and piece.epoch == asked.epoch:
                    if piece.retryable:
                        self._again(asked, piece.message)
                    else:
                        self.cancel(asked, f"{piece.code}: {piece.message}")
            case TransferStats():
                self.stats.append(piece)

    def _deliver(self, asked: Asked, token: Token) -> None:
        if token.index < len(asked.delivered):
            assert asked.delivered[token.index] == token.token_id, "two tokens of one index"
            return
        assert token.index == len(asked.delivered), f"a gap: {token}: {self.tail()}"
        assert token.token_id == asked.expected[token.index], f"{token} is wrong: {self.tail()}"
        asked.delivered.append(token.token_id)
        if token.finish is not None:
            asked.end = "stop" if token.finish is FinishReason.STOP else "length"
            if not self.faults.leave_cancels or self.hits(0.5):
                self._cancel_epoch(asked, "finished")

    def _commit(self, worker: Worker, asked: Asked, ask: CommitAsk) -> None:
        if self.hold_commits:
            return
        target = (WorkerId(worker.name), worker.incarnation)
        if asked.owner == target and asked.epoch == ask.from_epoch + 1 and asked.transfer == ask.transfer_id:
            self._answer(worker, asked, ask.transfer_id)
            return
        refused = ""
        if asked.end:
            refused = "over"
        elif asked.epoch != ask.from_epoch or asked.transfer != ask.transfer_id:
            refused = "stale"
        if refused:
            self._answer(worker, asked, ask.transfer_id, refused)
            return
        for token in ask.tokens:
            self._deliver(asked, token)
        asked.epoch += 1
        source, asked.owner = asked.owner, target
        self._answer(worker, asked, ask.transfer_id)
        if source is not None and self.workers[source[0]].incarnation == source[1]:
            self._answer(self.workers[source[0]], asked, ask.transfer_id)

    def _answer(self, worker: Worker, asked: Asked, transfer: TransferId, refused: str = "") -> None:
        over = asked.end or asked.owner is None
        owner = OwnerIs(
            request_id=asked.request_id,
            transfer_id=transfer,
            epoch=asked.epoch,
            worker_id=None if over or asked.owner is None else asked.owner[0],
            incarnation=0 if over or asked.owner is None else asked.owner[1],
            refused=refused,
        )
        if self.workers[worker.name] is worker and not self.hold_commits:
            self.say(worker.name, owner)

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """All requests have ended, with the right tokens; all workers are at their baseline."""
        for asked in self.requests.values():
            assert asked.end, f"{asked.request_id} never ended: {self.tail()}"
            assert not asked.end.startswith("failed"), f"{asked}: {self.tail()}"
            if asked.end in ("stop", "length"):
                assert asked.delivered == asked.expected, f"{asked}: {self.tail()}"
        problems = [problem for worker in self.workers.values() for problem in worker.problems()]
        assert not problems, f"{problems}\n{self.tail()}"
