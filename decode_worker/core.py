"""A request's life on the decode side: expected, received, owned, decoded to its end, or until it moves elsewhere.

Or it is prefilled here from the start. The core shares the batch and the block ledger with the worker's other role;
whoever composes the two (cluster/worker_core.py) calls `arrange` before a step is composed, `planned` when it is, and
`stepped` after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from decode_worker.config import DecodeConfig
from decode_worker.moving import MoveSources
from decode_worker.request import Request
from decode_worker.reserving import Reservations
from engine.blocks import BlockLedger
from engine.events import PeerGone, RouterGone, Tick
from engine.layout import KVLayout
from engine.prefix_cache import block_hashes
from engine.prompt_clock import PromptClock
from engine.sequence import Sequence
from engine.step import Batch, StepOutcome, StepPlan
from engine.step import Failed as StepFailed
from kv_transfer.actions import Action, AgentLost, FromRouter, Registered, Report, SendTransfer, request_failed
from kv_transfer.handoff import (
    AcceptBlocks,
    AskCommit,
    Attempt,
    Closed,
    EndQuarantine,
    Expect,
    Failed,
    Quarantine,
    Reserve,
    Say,
    Silence,
    Stop,
    TargetAction,
)
from kv_transfer.handoff_target import TargetHandoff, TargetState
from kv_transfer.lateness import next_late_ms
from kv_transfer.messages import (
    AgentEvent,
    Body,
    Cancel,
    EndTransfer,
    ExpectFrames,
    FrameAcked,
    FrameFailed,
    FrameLanded,
    Offer,
    Refuse,
    StatusAsk,
    StatusIs,
    TransferMessage,
    TransferQuiet,
)
from tandem.messages import (
    Assign,
    AssignMode,
    CancelAssigned,
    CommitAsk,
    Migrate,
    OwnerIs,
    RouterMessage,
    StopMove,
    TransferStats,
    WorkerAddress,
)
from tandem.request import RequestId, Token, TransferId, is_canary

FIRST = -1.0  # the priority of who is to run before all that wait; ranks begin at 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """A transfer that is closed, to answer what comes late."""

    session: int
    attempt: Attempt
    state: TargetState


class DecodeCore:
    """Decides for the decode side of one worker. Times are milliseconds on the clock of `now_ms`."""

    def __init__(
        self, *, me: WorkerAddress, layout: KVLayout, ledger: BlockLedger, batch: Batch, config: DecodeConfig
    ) -> None:
        self.me = me
        self.config = config
        self.num_ignored = 0  # messages that were stale, late, doubled or about nothing known
        self.moves = MoveSources(layout=layout, ledger=ledger, batch=batch, config=config, leave=self._moved)
        self._room = Reservations(layout=layout, ledger=ledger, batch=batch, config=config.admission)
        self._ledger = ledger
        self._batch = batch
        self._requests: dict[RequestId, Request] = {}
        self._attempts: dict[TransferId, Request] = {}
        self._ended: OrderedDict[TransferId, _Ended] = OrderedDict()
        self._early: OrderedDict[TransferId, tuple[int, TransferMessage]] = OrderedDict()
        self._num_assigned = 0
        self._planned_ms = 0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_attempts(self) -> int:
        """Attempts that hold something, in either direction, those in quarantine included."""
        return len(self._attempts) + len(self.moves)

    @property
    def num_expected(self) -> int:
        """Requests whose blocks have not all come."""
        return sum(each.machine is not None and each.sequence is None for each in self._requests.values())

    def epoch_of(self, request_id: RequestId) -> int | None:
        """The epoch under which the request is here, or None."""
        request = self._requests.get(request_id)
        return None if request is None else request.newest_epoch

    def has_source(self, transfer_id: TransferId) -> bool:
        """Whether this is the source of a transfer that is not closed."""
        return self.moves.has_attempt(transfer_id)

    def audit(self, now_ms: int) -> list[str]:
        """Quarantines that do not end, and reads of what has left."""
        late = []
        for transfer, each in self._attempts.items():
            since_ms = each.machine.quarantined_since_ms if each.machine is not None else None
            if since_ms is not None and now_ms - since_ms > self.config.handoff.quarantine_warn_ms:
                late.append(f"transfer {transfer} is in quarantine for {now_ms - since_ms} ms")
        return [*late, *self.moves.audit(now_ms)]

    def audit_due_ms(self, after_ms: int) -> int | None:
        """When, later than `after_ms`, the audit first finds something that it does not yet; None: not by itself."""
        machines = [each.machine for each in self._attempts.values() if each.machine is not None]
        since_ms = [machine.quarantined_since_ms for machine in machines] + self.moves.ended_since_ms()
        return next_late_ms(since_ms, after_ms, self.config.handoff.quarantine_warn_ms)

    def machines(self) -> list[TargetHandoff]:
        """The targets' ends of attempts that are not closed."""
        return [each.machine for each in self._attempts.values() if each.machine is not None]

    def stories(self) -> list[str]:
        """The story of every attempt that is not closed."""
        machines = [(key, each.machine) for key, each in self._attempts.items() if each.machine is not None]
        targets = [f"target {key}: {machine.state}: {machine.story}" for key, machine in machines]
        return [*targets, *self.moves.stories()]

    def next_deadline_ms(self) -> int | None:
        """When a Tick is wanted at the latest; None: not at all."""
        due = [each.machine.next_deadline_ms() for each in self._attempts.values() if each.machine is not None]
        due.append(self.moves.next_deadline_ms())
        return min((at for at in due if at is not None), default=None)

    # ---- events ------------------------------------------------------------------------------------------------------

    def handle(self, now_ms: int, event: object) -> list[Action]:
        """Takes one event in; returns what is to be done, in order. What is not for this side has no effect."""
        noticed = self.moves.notice(now_ms)
        return [*noticed, *self._handle(now_ms, event)] if noticed else self._handle(now_ms, event)

    def _handle(self, now_ms: int, event: object) -> list[Action]:
        match event:
            case FromRouter():
                return self._from_router(now_ms, event.session, event.message, event.heard_s)
            case TransferMessage():
                return self._heard(now_ms, event)
            case FrameLanded() | FrameFailed() | TransferQuiet() | FrameAcked():
                return self._agent_said(now_ms, event)
            case Tick():
                self._forget_early(now_ms)
                return self._all(now_ms, event, list(self._attempts.values()))
            case AgentLost():
                return self._all(now_ms, event, list(self._attempts.values()))
            case PeerGone(worker_id=worker_id, incarnation=incarnation):
                gone = (worker_id, incarnation)
                of = [(each, each.assign.peer) for each in self._attempts.values()]
                lost = [each for each, peer in of if peer and (peer.worker_id, peer.incarnation) == gone]
                return self._all(now_ms, event, lost)
            case RouterGone(session=session):
                ended = [each for each in self._requests.values() if each.session == session]
                return [action for each in ended for action in self._stop(now_ms, each, "its router is gone")]
            case Registered(address=address):
                self.me = address
                return []
            case _:
                raise TypeError(f"{type(event).__name__} is no event of a decode core")

    def _from_router(self, now_ms: int, session: int, message: RouterMessage, heard_s: float) -> list[Action]:
        match message:
            case Assign(mode=AssignMode.DECODE | AssignMode.LOCAL):
                return self._assigned(now_ms, session, message, heard_s)
            case CancelAssigned():
                request = self._requests.get(message.request_id)
                over = request is not None and message.epoch >= request.newest_epoch
                return self._stop(now_ms, request, message.reason) if request is not None and over else []
            case OwnerIs() | StopMove() if self.moves.has_attempt(message.transfer_id):
                return self.moves.heard(now_ms, message.transfer_id, message)
            case OwnerIs():
                return self._told(now_ms, message)
            case Migrate():
                request = self._requests.get(message.request_id)
                return self.moves.begin(now_ms, me=self.me, session=session, request=request, migrate=message)
        return []

    def _agent_said(self, now_ms: int, event: AgentEvent) -> list[Action]:
        if self.moves.has_attempt(event.transfer_id):
            return self.moves.told(now_ms, event)
        request = self._attempts.get(event.transfer_id)
        if request is None or request.machine is None or not request.machine.attempt.is_own(event):
            self.num_ignored += not isinstance(event, FrameAcked)  # those are mostly of the worker's other role
            return []
        return self._drive(now_ms, request, event)

    def _all(self, now_ms: int, event: object, attempts: list[Request]) -> list[Action]:
        """To all ends of transfers that it concerns."""
        targets = [action for each in attempts for action in self._drive(now_ms, each, event)]
        return [*targets, *self.moves.all(now_ms, event)]

    def _assigned(self, now_ms: int, session: int, assign: Assign, heard_s: float) -> list[Action]:
        actions: list[Action] = []
        before = self._requests.get(assign.request_id)
        if before is not None:
            if before.newest_epoch >= assign.epoch:
                self.num_ignored += 1
                return []
            actions += self._stop(now_ms, before, f"assigned anew at epoch {assign.epoch}")

        def refuse(code: str, message: str, *, retryable: bool) -> list[Action]:
            failed = request_failed(
                assign.request_id, assign.epoch, code, message, retryable=retryable, transfer_id=assign.transfer_id
            )
            return [*actions, Report(session=session, piece=failed)]

        local = assign.mode is AssignMode.LOCAL
        if not local:
            if assign.peer is None or not assign.transfer_id or assign.peer.worker_id == self.me.worker_id:
                return refuse(
                    "bad_assign", "a handoff needs a transfer and a peer other than this worker", retryable=False
                )
            if assign.transfer_id in self._attempts or assign.transfer_id in self._ended:
                return refuse("bad_assign", f"transfer {assign.transfer_id} is or was in use here", retryable=True)
        if len(self._requests) >= self.config.max_requests:
            return refuse("overloaded", f"{len(self._requests)} requests are here, no more may", retryable=True)
        if not 0 < assign.num_prompt_tokens <= len(assign.tokens):
            limits = f"must be between 1 and {len(assign.tokens)}"
            return refuse(
                "invalid_request", f"num_prompt_tokens is {assign.num_prompt_tokens}, {limits}", retryable=False
            )
        too_large = self._batch.refusal(num_tokens=len(assign.tokens), request_id=assign.request_id)
        if too_large is not None:
            return refuse("invalid_request", too_large, retryable=False)
        request = self._new(now_ms, session, assign, heard_s)
        self._requests[assign.request_id] = request
        if local:
            self._run(request, tokens=list(assign.tokens), num_computed=0, blocks=[])
            return actions
        self._attempts[assign.transfer_id] = request
        early = self._early.pop(assign.transfer_id, None)
        return [*actions, *(self._heard(now_ms, early[1]) if early is not None else [])]

    def _new(self, now_ms: int, session: int, assign: Assign, heard_s: float) -> Request:
        self._num_assigned += 1
        machine = None
        if assign.mode is AssignMode.DECODE:
            assert assign.peer is not None, "checked"
            attempt = Attempt(
                transfer_id=assign.transfer_id,
                request_id=assign.request_id,
                epoch=assign.epoch,
                me=self.me.worker_id,
                peer=assign.peer,
                source_incarnation=assign.peer.incarnation,
                target_incarnation=self.me.incarnation,
            )
            machine = TargetHandoff(
                attempt=attempt,
                config=self.config.handoff,
                deadline_ms=now_ms + assign.deadline_ms,
                num_tokens=len(assign.tokens),
                next_index=len(assign.tokens) - assign.num_prompt_tokens,
                block_size=self._ledger.block_size,
                move=assign.move,
            )
        return Request(
            session=session,
            assign=assign,
            received_ms=now_ms,
            clock=PromptClock(received_ms=now_ms, heard_s=heard_s) if machine is None else None,
            epoch=assign.epoch,
            salt=self._num_assigned,
            # Numbered: what it had here before may be a step's until that is over.
            owner=f"{assign.request_id}/{assign.epoch}/{assign.transfer_id or assign.mode}/{self._num_assigned}",
            machine=machine,
            hashes=block_hashes(
                self._batch.config.namespace, assign.tokens, self._ledger.block_size, salt=assign.cache_salt
            ),
        )

    def _heard(self, now_ms: int, message: TransferMessage) -> list[Action]:
        """A source speaks: of an attempt that is alive, of one that has ended, or of one still to be assigned."""
        header, body = message.header, message.body
        if self.moves.has_attempt(header.transfer_id):
            return self.moves.heard(now_ms, header.transfer_id, message)
        request = self._attempts.get(header.transfer_id)
        if request is not None and request.machine is not None:
            if request.machine.attempt.is_current(header):
                return self._drive(now_ms, request, body)
        elif (ended := self._ended.get(header.transfer_id)) is not None:
            if ended.attempt.is_current(header):
                return self._answer_late(ended, body)
        elif isinstance(body, Offer):
            # The router told the source first. Our assignment is under way, or the source offers again.
            self._forget_early(now_ms)
            self._early[header.transfer_id] = (now_ms, message)
            if len(self._early) > self.config.early_offers_max:
                self._early.popitem(last=False)
            return []
        self.num_ignored += 1
        return []

    def _answer_late(self, ended: _Ended, body: Body) -> list[Action]:
        self.num_ignored += 1
        answer: Body
        if isinstance(body, StatusAsk):
            answer = StatusIs(state=ended.state.value)
        elif ended.state is TargetState.ACTIVE or isinstance(body, Cancel | Refuse | StatusIs):
            return []
        else:
            answer = Cancel(reason="this attempt is over at the target")
        message = TransferMessage(header=ended.attempt.header(), body=answer)
        return [SendTransfer(to=ended.attempt.peer, message=message)]

    def _told(self, now_ms: int, owner: OwnerIs) -> list[Action]:
        request = self._attempts.get(owner.transfer_id)
        if request is not None:
            return self._drive(now_ms, request, owner)
        ended = self._ended.get(owner.transfer_id)
        if ended is None or ended.state is TargetState.ACTIVE:
            return []
        ours = (ended.attempt.me, ended.attempt.target_incarnation, ended.attempt.epoch + 1)
        if (owner.worker_id, owner.incarnation, owner.epoch) != ours:
            return []
        message = "the target had given the attempt up"
        failed = request_failed(
            owner.request_id,
            owner.epoch,
            "handoff_failed",
            message,
            retryable=True,
            transfer_id=owner.transfer_id,
        )
        return [Report(session=ended.session, piece=failed)]

    def _forget_early(self, now_ms: int) -> None:
        while self._early:
            transfer, (at_ms, _) = next(iter(self._early.items()))
            if now_ms - at_ms <= self.config.early_offer_ms:
                return
            del self._early[transfer]

    def _stop(self, now_ms: int, request: Request, reason: str) -> list[Action]:
        """The router's word: the request is over here."""
        self._leave(request)
        actions = self.moves.stop(now_ms, request, reason)
        if self._attempts.get(request.assign.transfer_id) is request:
            actions += self._drive(now_ms, request, Stop(reason=reason))
        return actions

    def _moved(self, request: Request) -> list[Action]:
        """It is another worker's: what it has here becomes prefix cache."""
        told = self._account(request)
        self._leave(request)
        return told

    # ---- steps -------------------------------------------------------------------------------------------------------

    def arrange(self) -> None:
        """Whoever has just come from elsewhere goes into the very next step, also with a rest of a block to compute."""
        for request in self._requests.values():
            if request.machine is not None and request.sequence is not None and not request.stepped:
                request.sequence.priority = FIRST

    def planned(self, now_ms: int, plan: StepPlan | None, preempted: Iterable[RequestId]) -> None:
        """A step has been composed and is about to run, or there is none; `preempted` have lost their blocks for it."""
        self._planned_ms = now_ms
        for row in plan.rows if plan is not None else ():
            if (request := self._requests.get(row.request_id)) is not None and request.clock is not None:
                request.clock.runs(now_ms)
        self.moves.planned(now_ms, plan, preempted)

    def stepped(self, now_ms: int, plan: StepPlan, outcome: StepOutcome) -> list[Action]:
        """The step has run and is booked: its tokens go to their routers, and who is to stand still does."""
        actions = self.moves.notice(now_ms)
        self.moves.clock(now_ms, plan)
        tokens = {token.request_id: token for token in outcome.tokens}
        failures = {failed.request_id: failed for failed in outcome.failed}
        for row in plan.rows:
            request = self._requests.get(row.request_id)
            if request is None or request.sequence is None or row.request_id not in outcome.computed:
                continue
            request.num_recomputed_tokens += max(0, min(row.position, request.num_known_tokens) - row.start)
            request.num_known_tokens = max(request.num_known_tokens, row.position)
            actions += self._ran(now_ms, request, tokens.get(row.request_id), failures.get(row.request_id))
        return actions

    def _ran(self, now_ms: int, request: Request, token: Token | None, failed: StepFailed | None) -> list[Action]:
        """One request's part of a step."""
        actions: list[Action] = []
        if not request.stepped:
            request.stepped = True
            actions += self._first_step(now_ms, request)
        if token is not None and token.finish is not None:
            if not is_canary(request.request_id):
                self._room.admission.finished(token.index + 1)
            actions += self._account(request)
        if token is not None:
            request.newest.append(token)
            actions += [request.report(token), *self._first_token(now_ms, request)]
        if failed is not None:
            piece = request_failed(failed.request_id, request.epoch, failed.code, failed.reason, retryable=False)
            actions.append(request.report(piece))
            actions += self._end(now_ms, request, failed.reason, spoiled=True)
        elif token is not None and token.finish is not None:
            actions += self._end(now_ms, request, "the request has finished")
        else:
            actions += self.moves.stepped(now_ms, request)
        return actions

    def _end(self, now_ms: int, request: Request, reason: str, *, spoiled: bool = False) -> list[Action]:
        self._leave(request)
        return self.moves.stop(now_ms, request, reason, spoiled=spoiled)

    def _first_step(self, now_ms: int, request: Request) -> list[Action]:
        """What the first step took of a request that came from elsewhere."""
        if request.machine is None:
            return []
        stats = TransferStats(
            request_id=request.request_id,
            transfer_id=request.assign.transfer_id,
            first_step_ms=float(now_ms - self._planned_ms),
        )
        return [request.report(stats)]

    def _first_token(self, now_ms: int, request: Request) -> list[Action]:
        """How long a prompt that is read here waited and ran, once."""
        if request.clock is None:
            return []
        first, request.clock = request.clock.times(now_ms), None
        stats = TransferStats(request_id=request.request_id, transfer_id=request.assign.transfer_id, first=first)
        return [request.report(stats)]

    def _account(self, request: Request) -> list[Action]:
        """What this worker prefilled of the request itself; nothing for one that only decoded here."""
        if not request.num_recomputed_tokens:
            return []
        assert request.sequence is not None
        local = request.machine is None
        stats = TransferStats(
            request_id=request.assign.request_id,
            transfer_id=request.assign.transfer_id,
            tokens_recomputed=request.num_recomputed_tokens,
            tokens_cached=request.sequence.num_cached_tokens if local else 0,
        )
        return [request.report(stats)]

    def _run(self, request: Request, *, tokens: list[int], num_computed: int, blocks: list[int]) -> None:
        request.sequence = Sequence(
            request_id=request.assign.request_id,
            epoch=request.epoch,
            tokens=tokens,
            num_prompt_tokens=request.assign.num_prompt_tokens,
            sampling=request.assign.sampling,
            num_computed=num_computed,
            blocks=blocks,
            owner=request.owner,
            cache_salt=request.assign.cache_salt,
            hashes=request.hashes,
            num_published=request.num_reused,
        )
        request.num_known_tokens = len(request.assign.tokens) if request.machine is None else len(tokens) - 1
        self._batch.add(request.sequence)

    # ---- what the machine asks ---------------------------------------------------------------------------------------

    def _drive(self, now_ms: int, request: Request, event: object) -> list[Action]:
        """Hands the event to the request's end of the handoff and does what it asks."""
        assert request.machine is not None
        actions: list[Action] = []
        for asked in request.machine.handle(now_ms, event):
            actions += self._do(now_ms, request, request.machine, asked)
        return actions

    def _do(self, now_ms: int, request: Request, machine: TargetHandoff, asked: TargetAction) -> list[Action]:
        attempt = machine.attempt
        transfer = attempt.transfer_id
        match asked:
            case Say(body=body):
                return [SendTransfer(to=attempt.peer, message=TransferMessage(header=attempt.header(), body=body))]
            case Reserve(offer=offer):
                others = self._requests.values()
                answer = self._room.reserve(now_ms, request, offer, others=others, endpoint=self.me.endpoint)
                return self._drive(now_ms, request, answer)
            case Expect(blocks=blocks, generations=generations, endpoint=endpoint):
                expect = ExpectFrames(
                    transfer_id=transfer,
                    epoch=attempt.epoch,
                    source_incarnation=attempt.source_incarnation,
                    target_incarnation=attempt.target_incarnation,
                    blocks=blocks,
                    generations=generations,
                    endpoint=endpoint,
                )
                return [expect]
            case Silence():
                return [EndTransfer(transfer_id=transfer, epoch=attempt.epoch)]
            case AskCommit(next_index=next_index, tokens=tokens):
                ask = CommitAsk(
                    request_id=attempt.request_id,
                    transfer_id=transfer,
                    from_epoch=attempt.epoch,
                    next_index=next_index,
                    tokens=tokens,
                )
                return [request.report(ask)]
            case AcceptBlocks():
                return self._accept(now_ms, request, asked)
            case Quarantine():
                self._ledger.quarantine(transfer)
                self._leave(request)
            case EndQuarantine(whole=whole):
                known = {block: request.hashes[at] for at, block in whole if at < len(request.hashes)}
                self._ledger.end_quarantine(transfer, known)
            case Failed(code=code, reason=reason, retryable=retryable):
                failed = request_failed(
                    attempt.request_id, machine.epoch, code, reason, retryable=retryable, transfer_id=transfer
                )
                return [request.report(failed)]
            case Closed():
                self._close(request, machine)
        return []

    def _accept(self, now_ms: int, request: Request, accept: AcceptBlocks) -> list[Action]:
        """The request is ours: its blocks are, and it runs from its newest token on."""
        assign = request.assign
        request.epoch = accept.epoch
        self._ledger.accept(assign.transfer_id, request.owner)
        tokens = [*assign.tokens, *(token.token_id for token in accept.tokens)]
        too_large = self._batch.refusal(num_tokens=len(tokens), request_id=assign.request_id)
        if too_large is not None:
            self._leave(request)
            # A request that ran elsewhere is no bad request; a worker with a larger pool may take it.
            failed = request_failed(
                assign.request_id, accept.epoch, "invalid_request", too_large, retryable=assign.move
            )
            return [request.report(failed)]
        blocks = list(self._ledger.blocks_of(request.owner))
        self._run(request, tokens=tokens, num_computed=accept.num_computed, blocks=blocks)
        stats = TransferStats(
            request_id=assign.request_id,
            transfer_id=assign.transfer_id,
            blocks_granted=request.num_granted,
            blocks_moved=accept.num_blocks,
            blocks_reused=request.num_reused,
            bytes=accept.num_bytes,
            frames=accept.num_frames,
            committed_ms=now_ms - request.received_ms,
        )
        return [request.report(stats)]

    def _close(self, request: Request, machine: TargetHandoff) -> None:
        del self._attempts[request.assign.transfer_id]
        if machine.state is not TargetState.ACTIVE:
            self._leave(request)
        ended = _Ended(session=request.session, attempt=machine.attempt, state=machine.state)
        self._ended[request.assign.transfer_id] = ended
        if len(self._ended) > self.config.ended_max:
            self._ended.popitem(last=False)

    def _leave(self, request: Request) -> None:
        """The request is over here. Its blocks become prefix cache; those still granted are its attempt's affair."""
        request_id = request.assign.request_id
        if self._requests.get(request_id) is request:
            del self._requests[request_id]
        if request.sequence is not None and self._batch.get(request_id) is request.sequence:
            self._batch.remove(request_id)
        self._ledger.release(request.owner)
