"""One worker's decider: both role cores over one batch and one ledger, as the engine loop and the simulator run them.

Assignments go by their mode, messages and agent events by transfer and direction. What a worker is used for is
decided by what the router assigns it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from decode_worker.config import DecodeConfig
from decode_worker.core import DecodeCore
from engine.blocks import BlockLedger
from engine.events import RouterGone, Tick
from engine.layout import KVLayout
from engine.step import Batch, Drawn, StepOutcome, StepPlan
from kv_transfer.actions import Action, FromRouter, Report, RouterJoined
from kv_transfer.messages import (
    Cancel,
    CommitRequest,
    Grant,
    Offer,
    Refuse,
    Renew,
    StatusAsk,
    StatusIs,
    TransferMessage,
    Wait,
)
from prefill_worker.config import PrefillConfig
from prefill_worker.core import PrefillCore
from tandem.messages import Assign, AssignMode, BlockEvents, CancelAssigned, WorkerAddress, WorkerLoad
from tandem.request import is_canary

STORY_ROWS_MAX = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCoreConfig:
    """Both sides of one worker."""

    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    audit_ms: int = 1_000  # how often an idle worker recounts its blocks; a busy one ten times less often
    quiet_ms: int = 200  # a worker is idle when nothing runs and nothing has happened for so long
    load_ms: int = 100  # how often the load is told when there is no step and only counts of blocks change

    def __post_init__(self) -> None:
        for name in ("audit_ms", "quiet_ms", "load_ms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")


class WorkerCore:
    """Everything that one worker decides. It is a `Core` of engine/loop.py; its actions are kv_transfer.actions.Action.

    Events: FromRouter, RouterJoined, RouterGone, TransferMessage, AgentEvent, AgentLost, PeerGone, Registered, Tick.
    """

    def __init__(
        self, *, me: WorkerAddress, layout: KVLayout, ledger: BlockLedger, batch: Batch, config: WorkerCoreConfig
    ) -> None:
        self.ledger = ledger
        self.batch = batch
        self.prefill = PrefillCore(me=me, layout=layout, ledger=ledger, batch=batch, config=config.prefill)
        self.decode = DecodeCore(me=me, layout=layout, ledger=ledger, batch=batch, config=config.decode)
        batch.swapping.pressure.recompute_ms = lambda tokens: self.prefill.queue.cost.predict_ms(tokens, tokens)
        self._config = config
        self._sessions: dict[int, None] = {}
        self._story: deque[str] = deque(maxlen=STORY_ROWS_MAX)
        self._num_block_reports = 0
        self._num_steps = 0
        self._tokens_read = self._tokens_written = 0
        self._planned_ms = 0
        self._last_step_ms = 0.0
        self._told_load: WorkerLoad | None = None
        self._told_load_ms = 0
        self._load_due_ms: int | None = None  # the load has changed and is told at this time
        self._audit: tuple[str, ...] = ()
        self._audited_ms: int | None = None  # None: not since the first event
        self._touched_ms: int | None = None  # when something changed last; None: nothing has since the audit

    # ---- what the loop calls -----------------------------------------------------------------------------------------

    def handle(self, now_ms: int, event: object) -> list[object]:
        """Takes an event in; returns what is to be done, in order. TypeError for what is no event of a worker."""
        self._tell(now_ms, event)
        if not isinstance(event, Tick):
            self._touch(now_ms)
        actions: list[Action] = []
        match event:
            case RouterJoined(session=session):
                self._join(session, actions)
            case FromRouter(session=session, message=message):
                self._join(session, actions)
                actions += self._from_router(now_ms, event, message)
            case RouterGone(session=session):
                self._sessions.pop(session, None)
                actions += self._both(now_ms, event)
            case TransferMessage():
                actions += self._from_peer(now_ms, event)
            case Tick():
                self._recount(now_ms)
                actions += self._both(now_ms, event)
            case _:
                actions += self._both(now_ms, event)
        self._report_state(now_ms, actions)
        return [*actions]

    def next_plan(self, now_ms: int) -> StepPlan | None:
        """The next step, or None when there is nothing to run."""
        self.prefill.arrange(now_ms)
        self.decode.arrange()
        plan = self.batch.compose()
        preempted = self.batch.take_preempted()
        for each in preempted:
            what = "is swapped out" if each.swapped else "lost its blocks and is prefilled again"
            self._story.append(f"{now_ms} {each.request_id} {what}: {each.reason}")
        self.decode.planned(now_ms, plan, [each.request_id for each in preempted])
        if plan is not None:
            self._planned_ms = now_ms
            self.prefill.planned(now_ms, plan)
        return plan

    def step_done(self, now_ms: int, plan: StepPlan, sampled: Sequence[Drawn | None]) -> list[object]:
        """The step has run; returns what is to be done, in order."""
        outcome = self.batch.apply(plan, sampled)
        self._touch(now_ms)
        self._num_steps += 1
        self._count(plan, outcome)
        self._last_step_ms = float(now_ms - self._planned_ms)
        actions = [*self.prefill.stepped(now_ms, plan, outcome), *self.decode.stepped(now_ms, plan, outcome)]
        self._report_state(now_ms, actions)
        return [*actions]

    def next_deadline_ms(self) -> int | None:
        """When a Tick is wanted at the latest; None: not at all."""
        due = (self.prefill.next_deadline_ms(), self.decode.next_deadline_ms(), self._load_due_ms, self._audit_due_ms())
        return min((at for at in due if at is not None), default=None)

    def story(self) -> list[str]:
        """The newest events and the stories of open attempts, oldest first."""
        return [*self._story, *self.prefill.stories(), *self.decode.stories()]

    # ---- who an event is for -----------------------------------------------------------------------------------------

    def _both(self, now_ms: int, event: object) -> list[Action]:
        return [*self.prefill.handle(now_ms, event), *self.decode.handle(now_ms, event)]

    def _from_router(self, now_ms: int, event: FromRouter, message: object) -> list[Action]:
        if not isinstance(message, Assign):
            return self._both(now_ms, event)
        prefills = message.mode is AssignMode.PREFILL
        mine, other = (self.prefill, self.decode) if prefills else (self.decode, self.prefill)
        actions: list[Action] = []
        epoch = other.epoch_of(message.request_id)
        if epoch is not None:
            if epoch >= message.epoch:
                return []  # the other role has it under this epoch or a newer one
            over = CancelAssigned(request_id=message.request_id, epoch=message.epoch - 1, reason="assigned anew")
            actions += other.handle(now_ms, FromRouter(session=event.session, message=over))
        return [*actions, *mine.handle(now_ms, event)]

    def _from_peer(self, now_ms: int, message: TransferMessage) -> list[Action]:
        """The decode side hears all sources and its migrations' targets, the prefill side its handoffs' targets."""
        match message.body:
            case Offer() | CommitRequest() | Renew() | StatusAsk():
                return self.decode.handle(now_ms, message)
            case Grant() | Refuse() | Wait() | StatusIs():
                migrates = self.decode.has_source(message.header.transfer_id)
                return (self.decode if migrates else self.prefill).handle(now_ms, message)
            case Cancel():
                hands_over = self.prefill.has_attempt(message.header.transfer_id)
                return (self.prefill if hands_over else self.decode).handle(now_ms, message)

    # ---- what every router hears -------------------------------------------------------------------------------------

    def _join(self, session: int, actions: list[Action]) -> None:
        """A new session gets all hashes; the others get them too, so that all count the same reports."""
        if session in self._sessions:
            return
        self._sessions[session] = None
        self.ledger.drain_events()
        self._num_block_reports += 1
        full = BlockEvents(sequence=self._num_block_reports, stored=self.ledger.hashes(), cleared=True)
        actions += [Report(session=each, piece=full) for each in self._sessions]
        self._told_load = None

    def _report_state(self, now_ms: int, actions: list[Action]) -> None:
        """Adds what has changed of the prefix cache and of the load."""
        stored, removed = self.ledger.drain_events()
        if stored or removed:
            self._num_block_reports += 1
            changed = BlockEvents(sequence=self._num_block_reports, stored=stored, removed=removed)
            actions += [Report(session=each, piece=changed) for each in self._sessions]
        load, told = self._load(now_ms), self._told_load
        self._load_due_ms = None
        if load == told:
            return
        counts_only = told is not None and load == replace(told, blocks=load.blocks)
        if counts_only and now_ms < self._told_load_ms + self._config.load_ms:
            self._load_due_ms = self._told_load_ms + self._config.load_ms
            return
        self._told_load, self._told_load_ms = load, now_ms
        actions += [Report(session=each, piece=load) for each in self._sessions]

    def _touch(self, now_ms: int) -> None:
        self._touched_ms = now_ms
        if self._audited_ms is None:
            self._audited_ms = now_ms

    def _audit_due_ms(self) -> int | None:
        """Recounting takes milliseconds, so it waits for a Tick, and for a while in which no commit is on its way."""
        if self._audited_ms is None:
            return None
        if self._touched_ms is None:
            late = (self.prefill.audit_due_ms(self._audited_ms), self.decode.audit_due_ms(self._audited_ms))
            return min((at for at in late if at is not None), default=None)
        busy_ms = self._audited_ms + self._config.audit_ms * 10
        if self.batch.num_running:
            return busy_ms
        return min(busy_ms, max(self._audited_ms + self._config.audit_ms, self._touched_ms + self._config.quiet_ms))

    def _recount(self, now_ms: int) -> None:
        due_ms = self._audit_due_ms()
        if due_ms is not None and now_ms >= due_ms:
            self._audited_ms, self._touched_ms = now_ms, None
            swapped = self.batch.swapping.space.audit(each.owner for each in self.batch.sequences())
            self._audit = (*self.ledger.audit(), *swapped, *self.prefill.audit(now_ms), *self.decode.audit(now_ms))

    def _load(self, now_ms: int) -> WorkerLoad:
        return WorkerLoad(
            running=self.batch.num_running,
            waiting=self.batch.num_waiting + self.decode.num_expected,
            blocks=self.ledger.counts(),
            prefill_backlog_tokens=self.batch.prefill_backlog_tokens,
            steps=self._num_steps,
            last_step_ms=self._last_step_ms,
            audit=self._audit,
            swap=self.batch.swapping.counts(),
            tokens_read=self._tokens_read,
            tokens_written=self._tokens_written,
        )

    def _count(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Adds what the step did for clients."""
        num_run = sum(len(row.tokens) for row in plan.rows if not is_canary(row.request_id))
        num_drawn = sum(row.sample for row in plan.rows if not is_canary(row.request_id))
        self._tokens_read += num_run - num_drawn
        self._tokens_written += sum(not is_canary(token.request_id) for token in outcome.tokens)

    def _tell(self, now_ms: int, event: object) -> None:
        match event:
            case Tick():
                return
            case FromRouter(session=session, message=message):
                about = f"{type(message).__name__} {message.request_id} epoch {message.epoch} of session {session}"
                if not isinstance(message, CancelAssigned) and message.transfer_id:
                    about += f", transfer {message.transfer_id}"
            case TransferMessage(header=header, body=body):
                about = f"{type(body).__name__} {header.transfer_id} epoch {header.epoch} from {header.sender}"
            case _:
                transfer = getattr(event, "transfer_id", "")
                about = f"{type(event).__name__} {transfer}".rstrip()
        self._story.append(f"{now_ms} {about}")
