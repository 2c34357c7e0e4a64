"""A request's life on the prefill side: queued, offered, prefilled in chunks that leave as they end, handed over.

The core shares the batch and the block ledger with the worker's other role; whoever composes the two
(cluster/worker_core.py) calls `arrange` before a step is composed, `planned` when it is, and `stepped` after it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.blocks import BlockLedger
from engine.events import PeerGone, RouterGone, Tick
from engine.layout import KVLayout
from engine.prefix_cache import block_hashes
from engine.prompt_clock import PromptClock
from engine.sequence import Sequence
from engine.step import Batch, StepOutcome, StepPlan
from kv_transfer.actions import Action, AgentLost, FromRouter, Piece, Registered, Report, SendTransfer, request_failed
from kv_transfer.exports import Exports
from kv_transfer.handoff import (
    AskOwner,
    Attempt,
    Closed,
    EndExport,
    ExportFrame,
    Failed,
    HandedOver,
    Over,
    Say,
    Silence,
    SourceAction,
    Stop,
)
from kv_transfer.handoff_source import BlocksReady, Fence, SourceHandoff, SourceState, Start
from kv_transfer.lateness import next_late_ms, not_quiet
from kv_transfer.messages import (
    CommitRequest,
    EndTransfer,
    FrameAcked,
    FrameFailed,
    FrameLanded,
    Grant,
    Offer,
    TransferMessage,
    TransferQuiet,
)
from prefill_worker.config import PrefillConfig
from prefill_worker.queue import Place, PrefillQueue, Prompt
from tandem.messages import (
    Assign,
    AssignMode,
    CancelAssigned,
    OwnerIs,
    OwnerQuery,
    TransferStats,
    WorkerAddress,
)
from tandem.request import RequestId, Token, TransferId, is_canary

CANARY_RANK = -2.0  # before all that wait; ranks begin at 0


@dataclass(slots=True, kw_only=True)
class _Request:
    """One request that this side prefills, or an attempt of one that is not yet closed."""

    session: int
    assign: Assign
    clock: PromptClock
    sequence: Sequence
    machine: SourceHandoff
    num_cached_blocks: int  # found in the prefix cache when it came
    last_chunk_ms: int = 0  # when its last chunk began
    fenced: bool = False  # its first token is drawn
    released: bool = False
    ended_ms: int | None = None  # since then only the agent keeps the attempt open


class PrefillCore:
    """Decides for the prefill side of one worker. Times are milliseconds on the clock of `now_ms`."""

    def __init__(
        self, *, me: WorkerAddress, layout: KVLayout, ledger: BlockLedger, batch: Batch, config: PrefillConfig
    ) -> None:
        self.me = me
        self.layout = layout
        self.config = config
        self.queue = PrefillQueue(config.queue)
        self.places: tuple[Place, ...] = ()  # the order of the last step, with its reasons
        self.num_ignored = 0  # messages that were stale, late, doubled or about nothing known
        self._ledger = ledger
        self._batch = batch
        self._requests: dict[RequestId, _Request] = {}
        self._attempts: dict[TransferId, _Request] = {}
        self._seen_ms: dict[RequestId, int] = {}  # prompts of the other role, for the order
        self._exports = Exports(ledger, layout)
        self._num_assigned = 0
        self._planned_ms = 0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_attempts(self) -> int:
        """Attempts that hold something, those of requests that have ended here included."""
        return len(self._attempts)

    def epoch_of(self, request_id: RequestId) -> int | None:
        """The epoch under which the request is here, or None."""
        request = self._requests.get(request_id)
        return None if request is None else request.assign.epoch

    def has_attempt(self, transfer_id: TransferId) -> bool:
        """Whether this is the source of a transfer that is not closed."""
        return transfer_id in self._attempts

    def audit(self, now_ms: int) -> list[str]:
        """Attempts that are over but whose blocks an agent still reads."""
        ended_ms = {key: each.ended_ms for key, each in self._attempts.items()}
        return not_quiet(ended_ms, now_ms, self.config.handoff.quarantine_warn_ms)

    def audit_due_ms(self, after_ms: int) -> int | None:
        """When, later than `after_ms`, the audit first finds something that it does not yet; None: not by itself."""
        since_ms = [each.ended_ms for each in self._attempts.values()]
        return next_late_ms(since_ms, after_ms, self.config.handoff.quarantine_warn_ms)

    def machines(self) -> list[SourceHandoff]:
        """The attempts that are not closed."""
        return [each.machine for each in self._attempts.values()]

    def stories(self) -> list[str]:
        """The story of every attempt that is not closed."""
        return [f"source {key}: {each.machine.state}: {each.machine.story}" for key, each in self._attempts.items()]

    def next_deadline_ms(self) -> int | None:
        """When a Tick is wanted at the latest; None: not at all."""
        due = [each.machine.next_deadline_ms() for each in self._attempts.values()]
        return min((at for at in due if at is not None), default=None)

    # ---- events ------------------------------------------------------------------------------------------------------

    def handle(self, now_ms: int, event: object) -> list[Action]:
        """Takes one event in; returns what is to be done, in order. What is not for this side has no effect."""
        match event:
            case FromRouter(session=session, message=Assign(mode=AssignMode.PREFILL) as assign, heard_s=heard_s):
                return self._assigned(now_ms, session, assign, heard_s)
            case FromRouter(message=CancelAssigned() as cancel):
                return self._cancelled(now_ms, cancel)
            case FromRouter(message=OwnerIs() as owner):
                return self._told(now_ms, owner.transfer_id, owner)
            case TransferMessage(header=header, body=body):
                attempt = self._attempts.get(header.transfer_id)
                if attempt is None or not attempt.machine.attempt.is_current(header):
                    self.num_ignored += 1
                    return []
                ready = self._note_ready(now_ms, attempt) if isinstance(body, Grant) else []
                return [*ready, *self._drive(now_ms, attempt, body)]
            case FrameAcked() | FrameFailed() | TransferQuiet():
                attempt = self._attempts.get(event.transfer_id)
                if attempt is None or not attempt.machine.attempt.is_own(event):
                    self.num_ignored += 1
                    return []
                return self._drive(now_ms, attempt, event)
            case Tick() | AgentLost():
                return self._all(now_ms, event, list(self._attempts.values()))
            case PeerGone(worker_id=worker_id, incarnation=incarnation):
                gone = (worker_id, incarnation)
                peers = [(each, each.machine.attempt) for each in self._attempts.values()]
                lost = [each for each, of in peers if (of.peer.worker_id, of.target_incarnation) == gone]
                return self._all(now_ms, event, lost)
            case RouterGone(session=session):
                over = [each for each in self._requests.values() if each.session == session]
                return [action for each in over for action in self._stop(now_ms, each, "its router is gone")]
            case Registered(address=address):
                self._registered(address)
                return []
            case FrameLanded() | FromRouter():
                return []
            case _:
                raise TypeError(f"{type(event).__name__} is no event of a prefill core")

    def _registered(self, address: WorkerAddress) -> None:
        """Frames of what is not offered yet will come from another agent."""
        self.me = address
        for each in self._attempts.values():
            if each.machine.state is SourceState.HOLDING:
                each.machine.offer = replace(each.machine.offer, endpoint=address.endpoint)

    def _all(self, now_ms: int, event: object, attempts: list[_Request]) -> list[Action]:
        return [action for each in attempts for action in self._drive(now_ms, each, event)]

    def _assigned(self, now_ms: int, session: int, assign: Assign, heard_s: float) -> list[Action]:
        actions: list[Action] = []
        before = self._requests.get(assign.request_id)
        if before is not None:
            if before.assign.epoch >= assign.epoch:
                self.num_ignored += 1
                return []
            actions += self._stop(now_ms, before, f"assigned anew at epoch {assign.epoch}")

        def refuse(code: str, message: str, *, retryable: bool) -> list[Action]:
            failed = request_failed(
                assign.request_id, assign.epoch, code, message, retryable=retryable, transfer_id=assign.transfer_id
            )
            return [*actions, Report(session=session, piece=failed)]

        peer = assign.peer
        if peer is None or not assign.transfer_id or peer.worker_id == self.me.worker_id:
            return refuse("bad_assign", "a prefill needs a transfer and a peer other than this worker", retryable=False)
        if assign.transfer_id in self._attempts:
            return refuse("bad_assign", f"transfer {assign.transfer_id} is in use here", retryable=True)
        if len(self._requests) >= self.config.max_queued:
            return refuse(
                "overloaded", f"{len(self._requests)} prompts are here, at most that many may", retryable=True
            )
        if (refusal := self._refusal(assign)) is not None:
            return refuse("invalid_request", refusal, retryable=False)
        request = self._new(now_ms, session, assign, peer, heard_s)
        self._batch.add(request.sequence)
        self._requests[assign.request_id] = request
        self._attempts[assign.transfer_id] = request
        return [*actions, *self._offer_next(now_ms)]

    def _refusal(self, assign: Assign) -> str | None:
        if not 0 < assign.num_prompt_tokens <= len(assign.tokens):
            return f"num_prompt_tokens is {assign.num_prompt_tokens}, must be between 1 and {len(assign.tokens)}"
        return self._batch.refusal(num_tokens=len(assign.tokens), request_id=assign.request_id)

    def _new(self, now_ms: int, session: int, assign: Assign, peer: WorkerAddress, heard_s: float) -> _Request:
        self._num_assigned += 1
        namespace, salt = self._batch.config.namespace, assign.cache_salt
        hashes = block_hashes(namespace, assign.tokens, self._ledger.block_size, salt=salt)
        sequence = Sequence(
            request_id=assign.request_id,
            epoch=assign.epoch,
            tokens=list(assign.tokens),
            num_prompt_tokens=assign.num_prompt_tokens,
            sampling=assign.sampling,
            # Numbered: what it had here before may be a step's until that is over.
            owner=f"{assign.request_id}/{assign.epoch}/prefill/{self._num_assigned}",
            preemptible=False,  # its blocks are being sent
            cache_salt=salt,
            hashes=list(hashes),
        )
        offer = Offer(
            layout=self.layout,
            num_tokens=len(assign.tokens),
            hashes=tuple(hashes),
            lease_ms=self.config.handoff.lease_ms,
            exact=self.config.exact,
            endpoint=self.me.endpoint,
        )
        machine = SourceHandoff(
            attempt=Attempt(
                transfer_id=assign.transfer_id,
                request_id=assign.request_id,
                epoch=assign.epoch,
                me=self.me.worker_id,
                peer=peer,
                source_incarnation=self.me.incarnation,
                target_incarnation=peer.incarnation,
            ),
            config=self.config.handoff,
            deadline_ms=now_ms + assign.deadline_ms,
            offer=offer,
            num_blocks=-(-len(assign.tokens) // self._ledger.block_size),
        )
        return _Request(
            session=session,
            assign=assign,
            clock=PromptClock(received_ms=now_ms, heard_s=heard_s),
            sequence=sequence,
            machine=machine,
            num_cached_blocks=self._ledger.match(hashes),
        )

    def _cancelled(self, now_ms: int, cancel: CancelAssigned) -> list[Action]:
        request = self._requests.get(cancel.request_id)
        if request is None or cancel.epoch < request.assign.epoch:
            return []
        return self._stop(now_ms, request, cancel.reason)

    def _told(self, now_ms: int, transfer_id: TransferId, owner: OwnerIs) -> list[Action]:
        attempt = self._attempts.get(transfer_id)
        return [] if attempt is None else self._drive(now_ms, attempt, owner)

    def _stop(self, now_ms: int, request: _Request, reason: str, *, spoiled: bool = False) -> list[Action]:
        """The request is over here. What is being read of it stays pinned until that ends."""
        self._release(request)
        return self._drive(now_ms, request, Stop(reason=reason, spoiled=spoiled))

    # ---- steps -------------------------------------------------------------------------------------------------------

    def arrange(self, now_ms: int) -> None:
        """Sets the order of all prompts in the batch, those of the worker's other role included."""
        waiting = [each for each in self._batch.sequences() if not each.held and not each.decoding]
        self._seen_ms = {each.request_id: self._seen_ms.get(each.request_id, now_ms) for each in waiting}
        self.places = tuple(self.queue.rank(now_ms, [self._prompt(each) for each in waiting]))
        for rank, place in enumerate(self.places):
            sequence = self._batch.get(place.request_id)
            assert sequence is not None, f"{place.request_id} left while it was ranked"
            sequence.priority = CANARY_RANK if is_canary(place.request_id) else float(rank)

    def planned(self, now_ms: int, plan: StepPlan) -> None:
        """The step is about to run."""
        self._planned_ms = now_ms
        for row in plan.rows:
            if (request := self._requests.get(row.request_id)) is not None:
                request.last_chunk_ms = now_ms
                request.clock.runs(now_ms)

    def stepped(self, now_ms: int, plan: StepPlan, outcome: StepOutcome) -> list[Action]:
        """The step has run and is booked: finished chunks leave, a first token ends the prefill."""
        if not plan.rows:
            return self._offer_next(now_ms)
        prefills = [row for row in plan.rows if len(row.tokens) > 1]
        copies = plan.copies_out or plan.copies_back  # whose time is not a prefill's
        if len(prefills) == len(plan.rows) and not copies and not any(is_canary(row.request_id) for row in prefills):
            self.queue.cost.observe([(len(row.tokens), row.position) for row in prefills], now_ms - self._planned_ms)
        self.queue.ran(now_ms, [row.request_id for row in plan.rows])
        tokens = {token.request_id: token for token in outcome.tokens}
        failures = {failed.request_id: failed for failed in outcome.failed}
        actions: list[Action] = []
        for row in plan.rows:
            request = self._requests.get(row.request_id)
            if request is None or row.request_id not in outcome.computed:
                continue
            token, failed = tokens.get(row.request_id), failures.get(row.request_id)
            if token is not None:
                actions += self._prefilled(now_ms, request, token)
            elif failed is None:
                actions += self._note_ready(now_ms, request)
            if failed is not None:
                piece = request_failed(failed.request_id, failed.epoch, failed.code, failed.reason, retryable=False)
                actions += [Report(session=request.session, piece=piece)]
                actions += self._stop(now_ms, request, failed.reason, spoiled=True)
        return [*actions, *self._offer_next(now_ms)]

    def _prefilled(self, now_ms: int, request: _Request, token: Token) -> list[Action]:
        times = TransferStats(
            request_id=request.assign.request_id,
            transfer_id=request.assign.transfer_id,
            first=request.clock.times(now_ms),
        )
        told = [self._report(request, token), self._report(request, times)]
        if token.finish is not None:
            return [*told, *self._stop(now_ms, request, "the first token ended the request")]
        if self._batch.get(request.assign.request_id) is request.sequence:
            self._batch.remove(request.assign.request_id)  # it stands still; its blocks stay its own
            request.fenced = True
            return [*told, *self._drive(now_ms, request, Fence(tokens=(token,)))]
        return [*told]

    def _note_ready(self, now_ms: int, request: _Request) -> list[Action]:
        """Full blocks that are computed, or were found in the prefix cache, are final."""
        ready = request.sequence.num_computed // self._ledger.block_size
        if request.released or ready <= request.machine.num_ready:
            return []
        return self._drive(now_ms, request, BlocksReady(num=ready))

    def _offer_next(self, now_ms: int) -> list[Action]:
        """Offers the prompts whose turn is near, so that the room is there when the first chunk ends, not sooner."""
        by_order = sorted(
            self._requests.values(),
            key=lambda each: (not each.sequence.started, each.sequence.priority, each.sequence.arrival),
        )
        ahead = 0
        actions: list[Action] = []
        for request in by_order:
            if ahead > self.config.offer_ahead_tokens and not request.sequence.started:
                break
            if not request.fenced:
                ahead += self._remaining(request.sequence)
            if request.machine.state is SourceState.HOLDING and not request.machine.draining:
                actions += self._drive(now_ms, request, Start())
        return actions

    def _prompt(self, sequence: Sequence) -> Prompt:
        request = self._requests.get(sequence.request_id)
        return Prompt(
            request_id=sequence.request_id,
            remaining_tokens=self._remaining(sequence),
            total_tokens=len(sequence.tokens),
            received_ms=self._seen_ms[sequence.request_id] if request is None else request.clock.received_ms,
            started=sequence.started,
            recomputed=sequence.num_preemptions > 0,
        )

    def _remaining(self, sequence: Sequence) -> int:
        request = self._requests.get(sequence.request_id)
        if sequence.started or request is None:
            return sequence.num_left
        return max(1, sequence.num_left - request.num_cached_blocks * self._ledger.block_size)

    # ---- what the machine asks ---------------------------------------------------------------------------------------

    def _drive(self, now_ms: int, request: _Request, event: object) -> list[Action]:
        """Hands the event to the request's end of the handoff and does what it asks."""
        actions: list[Action] = []
        for asked in request.machine.handle(now_ms, event):
            actions += self._do(now_ms, request, asked)
        if request.ended_ms is None and not request.machine.alive:
            request.ended_ms = now_ms
        return actions

    def _do(self, now_ms: int, request: _Request, asked: SourceAction) -> list[Action]:
        attempt = request.machine.attempt
        transfer = attempt.transfer_id
        match asked:
            case Say(body=body):
                said = SendTransfer(to=attempt.peer, message=TransferMessage(header=attempt.header(), body=body))
                stats = self._stats(request) if isinstance(body, CommitRequest) else []
                return [said, *stats]
            case ExportFrame():
                return [self._exports.send(attempt, asked, request.sequence.blocks)]
            case EndExport(sequence=sequence):
                self._exports.end(transfer, sequence)
            case Silence():
                return [EndTransfer(transfer_id=transfer, epoch=attempt.epoch)]
            case AskOwner():
                query = OwnerQuery(request_id=attempt.request_id, transfer_id=transfer, epoch=attempt.epoch)
                return [self._report(request, query)]
            case HandedOver() | Over():
                self._release(request)
            case Failed(code=code, reason=reason, retryable=retryable):
                self._release(request)
                failed = request_failed(
                    attempt.request_id,
                    attempt.epoch,
                    code,
                    reason,
                    retryable=retryable,
                    transfer_id=attempt.transfer_id,
                )
                return [self._report(request, failed)]
            case Closed():
                del self._attempts[transfer]
        return []

    def _stats(self, request: _Request) -> list[Action]:
        first_ms = request.machine.first_frame_ms
        stats = TransferStats(
            request_id=request.assign.request_id,
            transfer_id=request.assign.transfer_id,
            first_frame_ms=0 if first_ms is None else first_ms - request.clock.received_ms,
            last_chunk_start_ms=request.last_chunk_ms - request.clock.received_ms,
            tokens_cached=request.sequence.num_cached_tokens,
        )
        return [self._report(request, stats)]

    def _report(self, request: _Request, piece: Piece) -> Report:
        return Report(session=request.session, piece=piece)

    def _release(self, request: _Request) -> None:
        """The request is over here: its blocks become prefix cache, those being read when the reading ends."""
        if request.released:
            return
        request.released = True
        request_id = request.assign.request_id
        if self._batch.get(request_id) is request.sequence:
            self._batch.remove(request_id)
        self._ledger.release(request.sequence.owner)
        if self._requests.get(request_id) is request:
            del self._requests[request_id]
