"""The requests of one router from when they are taken in until they end, each once; and what is seen of them."""

from __future__ import annotations

from router.admission import Admission
from router.attempts import Attempts
from router.config import RouterConfig
from router.events import Fail, Finish
from router.fleet import Fleet, Worker, WorkerState
from router.history import History
from router.line import Line
from router.moves import Moves
from router.outbox import Outbox
from router.prefix_index import PrefixIndex
from router.request import Request, RequestSnapshot, RequestState, StatusSnapshot, snapshot, worker_snapshot
from tandem.errors import Cancelled, TandemError
from tandem.messages import TransferStats
from tandem.request import FinishReason, RequestId


class InFlight:
    """Whoever ends here is in flight no more: its attempt is cancelled, its client told, and its end remembered."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        fleet: Fleet,
        line: Line,
        attempts: Attempts,
        admission: Admission,
        outbox: Outbox,
    ) -> None:
        self._fleet = fleet
        self._line = line
        self._attempts = attempts
        self._admission = admission
        self._outbox = outbox
        self.requests: dict[RequestId, Request] = {}  # for others to read only
        self.history = History(keep_ms=config.history_ms, num_max=config.history_max)
        self.queued_tokens = 0  # of prompts whose first token is to come

    def add(self, now_ms: int, request: Request, *, taken_over: bool) -> None:
        """Takes the request in, as a new one or as one that another router had."""
        request.tell(now_ms, f"taken over after {len(request.answer)} tokens" if taken_over else "admitted")
        self.requests[request.new.request_id] = request
        self.queued_tokens += len(request.new.tokens)

    def first_token(self, now_ms: int, request: Request) -> None:
        """Its prompt is read, in whichever of its attempts."""
        request.first_token_ms = now_ms
        self.queued_tokens -= len(request.new.tokens)
        self._admission.first_token(now_ms, request)
        request.tell(now_ms, "first token")

    def transferred(self, stats: TransferStats) -> None:
        """A worker tells of a transfer; it may do so when the request has ended."""
        request = self.requests.get(stats.request_id)
        if request is not None:
            request.transferred = request.transferred.plus(stats)
        else:
            self.history.transferred(stats)

    # ---- ends ------------------------------------------------------------------------------------------------------

    def finish(self, now_ms: int, request: Request, reason: FinishReason, by: Worker | None) -> None:
        """It has all that it asked for. `by` wrote the last token and needs no telling."""
        request.state = RequestState.FINISHED
        if by is not None and request.placement is not None and request.num_moves == 0:
            self._fleet.served((request.placement.source, by.key), request.placed_ms)
        if by is not None and by in request.involved:
            request.involved.remove(by)
            self._fleet.forget(by, request.request_id)
        self._admission.ended(now_ms)
        request.tell(now_ms, f"finished: {reason.value}")
        self._outbox.add(Finish(request_id=request.request_id, reason=reason, usage=request.usage()))
        self._end(now_ms, request, "")

    def fail(self, now_ms: int, request: Request, error: TandemError) -> None:
        """It ends with an error, or as its client wished."""
        request.state = RequestState.CANCELLED if isinstance(error, Cancelled) else RequestState.FAILED
        request.tell(now_ms, f"{request.state.value}: {error.message}")
        self._outbox.add(Fail(request_id=request.request_id, error=error, num_tokens=len(request.answer)))
        self._end(now_ms, request, f"{error.code}: {error.message}")

    def _end(self, now_ms: int, request: Request, error: str) -> None:
        ended = snapshot(request, now_ms, error=error)
        self._attempts.end(now_ms, request, error or "the request is finished")
        if request.first_token_ms is None:
            self.queued_tokens -= len(request.new.tokens)
        del self.requests[request.request_id]
        self._line.tidy(len(self.requests))
        if request.new.canary is None:
            self.history.add(now_ms, ended)

    def find(self, now_ms: int, request_id: RequestId) -> RequestSnapshot | None:
        """The request as it is, or as it ended."""
        request = self.requests.get(request_id)
        if request is None:
            return self.history.find(request_id)
        return snapshot(request, now_ms, waits_for="" if self._line.blocked is None else self._line.blocked.reason)

    # ---- status ----------------------------------------------------------------------------------------------------

    def status(self, now_ms: int, index: PrefixIndex, moves: Moves) -> StatusSnapshot:
        """What operators see."""
        workers = [
            worker_snapshot(each, index.num_blocks(each.slot) if each.state is not WorkerState.DEAD else 0)
            for each in (*self._fleet, *self._fleet.dead())
        ]
        waits_for = "" if self._line.blocked is None else self._line.blocked.reason
        clients = [each for each in self.requests.values() if each.new.canary is None]
        running = [snapshot(each, now_ms, waits_for=waits_for) for each in clients]
        return StatusSnapshot(
            now_ms=now_ms,
            workers=tuple(workers),
            requests=(*self.history.snapshots(), *running),
            moves=moves.records(),
            queued_tokens=self.queued_tokens,
            waiting=sum(each.state is RequestState.ADMITTED for each in self.requests.values()),
        )
