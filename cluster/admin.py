"""The gRPC service for operators: what runs where, move a request, drain a worker, and stop."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio

from cluster.canary import Canaries
from cluster.draining import Drain
from cluster.elastic import Elastic
from cluster.flight_record import flight_record
from cluster.membership import Member, Membership, MemberState
from cluster.operations import Operations, find_request
from cluster.peers import ANSWER_S, Peers, check_all_answered
from cluster.readiness import PairStatus
from router.driver import Driver
from router.lately import Counted, Lately
from router.move import MoveRecord
from router.request import ENDED, RequestSnapshot, WorkerSnapshot
from tandem.errors import TandemError, UnknownRequest
from tandem.messages import BlockCounts
from tandem.request import RequestId
from tandem.v1 import admin_pb2 as pb
from tandem.v1 import admin_pb2_grpc

if TYPE_CHECKING:
    # The stubs are generic, the classes are not.
    _Context = grpc.aio.ServicerContext[Any, Any]


PAIRS_MAX = 256  # told


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the router listens, what it serves, and where it keeps its state: empty, in itself."""

    model: str
    http: str
    grpc: str
    store: str = ""


MIGRATE_S = 120.0  # for a move that another router bounds itself, unless it hangs


class Admin(admin_pb2_grpc.AdminServicer):
    """Answers from the membership, the driver's snapshot and the other routers.

    `stop` is told why the cluster shall stop; `cancel` ends a request of this router, `metrics` is
    its page, `lately` what its clients saw.
    """

    def __init__(
        self,
        *,
        membership: Membership,
        driver: Driver,
        operations: Operations,
        elastic: Elastic,
        canaries: Canaries,
        peers: Peers,
        addresses: Callable[[], Addresses],
        cancel: Callable[[str, str, str | None], bool],
        metrics: Callable[[], bytes],
        lately: Callable[[], Lately],
        stop: Callable[[str], None],
    ) -> None:
        self._membership = membership
        self._driver = driver
        self._operations = operations
        self._elastic = elastic
        self._canaries = canaries
        self._peers = peers
        self._addresses = addresses
        self._cancel = cancel
        self._metrics = metrics
        self._lately = lately
        self._stop = stop

    async def Status(self, request: pb.StatusRequest, context: _Context) -> pb.StatusResponse:
        """Workers, and requests in flight; with `include_finished` also those that ended lately. Of all routers."""
        mine = self._local(request)
        return mine if request.local else merged(mine, await self._peers.statuses(request), self._peers.internal)

    def _local(self, asked: pb.StatusRequest) -> pb.StatusResponse:
        snapshot = self._driver.status()
        addresses, me = self._addresses(), self._peers.me
        seen = {(worker.worker_id, worker.incarnation): worker for worker in snapshot.workers}
        members = sorted(self._membership.members.values(), key=lambda each: each.info.worker_id)
        lately = self._lately()
        router = pb.RouterStatus(
            id=me,
            pid=os.getpid(),
            address=self._peers.internal[me],
            up=True,
            workers_ready=[each.info.worker_id for each in members if each.state is MemberState.READY],
            num_requests=sum(each.state not in ENDED for each in snapshot.requests),
            last_minute=last_minute(lately) if asked.last_minute else None,
            tokens_total=lately.tokens_total,
        )
        return pb.StatusResponse(
            workers=[
                worker_status(member, seen.get((member.info.worker_id, member.incarnation))) for member in members
            ],
            requests=[
                request_status(each, me)
                for each in snapshot.requests
                if asked.include_finished or each.state not in ENDED
            ],
            model=addresses.model,
            http_address=addresses.http,
            grpc_address=addresses.grpc,
            router_pid=os.getpid(),
            moves=[move_status(each, snapshot.now_ms) for each in snapshot.moves],
            not_ready=self._canaries.not_ready(),
            pairs=[pair_status(each, snapshot.now_ms) for each in self._canaries.status()[:PAIRS_MAX]],
            routers=[router],
            store=addresses.store,
        )  # fmt: skip

    async def Migrate(self, request: pb.MigrateRequest, context: _Context) -> pb.MoveStatus:
        """Moves a running request; the answer says how that went. The router that has it bounds the wait."""
        try:
            return await self.migrate(request)
        except (TandemError, grpc.aio.AioRpcError) as error:
            await _abort(context, error)

    async def migrate(self, request: pb.MigrateRequest) -> pb.MoveStatus:
        """The same for callers in this process. Raises TandemError, or AioRpcError as another router said."""
        name, there = await self._where(request)
        if there is not None:
            asked = pb.MigrateRequest(request_id=name, to=request.to, local=True)
            answer: pb.MoveStatus = await there.Migrate(asked, timeout=MIGRATE_S, metadata=self._peers.metadata)
            return answer
        record = await self._operations.migrate(name, request.to)
        return move_status(record, self._driver.status().now_ms)

    async def Explain(self, request: pb.ExplainRequest, context: _Context) -> pb.FlightRecord:
        """All that is remembered of one request, from whichever router has it."""
        try:
            return await self.explain(request)
        except (TandemError, grpc.aio.AioRpcError) as error:
            await _abort(context, error)

    async def explain(self, request: pb.ExplainRequest) -> pb.FlightRecord:
        """The same for callers in this process. Raises TandemError, or AioRpcError as another router said."""
        name, there = await self._where(request)
        if there is not None:
            asked = pb.ExplainRequest(request_id=name, local=True)
            answer: pb.FlightRecord = await there.Explain(asked, timeout=ANSWER_S, metadata=self._peers.metadata)
            return answer
        return self._record(name)

    def _record(self, request_id: str) -> pb.FlightRecord:
        """Of a request of this router, the newest of its name. Raises UnknownRequest."""
        flight = self._driver.flight(RequestId(request_id))
        if flight is None:
            raise UnknownRequest(f"no request of id {request_id!r} is remembered")
        moves = [move_status(each, flight.now_ms) for each in flight.moves]
        return flight_record(flight, request_status(flight.request, self._peers.me), moves)

    async def _where(
        self, request: pb.MigrateRequest | pb.ExplainRequest
    ) -> tuple[str, admin_pb2_grpc.AdminStub | None]:
        """The whole id of the request that is meant, and the other router that has it, if this one has not.

        Raises as `_found`; what is asked of this router alone is taken as it is.
        """
        if request.local:
            return request.request_id, None
        found = await self._found(request.request_id)
        return found.id, None if found.router == self._peers.me else self._peers.stub(found.router)

    async def _found(self, name: str) -> pb.RequestStatus:
        """The request that is named so, at whichever router. Raises as find_request, or Unavailable."""
        asked = pb.StatusRequest(include_finished=True)
        others = await self._peers.statuses(asked)
        everywhere = merged(self._local(asked), others, self._peers.internal)
        try:
            return find_request(name, everywhere.requests)
        except UnknownRequest:
            check_all_answered(others)
            raise

    async def CancelHere(self, request: pb.CancelHereRequest, context: _Context) -> pb.CancelHereResponse:
        """Ends a request of this router, for a client that came to another one."""
        only = request.owner if request.HasField("owner") else None
        return pb.CancelHereResponse(found=self._cancel(request.request_id, "cancelled by a client", only))

    async def MetricsHere(self, request: pb.MetricsHereRequest, context: _Context) -> pb.MetricsHereResponse:
        """What this router has counted, for a page of all routers."""
        return pb.MetricsHereResponse(page=self._metrics().decode())

    async def Drain(self, request: pb.DrainRequest, context: _Context) -> AsyncIterator[pb.DrainProgress]:
        """Drains a worker, and tells of each change until that is over. It goes on when the caller goes away."""
        try:
            drain = self._operations.drain(request.worker, deadline_ms=request.deadline_ms, restart=request.restart)
            async with aclosing(self._operations.follow(drain)) as steps:
                async for now in steps:
                    yield drain_progress(now, elapsed_ms=now.elapsed_ms(time.monotonic_ns() // 1_000_000))
        except TandemError as error:
            await _abort(context, error)

    async def Flip(self, request: pb.FlipRequest, context: _Context) -> AsyncIterator[pb.DrainProgress]:
        """Gives a worker another role, and tells of each change until it has it. It goes on without the caller."""
        try:
            drain = self._operations.flip(request.worker, request.role, deadline_ms=request.deadline_ms)
            async with aclosing(self._operations.follow(drain)) as steps:
                async for now in steps:
                    yield drain_progress(now, elapsed_ms=now.elapsed_ms(time.monotonic_ns() // 1_000_000))
        except TandemError as error:
            await _abort(context, error)

    async def Scale(self, request: pb.ScaleRequest, context: _Context) -> AsyncIterator[pb.ScaleProgress]:
        """Brings the pools to the wanted sizes, and tells of each worker that comes or goes."""
        began_s = time.monotonic()
        wanted = {each.role: each.num for each in request.pools}
        try:
            async with aclosing(self._elastic.scale(wanted, deadline_ms=request.deadline_ms)) as steps:
                async for progress in steps:
                    yield pb.ScaleProgress(
                        worker=progress.worker_id,
                        role=progress.role.value,
                        state=progress.state,
                        requests=progress.num_requests,
                        blocks=progress.num_blocks,
                        elapsed_ms=round(1000 * (time.monotonic() - began_s)),
                    )
        except TandemError as error:
            await _abort(context, error)

    async def Stop(self, request: pb.StopRequest, context: _Context) -> pb.StopResponse:
        """Begins an orderly stop of the whole cluster and returns at once."""
        self._stop(request.reason or "asked by an operator")
        return pb.StopResponse()


def worker_status(member: Member, worker: WorkerSnapshot | None) -> pb.WorkerStatus:
    """One worker from membership's view and, where the router has heard of it, its last report."""
    info, load = member.info, worker.load if worker is not None else None
    counts = load.blocks if load is not None else BlockCounts(total=info.total_blocks, free=info.total_blocks)
    status = pb.WorkerStatus(
        id=info.worker_id,
        role=info.role.value,
        state=member.state.value,
        pid=info.pid,
        agent_pid=member.agent_pid,
        incarnation=member.incarnation,
        exact=info.exact,
        kv_blocks=pb.BlockCountsStatus(
            total=counts.total,
            free=counts.free,
            cached=counts.cached,
            owned=counts.owned,
            exported=counts.exported,
            granted=counts.granted,
            quarantined=counts.quarantined,
        ),
        model=info.model,
        dtype=info.dtype,
        reason=member.reason,
        exact_reason=dict(info.labels).get("exact_reason", ""),
        steps=member.steps,
        refused=min(member.refused, (1 << 32) - 1),
        control=info.control,
    )
    if load is not None:
        status.running, status.waiting = load.running, load.waiting
        status.last_step_ms = load.last_step_ms
        status.tokens_read, status.tokens_written = load.tokens_read, load.tokens_written
        status.swap.CopyFrom(
            pb.SwapStatus(
                total=load.swap.total,
                used=load.swap.used,
                requests=load.swap.requests,
                swapped_out=load.swap.swapped_out,
                brought_back=load.swap.brought_back,
                recomputed=load.swap.recomputed,
            )
        )
        status.audit.extend(load.audit)
    return status


def merged(
    mine: pb.StatusResponse, others: dict[str, pb.StatusResponse | None], internal: dict[str, str]
) -> pb.StatusResponse:
    """The status of all routers together: workers as the answering one sees them, requests and moves of each.

    A router that did not answer is named as one that is not up.
    """
    told = [each for each in others.values() if each is not None]
    known = {each.id for each in mine.workers}
    for answer in told:
        strangers = [each for each in answer.workers if each.id not in known]  # this router may be new
        mine.workers.extend(strangers)
        known |= {each.id for each in strangers}
        mine.requests.extend(answer.requests)
        mine.moves.extend(answer.moves)
        mine.routers.extend(answer.routers)
    silent = [name for name, answer in others.items() if answer is None]
    mine.routers.extend(pb.RouterStatus(id=name, address=internal[name]) for name in silent)
    mine.workers.sort(key=lambda each: each.id)
    mine.requests.sort(key=lambda each: each.state not in ENDED)  # the newest stay last
    mine.moves.sort(key=lambda each: each.at_ms)
    mine.routers.sort(key=lambda each: list(internal).index(each.id))
    return mine


def request_status(request: RequestSnapshot, router: str = "") -> pb.RequestStatus:
    """One request as its router sees it."""
    done = request.transferred
    status = pb.RequestStatus(
        id=request.request_id,
        state=request.state.value,
        mode=request.mode,
        prefill_worker=request.prefill_worker,
        decode_worker=request.decode_worker,
        tokens=request.tokens,
        prompt_tokens=request.prompt_tokens,
        blocks_granted=done.blocks_granted,
        blocks_moved=done.blocks_moved,
        blocks_reused=done.blocks_reused,
        tokens_recomputed=done.tokens_recomputed,
        tokens_cached=done.tokens_cached,
        first_frame_ms=done.first_frame_ms,
        last_chunk_start_ms=done.last_chunk_start_ms,
        committed_ms=done.committed_ms,
        first_step_ms=done.first_step_ms,
        num_replacements=request.num_replacements,
        error=request.error,
        reason=request.reason,
        num_moves=request.num_moves,
        moving_to=request.moving_to,
        priority=request.priority,
        router=router,
        age_ms=max(0, request.age_ms),
    )
    if request.ttft_ms is not None:
        status.ttft_ms = request.ttft_ms
    return status


def move_status(move: MoveRecord, now_ms: int) -> pb.MoveStatus:
    """A move as the router remembers it. `now_ms`: the present on the clock of its beginning."""
    status = pb.MoveStatus(
        request=move.request_id,
        to=move.target,
        reason=move.reason.value,
        why=move.why,
        outcome=move.outcome.value,
        error=move.error,
        rounds=move.rounds,
        blocks=move.blocks_moved,
        blocks_reused=move.blocks_reused,
        bytes=move.bytes_moved,
        precopy_ms=move.precopy_ms,
        fence_ms=move.fence_ms,
        pause_ms=move.pause_ms,
        at_ms=time.time_ns() // 1_000_000 - (now_ms - move.at_ms),
    )
    setattr(status, "from", move.source)  # no name for an argument
    return status


def last_minute(lately: Lately) -> pb.LastMinute:
    """What a router's clients saw."""
    return pb.LastMinute(
        seconds=lately.seconds,
        tokens=lately.counts[Counted.TOKENS],
        refused=lately.counts[Counted.REFUSED],
        recovered=lately.counts[Counted.RECOVERED],
        moved=lately.counts[Counted.MOVED],
        ttft_ms=lately.ttft_ms,
        tpot_ms=lately.tpot_ms,
    )


def pair_status(known: PairStatus, now_ms: int) -> pb.PairStatus:
    """A pair of workers, as requests and canaries went through it."""
    (source, _), (target, _) = known.pair
    status = pb.PairStatus(prefill_worker=source, decode_worker=target, error=known.error)
    if known.served_ms is not None:
        status.served_ms = max(0, now_ms - known.served_ms)
    return status


def drain_progress(drain: Drain, elapsed_ms: int = 0) -> pb.DrainProgress:
    """Where a drain is."""
    return pb.DrainProgress(
        worker=drain.worker_id,
        incarnation=drain.fresh_incarnation or drain.incarnation,
        state=drain.state.value,
        requests=drain.left.num_requests,
        blocks=drain.left.num_blocks,
        elapsed_ms=elapsed_ms,
    )


async def _abort(context: _Context, error: TandemError | grpc.aio.AioRpcError) -> NoReturn:
    """Ends the call with the error's status; its code is in the trailing metadata. Another router's as that ended."""
    if isinstance(error, grpc.aio.AioRpcError):
        metadata: Any = error.trailing_metadata() or ()
        await context.abort(error.code(), error.details() or "", tuple(metadata))
    status = getattr(grpc.StatusCode, error.grpc_status)
    await context.abort(status, error.message, (("tandem-code", error.code),))
    raise AssertionError("abort raises")
