"""Requests that leave a decode worker while they run: what their machines ask is done here, and what they hear begins.

A part of the decode side: decode_worker/core.py hands over Migrate, StopMove and all that concerns a transfer that
this worker is the source of, and tells of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from decode_worker.config import DecodeConfig
from decode_worker.request import Request
from engine.blocks import BlockLedger
from engine.events import PeerGone
from engine.layout import KVLayout
from engine.prefix_cache import block_hashes
from engine.sequence import Sequence
from engine.step import Batch, StepPlan
from kv_transfer.actions import Action, Report, SendTransfer
from kv_transfer.exports import Exports
from kv_transfer.handoff import (
    AskOwner,
    Attempt,
    Closed,
    EndExport,
    ExportFrame,
    GiveUp,
    HandedOver,
    Hold,
    MigrationAction,
    Over,
    Resume,
    Say,
    Silence,
    Stop,
)
from kv_transfer.handoff_source import BlocksReady, Start
from kv_transfer.lateness import not_quiet
from kv_transfer.messages import AgentEvent, EndTransfer, Offer, TransferMessage
from kv_transfer.migration_source import Fenced, MigrationState, Preempted, SourceMigration, Starved
from tandem.messages import Migrate, MoveFailed, OwnerIs, OwnerQuery, StopMove, TransferStats, WorkerAddress
from tandem.request import RequestId, TransferId

TOKEN_MS_SHARE = 0.2  # of the newest step in the moving average
# Taking the blocks of a request that is being copied would waste the copy: it leaves at once, or the move is given up.
LEAVING = {MigrationState.PRECOPY, MigrationState.FENCING, MigrationState.TAIL, MigrationState.COMMITTING}


@dataclass(slots=True, kw_only=True)
class _Move:
    """One attempt that is not closed. The request may have left since."""

    request: Request
    sequence: Sequence
    migrate: Migrate
    machine: SourceMigration
    ended_ms: int | None = None  # since then only the agent keeps it open


class MoveSources:
    """The source's side of all migrations of one worker. `leave(request)` takes a request out that is over here."""

    def __init__(
        self,
        *,
        layout: KVLayout,
        ledger: BlockLedger,
        batch: Batch,
        config: DecodeConfig,
        leave: Callable[[Request], list[Action]],
    ) -> None:
        self.num_ignored = 0
        self._layout = layout
        self._ledger = ledger
        self._batch = batch
        self._config = config
        self._leave = leave
        self._exports = Exports(ledger, layout)
        self._moves: dict[TransferId, _Move] = {}
        self._planned_ms = 0
        self._token_ms: float | None = None  # a step's duration over its tokens: more than what one more of them costs
        self._noticed: list[tuple[TransferId, Preempted | Starved]] = []  # when a step was composed; to be handled

    def __len__(self) -> int:
        return len(self._moves)

    def has_attempt(self, transfer_id: TransferId) -> bool:
        """Whether this is the source of a migration that is not closed."""
        return transfer_id in self._moves

    def machines(self) -> list[SourceMigration]:
        """The attempts that are not closed."""
        return [each.machine for each in self._moves.values()]

    def stories(self) -> list[str]:
        """The story of every attempt that is not closed."""
        return [f"move {key}: {each.machine.state}: {each.machine.story}" for key, each in self._moves.items()]

    def audit(self, now_ms: int) -> list[str]:
        """Attempts that are over but whose blocks an agent still reads."""
        ended_ms = {key: each.ended_ms for key, each in self._moves.items()}
        return not_quiet(ended_ms, now_ms, self._config.handoff.quarantine_warn_ms)

    def ended_since_ms(self) -> list[int | None]:
        """Since when each attempt is over whose blocks may still be read; None: it is not."""
        return [each.ended_ms for each in self._moves.values()]

    def next_deadline_ms(self) -> int | None:
        """When a Tick is wanted at the latest; None: not at all."""
        if self._noticed:
            return self._planned_ms
        due = [each.machine.next_deadline_ms() for each in self._moves.values()]
        return min((at for at in due if at is not None), default=None)

    # ---- from the router ---------------------------------------------------------------------------------------------

    def begin(
        self, now_ms: int, *, me: WorkerAddress, session: int, request: Request | None, migrate: Migrate
    ) -> list[Action]:
        """Begins to move the request, or says why not; then it runs on."""
        known = self._moves.get(migrate.transfer_id)
        if known is not None and known.migrate == migrate:
            self.num_ignored += 1
            return []
        problem = self._problem(me, request, migrate)
        if problem is not None or request is None or request.sequence is None:
            code, reason = problem or ("not_here", "the request is not here")
            failed = MoveFailed(
                request_id=migrate.request_id,
                transfer_id=migrate.transfer_id,
                epoch=migrate.epoch,
                code=code,
                message=reason,
            )
            return [Report(session=session, piece=failed)]
        machine = self._machine(now_ms, me, request.sequence, migrate)
        move = _Move(request=request, sequence=request.sequence, migrate=migrate, machine=machine)
        request.moving = migrate.transfer_id
        self._moves[migrate.transfer_id] = move
        return self._drive(now_ms, move, Start())

    def _problem(self, me: WorkerAddress, request: Request | None, migrate: Migrate) -> tuple[str, str] | None:
        """Code and reason why the request cannot be moved now, or None."""
        if request is None or request.epoch != migrate.epoch:
            return "not_here", f"{migrate.request_id} is not here under epoch {migrate.epoch}"
        sequence = request.sequence
        if sequence is None:
            return "not_active", f"{migrate.request_id} is itself on its way here"
        if not migrate.transfer_id or migrate.peer.worker_id == me.worker_id:
            return "bad_move", "a migration needs a transfer and a peer other than this worker"
        if request.moving is not None:
            return "moving", f"{migrate.request_id} is being moved already, by {request.moving}"
        if migrate.transfer_id in self._moves:
            return "bad_move", f"transfer {migrate.transfer_id} is in use here"
        if sequence.copying or (not sequence.started and sequence.num_computed):
            return "swapped", f"{migrate.request_id} is swapped out, or on its way back"
        if not sequence.decoding:
            return "prefilling", f"{migrate.request_id} has {sequence.num_left} tokens to compute before it decodes"
        num_tokens = len(sequence.tokens)
        if not sequence.num_prompt_tokens <= migrate.num_tokens <= num_tokens:
            limits = f"must be from {sequence.num_prompt_tokens} to {num_tokens}"
            return "mismatch", f"num_tokens is {migrate.num_tokens}, {limits}"
        if num_tokens - migrate.num_tokens > len(request.newest):
            told = f"{migrate.num_tokens} of {num_tokens} tokens are known there, the newest {len(request.newest)} here"
            return "too_far_behind", told
        return None

    def _machine(self, now_ms: int, me: WorkerAddress, sequence: Sequence, migrate: Migrate) -> SourceMigration:
        config, size = self._config.handoff, self._ledger.block_size
        sampling = sequence.sampling
        # It ends before the last of these blocks begins to fill, so that it is not fenced for want of room.
        most = min(sequence.num_prompt_tokens + sampling.max_tokens, self._batch.config.context_tokens) + size
        offer = Offer(
            layout=self._layout,
            num_tokens=min(len(sequence.tokens) + config.move_margin_tokens, most),
            hashes=tuple(
                block_hashes(
                    self._batch.config.namespace,
                    sequence.tokens[: sequence.num_computed],
                    size,
                    sequence.hashes[: sequence.num_computed // size],
                    salt=sequence.cache_salt,
                )
            ),
            lease_ms=config.lease_ms,
            exact=self._config.exact,
            endpoint=me.endpoint,
            move=True,
        )
        attempt = Attempt(
            transfer_id=migrate.transfer_id,
            request_id=migrate.request_id,
            epoch=migrate.epoch,
            me=me.worker_id,
            peer=migrate.peer,
            source_incarnation=me.incarnation,
            target_incarnation=migrate.peer.incarnation,
        )
        return SourceMigration(
            attempt=attempt,
            config=config,
            deadline_ms=now_ms + migrate.deadline_ms,
            offer=offer,
            first_index=migrate.num_tokens - sequence.num_prompt_tokens,
        )

    def stop(self, now_ms: int, request: Request, reason: str, *, spoiled: bool = False) -> list[Action]:
        """The request is over here. What is being read of it stays pinned until that ends.

        `spoiled`: it has failed, and its blocks may be why.
        """
        if request.moving is None:
            return []
        move, request.moving = self._moves[request.moving], None
        return self._drive(now_ms, move, Stop(reason=reason, spoiled=spoiled))

    # ---- events ------------------------------------------------------------------------------------------------------

    def heard(self, now_ms: int, transfer_id: TransferId, event: TransferMessage | OwnerIs | StopMove) -> list[Action]:
        """The target or the router speaks of an attempt that `has_attempt`."""
        move = self._moves[transfer_id]
        attempt = move.machine.attempt
        match event:
            case TransferMessage(header=header, body=body) if attempt.is_current(header):
                return self._drive(now_ms, move, body)
            case OwnerIs():
                return self._drive(now_ms, move, event)
            case StopMove(epoch=epoch) if epoch == attempt.epoch:
                return self._drive(now_ms, move, event)
        self.num_ignored += 1
        return []

    def told(self, now_ms: int, event: AgentEvent) -> list[Action]:
        """The agent speaks of an attempt that `has_attempt`."""
        move = self._moves[event.transfer_id]
        if not move.machine.attempt.is_own(event):
            self.num_ignored += 1
            return []
        return self._drive(now_ms, move, event)

    def all(self, now_ms: int, event: object) -> list[Action]:
        """Something concerns every attempt, or, as PeerGone, those with this peer."""
        moves = list(self._moves.values())
        if isinstance(event, PeerGone):
            gone = (event.worker_id, event.incarnation)
            peers = [(each, each.machine.attempt.peer) for each in moves]
            moves = [each for each, peer in peers if (peer.worker_id, peer.incarnation) == gone]
        return [action for each in moves for action in self._drive(now_ms, each, event)]

    # ---- steps -------------------------------------------------------------------------------------------------------

    def planned(self, now_ms: int, plan: StepPlan | None, preempted: Iterable[RequestId]) -> None:
        """A step has been composed: who lost blocks for it, or found none, is noticed; `notice` handles it."""
        self._planned_ms = now_ms
        if not self._moves:
            return
        lost = set(preempted)
        starving = self._starving({row.request_id for row in plan.rows} if plan is not None else set())
        for transfer_id, move in self._moves.items():
            if not move.machine.alive:
                continue
            if move.request.request_id in lost:
                self._noticed.append((transfer_id, Preempted()))
            elif move.machine.state is MigrationState.PRECOPY and starving is not None:
                if starving <= move.sequence.arrival:
                    self._noticed.append((transfer_id, Starved()))

    def notice(self, now_ms: int) -> list[Action]:
        """Hands on what was noticed when a step was composed; to be called before any other event is handled."""
        noticed, self._noticed = self._noticed, []
        actions: list[Action] = []
        for transfer_id, event in noticed:
            move = self._moves.get(transfer_id)
            if move is not None and self._batch.get(move.request.request_id) is move.sequence:
                actions += self._drive(now_ms, move, event)
        return actions

    def _starving(self, planned: set[RequestId]) -> int | None:
        """The arrival of the oldest sequence that is not in the step since there is no block for it; None: nobody."""
        size, available = self._ledger.block_size, self._ledger.num_available
        return min(
            (
                each.arrival
                for each in self._batch.sequences()
                if each.started
                and not each.held
                and not each.copying
                and not self._batch.swapping.waits(each)
                and each.request_id not in planned
                and -(-len(each.tokens) // size) - len(each.blocks) > available
            ),
            default=None,
        )

    def clock(self, now_ms: int, plan: StepPlan) -> None:
        """The step has run."""
        if not plan.rows:
            return
        token_ms = (now_ms - self._planned_ms) / plan.num_tokens
        before = token_ms if self._token_ms is None else self._token_ms
        self._token_ms = before + TOKEN_MS_SHARE * (token_ms - before)

    def stepped(self, now_ms: int, request: Request) -> list[Action]:
        """A step with the request has been booked, and the request goes on."""
        move = None if request.moving is None else self._moves[request.moving]
        if move is None:
            return []
        if move.machine.state is MigrationState.FENCING:
            return self._drive(now_ms, move, self._fenced(move))
        num_ready = move.sequence.num_computed // self._ledger.block_size
        if num_ready <= move.machine.num_ready or not move.sequence.decoding:
            return []
        return self._drive(now_ms, move, BlocksReady(num=num_ready))

    def _fenced(self, move: _Move) -> Fenced:
        tokens = tuple(token for token in move.request.newest if token.index >= move.machine.first_index)
        return Fenced(num_computed=move.sequence.num_computed, tokens=tokens, token_ms=self._token_ms)

    # ---- what the machine asks ---------------------------------------------------------------------------------------

    def _drive(self, now_ms: int, move: _Move, event: object) -> list[Action]:
        """Hands the event to the machine and does what it asks."""
        actions: list[Action] = []
        for asked in move.machine.handle(now_ms, event):
            actions += self._do(now_ms, move, asked)
        if move.ended_ms is None and not move.machine.alive:
            move.ended_ms = now_ms
        if move.request.moving in (None, attempt_id := move.machine.attempt.transfer_id):
            move.sequence.leaving = move.request.moving == attempt_id and move.machine.state in LEAVING
        return actions

    def _do(self, now_ms: int, move: _Move, asked: MigrationAction) -> list[Action]:
        attempt, request = move.machine.attempt, move.request
        match asked:
            case Say(body=body):
                message = TransferMessage(header=attempt.header(), body=body)
                return [SendTransfer(to=attempt.peer, message=message)]
            case ExportFrame():
                return [self._exports.send(attempt, asked, move.sequence.blocks)]
            case EndExport(sequence=sequence):
                self._exports.end(attempt.transfer_id, sequence)
            case Silence():
                return [EndTransfer(transfer_id=attempt.transfer_id, epoch=attempt.epoch)]
            case AskOwner(revoke=revoke):
                query = OwnerQuery(
                    request_id=attempt.request_id,
                    transfer_id=attempt.transfer_id,
                    epoch=attempt.epoch,
                    revoke=revoke,
                )
                return [request.report(query)]
            case Hold():
                self._batch.hold(request.request_id)
                if not self._batch.is_running(request.request_id):  # else it stands still when that step is booked
                    return self._drive(now_ms, move, self._fenced(move))
            case Resume():
                self._batch.resume(request.request_id)
                request.moving = None
            case HandedOver():
                request.moving = None
                return [request.report(self._stats(now_ms, move)), *self._leave(request)]
            case Over():
                request.moving = None
                return self._leave(request)
            case GiveUp(code=code, reason=reason):
                failed = MoveFailed(
                    request_id=attempt.request_id,
                    transfer_id=attempt.transfer_id,
                    epoch=attempt.epoch,
                    code=code,
                    message=reason,
                )
                return [request.report(failed)]
            case Closed():
                del self._moves[attempt.transfer_id]
        return []

    def _stats(self, now_ms: int, move: _Move) -> TransferStats:
        machine = move.machine
        granted_ms, fenced_ms = machine.granted_ms, machine.fenced_ms
        assert granted_ms is not None
        assert fenced_ms is not None
        return TransferStats(
            request_id=machine.attempt.request_id,
            transfer_id=machine.attempt.transfer_id,
            rounds=machine.num_rounds,
            precopy_ms=fenced_ms - granted_ms,
            fence_ms=now_ms - fenced_ms,
        )
