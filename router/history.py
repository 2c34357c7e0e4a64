"""The requests and the moves that ended a while ago, for status: bounded in time and number."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from router.move import MoveOutcome, MoveRecord
from router.request import RequestSnapshot
from tandem.messages import TransferStats
from tandem.request import RequestId, TransferId


class History:
    """Ended requests, oldest first."""

    def __init__(self, *, keep_ms: int, num_max: int) -> None:
        self._keep_ms = keep_ms
        self._num_max = num_max
        self._ended: OrderedDict[RequestId, tuple[int, RequestSnapshot]] = OrderedDict()

    def add(self, now_ms: int, ended: RequestSnapshot) -> None:
        """Remembers a request that ended now; an older one of the same id is forgotten."""
        self._ended.pop(ended.request_id, None)
        self._ended[ended.request_id] = now_ms, ended
        while len(self._ended) > self._num_max:
            self._ended.popitem(last=False)

    def state_of(self, request_id: RequestId) -> str:
        """How a request that is remembered ended; empty when it is not."""
        entry = self._ended.get(request_id)
        return "" if entry is None else entry[1].state.value

    def find(self, request_id: RequestId) -> RequestSnapshot | None:
        """How it ended, if that is remembered."""
        entry = self._ended.get(request_id)
        return None if entry is None else entry[1]

    def expire(self, now_ms: int) -> None:
        """Forgets what ended too long ago."""
        while self._ended:
            at_ms, ended = next(iter(self._ended.values()))
            if now_ms - at_ms <= self._keep_ms:
                return
            del self._ended[ended.request_id]

    def transferred(self, stats: TransferStats) -> None:
        """A worker tells of a transfer when the request has already ended."""
        entry = self._ended.get(stats.request_id)
        if entry is None:
            return
        at_ms, ended = entry
        self._ended[stats.request_id] = at_ms, replace(ended, transferred=ended.transferred.plus(stats))

    def snapshots(self) -> tuple[RequestSnapshot, ...]:
        """All that are remembered, oldest end first."""
        return tuple(ended for _, ended in self._ended.values())


class MoveHistory:
    """Moves under way and ended, in the order in which they began."""

    def __init__(self, *, keep_ms: int, num_max: int) -> None:
        self._keep_ms = keep_ms
        self._num_max = num_max
        self._records: OrderedDict[TransferId, MoveRecord] = OrderedDict()
        self._ended_ms: OrderedDict[TransferId, int] = OrderedDict()

    def begin(self, transfer_id: TransferId, record: MoveRecord) -> None:
        """A move is under way; it is remembered at least until it ends."""
        self._records[transfer_id] = record

    def settle(self, transfer_id: TransferId, outcome: MoveOutcome, *, error: str = "", pause_ms: int = 0) -> None:
        """How the move went is known; its end may be still to come."""
        record = self._records[transfer_id]
        self._records[transfer_id] = replace(record, outcome=outcome, error=error, pause_ms=pause_ms)

    def end(self, transfer_id: TransferId, now_ms: int) -> MoveRecord:
        """The move is over: so long, and among so many, it is remembered from now on."""
        record = self._records[transfer_id]
        self._ended_ms[transfer_id] = now_ms
        if len(self._ended_ms) > self._num_max:
            oldest, _ = self._ended_ms.popitem(last=False)
            del self._records[oldest]
        return record

    def transferred(self, stats: TransferStats) -> bool:
        """What an end of the move tells, at any time and however often; False when it is no move that is remembered."""
        record = self._records.get(stats.transfer_id)
        if record is None:
            return False
        self._records[stats.transfer_id] = replace(
            record,
            rounds=max(record.rounds, stats.rounds),
            blocks_moved=max(record.blocks_moved, stats.blocks_moved),
            blocks_reused=max(record.blocks_reused, stats.blocks_reused),
            bytes_moved=max(record.bytes_moved, stats.bytes),
            tokens_recomputed=max(record.tokens_recomputed, stats.tokens_recomputed),
            precopy_ms=max(record.precopy_ms, stats.precopy_ms),
            fence_ms=max(record.fence_ms, stats.fence_ms),
        )
        return True

    def records(self) -> tuple[MoveRecord, ...]:
        """All that are remembered, those under way included."""
        return tuple(self._records.values())

    def expire(self, now_ms: int) -> None:
        """Forgets what ended too long ago."""
        while self._ended_ms:
            transfer_id, ended_ms = next(iter(self._ended_ms.items()))
            if now_ms - ended_ms <= self._keep_ms:
                return
            del self._ended_ms[transfer_id], self._records[transfer_id]
