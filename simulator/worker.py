"""One worker of a world: the real core over the fake runner, stepped on the virtual clock, with a shell of streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.worker_core import WorkerCore
from cluster.worker_reports import ReportBuilder
from engine.blocks import BlockLedger
from engine.events import PeerGone, RouterGone, Tick
from engine.fake_runner import FakeRunner
from engine.step import Drawn, StepPlan
from engine.swapping_runner import SwappingRunner
from kv_transfer.actions import FromRouter, Report, RouterJoined, SendTransfer
from kv_transfer.messages import AgentEvent, EndTransfer, ExpectFrames, SendFrame, TransferMessage
from simulator.agents import VirtualAgent
from simulator.checks import Checks, Contents
from simulator.choices import Choices
from simulator.network import Clock, Schedule
from tandem.messages import RouterMessage, WorkerAddress, WorkerInfo, WorkerReport
from tandem.request import RequestId, WorkerId


class VirtualWorker:
    """One incarnation. Events are heard while a step runs, and queue up while the worker stands still.

    `to_router(worker, session, report)` and `to_peer(worker, address, message)` put words on the way.
    """

    def __init__(
        self,
        *,
        info: WorkerInfo,
        address: WorkerAddress,
        core: WorkerCore,
        runner: FakeRunner,
        memory: memoryview,
        ledger: BlockLedger,
        schedule: Schedule,
        clock: Clock,
        choices: Choices,
        checks: Checks,
        step_max_ms: int,
        slow_steps: int,
        to_router: Callable[[VirtualWorker, int, WorkerReport], None],
        to_peer: Callable[[VirtualWorker, WorkerAddress, TransferMessage], None],
    ) -> None:
        self.info = info
        self.address = address
        self.core = core
        self.runner = runner
        self._steps = SwappingRunner(runner, pool=memory, num_slots=core.batch.swapping.space.num_slots)
        self.ledger = ledger
        self.agent: VirtualAgent | None = None
        self.alive = True
        self.paused_until_ms = 0
        self.num_steps = 0
        self.clock = clock
        self._schedule = schedule
        self._choices = choices
        self._checks = checks
        self._step_max_ms = step_max_ms
        self.slow_steps = slow_steps
        self._to_router = to_router
        self._to_peer = to_peer
        self._reports = ReportBuilder(worker_id=info.worker_id, incarnation=address.incarnation)
        self._inbox: list[object] = []
        self._stepping = False
        self._turn_due = False
        self._wake_ms: int | None = None

    @property
    def worker_id(self) -> WorkerId:
        return self.info.worker_id

    @property
    def hears(self) -> bool:
        """Whether it lives, and does not stand still."""
        return self.alive and self.paused_until_ms <= self._schedule.now_ms

    def knows(self, request_id: RequestId, epoch: int) -> bool:
        """Whether it has the request in this epoch, or in the one before, whose end it is about to hear of."""
        for core in (self.core.prefill, self.core.decode):
            mine = core.epoch_of(request_id)
            if mine is not None and mine in (epoch, epoch - 1):
                return True
        return False

    def request_ids(self) -> set[RequestId]:
        """All that it has for a router, in either role."""
        return {*self.core.prefill._requests, *self.core.decode._requests}

    def stands_with(self, request_id: RequestId) -> bool:
        """Whether the request, which decodes here, stands still, and not for want of the end of a step."""
        sequence = self.core.batch.get(request_id)
        if sequence is None or self._stepping:
            return False
        return sequence.held and self.core.decode.epoch_of(request_id) == sequence.epoch

    def post(self, event: object) -> None:
        """Hands the core an event at its next turn."""
        if self.alive:
            self._inbox.append(event)
            self._turn(0)

    def joined(self, session: int) -> None:
        self.post(RouterJoined(session=session))

    def said(self, session: int, message: RouterMessage) -> None:
        self.post(FromRouter(session=session, message=message))

    def gone(self, session: int) -> None:
        self.post(RouterGone(session=session))

    def peer_gone(self, peer: WorkerAddress) -> None:
        self.post(PeerGone(worker_id=peer.worker_id, incarnation=peer.incarnation))

    def agent_said(self, event: AgentEvent) -> None:
        self.post(event)

    def pause(self, duration_ms: int) -> None:
        """Stands still, as under SIGSTOP; its agent goes on."""
        self.paused_until_ms = max(self.paused_until_ms, self._schedule.now_ms + duration_ms)

    def resume(self) -> None:
        """Goes on, as after SIGCONT."""
        self.paused_until_ms = self._schedule.now_ms
        self._turn_due = False  # it would come when the pause was to end
        self._turn(0)

    def kill(self) -> None:
        """The process and its agent are gone."""
        self.alive = False
        if self.agent is not None:
            self.agent.kill()

    # ---- the engine loop, as engine/loop.py has it -----------------------------------------------------------------

    def _turn(self, delay_ms: int) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._schedule.after(delay_ms, self._take_turn)

    def _take_turn(self) -> None:
        self._turn_due = False
        if not self.alive:
            return
        if (stands_ms := self.paused_until_ms - self._schedule.now_ms) > 0:
            self._turn(stands_ms)
            return
        now_ms = self.clock.now_ms
        events, self._inbox = self._inbox, []
        for event in events:
            self._perform(self.core.handle(now_ms, event))
            if isinstance(event, FromRouter):
                self._checks.heard(self.worker_id, self.address.incarnation, event.message)
        due_ms = self.core.next_deadline_ms()
        if due_ms is not None and due_ms <= now_ms:
            self._perform(self.core.handle(now_ms, Tick()))
            due_ms = self.core.next_deadline_ms()
        plan = None if self._stepping else self.core.next_plan(now_ms)
        if plan is not None:
            self._begin(plan)
        if due_ms is not None:
            self._sleep(due_ms)

    def _sleep(self, due_ms: int) -> None:
        """Until the core's deadline."""
        now_ms = self._schedule.now_ms
        at_ms = max(self.clock.true_ms(due_ms), now_ms + 1)
        if self._wake_ms is not None and now_ms < self._wake_ms <= at_ms:
            return  # an earlier waking is on its way
        self._wake_ms = at_ms
        self._schedule.after(at_ms - now_ms, self._woken)

    def _woken(self) -> None:
        self._wake_ms = None
        self._turn(0)

    def _begin(self, plan: StepPlan) -> None:
        self._stepping = True
        contents = self._checks.step_begins(self.worker_id, self.address.incarnation, plan, self.core.batch)
        duration_ms = 1 + self._choices.choose(self._step_max_ms)
        if self._choices.chance(self.slow_steps):
            duration_ms += 200 * (1 + self._choices.choose(20))
        early = self._choices.choose(2) == 0
        sampled = self._steps.run(plan) if early else None
        self._schedule.after(duration_ms, lambda: self._end(plan, sampled, contents))

    def _end(self, plan: StepPlan, sampled: Sequence[Drawn | None] | None, contents: Contents) -> None:
        """The memory was read and written at the start of the step or at its end: nobody else may care which."""
        if not self.alive:
            return
        if (stands_ms := self.paused_until_ms - self._schedule.now_ms) > 0:
            self._schedule.after(min(stands_ms, 100), lambda: self._end(plan, sampled, contents))
            return
        self._checks.step_ends(self.worker_id, contents, self.ledger)
        if sampled is None:
            sampled = self._steps.run(plan)
        self._stepping = False
        self.num_steps += 1
        self._perform(self.core.step_done(self.clock.now_ms, plan, sampled))
        self._turn(0)

    def _perform(self, actions: list[object]) -> None:
        reports: list[Report] = []
        for action in actions:
            match action:
                case Report():
                    reports.append(action)
                case SendTransfer(to=to, message=message):
                    self._to_peer(self, to, message)
                case SendFrame() | ExpectFrames() | EndTransfer():
                    if self.agent is not None:
                        self.agent.handle(action, endpoint=self.core.prefill.me.endpoint)  # the agent it was told of
                case _:
                    raise AssertionError(f"{action} is no action of a worker")
        for session, report in self._reports.merge(reports):
            self._to_router(self, session, report)
