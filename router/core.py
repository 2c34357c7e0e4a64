"""A request from admission to its last token, as a table of states and events, and the owner records of all requests.

The sentence it keeps: every admitted request ends exactly once, and each token index is delivered once and in order.
The owner record is the only commit point of a handoff (design.md 3): a target asks for it with CommitAsk, which is a
compare-and-swap on (epoch, transfer). Epochs grow over all requests of this core and are never used twice, so nothing
of an earlier attempt, or of an earlier request of the same id, can be taken for the current one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

from kv_transfer.handoff_source import FAILED_CODE as HANDOFF_FAILED
from router import admission, commit
from router.config import RouterConfig
from router.events import (
    INTERNAL,
    Action,
    AttemptLost,
    ClientGone,
    Deliver,
    Event,
    Fail,
    Finish,
    LinkLost,
    LinkUp,
    Refuse,
    ReportArrived,
    RequestDue,
    RequestEvent,
    SendToWorker,
    StageDue,
    StopRequested,
    Submitted,
    Tick,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerSuspected,
)
from router.fleet import Fleet, Worker, WorkerState
from router.history import History
from router.line import Line
from router.placement import Ask, NoPlacement, Placement, Placer, Why
from router.prefix_index import PrefixIndex
from router.request import Request, RequestState, StatusSnapshot, snapshot, worker_snapshot
from router.store import EmbeddedOwners, OwnerRecord, OwnerStore
from tandem.errors import (
    ERRORS,
    Cancelled,
    DeadlinePassed,
    DuplicateRequest,
    InvalidRequest,
    NotFinite,
    Overloaded,
    RequestLost,
    StepFailed,
    TandemError,
    Unavailable,
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
    WorkerReport,
)
from tandem.request import FinishReason, RequestId, Token, TransferId

GRACE_MS = 1_000  # the router waits so much longer than it told the workers to


class RouterCore:
    """All requests and workers of one router. Times are milliseconds of any steady clock, the same for all events."""

    def __init__(self, config: RouterConfig, *, first_epoch: int = 1, owners: OwnerStore | None = None) -> None:
        self._config = config
        self._owners: OwnerStore = EmbeddedOwners() if owners is None else owners
        self.fleet = self._fleet = Fleet(report_lag_ms=config.report_lag_ms)  # for others to read only
        self.index = self._index = PrefixIndex()  # likewise
        self._placer = Placer(self._fleet, self._index, config)
        self._requests: dict[RequestId, Request] = {}
        self._line = Line(config)
        self._history = History(keep_ms=config.history_ms, num_max=config.history_max)
        self._queued_tokens = 0
        self._next_epoch = first_epoch
        self._actions: list[Action] = []
        self._now_ms = 0
        self._look_again = False
        self.num_stale_tokens = 0

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._requests)

    def handle(self, now_ms: int, event: Event) -> list[Action]:
        """The one entry: an event in, the actions that follow from it out, in order."""
        self._now_ms = now_ms
        self._actions = []
        match event:
            case Submitted():
                self._submit(event)
            case ReportArrived(report=report):
                self._report(report)
            case WorkerJoined():
                self._worker_joined(event)
            case WorkerDraining() | WorkerSuspected() | WorkerLost() | LinkUp() | LinkLost():
                self._worker_changed(event)
            case ClientGone(request_id=request_id) | StopRequested(request_id=request_id):
                request = self._requests.get(request_id)
                if request is not None:
                    self._step(request, None, event)
            case Tick():
                self._tick()
        if self._look_again:
            self._line.advance(now_ms, self._place)
        self._look_again = False
        return self._actions

    # ---- requests come in ------------------------------------------------------------------------------------------

    def _submit(self, event: Submitted) -> None:
        new = event.request
        error = self._submit_error(event)
        if error is not None:
            self._actions.append(Refuse(request_id=new.request_id, error=error))
            return
        bound_ms = min(new.deadline_ms or self._config.request_deadline_ms, self._config.request_deadline_ms)
        request = Request(
            new=new,
            submitted_ms=self._now_ms,
            deadline_ms=self._now_ms + bound_ms,
            stage_since_ms=self._now_ms,
        )
        request.tell(self._now_ms, "admitted")
        self._requests[new.request_id] = request
        self._queued_tokens += len(new.tokens)
        self._line.append(request)
        self._look_again = True

    def _submit_error(self, event: Submitted) -> TandemError | None:
        new = event.request
        if new.request_id in self._requests:
            return DuplicateRequest(f"a request of id {new.request_id!r} is being served")
        if not new.tokens:
            return InvalidRequest("prompt", "is empty; at least one token is needed")
        return admission.refusal(
            self._config,
            num_requests=len(self._requests),
            queued_tokens=self._queued_tokens,
            new_tokens=len(new.tokens),
            predicted_wait_ms=self._placer.shortest_wait_ms(self._now_ms),
        )

    def _place(self, request: Request) -> NoPlacement | None:
        found = self._placer.place(self._now_ms, self._ask(request))
        if isinstance(found, Placement):
            self._assign(request, found)
        elif found.why is Why.NEVER_FITS:
            self._fail(request, InvalidRequest("prompt", found.reason))
        else:
            return found
        return None

    def _due_ms(self, request: Request) -> int:
        """When the request, or the state that it is in, has lasted too long."""
        waits = request.state is RequestState.ADMITTED
        return min(request.deadline_ms, self._line.due_ms(request) if waits else request.stage_deadline_ms)

    def _ask(self, request: Request) -> Ask:
        for first in islice(self._fleet, 1):  # all workers of a fleet serve one model
            request.hash_blocks(first.info.namespace, first.info.block_size)
        return Ask(
            num_tokens=request.num_tokens,
            num_more=max(1, request.new.sampling.max_tokens - len(request.answer)),
            hashes=request.hashes,
            avoid=frozenset(request.avoid),
        )

    def _assign(self, request: Request, placement: Placement) -> None:
        """Gives the request to its workers under a fresh epoch; the next epoch is kept for the commit."""
        epoch = self._next_epoch
        self._next_epoch += 2
        source, target = self._at(placement.prefill_worker), self._at(placement.decode_worker)
        local = placement.mode is AssignMode.LOCAL
        transfer_id = TransferId("" if local else f"{request.request_id}.{epoch}")
        owner = OwnerRecord(
            request_id=request.request_id,
            epoch=epoch,
            worker_id=source.worker_id,
            incarnation=source.incarnation,
            transfer_id=transfer_id,
        )
        swapped = self._owners.swap(request.request_id, None, owner)
        assert swapped, f"{request.request_id} had an owner when it was placed: {list(request.story)}"
        ask = self._ask(request)
        left_ms = request.deadline_ms - self._now_ms
        deadline_ms = max(1, min(left_ms, self._config.handoff_deadline_ms + 3 * round(placement.predicted_ms)))
        request.owner, request.placement = owner, placement
        request.involved = [source] if local else [source, target]
        request.state = RequestState.PREFILLING
        request.stage_deadline_ms = self._now_ms + deadline_ms + GRACE_MS
        request.placed_ms = self._now_ms
        request.attempt_has_token = False
        where = source.worker_id if local else f"{source.worker_id} -> {target.worker_id}"
        request.tell(self._now_ms, f"placed on {where} at epoch {epoch}: {placement.reason}")
        self._fleet.charge_prefill(
            source,
            request.request_id,
            now_ms=self._now_ms,
            predicted_ms=placement.prefill_ms,
            num_uncached=request.num_tokens - placement.num_cached_tokens,
            num_tokens=request.num_tokens,
        )
        self._placer.charge(self._now_ms, placement.prefill_ms)
        self._fleet.reserve(target, request.request_id, self._placer.num_blocks(ask, target))
        # The target first: it should know of the request when the source's offer comes.
        roles = ((target, AssignMode.DECODE, source), (source, AssignMode.PREFILL, target))
        for worker, mode, peer in ((source, AssignMode.LOCAL, None),) if local else roles:
            message = Assign(
                request_id=request.request_id,
                epoch=epoch,
                mode=mode,
                tokens=request.tokens,
                num_prompt_tokens=len(request.new.tokens),
                sampling=request.new.sampling,
                transfer_id=transfer_id,
                peer=None if peer is None else peer.address,
                deadline_ms=deadline_ms,
            )
            self._send(worker, message, placement.reason)

    # ---- workers ---------------------------------------------------------------------------------------------------

    def _worker_joined(self, event: WorkerJoined) -> None:
        known = self._fleet.current(event.info.worker_id)
        if known is not None:
            if event.incarnation <= known.incarnation:
                return
            self._remove_worker(known, f"superseded by incarnation {event.incarnation}")
        worker = self._fleet.join(event.info, event.incarnation)
        self._index.join(worker.slot, worker.incarnation)

    def _worker_changed(self, event: WorkerDraining | WorkerSuspected | WorkerLost | LinkUp | LinkLost) -> None:
        worker = self._fleet.get(event.worker_id, event.incarnation)
        if worker is None:
            return
        match event:
            case LinkUp():
                self._fleet.linked(worker, True)
                self._index.join(worker.slot, worker.incarnation)  # it begins with all that it holds
            case WorkerSuspected(suspected=suspected):
                self._fleet.suspected(worker, suspected)
            case WorkerDraining():
                self._fleet.drain(worker)
            case LinkLost(reason=reason):
                self._unlink(worker, reason)
            case WorkerLost(reason=reason):
                self._remove_worker(worker, reason)
        self._look_again = True

    def _unlink(self, worker: Worker, reason: str) -> None:
        """No word to or from the worker any more: it cancels by itself what it was assigned on the broken stream."""
        self._fleet.linked(worker, False)
        why = f"{worker.worker_id} (incarnation {worker.incarnation}) was lost: {reason}"
        for request in [each for each in self._requests.values() if worker in each.involved]:
            request.involved = [each for each in request.involved if each is not worker]
            self._fleet.forget(worker, request.request_id)
            self._step(request, worker, AttemptLost(why))

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
            self._transferred(stats)
        pieces: list[Token | CommitAsk | OwnerQuery | RequestFailed] = []
        pieces += (*report.tokens, *report.commit_asks, *report.owner_queries, *report.failed)
        for event in pieces:
            request = self._requests.get(event.request_id)
            if isinstance(event, OwnerQuery):
                self._answer(worker, event.request_id, event.transfer_id)
            elif request is not None:
                self._step(request, worker, event)
            elif isinstance(event, CommitAsk):
                self._answer(worker, event.request_id, event.transfer_id, refused="the request is over")
        if report.load is not None:
            self._fleet.report(worker, report.load, self._now_ms)
            self._look_again = True

    def _transferred(self, stats: TransferStats) -> None:
        request = self._requests.get(stats.request_id)
        if request is not None:
            request.transferred = request.transferred.plus(stats)
        else:
            self._history.transferred(stats)

    # ---- time ------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now_ms = self._now_ms
        due = [each for each in self._requests.values() if now_ms >= self._due_ms(each)]
        for request in due:
            self._step(request, None, RequestDue() if now_ms >= request.deadline_ms else StageDue())
        self._history.expire(now_ms)
        self._look_again = True

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
            self._step(request, worker, AttemptLost(reason, (worker.key,)))
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
            request.first_token_ms = self._now_ms
            self._queued_tokens -= len(request.new.tokens)
            request.tell(self._now_ms, "first token")
        request.answer.append(token)
        last = self._actions[-1] if self._actions else None
        if isinstance(last, Deliver) and last.request_id == request.request_id:
            self._actions[-1] = Deliver(request_id=request.request_id, tokens=(*last.tokens, token))
        else:
            self._actions.append(Deliver(request_id=request.request_id, tokens=(token,)))
        if token.finish is not None:
            self._finish(request, token.finish, worker)

    def _on_commit_ask(self, request: Request, worker: Worker | None, ask: RequestEvent) -> None:
        """The compare-and-swap of a handoff: the target becomes the owner under the next epoch, or is told why not."""
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
            self._answer(worker, request.request_id, ask.transfer_id, refused=violation)
            self._step(request, worker, AttemptLost(violation, (worker.key,)))
            return
        source = self._fleet.get(owner.worker_id, owner.incarnation) if owner is not None else None
        for token in fresh:
            self._take_token(request, source, token)
        if request.state is RequestState.FINISHED:
            self._answer(worker, request.request_id, ask.transfer_id, refused="the request is over")
            return
        self._commit(request, worker, source, ask)

    def _commit(self, request: Request, target: Worker, source: Worker | None, ask: CommitAsk) -> None:
        was = request.owner
        assert was is not None
        owner = replace(
            was, epoch=was.epoch + 1, worker_id=target.worker_id, incarnation=target.incarnation, committed=True
        )
        swapped = self._owners.swap(request.request_id, was, owner)
        assert swapped, f"the owner record of {request.request_id} changed under its router: {list(request.story)}"
        request.owner = owner
        request.involved = [target]
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
        if failed.retryable:
            # Of a handoff that failed the other end is to blame, as far as who reports it can see.
            others = [each for each in request.involved if each is not worker and failed.code == HANDOFF_FAILED]
            self._step(request, worker, AttemptLost(why, tuple(each.key for each in others or [worker])))
        elif failed.code == InvalidRequest.code:
            self._fail(request, InvalidRequest("request", failed.message))
        elif failed.code in (NotFinite.code, StepFailed.code):
            self._fail(request, ERRORS[failed.code](why))
        else:
            self._fail(request, RequestLost(why))

    def _on_attempt_lost(self, request: Request, worker: Worker | None, lost: RequestEvent) -> None:
        """Ends the attempt everywhere and lets the request wait for another place, or gives it up."""
        assert isinstance(lost, AttemptLost)
        self._leave_workers(request, lost.reason)
        request.avoid.update(lost.suspects)
        request.last_failure = lost.reason
        request.tell(self._now_ms, f"attempt lost: {lost.reason}")
        if request.num_replacements >= self._config.replacements_max:
            error = f"placed {request.num_replacements + 1} times in vain; at last: {lost.reason}"
            self._fail(request, RequestLost(error))
            return
        request.num_replacements += 1
        request.state = RequestState.ADMITTED
        request.stage_since_ms = self._now_ms
        backoff = (1 << (request.num_replacements - 1)) - 1
        request.not_before_ms = self._now_ms + self._config.replace_backoff_ms * backoff
        self._line.appendleft(request)
        self._look_again = True

    def _on_wait_due(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        why = "its turn did not come" if self._line.blocked is None else self._line.blocked.reason
        message = f"waited {self._now_ms - request.stage_since_ms} ms: {why}"
        message += f"; before that: {request.last_failure}" if request.last_failure else ""
        if self._line.lacks_workers:
            self._fail(request, Unavailable(message))
        else:
            self._fail(request, Overloaded(message, retry_after_ms=self._config.workers_wait_ms))

    def _on_attempt_due(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        after_ms = self._now_ms - request.placed_ms
        what = {
            RequestState.PREFILLING: f"no first token {after_ms} ms after the placement",
            RequestState.HANDING_OFF: f"no commit {after_ms} ms after the placement",
            RequestState.DECODING: f"no token for {self._config.decode_stall_ms} ms",
        }[request.state]
        suspect = request.involved[0] if request.state is RequestState.PREFILLING else request.involved[-1]
        self._step(request, worker, AttemptLost(f"{what} ({suspect.worker_id})", (suspect.key,)))

    def _on_request_due(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        bound_ms = request.deadline_ms - request.submitted_ms
        self._fail(request, DeadlinePassed(f"did not end within {bound_ms} ms; it was {request.state.value}"))

    def _on_client_gone(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        assert isinstance(event, ClientGone)
        self._fail(request, Cancelled(event.reason))

    def _on_stop(self, request: Request, worker: Worker | None, event: RequestEvent) -> None:
        assert isinstance(event, StopRequested)
        if event.index >= len(request.answer):
            return  # the edge can only stop at what was delivered
        del request.answer[event.index + 1 :]
        self._finish(request, FinishReason.STOP, None)

    # ---- ends ------------------------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason, by: Worker | None) -> None:
        """`by` wrote the last token and needs no telling."""
        request.state = RequestState.FINISHED
        if by is not None and by in request.involved:
            request.involved.remove(by)
            self._fleet.forget(by, request.request_id)
        request.tell(self._now_ms, f"finished: {reason.value}")
        self._actions.append(Finish(request_id=request.request_id, reason=reason, usage=request.usage()))
        self._end(request, "")

    def _fail(self, request: Request, error: TandemError) -> None:
        request.state = RequestState.FAILED
        request.tell(self._now_ms, f"failed: {error.message}")
        self._actions.append(Fail(request_id=request.request_id, error=error))
        self._end(request, f"{error.code}: {error.message}")

    def _end(self, request: Request, error: str) -> None:
        ended = snapshot(request, self._now_ms, error=error)
        self._leave_workers(request, error or "the request is finished")
        if request.first_token_ms is None:
            self._queued_tokens -= len(request.new.tokens)
        del self._requests[request.request_id]
        self._history.add(self._now_ms, ended)
        self._look_again = True

    def _leave_workers(self, request: Request, reason: str) -> None:
        """Cancels the attempt where it lives and takes the owner record away: a later commit of it fails."""
        owner = request.owner
        if owner is None:
            return
        for worker in request.involved:
            self._fleet.forget(worker, request.request_id)
            if worker.link is WorkerState.READY:
                message = CancelAssigned(request_id=request.request_id, epoch=owner.epoch, reason=reason)
                self._send(worker, message, reason)
        swapped = self._owners.swap(request.request_id, owner, None)
        assert swapped, f"the owner record of {request.request_id} changed under its router: {list(request.story)}"
        request.owner = None
        request.involved = []

    def _send(self, worker: Worker, message: RouterMessage, reason: str) -> None:
        self._actions.append(
            SendToWorker(worker_id=worker.worker_id, incarnation=worker.incarnation, message=message, reason=reason)
        )

    def _answer(self, worker: Worker, request_id: RequestId, transfer_id: TransferId, refused: str = "") -> None:
        """Says what the owner record holds now; of a request that no worker has, that it is over."""
        owner = self._owners.get(request_id)
        message = OwnerIs(
            request_id=request_id,
            transfer_id=transfer_id,
            epoch=0 if owner is None else owner.epoch,
            worker_id=None if owner is None else owner.worker_id,
            incarnation=0 if owner is None else owner.incarnation,
            refused=refused,
        )
        self._send(worker, message, refused or "the owner record was asked")

    def _at(self, address: WorkerAddress) -> Worker:
        worker = self._fleet.get(address.worker_id, address.incarnation)
        assert worker is not None, f"{address} was placed on, and is not in the fleet"
        return worker

    # ---- status ----------------------------------------------------------------------------------------------------

    def status(self, now_ms: int) -> StatusSnapshot:
        """What operators see."""
        workers = [
            worker_snapshot(each, self._index.num_blocks(each.slot) if each.state is not WorkerState.DEAD else 0)
            for each in (*self._fleet, *self._fleet.dead())
        ]
        waits_for = "" if self._line.blocked is None else self._line.blocked.reason
        running = [snapshot(each, now_ms, waits_for=waits_for) for each in self._requests.values()]
        return StatusSnapshot(
            workers=tuple(workers),
            requests=(*self._history.snapshots(), *running),
            queued_tokens=self._queued_tokens,
            waiting=sum(each.state is RequestState.ADMITTED for each in self._requests.values()),
        )


_Row = Callable[[RouterCore, Request, Worker | None, RequestEvent], None]
_S, _C = RequestState, RouterCore

# What a request does with an event while workers have it: the rows know the three states apart where they must.
_ASSIGNED: dict[type, _Row] = {
    Token: _C._on_token,
    CommitAsk: _C._on_commit_ask,
    RequestFailed: _C._on_failed,
    ClientGone: _C._on_client_gone,
    StopRequested: _C._on_stop,
    AttemptLost: _C._on_attempt_lost,
    StageDue: _C._on_attempt_due,
    RequestDue: _C._on_request_due,
}

# What a request does with an event. A missing pair: a late or doubled word from outside, without effect; events from
# inside never meet a missing pair.
TABLE: dict[tuple[RequestState, type], _Row] = {
    (_S.ADMITTED, CommitAsk): _C._on_commit_ask,
    (_S.ADMITTED, ClientGone): _C._on_client_gone,
    (_S.ADMITTED, StopRequested): _C._on_stop,
    (_S.ADMITTED, StageDue): _C._on_wait_due,
    (_S.ADMITTED, RequestDue): _C._on_request_due,
} | {(state, event): row for state in (_S.PREFILLING, _S.HANDING_OFF, _S.DECODING) for event, row in _ASSIGNED.items()}
