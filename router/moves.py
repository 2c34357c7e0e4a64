"""Moves of running requests: which are begun and why others are not, and what becomes of each.

A move copies a request to its target while its source runs on; the owner record's commit (router/core.py) is what
moves it. Until then a move can be dropped at any time, and the request is none the worse: it was never anywhere else.
Each move that is begun ends once, with MoveEnded: when the target's first token is delivered (then its pause is
known), when the move is dropped, or when the request is over or lost.
"""

from __future__ import annotations

from router.config import GRACE_MS, RouterConfig
from router.events import MoveEnded, MoveRefused, MoveRequested
from router.fleet import Fleet, Worker, WorkerState
from router.history import MoveHistory
from router.move import MOVES_MAX, Move, MoveOutcome, MoveReason, MoveRecord
from router.outbox import Outbox
from router.placement import Ask, Placer
from router.request import Request, RequestState
from tandem.errors import InvalidRequest, MoveImpossible, TandemError, UnknownRequest
from tandem.messages import AssignMode, CancelAssigned, Migrate, Role, StopMove, TransferStats, WorkerInfo
from tandem.near_miss import did_you_mean
from tandem.request import RequestId, TransferId, WorkerId

DECODES = (Role.DECODE, Role.MIXED)  # roles that a request may be moved to
NO_DWELL = (MoveReason.OPERATOR, MoveReason.DRAIN)
SCORES_SHOWN = 8


class Moves:
    """Judges what is asked, begins and ends moves, and keeps their records. The core decides when a move is lost."""

    def __init__(self, config: RouterConfig, fleet: Fleet, placer: Placer, outbox: Outbox) -> None:
        self._config = config
        self._fleet = fleet
        self._placer = placer
        self._outbox = outbox
        self._history = MoveHistory(keep_ms=config.move_history_ms, num_max=config.move_history_max)

    def ask(self, now_ms: int, event: MoveRequested, request: Request | None, ended: str) -> None:
        """Begins the move, or refuses it. `ended`: how the request ended, when it is known to have."""
        try:
            source = self._movable(now_ms, event, request, ended)
            assert request is not None, "checked"
            if event.to is None:
                target, chosen = self._choose(request, source)
            else:
                target, chosen = self._named(event.to), ""
                why_not = self._unfit(request, source, target)
                if why_not:
                    raise MoveImpossible(f"{request.request_id} cannot be moved to {target.worker_id}: {why_not}")
        except TandemError as error:
            self._outbox.add(MoveRefused(request_id=event.request_id, ticket=event.ticket, error=error))
            return
        why = "; ".join(each for each in (event.why, chosen) if each)
        self._begin(now_ms, request, source, target, event, why)

    # ---- judgement -------------------------------------------------------------------------------------------------

    def _movable(self, now_ms: int, event: MoveRequested, request: Request | None, ended: str) -> Worker:
        """The worker that the request may leave. Raises TandemError saying why it may not."""
        if request is None:
            if ended:
                raise MoveImpossible(f"{event.request_id} is {ended}")
            raise UnknownRequest(f"no request of id {event.request_id!r} is known")
        name, owner = request.request_id, request.owner
        if request.state is not RequestState.DECODING or owner is None:
            raise MoveImpossible(f"{name} is {request.state.value}: only a request that is decoding can be moved")
        moving = request.move or request.landing
        if moving is not None:
            since_ms = now_ms - moving.began_ms
            where = f"from {moving.source.worker_id} to {moving.target.worker_id}"
            raise MoveImpossible(f"{name} is being moved already, {where}, for {since_ms} ms")
        if owner.epoch >= request.last_epoch:
            raise MoveImpossible(f"{name} was moved {MOVES_MAX} times since it was placed; the limit is {MOVES_MAX}")
        if request.move_ended_ms is not None and event.reason not in NO_DWELL:
            rested_ms, due_ms = now_ms - request.move_ended_ms, self._config.move_dwell_ms
            if rested_ms < due_ms:
                raise MoveImpossible(f"{name} was moved {rested_ms} ms ago; it dwells at least {due_ms} ms")
        source = self._fleet.get(owner.worker_id, owner.incarnation)
        assert source is not None, f"{name} decodes on {owner}, who is not in the fleet"
        return source

    def _named(self, worker_id: WorkerId) -> Worker:
        worker = self._fleet.current(worker_id)
        if worker is not None:
            return worker
        for dead in self._fleet.dead():
            if dead.worker_id == worker_id:
                raise MoveImpossible(f"{worker_id} is dead: {dead.lost_reason}")
        known = sorted(each.worker_id for each in self._fleet)
        there_are = f"there are: {', '.join(known) or 'none'}{did_you_mean(worker_id, known)}"
        raise InvalidRequest("to", f"no worker of id {worker_id!r} is known; {there_are}")

    def _unfit(self, request: Request, source: Worker, target: Worker) -> str:
        """Why the request cannot go there; empty when it can."""
        if target is source:
            return "it is there"
        if target.state is not WorkerState.READY:
            return f"that worker is {target.state.value}"
        if target.info.role not in DECODES:
            return f"that worker's role is {target.info.role.value}"
        differs = _differences(source.info, target.info)
        if differs:
            return f"the workers differ: {differs}"
        reach = min(len(request.new.tokens) + request.new.sampling.max_tokens, _tokens_max(source.info))
        if reach > _tokens_max(target.info):
            return f"it may reach {reach} tokens, that worker has context and memory for {_tokens_max(target.info)}"
        ask = _ask(request)
        if not self._placer.fits(ask, target):
            needed = self._placer.num_blocks(ask, target)
            return f"it needs {needed} blocks there, {max(0, target.num_free_blocks)} are free and not promised"
        return ""

    def _choose(self, request: Request, source: Worker) -> tuple[Worker, str]:
        """The target of the lowest load, and why; one where the request failed before only when there is no other.

        Raises MoveImpossible when there is none.
        """
        fit: list[tuple[float, int, Worker]] = []
        unfit: list[str] = []
        for worker in self._fleet:
            why_not = self._unfit(request, source, worker)
            if not why_not:
                fit.append((_load(worker), worker.slot, worker))
            elif worker is not source and worker.info.role in DECODES:
                unfit.append(f"{worker.worker_id}: {why_not}")
        if not fit:
            tried = "; ".join(unfit[:SCORES_SHOWN]) or "there is no other worker that decodes"
            raise MoveImpossible(f"no worker can take {request.request_id}: {tried}")
        fit = [each for each in fit if each[2].key not in request.avoid] or fit
        fit.sort(key=lambda each: each[:2])
        scores = ", ".join(f"{worker.worker_id} {load:.2f}" for load, _, worker in fit[:SCORES_SHOWN])
        return fit[0][2], f"lowest load of {len(fit)} that can take it ({scores}; the source has {_load(source):.2f})"

    # ---- a move's life ---------------------------------------------------------------------------------------------

    def _begin(
        self, now_ms: int, request: Request, source: Worker, target: Worker, event: MoveRequested, why: str
    ) -> None:
        """Tells the target, then the source. The request's state does not change: the source runs on."""
        assert request.owner is not None, "checked"
        request.num_moves_begun += 1
        epoch = request.owner.epoch
        deadline_ms = max(1, min(self._config.move_deadline_ms, request.deadline_ms - now_ms))
        move = Move(
            transfer_id=TransferId(f"{request.request_id}.{epoch}.m{request.num_moves_begun}"),
            epoch=epoch,
            source=source,
            target=target,
            reason=event.reason,
            why=why,
            ticket=event.ticket,
            began_ms=now_ms,
            deadline_ms=now_ms + deadline_ms + GRACE_MS,
        )
        record = MoveRecord(
            request_id=request.request_id,
            source=source.worker_id,
            target=target.worker_id,
            reason=event.reason,
            why=why,
            outcome=MoveOutcome.MOVING,
            at_ms=now_ms,
        )
        self._history.begin(move.transfer_id, record)
        request.move = move
        request.involved.append(target)
        self._fleet.reserve(
            target,
            request.request_id,
            self._placer.num_blocks(_ask(request), target),
            arriving=True,
            priority=request.new.priority,
        )
        reason = f"{event.reason.value}: {why}" if why else event.reason.value
        request.tell(now_ms, f"moves from {source.worker_id} to {target.worker_id} ({reason})")
        told = request.assign(AssignMode.DECODE, move.transfer_id, source, deadline_ms, move=True)
        migrate = Migrate(
            request_id=request.request_id,
            epoch=epoch,
            transfer_id=move.transfer_id,
            peer=target.address,
            num_tokens=len(told.tokens),
            deadline_ms=deadline_ms,
            reason=reason,
        )
        self._outbox.send(target, told, reason)
        self._outbox.send(source, migrate, reason)

    def drop(self, now_ms: int, request: Request, error: str, *, tell_source: bool) -> None:
        """The move is over without a commit, and the request runs on at its source (told, unless it said so itself)."""
        move = request.move
        assert move is not None, f"{request.request_id} has no move to drop: {list(request.story)}"
        request.move = None
        target = move.target
        if target in request.involved:
            request.involved.remove(target)
            self._fleet.forget(target, request.request_id)
            cancel = CancelAssigned(request_id=request.request_id, epoch=move.epoch, reason=error)
            self._outbox.send(target, cancel, error)
        if tell_source:
            stop = StopMove(request_id=request.request_id, epoch=move.epoch, transfer_id=move.transfer_id, reason=error)
            self._outbox.send(move.source, stop, error)
        request.tell(now_ms, f"was not moved to {target.worker_id}: {error}")
        self._history.settle(move.transfer_id, MoveOutcome.FAILED, error=error)
        self._ended(now_ms, request, move)

    def committed(self, request: Request) -> None:
        """The target owns the request; the move ends with its first token."""
        assert request.move is not None, f"{request.request_id} has no move to commit: {list(request.story)}"
        request.landing, request.move = request.move, None
        request.num_moves += 1
        self._history.settle(request.landing.transfer_id, MoveOutcome.MOVED)

    def landed(self, now_ms: int, request: Request) -> None:
        """The target's first token is about to be delivered."""
        move = request.landing
        assert move is not None, f"{request.request_id} has not landed anywhere: {list(request.story)}"
        request.landing = None
        self._history.settle(move.transfer_id, MoveOutcome.MOVED, pause_ms=now_ms - request.last_token_ms)
        self._ended(now_ms, request, move)

    def over(self, now_ms: int, request: Request, reason: str) -> None:
        """The request leaves its workers, however that came: so does a move of it."""
        move = request.move or request.landing
        if move is None:
            return
        if request.move is not None:
            self._history.settle(move.transfer_id, MoveOutcome.ENDED, error=reason)
        request.move = request.landing = None
        self._ended(now_ms, request, move)

    def _ended(self, now_ms: int, request: Request, move: Move) -> None:
        request.move_ended_ms = now_ms
        self._outbox.add(MoveEnded(ticket=move.ticket, record=self._history.end(move.transfer_id, now_ms)))

    # ---- records ---------------------------------------------------------------------------------------------------

    def transferred(self, stats: TransferStats) -> bool:
        """An end of a transfer tells of it; False when it was no move."""
        return self._history.transferred(stats)

    def expire(self, now_ms: int) -> None:
        """Forgets the moves that ended too long ago."""
        self._history.expire(now_ms)

    def records_of(self, request_id: RequestId) -> tuple[MoveRecord, ...]:
        """The moves of one request that are remembered, oldest first."""
        return tuple(each for each in self._history.records() if each.request_id == request_id)

    def records(self) -> tuple[MoveRecord, ...]:
        """Moves under way and ended, in the order in which they began."""
        return self._history.records()


def _ask(request: Request) -> Ask:
    return Ask(num_tokens=request.num_tokens, num_more=request.num_more)


def _load(worker: Worker) -> float:
    """The part of its blocks that is taken or promised."""
    return 1.0 - worker.num_free_blocks / worker.info.total_blocks


def _tokens_max(info: WorkerInfo) -> int:
    """Tokens that one request can have there at most."""
    return min(info.context_tokens, info.total_blocks * info.block_size)


def _differences(source: WorkerInfo, target: WorkerInfo) -> str:
    """What keeps a request of one worker from running on as it is on the other; empty when nothing does."""
    names = ("model", "namespace", "fingerprint", "exact", "dtype", "block_size", "block_bytes")
    pairs = [(name, getattr(source, name), getattr(target, name)) for name in names]
    return ", ".join(f"{name} is {here!r} here and {there!r} there" for name, here, there in pairs if here != there)
