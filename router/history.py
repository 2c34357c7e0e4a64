"""The requests that ended a while ago, for status: bounded in time and number."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from router.request import RequestSnapshot
from tandem.messages import TransferStats
from tandem.request import RequestId


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
