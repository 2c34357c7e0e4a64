"""The owner records: who may write the next token of a request, changed by compare-and-swap only.

The core uses this synchronously, and keeps the records to itself: one router at a time serves a request. Which one that
is, where routers share a store, the fence of its transcript says (router/transcripts.py), and epochs begin with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tandem.request import RequestId, TransferId, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerRecord:
    """The owner of one request. `committed`: this epoch began with the commit of `transfer_id`."""

    request_id: RequestId
    epoch: int
    worker_id: WorkerId
    incarnation: int
    transfer_id: TransferId
    committed: bool = False


class OwnerStore(Protocol):
    """Owner records by request."""

    def get(self, request_id: RequestId) -> OwnerRecord | None: ...

    def swap(self, request_id: RequestId, expected: OwnerRecord | None, new: OwnerRecord | None) -> bool:
        """Replaces the record if it is `expected` (None: absent), and says whether it did. `new` None removes it."""
        ...


class EmbeddedOwners:
    """Owner records in this process's memory."""

    def __init__(self) -> None:
        self._records: dict[RequestId, OwnerRecord] = {}

    def __len__(self) -> int:
        return len(self._records)

    def get(self, request_id: RequestId) -> OwnerRecord | None:
        return self._records.get(request_id)

    def swap(self, request_id: RequestId, expected: OwnerRecord | None, new: OwnerRecord | None) -> bool:
        if self._records.get(request_id) != expected:
            return False
        if new is None:
            self._records.pop(request_id, None)
        else:
            assert expected is None or new.epoch > expected.epoch, f"{new} does not follow {expected}"
            self._records[request_id] = new
        return True
