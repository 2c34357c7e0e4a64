"""The owner record of a request, as the router opens, swaps, closes and tells it."""

from __future__ import annotations

from dataclasses import replace

from router.commit import is_over
from router.fleet import Worker
from router.outbox import Outbox
from router.request import Request
from router.store import OwnerRecord, OwnerStore
from tandem.messages import OwnerIs
from tandem.request import RequestId, TransferId


class Owners:
    """All changes of owner records go through here; each is a compare-and-swap that this router must win."""

    def __init__(self, store: OwnerStore, outbox: Outbox) -> None:
        self._store = store
        self._outbox = outbox

    def open(self, request: Request, worker: Worker, epoch: int, transfer_id: TransferId) -> None:
        """The request is placed: the worker that begins with it owns it."""
        owner = OwnerRecord(
            request_id=request.request_id,
            epoch=epoch,
            worker_id=worker.worker_id,
            incarnation=worker.incarnation,
            transfer_id=transfer_id,
        )
        self._swap(request, owner)

    def commit(self, request: Request, target: Worker, transfer_id: TransferId) -> OwnerRecord:
        """The request changes hands, under the next epoch."""
        assert request.owner is not None, f"{request.request_id} has no owner: {list(request.story)}"
        owner = replace(
            request.owner,
            epoch=request.owner.epoch + 1,
            worker_id=target.worker_id,
            incarnation=target.incarnation,
            transfer_id=transfer_id,
            committed=True,
        )
        self._swap(request, owner)
        return owner

    def close(self, request: Request) -> None:
        """Nobody has the request any more: a commit that comes later fails."""
        self._swap(request, None)

    def _swap(self, request: Request, owner: OwnerRecord | None) -> None:
        swapped = self._store.swap(request.request_id, request.owner, owner)
        assert swapped, f"the owner record of {request.request_id} changed under its router: {list(request.story)}"
        request.owner = owner

    def tell(
        self, worker: Worker, request_id: RequestId, request: Request | None, transfer_id: TransferId, refused: str = ""
    ) -> None:
        """Says what the record holds now; of a request that no worker has, that it is over."""
        owner = self._store.get(request_id)
        message = OwnerIs(
            request_id=request_id,
            transfer_id=transfer_id,
            epoch=0 if owner is None else owner.epoch,
            worker_id=None if owner is None else owner.worker_id,
            incarnation=0 if owner is None else owner.incarnation,
            refused=refused,
            over=is_over(request, transfer_id),
        )
        self._outbox.send(worker, message, refused or "the owner record was asked")
