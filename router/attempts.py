"""An attempt to serve a request: it is given to its workers under fresh epochs, and taken from them again."""

from __future__ import annotations

from itertools import islice

from router.config import GRACE_MS, RouterConfig
from router.events import Placed
from router.fleet import Fleet, Worker
from router.move import EPOCHS_PER_PLACEMENT, MOVES_MAX
from router.moves import Moves
from router.outbox import Outbox
from router.owners import Owners
from router.placement import Ask, NoPlacement, Placement, Placer, WorkerKey
from router.request import PlacementRecord, Request, RequestState
from tandem.messages import AssignMode, CancelAssigned, WorkerAddress
from tandem.request import TransferId


class Attempts:
    """Hands out epochs, which grow over all lives of a request and are never used twice for it."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        placer: Placer,
        owners: Owners,
        moves: Moves,
        outbox: Outbox,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._placer = placer
        self._owners = owners
        self._moves = moves
        self._outbox = outbox
        self._next_epoch = 1  # of requests that bring none of their own
        self._resting: dict[tuple[WorkerKey, WorkerKey], int] = {}  # source and target: until when

    def begin(self, now_ms: int, request: Request) -> NoPlacement | None:
        """Places the request, or says why it cannot be placed now."""
        self._resting = {pair: until_ms for pair, until_ms in self._resting.items() if until_ms > now_ms}
        ask = self.ask(request)
        found = self._placer.place(now_ms, ask)
        if isinstance(found, NoPlacement):
            return found
        self._assign(now_ms, request, ask, found)
        return None

    def end(self, now_ms: int, request: Request, reason: str) -> None:
        """Cancels the attempt where it lives and takes the owner record away: a later commit of it fails."""
        if request.owner is None:
            return
        self._moves.over(now_ms, request, reason)
        for worker in request.involved:
            self._fleet.forget(worker, request.request_id)
            message = CancelAssigned(request_id=request.request_id, epoch=request.owner.epoch, reason=reason)
            self._outbox.send(worker, message, reason)
        self._owners.close(request)
        request.involved = []

    def failed(self, now_ms: int, request: Request) -> None:
        """A handoff of the request has failed: others need not find out, too, that its two workers do not get through.

        What rests is forgotten after a moment, so no list of it outlives the membership.
        """
        placement = request.placement
        if placement is None or placement.mode is AssignMode.LOCAL:
            return
        source, target = placement.prefill_worker, placement.decode_worker
        pair = ((source.worker_id, source.incarnation), (target.worker_id, target.incarnation))
        self._resting[pair] = now_ms + self._config.pair_rest_ms

    def ask(self, request: Request) -> Ask:
        """What placement needs to know of the request now."""
        for first in islice(self._fleet, 1):  # all workers of a fleet serve one model
            request.hash_blocks(first.info.namespace, first.info.block_size)
        return Ask(
            num_tokens=request.num_tokens,
            num_more=request.num_more,
            priority=request.new.priority,
            hashes=request.hashes,
            avoid=frozenset(request.avoid),
            resting=frozenset(self._resting),
            recovers=request.num_replacements > 0,
            pinned=request.new.canary,
        )

    def _assign(self, now_ms: int, request: Request, ask: Ask, placement: Placement) -> None:
        """Gives the request to its workers under a fresh epoch; the next ones are kept for its commits."""
        epoch = request.next_epoch or self._next_epoch
        if not request.next_epoch:
            self._next_epoch += EPOCHS_PER_PLACEMENT
        else:
            request.next_epoch += EPOCHS_PER_PLACEMENT
        source, target = self._at(placement.prefill_worker), self._at(placement.decode_worker)
        local = placement.mode is AssignMode.LOCAL
        transfer_id = TransferId("" if local else f"{request.request_id}.{epoch}")
        self._owners.open(request, source, epoch, transfer_id)
        left_ms = request.deadline_ms - now_ms
        deadline_ms = max(1, min(left_ms, self._config.handoff_deadline_ms + 3 * round(placement.predicted_ms)))
        request.placement = placement
        request.placements.append(
            PlacementRecord(at_ms=now_ms - request.submitted_ms, epoch=epoch, placement=placement)
        )
        request.last_epoch = epoch + MOVES_MAX + (0 if local else 1)
        request.involved = [source] if local else [source, target]
        request.state = RequestState.PREFILLING
        request.stage_deadline_ms = now_ms + deadline_ms + GRACE_MS
        request.placed_ms = now_ms
        request.attempt_has_token = False
        where = source.worker_id if local else f"{source.worker_id} -> {target.worker_id}"
        request.tell(now_ms, f"placed on {where} at epoch {epoch}: {placement.reason}")
        if request.new.canary is None:  # of which nobody is to learn what a prefill takes
            self._fleet.charge_prefill(
                source,
                request.request_id,
                now_ms=now_ms,
                predicted_ms=placement.prefill_ms,
                num_uncached=request.num_tokens - placement.num_cached_tokens,
                num_tokens=request.num_tokens,
            )
            self._placer.charge(now_ms, placement.prefill_ms)
            self._outbox.add(Placed(request_id=request.request_id, mode=placement.mode))
        self._fleet.reserve(
            target,
            request.request_id,
            self._placer.num_blocks(ask, target),
            arriving=not local,
            priority=request.new.priority,
        )
        # The target first: it should know of the request when the source's offer comes.
        roles = ((target, AssignMode.DECODE, source), (source, AssignMode.PREFILL, target))
        for worker, mode, peer in ((source, AssignMode.LOCAL, None),) if local else roles:
            self._outbox.send(worker, request.assign(mode, transfer_id, peer, deadline_ms), placement.reason)

    def _at(self, address: WorkerAddress) -> Worker:
        worker = self._fleet.get(address.worker_id, address.incarnation)
        assert worker is not None, f"{address} was placed on, and is not in the fleet"
        return worker
