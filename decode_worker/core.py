"""A request's life on the decode side: expected, received, owned, decoded to its end; or prefilled here from the start.

The core shares the batch and the block ledger with the worker's other role; whoever composes the two
(cluster/worker_core.py) calls `stepped` after each step.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from decode_worker.admission import Admission, Load, Verdict
from decode_worker.config import DecodeConfig
from engine.blocks import BlockLedger
from engine.events import PeerGone, RouterGone, Tick
from engine.layout import KVLayout
from engine.prefix_cache import BlockHash, block_hashes
from engine.sequence import Sequence
from engine.step import Batch, StepOutcome, StepPlan
from kv_transfer.actions import Action, AgentLost, FromRouter, Piece, Registered, Report, SendTransfer, request_failed
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
from kv_transfer.handoff_target import Declined, Postponed, Reserved, TargetHandoff, TargetState
from kv_transfer.layout import refusal
from kv_transfer.messages import (
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
    OwnerIs,
    TransferStats,
    WorkerAddress,
)
from tandem.request import RequestId, TransferId


@dataclass(slots=True, kw_only=True)
class _Request:
    """One request on this side, or an attempt of one that is not yet closed."""

    session: int
    assign: Assign
    received_ms: int
    epoch: int  # that we report under: the assignment's, from the commit on the next
    salt: int  # tells it from others in the draws of admission
    owner: str  # its name in the ledger
    machine: TargetHandoff | None  # None: LOCAL
    hashes: list[BlockHash]
    sequence: Sequence | None = None  # in the batch
    num_reused: int = 0
    num_granted: int = 0
    reserved: bool = False
    waiting_since_ms: int | None = None  # the source has been told to wait
    num_known_tokens: int = 0  # tokens that were computed once already, or that the router gave us
    num_recomputed_tokens: int = 0  # of those, run here: the prefill of a LOCAL request, or after a preemption


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
        self.layout = layout
        self.config = config
        self.admission = Admission(config.admission, num_blocks=ledger.num_blocks, block_size=ledger.block_size)
        self.num_ignored = 0  # messages that were stale, late, doubled or about nothing known
        self._ledger = ledger
        self._batch = batch
        self._requests: dict[RequestId, _Request] = {}
        self._attempts: dict[TransferId, _Request] = {}
        self._ended: OrderedDict[TransferId, _Ended] = OrderedDict()
        self._early: OrderedDict[TransferId, tuple[int, TransferMessage]] = OrderedDict()
        self._num_assigned = 0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_attempts(self) -> int:
        """Attempts that hold something, those in quarantine included."""
        return len(self._attempts)

    @property
    def num_expected(self) -> int:
        """Requests whose blocks have not all come."""
        return sum(each.machine is not None and each.sequence is None for each in self._requests.values())

    def epoch_of(self, request_id: RequestId) -> int | None:
        """The epoch under which the request is here, or None."""
        request = self._requests.get(request_id)
        return None if request is None else _epoch(request)

    def audit(self, now_ms: int) -> list[str]:
        """Quarantines that do not end."""
        late = []
        for transfer, each in self._attempts.items():
            since_ms = each.machine.quarantined_since_ms if each.machine is not None else None
            if since_ms is not None and now_ms - since_ms > self.config.handoff.quarantine_warn_ms:
                late.append(f"transfer {transfer} is in quarantine for {now_ms - since_ms} ms")
        return late

    def stories(self) -> list[str]:
        """The story of every attempt that is not closed."""
        machines = [(key, each.machine) for key, each in self._attempts.items() if each.machine is not None]
        return [f"target {key}: {machine.state}: {machine.story}" for key, machine in machines]

    def next_deadline_ms(self) -> int | None:
        """When a Tick is wanted at the latest; None: not at all."""
        due = [each.machine.next_deadline_ms() for each in self._attempts.values() if each.machine is not None]
        return min((at for at in due if at is not None), default=None)

    # ---- events ------------------------------------------------------------------------------------------------------

    def handle(self, now_ms: int, event: object) -> list[Action]:
        """Takes one event in; returns what is to be done, in order. What is not for this side has no effect."""
        match event:
            case FromRouter(session=session, message=Assign(mode=AssignMode.DECODE | AssignMode.LOCAL) as assign):
                return self._assigned(now_ms, session, assign)
            case FromRouter(message=CancelAssigned() as cancel):
                request = self._requests.get(cancel.request_id)
                over = request is not None and cancel.epoch >= _epoch(request)
                return self._stop(now_ms, request, cancel.reason) if request is not None and over else []
            case FromRouter(message=OwnerIs() as owner):
                return self._told(now_ms, owner)
            case TransferMessage():
                return self._heard(now_ms, event)
            case FrameLanded() | FrameFailed() | TransferQuiet():
                attempt = self._attempts.get(event.transfer_id)
                if attempt is None or attempt.machine is None or not attempt.machine.attempt.is_own(event):
                    self.num_ignored += 1
                    return []
                return self._drive(now_ms, attempt, event)
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
            case FrameAcked() | FromRouter():
                return []
            case _:
                raise TypeError(f"{type(event).__name__} is no event of a decode core")

    def _all(self, now_ms: int, event: object, attempts: list[_Request]) -> list[Action]:
        return [action for each in attempts for action in self._drive(now_ms, each, event)]

    def _assigned(self, now_ms: int, session: int, assign: Assign) -> list[Action]:
        actions: list[Action] = []
        before = self._requests.get(assign.request_id)
        if before is not None:
            if _epoch(before) >= assign.epoch:
                self.num_ignored += 1
                return []
            actions += self._stop(now_ms, before, f"assigned anew at epoch {assign.epoch}")

        def refuse(code: str, message: str, *, retryable: bool) -> list[Action]:
            failed = request_failed(assign.request_id, assign.epoch, code, message, retryable=retryable)
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
        request = self._new(now_ms, session, assign)
        self._requests[assign.request_id] = request
        if local:
            self._run(request, tokens=list(assign.tokens), num_computed=0, blocks=[])
            return actions
        self._attempts[assign.transfer_id] = request
        early = self._early.pop(assign.transfer_id, None)
        return [*actions, *(self._heard(now_ms, early[1]) if early is not None else [])]

    def _new(self, now_ms: int, session: int, assign: Assign) -> _Request:
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
            )
        return _Request(
            session=session,
            assign=assign,
            received_ms=now_ms,
            epoch=assign.epoch,
            salt=self._num_assigned,
            owner=f"{assign.request_id}/{assign.epoch}/{assign.mode}",
            machine=machine,
            hashes=block_hashes(self._batch.config.namespace, assign.tokens, self._ledger.block_size),
        )

    def _heard(self, now_ms: int, message: TransferMessage) -> list[Action]:
        """A source speaks: of an attempt that is alive, of one that has ended, or of one still to be assigned."""
        header, body = message.header, message.body
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
        failed = request_failed(owner.request_id, owner.epoch, "handoff_failed", message, retryable=True)
        return [Report(session=ended.session, piece=failed)]

    def _forget_early(self, now_ms: int) -> None:
        while self._early:
            transfer, (at_ms, _) = next(iter(self._early.items()))
            if now_ms - at_ms <= self.config.early_offer_ms:
                return
            del self._early[transfer]

    def _stop(self, now_ms: int, request: _Request, reason: str) -> list[Action]:
        """The router's word: the request is over here."""
        self._leave(request)
        if request.assign.transfer_id in self._attempts:
            return self._drive(now_ms, request, Stop(reason=reason))
        return []

    # ---- steps -------------------------------------------------------------------------------------------------------

    def stepped(self, now_ms: int, plan: StepPlan, outcome: StepOutcome) -> list[Action]:
        """The step has run and is booked: its tokens go to their routers."""
        actions: list[Action] = []
        for row in plan.rows:
            request = self._requests.get(row.request_id)
            if request is not None and request.sequence is not None and row.request_id in outcome.computed:
                request.num_recomputed_tokens += max(0, min(row.position, request.num_known_tokens) - row.start)
                request.num_known_tokens = max(request.num_known_tokens, row.position)
        for token in outcome.tokens:
            request = self._requests.get(token.request_id)
            if request is None or request.sequence is None:
                continue
            if token.finish is not None:
                self.admission.finished(token.index + 1)
                actions += self._account(request)
                self._leave(request)
            actions.append(Report(session=request.session, piece=token))
        for failed in outcome.failed:
            request = self._requests.get(failed.request_id)
            if request is not None and request.sequence is not None:
                piece = request_failed(failed.request_id, request.epoch, failed.code, failed.reason, retryable=False)
                actions.append(Report(session=request.session, piece=piece))
                self._leave(request)
        return actions

    def _account(self, request: _Request) -> list[Action]:
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
        return [self._report(request, stats)]

    def _run(self, request: _Request, *, tokens: list[int], num_computed: int, blocks: list[int]) -> None:
        request.sequence = Sequence(
            request_id=request.assign.request_id,
            epoch=request.epoch,
            tokens=tokens,
            num_prompt_tokens=request.assign.num_prompt_tokens,
            sampling=request.assign.sampling,
            num_computed=num_computed,
            blocks=blocks,
            owner=request.owner,
            hashes=request.hashes,
            num_published=request.num_reused,
        )
        request.num_known_tokens = len(request.assign.tokens)
        self._batch.add(request.sequence)

    # ---- what the machine asks ---------------------------------------------------------------------------------------

    def _drive(self, now_ms: int, request: _Request, event: object) -> list[Action]:
        """Hands the event to the request's end of the handoff and does what it asks."""
        assert request.machine is not None
        actions: list[Action] = []
        for asked in request.machine.handle(now_ms, event):
            actions += self._do(now_ms, request, request.machine, asked)
        return actions

    def _do(self, now_ms: int, request: _Request, machine: TargetHandoff, asked: TargetAction) -> list[Action]:
        attempt = machine.attempt
        transfer = attempt.transfer_id
        match asked:
            case Say(body=body):
                return [SendTransfer(to=attempt.peer, message=TransferMessage(header=attempt.header(), body=body))]
            case Reserve(offer=offer):
                return self._drive(now_ms, request, self._reserve(now_ms, request, offer))
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
                return [self._report(request, ask)]
            case AcceptBlocks():
                return self._accept(now_ms, request, asked)
            case Quarantine():
                self._ledger.quarantine(transfer)
                self._leave(request)
            case EndQuarantine():
                self._ledger.end_quarantine(transfer)
            case Failed(code=code, reason=reason, retryable=retryable):
                failed = request_failed(attempt.request_id, machine.epoch, code, reason, retryable=retryable)
                return [self._report(request, failed)]
            case Closed():
                self._close(request, machine)
        return []

    def _reserve(self, now_ms: int, request: _Request, offer: Offer) -> Reserved | Postponed | Declined:
        """Room for an offer, if it is what the router told us to expect and admission lets it in."""
        assign, size = request.assign, self._ledger.block_size
        different = refusal(offer.layout, self.layout, exact=offer.exact)
        if different is not None:
            return Declined(code="layout", reason=different, retryable=True)
        if offer.num_tokens != len(assign.tokens) or list(offer.hashes) != request.hashes:
            told = f"{offer.num_tokens} tokens offered, {len(assign.tokens)} expected, or their hashes differ"
            return Declined(code="mismatch", reason=told, retryable=True)
        num_blocks = -(-offer.num_tokens // size)
        reused = self._ledger.acquire(request.owner, offer.hashes)
        num_new = num_blocks - len(reused)
        decision = self.admission.decide(
            wanted=self._load(request),
            num_new_blocks=num_new,
            num_available=self._ledger.num_available - self._num_promised(),
            others=[self._load(each) for each in self._requests.values() if each.reserved or each.sequence is not None],
        )
        granted = None
        if decision.verdict is Verdict.ADMIT:
            granted = self._ledger.grant(assign.transfer_id, num_new)
        if granted is None:
            self._ledger.release(request.owner)
            return self._no_room(now_ms, request, decision.verdict, decision.reason)
        request.reserved = True
        request.num_reused, request.num_granted = len(reused), num_new
        return Reserved(
            num_reused=len(reused),
            blocks=tuple(granted),
            generations=tuple(self._ledger.generation(block) for block in granted),
            endpoint=self.me.endpoint,
        )

    def _num_promised(self) -> int:
        """Blocks that sequences here have yet to take for the tokens they have.

        Those that hold none count too: a request that lost its blocks would else wait for as long as others are let in.
        """
        size = self._ledger.block_size
        return sum(max(0, -(-len(each.tokens) // size) - len(each.blocks)) for each in self._batch.sequences())

    def _load(self, request: _Request) -> Load:
        """What the request occupies now and may still write."""
        num_tokens = len(request.assign.tokens) if request.sequence is None else len(request.sequence.tokens)
        num_generated = num_tokens - request.assign.num_prompt_tokens
        left = min(request.assign.sampling.max_tokens - num_generated, self._batch.config.context_tokens - num_tokens)
        return Load(salt=request.salt, num_tokens=num_tokens, num_generated=num_generated, num_left_max=max(0, left))

    def _no_room(self, now_ms: int, request: _Request, verdict: Verdict, reason: str) -> Postponed | Declined:
        if verdict is Verdict.REFUSE:
            return Declined(code="too_large", reason=reason, retryable=False)
        if request.waiting_since_ms is None:
            request.waiting_since_ms = now_ms
        if now_ms - request.waiting_since_ms >= self.config.admission.wait_limit_ms:
            return Declined(code="no_room", reason=reason, retryable=True)
        return Postponed(retry_after_ms=self.config.admission.retry_after_ms, reason=reason)

    def _accept(self, now_ms: int, request: _Request, accept: AcceptBlocks) -> list[Action]:
        """The request is ours: its blocks are, and it runs from its newest token on."""
        assign = request.assign
        request.epoch = accept.epoch
        self._ledger.accept(assign.transfer_id, request.owner)
        tokens = [*assign.tokens, *(token.token_id for token in accept.tokens)]
        too_large = self._batch.refusal(num_tokens=len(tokens), request_id=assign.request_id)
        if too_large is not None:
            self._leave(request)
            failed = request_failed(assign.request_id, accept.epoch, "invalid_request", too_large, retryable=False)
            return [self._report(request, failed)]
        blocks = list(self._ledger.blocks_of(request.owner))
        self._run(request, tokens=tokens, num_computed=len(assign.tokens), blocks=blocks)
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
        return [self._report(request, stats)]

    def _close(self, request: _Request, machine: TargetHandoff) -> None:
        del self._attempts[request.assign.transfer_id]
        if machine.state is not TargetState.ACTIVE:
            self._leave(request)
        ended = _Ended(session=request.session, attempt=machine.attempt, state=machine.state)
        self._ended[request.assign.transfer_id] = ended
        if len(self._ended) > self.config.ended_max:
            self._ended.popitem(last=False)

    def _report(self, request: _Request, piece: Piece) -> Report:
        return Report(session=request.session, piece=piece)

    def _leave(self, request: _Request) -> None:
        """The request is over here. Its blocks become prefix cache; those still granted are its attempt's affair."""
        request_id = request.assign.request_id
        if self._requests.get(request_id) is request:
            del self._requests[request_id]
        if request.sequence is not None and self._batch.get(request_id) is request.sequence:
            self._batch.remove(request_id)
        self._ledger.release(request.owner)


def _epoch(request: _Request) -> int:
    """The newest epoch that the request is known here under, that of a commit whose agent is not quiet yet included."""
    return request.epoch if request.machine is None else max(request.epoch, request.machine.epoch)
