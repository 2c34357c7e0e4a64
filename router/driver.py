"""The router's core on an asyncio loop: streams to workers, streams to clients, and a tick. No policy lives here."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import assert_never

from router.answer import TokenStream
from router.clients import WorkerLink
from router.config import GRACE_MS, RouterConfig
from router.core import RouterCore
from router.events import (
    Action,
    ClientGone,
    Deliver,
    Event,
    Fail,
    FenceRaised,
    Finish,
    HandedOver,
    LetGo,
    LinkLost,
    LinkUp,
    MoveEnded,
    MoveRefused,
    MoveRequested,
    NewRequest,
    Placed,
    Recovering,
    Refuse,
    ReportArrived,
    SendToWorker,
    StopRequested,
    Submitted,
    Tick,
    Usage,
    WorkerDraining,
    WorkerFlipped,
    WorkerJoined,
    WorkerLost,
    WorkerSuspected,
)
from router.fleet import Fleet
from router.flight import Flight
from router.move import EPOCHS_PER_FENCE, MoveReason, MoveRecord
from router.ports import Account, Link, MakeLink, Watcher
from router.request import StatusSnapshot
from router.stages import FirstToken, StageBook
from router.token_stream import RequestStream, replay_of
from router.transcripts import Ended, Keep, Kept, Transcripts, Write
from tandem.cluster_access import ClusterAccess
from tandem.errors import (
    Cancelled,
    DeadlinePassed,
    DuplicateRequest,
    Overloaded,
    Stopping,
    StoreAway,
    TakenOver,
    TandemError,
    UnknownRequest,
)
from tandem.messages import Assign, AssignMode, Role, WorkerInfo, WorkerReport
from tandem.request import RequestId, Token, WorkerId

__all__ = ["Driver", "NewRequest", "WantedMove"]

log = logging.getLogger(__name__)

_Key = tuple[WorkerId, int]


def _steady_ms() -> int:
    return time.monotonic_ns() // 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedMove:
    """A running request should go to another worker; `to` None leaves the choice to the router."""

    request_id: RequestId
    to: WorkerId | None
    reason: MoveReason
    why: str


class Driver:
    """Feeds the core and performs what it wants. All methods are called on the event loop that `start` ran on.

    `born_us`: when this router's life began, by the clock of the store that routers share, if any. Fences and sessions
    count from there, and so grow over restarts. The fence of a request leads all of its epochs: whoever may write of it
    is whom workers listen to, and nothing old is ever taken for current. `clock_ms`, `clock_s`:
    any steady clocks, the second for measuring alone. `link`: makes the streams to workers.
    """

    def __init__(
        self,
        config: RouterConfig | None = None,
        *,
        transcripts: Transcripts | None = None,
        born_us: int | None = None,
        access: ClusterAccess | None = None,
        account: Account | None = None,
        watcher: Watcher | None = None,
        clock_ms: Callable[[], int] = _steady_ms,
        clock_s: Callable[[], float] = time.monotonic,
        link: MakeLink = WorkerLink,
    ) -> None:
        self._now_ms = clock_ms
        self._clock_s = clock_s
        self._link = link
        self.config = RouterConfig() if config is None else config
        self._access = access or ClusterAccess()
        self._account = account
        self._watcher = watcher
        self.transcripts = Transcripts(shared=False) if transcripts is None else transcripts
        born_us = time.time_ns() // 1000 if born_us is None else born_us
        self._core = RouterCore(self.config)
        self._stages = StageBook(self.config.history_max)
        self._sessions = itertools.count(born_us)
        self._fence = 0
        self._to_us = born_us - 1000 * clock_ms()  # from this process's clock to the store's
        self._streams: dict[RequestId, RequestStream] = {}
        self._tickets = itertools.count(1)
        self._moves: dict[int, asyncio.Future[MoveRecord]] = {}  # who waits for the end of a move, by ticket
        self.move_ended = asyncio.Event()  # set at each; whoever waits clears it
        self._links: dict[_Key, Link] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._crash: asyncio.Future[None] | None = None  # gets the first error that nobody can answer for
        self._stopped = False

    async def __aenter__(self) -> Driver:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Begins to tick."""
        loop = asyncio.get_running_loop()
        self._crash = loop.create_future()
        self._ticker = loop.create_task(self._tick(), name="router tick")
        self._ticker.add_done_callback(self._watch)

    async def crashed(self) -> None:
        """Waits until the core, its tick or a link has failed by a mistake of ours, and raises that.

        Without a tick no deadline passes, and a dead link looks alive: whoever hosts the driver ends the process then.
        """
        assert self._crash is not None, "not started"
        await asyncio.shield(self._crash)

    async def stop(self) -> None:
        """Ends every request with a named error, then every link. Bounded."""
        self._stopped = True
        self.transcripts.close()
        for request_id in self._core.request_ids():
            self._feed(LetGo(request_id=request_id, error=Stopping("the router is stopping")))
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        links = [link.close() for link in self._links.values()]
        self._links.clear()
        await asyncio.wait_for(asyncio.gather(*links, *self._closing), timeout=10)

    # ---- clients ---------------------------------------------------------------------------------------------------

    def next_fence(self, above: int = 0) -> int:
        """A fence for a request that begins here: the time of that, and above those of all that began before."""
        self._fence = max(self._fence + 1, above + 1, self._to_us + 1000 * self._now_ms())
        return self._fence

    def submit(
        self,
        request: NewRequest,
        keep: Keep | None = None,
        *,
        fence: int | None = None,
        arrived_s: float | None = None,
    ) -> RequestStream:
        """Starts a request. `keep`: its client may come back. `fence`: the shared store has it already, under this one.

        `arrived_s`: when it came to the edge; None: now.

        Raises the TandemError that it is refused with.
        """
        if self._core.has(request.request_id):
            raise DuplicateRequest(f"a request of id {request.request_id!r} is being served")
        now_s = self._clock_s()
        self._stages.submitted(request.request_id, arrived_s=now_s if arrived_s is None else arrived_s, at_s=now_s)
        claimed, fence = fence is not None, fence or self.next_fence()
        if keep is not None:
            self.transcripts.begin(request, keep, fence=fence, written=claimed)
        return self._begin(Submitted(request=request, first_epoch=fence * EPOCHS_PER_FENCE))

    def take_over(self, kept: Kept) -> RequestStream:
        """Goes on with a request that another router had, under the fence that the store gave for it.

        That router may have had it from this one, which did not know: its life here ends.
        """
        if self._core.has(kept.new.request_id):
            self.let_go(kept.new.request_id, began_apart=False)
        self._fence = max(self._fence, kept.fence)  # the id's next life here is above it, however the clocks stand
        self.transcripts.begin(kept.new, kept.keep, fence=kept.fence, tokens=kept.tokens, written=True)
        first_epoch = kept.fence * EPOCHS_PER_FENCE
        event = Submitted(request=kept.new, answer=kept.tokens, first_epoch=first_epoch, taken_over=True)
        return self._begin(event)

    def _begin(self, event: Submitted) -> RequestStream:
        if self._stopped:
            raise Stopping("the router is stopping")
        request_id = event.request.request_id
        stream = RequestStream(request_id)
        stream.replay(event.answer)
        self._streams[request_id] = stream
        for action in self._handle(event):
            if isinstance(action, Refuse):
                del self._streams[request_id]
                self.transcripts.refuse(self._now_ms(), request_id, action.error)
                raise action.error
            self._perform(action)
        if stream.error is not None:
            raise stream.error  # it can never be served: known at once
        return stream

    def read_again(self, request_id: RequestId, *, sure: bool = True) -> RequestStream:
        """The answer of a request that is served here, or was lately, from its first token on; ends an earlier reader.

        `sure`: the store says that no other router has it. Raises UnknownRequest.
        """
        kept = self.transcripts.find(request_id)
        if kept is None:
            raise UnknownRequest(f"no request of id {request_id!r} is known, that could be resumed")
        stream = replay_of(kept)
        if kept.ended is None:
            before = self._streams.get(request_id)
            if before is not None:
                before.end(None, TakenOver("another client reads this answer now"))
            self._streams[request_id] = stream
            stream.sure = sure
            self.transcripts.read(request_id)
        return stream

    def leave(self, stream: TokenStream, reason: str) -> None:
        """The reader of this stream is gone: the request waits for another one, if its client wants that, or ends."""
        if self._streams.get(stream.request_id) is not stream:
            return  # it has ended, or another one reads it already
        if not self.transcripts.left(self._now_ms(), stream.request_id):
            self._feed(ClientGone(request_id=stream.request_id, reason=reason))
        else:
            del self._streams[stream.request_id]

    def withdraw(self, new: NewRequest, keep: Keep, fence: int) -> None:
        """A request that was being claimed under this fence does not begin."""
        self.transcripts.withdraw(self._now_ms(), new, keep, fence)

    def renew(self, write: Write, above: int) -> None:
        """What this write is of goes on above that fence, which a take-over of this router's set without its hearing.

        Workers may have heard of the request from a router in between, so they are told of it anew.
        """
        kept = self.transcripts.find(write.request_id)
        if kept is not None and kept.fence == write.fence:  # else another life of it began
            fence = self.next_fence(above)
            self.transcripts.renew(write.request_id, fence)
            self._feed(FenceRaised(request_id=write.request_id, first_epoch=fence * EPOCHS_PER_FENCE))

    def let_go(self, request_id: RequestId, *, began_apart: bool) -> None:
        """Another router has the request: it ends here, whatever was under way.

        Its reader was left behind there, unless it came here while the store could not be asked (`began_apart`: the
        request did): then it goes on there.
        """
        self.transcripts.let_go(request_id)
        stream = self._streams.get(request_id)
        error: TandemError = TakenOver("another router has this request now: its client resumed the stream there")
        if began_apart or (stream is not None and not stream.sure):
            error = StoreAway("another router has this request, which the store could not say before: resume it there")
        self._feed(LetGo(request_id=request_id, error=error))

    def written(self, request_id: RequestId) -> FirstToken | None:
        """The request's first token was handed to its client; how long that took, the first time."""
        return self._stages.written(request_id, self._clock_s())

    def flight(self, request_id: RequestId) -> Flight | None:
        """All that is known of a request that runs here or ended lately; None: there is no such request."""
        now_ms = self._now_ms()
        found = self._core.explain(now_ms, request_id)
        if found is None:
            return None
        request, moves = found
        arrived_s = self._stages.arrived_s(request_id)
        ago_ms = float(request.age_ms) if arrived_s is None else 1000 * (self._clock_s() - arrived_s)
        first = self._stages.find(request_id)
        return Flight(request=request, moves=moves, first=first, now_ms=now_ms, arrived_ms_ago=ago_ms)

    def cancel(self, request_id: RequestId, reason: str) -> bool:
        """Ends a request everywhere; its stream raises Cancelled. False when it is not known."""
        if not self._core.has(request_id):
            return False
        self._feed(ClientGone(request_id=request_id, reason=reason))
        return True

    def stop_at(self, request_id: RequestId, index: int) -> None:
        """The answer ends at token `index`, which is kept: a stop string was found."""
        self._feed(StopRequested(request_id=request_id, index=index))

    # ---- moves -----------------------------------------------------------------------------------------------------

    async def move(self, request_id: RequestId, to: WorkerId | None, reason: MoveReason, why: str) -> MoveRecord:
        """Moves a running request and waits for the end of that: its record says how it went.

        Raises the TandemError that the move is refused with; DeadlinePassed when its end is not known in time, which
        the move itself survives.
        """
        if self._stopped:
            raise Stopping("the router is stopping")
        if len(self._moves) >= self.config.move_askers_max:
            limit = self.config.move_askers_max
            raise Overloaded(
                f"{limit} callers wait for moves, no more may", retry_after_ms=self.config.move_deadline_ms
            )
        # The core ends a move by its deadline, or by the target's first token, whose stall has a deadline, too.
        bound_ms = self.config.move_deadline_ms + self.config.decode_stall_ms + 2 * GRACE_MS
        ticket = next(self._tickets)
        ended: asyncio.Future[MoveRecord] = asyncio.get_running_loop().create_future()
        self._moves[ticket] = ended
        try:
            self._feed(MoveRequested(request_id=request_id, to=to, reason=reason, why=why, ticket=ticket))
            async with asyncio.timeout(bound_ms / 1000):
                return await ended
        except TimeoutError:
            raise DeadlinePassed(f"the move of {request_id} did not end within {bound_ms} ms") from None
        finally:
            self._moves.pop(ticket, None)

    def request_moves(self, wanted: Iterable[WantedMove]) -> list[MoveRefused]:
        """Begins the moves that can be begun and returns why the others cannot; status shows how the begun ones end."""
        refused: list[MoveRefused] = []
        for each in wanted:
            event = MoveRequested(
                request_id=each.request_id, to=each.to, reason=each.reason, why=each.why, ticket=next(self._tickets)
            )
            for action in self._handle(event):
                if isinstance(action, MoveRefused):
                    refused.append(action)
                self._perform(action)
        return refused

    # ---- workers ---------------------------------------------------------------------------------------------------

    def worker_joined(self, info: WorkerInfo, incarnation: int) -> None:
        """A worker incarnation registered: dial it. An older incarnation of it is given up."""
        known = [each for each in self._links if each[0] == info.worker_id]
        if any(each[1] >= incarnation for each in known):
            return
        for each in known:
            self._close(each)
        self._feed(WorkerJoined(info=info, incarnation=incarnation))
        key = (info.worker_id, incarnation)

        def lost(reason: str) -> None:
            self._feed(LinkLost(worker_id=key[0], incarnation=key[1], reason=reason))

        link = self._link(
            worker_id=info.worker_id,
            control=info.control,
            config=self.config,
            access=self._access,
            next_session=lambda: next(self._sessions),
            on_up=lambda: self._feed(LinkUp(worker_id=key[0], incarnation=key[1])),
            on_report=lambda report: self._reported(key, report),
            on_lost=lost,
        )
        self._links[key] = link
        link.start().add_done_callback(self._watch)

    def worker_lost(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        """The worker incarnation is dead: what it had is placed anew."""
        self._close((worker_id, incarnation))
        self._feed(WorkerLost(worker_id=worker_id, incarnation=incarnation, reason=reason))

    def worker_suspected(self, worker_id: WorkerId, incarnation: int, suspected: bool) -> None:
        """Its heartbeats are missing, or are there again: it gets nothing new meanwhile."""
        self._feed(WorkerSuspected(worker_id=worker_id, incarnation=incarnation, suspected=suspected))

    def worker_draining(self, worker_id: WorkerId, incarnation: int, draining: bool = True) -> None:
        """It finishes what it has and gets nothing new; or, `draining` False, it gets work again."""
        self._feed(WorkerDraining(worker_id=worker_id, incarnation=incarnation, draining=draining))

    def worker_flipped(self, worker_id: WorkerId, incarnation: int, role: Role) -> None:
        """It has another role from now on."""
        self._feed(WorkerFlipped(worker_id=worker_id, incarnation=incarnation, role=role))

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return self._core.num_waiting

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of requests whose first token is to come."""
        return self._core.queued_tokens

    @property
    def fleet(self) -> Fleet:
        """The workers as the router sees them, to be read only."""
        return self._core.fleet

    def status(self) -> StatusSnapshot:
        """Workers and requests, also those that ended in the last minutes."""
        return self._core.status(self._now_ms())

    # ---- the loop --------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.config.tick_ms / 1000)
            self._feed(Tick())
            now_ms = self._now_ms()
            for request_id, waited_ms in self.transcripts.overdue(now_ms):
                self.cancel(request_id, f"its client did not come back within {waited_ms} ms")
            self.transcripts.expire(now_ms)

    def _reported(self, key: _Key, report: WorkerReport) -> None:
        if (report.worker_id, report.incarnation) != key:
            log.warning("worker=%s incarnation=%d speaks as %s/%d", *key, report.worker_id, report.incarnation)
            return
        for stats in report.transfers:
            if stats.first is not None:
                self._stages.told(stats.request_id, stats.first)
            if self._watcher is not None:
                self._watcher.transferred(stats)
        self._feed(ReportArrived(report=report))

    def _feed(self, event: Event) -> None:
        for action in self._handle(event):
            self._perform(action)

    def _handle(self, event: Event) -> list[Action]:
        try:
            return self._core.handle(self._now_ms(), event)
        except Exception as error:
            self._crashes(error)
            raise

    def _watch(self, task: asyncio.Future[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._crashes(error)

    def _crashes(self, error: BaseException) -> None:
        log.critical("the router is broken", exc_info=error)
        if self._crash is not None and not self._crash.done():
            self._crash.set_exception(error)
            self._crash.exception()  # taken note of, whether or not anybody waits

    def _perform(self, action: Action) -> None:
        match action:
            case SendToWorker():
                message = action.message
                if isinstance(message, Assign) and message.mode is not AssignMode.DECODE:
                    self._stages.assigned(message.request_id, self._clock_s())
                link = self._links.get((action.worker_id, action.incarnation))
                if link is not None:
                    link.send(message)
            case Deliver(request_id=request_id, tokens=tokens):
                self._deliver(request_id, tokens)
            case Finish(request_id=request_id, usage=usage):
                ended = Ended(num_tokens=usage.completion_tokens, usage=usage)
                self.transcripts.end(self._now_ms(), request_id, ended)
                self._end(request_id, usage, None)
            case Fail(request_id=request_id, error=error):
                log.info("request=%s failed: %s", request_id, error)
                ended = Ended(num_tokens=action.num_tokens, usage=None, code=error.code, message=error.message)
                self.transcripts.end(self._now_ms(), request_id, ended)
                self._end(request_id, None, error)
            case MoveRefused(ticket=ticket, error=error):
                log.debug("request=%s is not moved: %s", action.request_id, error)
                self._move_ended(ticket, error)
            case MoveEnded(ticket=ticket, record=record):
                log.info(
                    "request=%s %s from=%s to=%s reason=%s pause_ms=%d %s",
                    *(record.request_id, record.outcome, record.source, record.target, record.reason),
                    *(record.pause_ms, record.error),
                )
                self._move_ended(ticket, record)
            case Placed() | HandedOver() | Recovering():
                if self._watcher is not None:
                    self._watcher.noted(action)
            case Refuse():
                raise AssertionError(f"{action} answers nothing that was asked")
            case _:
                assert_never(action)

    def _deliver(self, request_id: RequestId, tokens: tuple[Token, ...]) -> None:
        if self._account is not None:
            self._account.produced(request_id, len(tokens))
        self.transcripts.deliver(request_id, tokens)
        stream = self._streams.get(request_id)
        if stream is None:
            return
        if tokens[0].index == 0:
            self._stages.came(request_id, self._clock_s())
        stream.push(tokens)
        limit = self.config.stream_tokens_max + stream.num_replayed
        if stream.num_buffered > limit and not stream.ended:
            reason = f"the client reads too slowly: {stream.num_buffered} tokens wait for it, the limit is {limit}"
            stream.end(None, Cancelled(reason))
            asyncio.get_running_loop().call_soon(self.cancel, request_id, reason)

    def _end(self, request_id: RequestId, usage: Usage | None, error: TandemError | None) -> None:
        if self._account is not None:
            self._account.ended(request_id)
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.end(usage, error)

    def _move_ended(self, ticket: int, how: MoveRecord | TandemError) -> None:
        """Tells whoever waits for it; moves of the rebalancer have nobody waiting for this one alone."""
        if isinstance(how, MoveRecord):
            self.move_ended.set()
            if self._watcher is not None:
                self._watcher.moved(how)
        waiting = self._moves.get(ticket)
        if waiting is None or waiting.done():
            return
        if isinstance(how, MoveRecord):
            waiting.set_result(how)
        else:
            waiting.set_exception(how)

    def _close(self, key: _Key) -> None:
        link = self._links.pop(key, None)
        if link is not None:
            self._spawn(link.close())

    def _spawn(self, closing: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
