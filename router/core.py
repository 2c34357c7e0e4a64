"""A request from admission to its last token, as a table of states and events, and the owner records of all requests.

The sentence it keeps: every admitted request ends exactly once, and each token index is delivered once and in order.
The owner record is the only commit point of a handoff or a move (design.md 3): a target asks for it with CommitAsk, a
compare-and-swap on (epoch, transfer). Epochs grow over all attempts and all lives of a request, at whichever router,
since each life brings its own (Submitted.first_epoch): nothing of an earlier one can be taken for the current one.
"""

from __future__ import annotations

from collections.abc import Callable

from kv_transfer.handoff_source import FAILED_CODE as HANDOFF_FAILED
from router import commit, recovery
from router.admission import Admission
from router.attempts import Attempts
from router.config import RouterConfig
from router.events import (
    INTERNAL,
    Action,
    AttemptLost,
    Cause,
    ClientGone,
    Event,
    FenceRaised,
    HandedOver,
    LetGo,
    LinkLost,
    LinkUp,
    MoveLost,
    MoveRequested,
    Recovering,
    Refuse,
    ReportArrived,
    RequestDue,
    RequestEvent,
    StageDue,
    StopRequested,
    Submitted,
    Tick,
    WorkerDraining,
    WorkerFlipped,
    WorkerGone,
    WorkerJoined,
    WorkerLost,
    WorkerSuspected,
)
from router.fleet import Fleet, Worker, WorkerState
from router.in_flight import InFlight
from router.line import Line
from router.move import MoveRecord
from router.moves import Moves
from router.outbox import Outbox
from router.owners import Owners
from router.placement import NoPlacement, Placer
from router.prefix_index import PrefixIndex
from router.request import Request, RequestSnapshot, RequestState, StatusSnapshot
from router.store import EmbeddedOwners, OwnerStore
from tandem.errors import (
    ERRORS,
    Cancelled,
    DeadlinePassed,
    DuplicateRequest,
    InvalidRequest,
    NotFinite,
    RequestLost,
    StepFailed,
    TandemError,
)
from tandem.messages import (
    AssignMode,
    CommitAsk,
    MoveFailed,
    OwnerQuery,
    RequestFailed,
    WorkerReport,
)
from tandem.request import FinishReason, RequestId, Token, TransferId


class RouterCore:
    """All requests and workers of one router. Times are milliseconds of any steady clock, the same for all events."""

    def __init__(self, config: RouterConfig, *, owners: OwnerStore | None = None) -> None:
        self._config = config
        self._outbox = Outbox()
        self._owners = Owners(EmbeddedOwners() if owners is None else owners, self._outbox)
        self.fleet = self._fleet = Fleet(report_lag_ms=config.report_lag_ms)  # for others to read only
        self.index = self._index = PrefixIndex()  # likewise
        self._placer = Placer(self._fleet, self._index, config)
        self._moves = Moves(config, self._fleet, self._placer, self._outbox)
        self._attempts = Attempts(config, self._fleet, self._placer, self._owners, self._moves, self._outbox)
        self.line = self._line = Line(config)  # likewise
        self._admission = Admission(config, placer=self._placer, line=self._line, ask=self._attempts.ask)
        self._flight = InFlight(
            config,
            fleet=self._fleet,
            line=self._line,
            attempts=self._attempts,
            admission=self._admission,
            outbox=self._outbox,
        )
        self._requests = self._flight.requests  # to read only
        self._now_ms = 0
        self._look_again = False
        self.num_stale_tokens = 0

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return sum(each.state is RequestState.ADMITTED for each in self._requests.values())

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of requests whose first token is to come."""
        return self._flight.queued_tokens

    def has(self, request_id: RequestId) -> bool:
        """Whether the request is in flight."""
        return request_id in self._requests

    def request_ids(self) -> list[RequestId]:
        """All requests in flight."""
        return list(self._requests)

    def handle(self, now_ms: int, event: Event) -> list[Action]:
        """The one entry: an event in, the actions that follow from it out, in order."""
        self._now_ms = now_ms
        match event:
            case Submitted():
                self._submit(event)
            case ReportArrived(report=report):
                self._report(report)
            case WorkerJoined():
                self._worker_joined(event)
            case WorkerDraining() | WorkerFlipped() | WorkerSuspected() | WorkerLost() | LinkUp() | LinkLost():
                self._worker_changed(event)
            case ClientGone() | LetGo() | FenceRaised() | StopRequested():
                request = self._requests.get(event.request_id)
                if request is not None:
                    self._step(request, None, event)
            case MoveRequested(request_id=request_id):
                ended = self._flight.history.state_of(request_id)
                self._moves.ask(now_ms, event, self._requests.get(request_id), ended)
            case Tick():
                self._tick()
        if self._look_again:
            self._line.advance(now_ms, self._place)
        self._look_again = False
        return self._outbox.take()

    # ---- requests come in ------------------------------------------------------------------------------------------

    def _submit(self, event: Submitted) -> None:
        new = event.request
        bound_ms = min(new.deadline_ms or self._config.request_deadline_ms, self._config.request_deadline_ms)
        request = Request(
            new=new,
            submitted_ms=self._now_ms,
            deadline_ms=self._now_ms + bound_ms,
            stage_since_ms=self._now_ms,
            answer=list(event.answer),
            next_epoch=event.first_epoch,
        )
        error = self._submit_error(event, request)
        if error is not None:
            self._outbox.add(Refuse(request_id=new.request_id, error=error))
            return
        self._flight.add(self._now_ms, request, taken_over=event.taken_over)
        if new.canary is not None:
            self._place(request)
            return
        self._line.append(request)
        self._look_again = True

    def _submit_error(self, event: Submitted, request: Request) -> TandemError | None:
        new = event.request
        if new.request_id in self._requests:
            return DuplicateRequest(f"a request of id {new.request_id!r} is being served")
        if not new.tokens:
            return InvalidRequest("prompt", "is empty; at least one token is needed")
        if event.taken_over or new.canary is not None:
            return None
        return self._admission.refusal(
            self._now_ms, request, num_requests=len(self._requests), queued_tokens=self._flight.queued_tokens
        )

    def _place(self, request: Request) -> NoPlacement | None:
        found = self._attempts.begin(self._now_ms, request)
        error = None if found is None else self._line.hopeless(request, found)
        if error is None:
            return found
        self._fail(request, error)
        return None

    # ---- workers ---------------------------------------------------------------------------------------------------

    def _worker_joined(self, event: WorkerJoined) -> None:
        known = self._fleet.current(event.info.worker_id)
        if known is not None:
            if event.incarnation <= known.incarnation:
                return
            self._remove_worker(known, f"superseded by incarnation {event.incarnation}")
        worker = self._fleet.join(event.info, event.incarnation)
        self._index.join(worker.slot, worker.incarnation)

    def _worker_changed(
        self, event: WorkerDraining | WorkerFlipped | WorkerSuspected | WorkerLost | LinkUp | LinkLost
    ) -> None:
        worker = self._fleet.get(event.worker_id, event.incarnation)
        if worker is None:
            return
        match event:
            case LinkUp():
                self._fleet.linked(worker, True)
                self._index.join(worker.slot, worker.incarnation)  # it begins with all that it holds
            case WorkerSuspected(suspected=suspected):
                self._fleet.suspected(worker, suspected)
            case WorkerDraining(draining=draining):
                self._fleet.drain(worker, draining)
                if draining:
                    self._drop_moves_to(worker)
            case WorkerFlipped(role=role):
                self._fleet.flip(worker, role)
            case LinkLost(reason=reason):
                self._unlink(worker, reason)
            case WorkerLost(reason=reason):
                self._remove_worker(worker, reason)
        self._look_again = True

    def _drop_moves_to(self, worker: Worker) -> None:
        """Whoever is emptied should not be filled; but who has lost its source has nothing else to go on from."""
        for request in list(self._requests.values()):
            moves = request.move is not None and request.move.target is worker
            if moves and request.state is RequestState.DECODING:
                self._step(request, worker, MoveLost(f"{worker.worker_id} is draining"))

    def _unlink(self, worker: Worker, reason: str) -> None:
        """No word to or from the worker any more: it cancels by itself what it was assigned on the broken stream."""
        self._fleet.linked(worker, False)
        why = f"{worker.worker_id} (incarnation {worker.incarnation}) was lost: {reason}"
        for request in [each for each in self._requests.values() if worker in each.involved]:
            request.involved = [each for each in request.involved if each is not worker]
            self._fleet.forget(worker, request.request_id)
            self._step(request, worker, WorkerGone(why))

    def _remove_worker(self, worker: Worker, reason: str) -> None:
        self._unlink(worker, reason)
        self._index.leave(worker.slot)
        self._fleet.leave(worker, reason)

    def _report(self, report: WorkerReport) -> None:
        """What a worker says. Stale incarnations are not heard; neither is who has no stream."""
        worker = self._fleet.get(report.worker_id, report.incarnation)
        if worker is None or worker.link is not WorkerState.READY:
            return
        if report.blocks is not None:
            self._index.apply(worker.slot, worker.incarnation, report.blocks)
        for stats in report.transfers:
            if not self._moves.transferred(stats):
                self._flight.transferred(stats)
        pieces: list[Token | CommitAsk | OwnerQuery | RequestFailed | MoveFailed] = []
        pieces += (*report.tokens, *report.commit_asks, *report.owner_queries, *report.failed, *report.moves_failed)
        for event in pieces:
            request = self._requests.get(event.request_id)
            if request is not None:
                self._step(request, worker, event)
            elif isinstance(event, CommitAsk):
                self._answer(worker, event.request_id, event.transfer_id, refused="the request is over")
            if isinstance(event, OwnerQuery):
                self._answer(worker, event.request_id, event.transfer_id)
        if report.load is not None:
            self._fleet.report(worker, report.load, self._now_ms)
            self._look_again = True

    # ---- time ------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        for request in list(self._requests.values()):
            event = self._due(request)
            if event is not None:
                self._step(request, None, event)
        self._flight.history.expire(self._now_ms)
        self._moves.expire(self._now_ms)
        self._look_again = True

    def _due(self, request: Request) -> RequestDue | StageDue | MoveLost | None:
        """What of the request has lasted too long: itself, the state that it is in, or its move."""
        waits = request.state is RequestState.ADMITTED
        if self._now_ms >= request.deadline_ms:
            return RequestDue()
        if self._now_ms >= (self._line.due_ms(request) if waits else request.stage_deadline_ms):
            return StageDue()
        move = request.move
        if move is not None and self._now_ms >= move.deadline_ms:
            return MoveLost(f"no commit {self._now_ms - move.began_ms} ms after it began")
        return None

    # ---- the table -------------------------------------------------------------------------------------------------

    def _step(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        """One event to one request. A missing row is a late or doubled word from outside, and has no effect."""
        row = TABLE.get((request.state, type(event)))
        if row is None:
            assert not isinstance(event, INTERNAL), f"{event} in {request.state}: {list(request.story)}"
            return
        row(self, request, worker, event)

    def _on_token(self, request: Request, worker: Worker | None, token: RequestEvent) -> None:
        assert isinstance(token, Token)
        assert worker is not None
        owner = request.owner
        if not commit.is_owner(owner, worker, token.epoch) or token.index < len(request.answer):
            self.num_stale_tokens += 1
            return
        if token.index > len(request.answer):
            reason = f"{worker.worker_id} sent token {token.index} where {len(request.answer)} was due"
            self._step(request, worker, AttemptLost(reason, Cause.BROKEN_WORD, (worker.key,)))
            return
        self._take_token(request, worker, token)
        if request.state is RequestState.PREFILLING:
            assert request.placement is not None
            local = request.placement.mode is AssignMode.LOCAL
            request.state = RequestState.DECODING if local else RequestState.HANDING_OFF
        if request.state is RequestState.DECODING:
            request.stage_deadline_ms = self._now_ms + self._config.decode_stall_ms

    def _take_token(self, request: Request, worker: Worker | None, token: Token) -> None:
        """Delivers the next token, and ends the request with its last."""
        if not request.attempt_has_token:
            request.attempt_has_token = True
            if worker is not None:
                self._fleet.first_token(worker, request.request_id, self._now_ms)
        if request.first_token_ms is None:
            self._flight.first_token(self._now_ms, request)
        if request.landing is not None:
            self._moves.landed(self._now_ms, request)
        request.last_token_ms = self._now_ms
        request.num_in_vain = 0
        request.answer.append(token)
        self._outbox.deliver(request.request_id, token)
        if token.finish is not None:
            self._finish(request, token.finish, worker)

    def _on_commit_ask(self, request: Request, worker: Worker | None, ask: RequestEvent) -> None:
        """The compare-and-swap of a handoff or a move: the target becomes the owner under the next epoch, or is told
        why not."""
        assert isinstance(ask, CommitAsk)
        assert worker is not None
        owner = request.owner
        if commit.is_repeated(owner, worker, ask):
            self._answer(worker, request.request_id, ask.transfer_id)  # the same answer again
            return
        refused = commit.refusal(request, worker, ask)
        if refused:
            self._answer(worker, request.request_id, ask.transfer_id, refused=refused)
            return
        fresh, violation = commit.carried(request, ask)
        if violation:
            moves = request.move is not None
            lost = AttemptLost(violation, Cause.BROKEN_WORD, (worker.key,))
            self._step(request, worker, MoveLost(violation) if moves else lost)
            self._answer(worker, request.request_id, ask.transfer_id, refused=violation)
            return
        source = self._fleet.get(owner.worker_id, owner.incarnation) if owner is not None else None
        for token in fresh:
            self._take_token(request, source, token)
        if request.state is RequestState.FINISHED:
            self._answer(worker, request.request_id, ask.transfer_id, refused="the request is over")
            return
        self._commit(request, worker, source, ask)

    def _commit(self, request: Request, target: Worker, source: Worker | None, ask: CommitAsk) -> None:
        owner = self._owners.commit(request, target, ask.transfer_id)
        request.involved = [target]
        self._fleet.arrived(target, request.request_id)
        if request.move is not None:
            self._moves.committed(request)
            self._look_again = True  # there is room at its source
        elif request.first_token_ms is not None and request.new.canary is None:
            request.handoff_ms = after_ms = self._now_ms - request.first_token_ms
            self._outbox.add(HandedOver(request_id=request.request_id, after_ms=after_ms))
        request.state = RequestState.DECODING
        request.stage_deadline_ms = self._now_ms + self._config.decode_stall_ms
        request.tell(self._now_ms, f"{target.worker_id} owns it at epoch {owner.epoch}")
        self._answer(target, request.request_id, ask.transfer_id)
        if source is not None:
            self._fleet.forget(source, request.request_id)
            self._answer(source, request.request_id, ask.transfer_id)

    def _on_failed(self, request: Request, worker: Worker | None, failed: RequestEvent) -> None:
        assert isinstance(failed, RequestFailed)
        assert worker is not None
        owner = request.owner
        if owner is None or failed.epoch != owner.epoch or worker not in request.involved:
            return
        why = f"{worker.worker_id}: {failed.code}: {failed.message}"
        if request.move is not None and worker is request.move.target:
            if failed.transfer_id == request.move.transfer_id:  # and not of an earlier move to the same target
                self._step(request, worker, MoveLost(why))
        elif failed.retryable:
            # Of a handoff that failed the other end is to blame, as far as who reports it can see.
            others = [each for each in request.involved if each is not worker and failed.code == HANDOFF_FAILED]
            blamed = [] if request.state is RequestState.ORPHANED else others or [worker]  # then it is who is gone
            cause = Cause.HANDOFF_FAILED if failed.code == HANDOFF_FAILED else Cause.REPORTED
            self._step(request, worker, AttemptLost(why, cause, tuple(each.key for each in blamed)))
        elif failed.code == InvalidRequest.code:
            self._fail(request, InvalidRequest("request", failed.message))
        elif failed.code in (NotFinite.code, StepFailed.code):
            self._fail(request, ERRORS[failed.code](why))
        else:
            self._fail(request, RequestLost(why))

    # ---- moves -----------------------------------------------------------------------------------------------------

    def _on_worker_gone(self, request: Request, worker: Worker | None, gone: RequestEvent) -> None:
        """A target that is lost ends its move alone. Behind a lost source the target may hold all of the request."""
        assert isinstance(gone, WorkerGone)
        heir = recovery.heir(request)
        if request.move is not None and worker is request.move.target:
            self._step(request, worker, MoveLost(gone.reason))
        elif heir is None:
            self._step(request, worker, AttemptLost(gone.reason, Cause.WORKER_GONE))
        else:
            request.state = RequestState.ORPHANED
            request.stage_deadline_ms = self._now_ms + self._config.orphan_commit_ms
            request.last_failure = gone.reason
            request.tell(self._now_ms, f"{gone.reason}; {heir.worker_id} may hold all of it")

    def _on_move_lost(self, request: Request, worker: Worker | None, lost: RequestEvent) -> None:
        assert isinstance(lost, MoveLost)
        if request.state is RequestState.ORPHANED:
            why = f"{request.last_failure}; its move failed, too: {lost.reason}"
            self._step(request, worker, AttemptLost(why, Cause.WORKER_GONE))
        else:
            self._drop_move(request, lost.reason, tell_source=True)

    def _on_move_failed(self, request: Request, worker: Worker | None, failed: RequestEvent) -> None:
        """The source has given the move up and runs on; of a move that is over already it is no news."""
        assert isinstance(failed, MoveFailed)
        if self._is_source(request, worker, failed.transfer_id):
            self._drop_move(request, f"{failed.code}: {failed.message}", tell_source=False)

    def _on_revoke(self, request: Request, worker: Worker | None, query: RequestEvent) -> None:
        """The source wants the request back: from now on no commit of the move succeeds. The answer says so."""
        assert isinstance(query, OwnerQuery)
        if query.revoke and self._is_source(request, worker, query.transfer_id):
            self._drop_move(request, "the source revoked it", tell_source=False)

    def _is_source(self, request: Request, worker: Worker | None, transfer_id: TransferId) -> bool:
        move = request.move
        return move is not None and move.transfer_id == transfer_id and worker is move.source

    def _drop_move(self, request: Request, reason: str, *, tell_source: bool) -> None:
        self._moves.drop(self._now_ms, request, reason, tell_source=tell_source)
        self._look_again = True  # there is room at its target again

    # ---- losses ----------------------------------------------------------------------------------------------------

    def _on_attempt_lost(self, request: Request, worker: Worker | None, lost: RequestEvent) -> None:
        """Ends the attempt everywhere and lets the request wait for another place, or gives it up."""
        assert isinstance(lost, AttemptLost)
        salvages = recovery.leaves_blocks(request)
        self._attempts.end(self._now_ms, request, lost.reason)
        request.avoid.update(lost.suspects)
        if lost.suspects and request.state is not RequestState.DECODING:
            self._attempts.failed(self._now_ms, request)
        request.last_failure = lost.reason
        request.tell(self._now_ms, f"attempt lost: {lost.reason}")
        given_up = recovery.exhausted(self._config, request)
        if given_up:
            self._fail(request, RequestLost(f"{given_up}; at last: {lost.reason}"))
            return
        if request.new.canary is None:
            self._outbox.add(Recovering(request_id=request.request_id, cause=lost.cause))
        request.state = RequestState.ADMITTED
        request.stage_since_ms = self._now_ms
        request.not_before_ms = self._now_ms + recovery.pause_ms(self._config, request, salvages=salvages)
        self._line.appendleft(request)
        self._look_again = True

    def _on_wait_due(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        self._fail(request, self._line.overdue(self._now_ms, request))

    def _on_attempt_due(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        if request.state is RequestState.ORPHANED:  # of its two workers the one to blame is gone
            why = f"{request.last_failure}; no commit followed"
            self._step(request, worker, AttemptLost(why, Cause.WORKER_GONE))
            return
        reason, suspect = recovery.overdue(self._config, request, self._now_ms)
        self._step(request, worker, AttemptLost(reason, Cause.OVERDUE, (suspect.key,)))

    def _on_request_due(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        bound_ms = request.deadline_ms - request.submitted_ms
        self._fail(request, DeadlinePassed(f"did not end within {bound_ms} ms; it was {request.state.value}"))

    def _on_client_gone(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        assert isinstance(event, ClientGone)
        self._fail(request, Cancelled(event.reason))

    def _on_let_go(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        assert isinstance(event, LetGo)
        self._fail(request, event.error)

    def _on_fence_raised(self, request: Request, worker: Worker | None, raised: RequestEvent) -> None:
        assert isinstance(raised, FenceRaised)
        request.next_epoch = raised.first_epoch
        if request.state is not RequestState.ADMITTED:
            self._step(request, worker, AttemptLost("it goes on under a later fence", Cause.FENCE))

    def _on_stop(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        assert isinstance(event, StopRequested)
        if event.index >= len(request.answer):
            return  # the edge can only stop at what was delivered
        del request.answer[event.index + 1 :]
        self._finish(request, FinishReason.STOP, None)

    # ---- ends ------------------------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason, by: Worker | None) -> None:
        self._flight.finish(self._now_ms, request, reason, by)
        self._look_again = True

    def _fail(self, request: Request, error: TandemError) -> None:
        self._flight.fail(self._now_ms, request, error)
        self._look_again = True

    def _answer(self, worker: Worker, request_id: RequestId, transfer_id: TransferId, refused: str = "") -> None:
        self._owners.tell(worker, request_id, self._requests.get(request_id), transfer_id, refused)

    # ---- status ----------------------------------------------------------------------------------------------------

    def status(self, now_ms: int) -> StatusSnapshot:
        """What operators see."""
        return self._flight.status(now_ms, self._index, self._moves)

    def explain(self, now_ms: int, request_id: RequestId) -> tuple[RequestSnapshot, tuple[MoveRecord, ...]] | None:
        """A request that runs or is remembered, and its moves; None: it is not known."""
        found = self._flight.find(now_ms, request_id)
        return None if found is None else (found, self._moves.records_of(request_id))


_Row = Callable[[RouterCore, Request, Worker | None, RequestEvent], None]
_S, _C = RequestState, RouterCore

# What a request does with an event while workers have it: the rows know the states apart where they must.
_ASSIGNED: dict[type, _Row] = {
    Token: _C._on_token,
    CommitAsk: _C._on_commit_ask,
    RequestFailed: _C._on_failed,
    ClientGone: _C._on_client_gone,
    LetGo: _C._on_let_go,
    FenceRaised: _C._on_fence_raised,
    StopRequested: _C._on_stop,
    AttemptLost: _C._on_attempt_lost,
    WorkerGone: _C._on_worker_gone,
    StageDue: _C._on_attempt_due,
    RequestDue: _C._on_request_due,
}

# What a request does with an event. A missing pair: a late or doubled word from outside, without effect; events from
# inside never meet a missing pair.
TABLE: dict[tuple[RequestState, type], _Row] = {
    (_S.ADMITTED, CommitAsk): _C._on_commit_ask,
    (_S.ADMITTED, ClientGone): _C._on_client_gone,
    (_S.ADMITTED, LetGo): _C._on_let_go,
    (_S.ADMITTED, FenceRaised): _C._on_fence_raised,
    (_S.ADMITTED, StopRequested): _C._on_stop,
    (_S.ADMITTED, StageDue): _C._on_wait_due,
    (_S.ADMITTED, RequestDue): _C._on_request_due,
    (_S.DECODING, MoveFailed): _C._on_move_failed,
    (_S.DECODING, OwnerQuery): _C._on_revoke,
    (_S.DECODING, MoveLost): _C._on_move_lost,
    (_S.ORPHANED, MoveLost): _C._on_move_lost,
}
TABLE |= {
    (state, event): row for state in (_S.PREFILLING, _S.HANDING_OFF, _S.DECODING) for event, row in _ASSIGNED.items()
}
# Who has lost its worker hears no token: the one who wrote them is gone, and the target has not committed.
TABLE |= {(_S.ORPHANED, event): row for event, row in _ASSIGNED.items() if event is not Token}
