"""The gRPC service for operators: what runs where, move a request, drain a worker, and stop."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import grpc
import grpc.aio

from cluster.draining import Drain, DrainState
from cluster.membership import Member, Membership
from cluster.operations import Operations
from router.driver import Driver
from router.move import MoveRecord
from router.request import ENDED, RequestSnapshot, WorkerSnapshot
from tandem.errors import TandemError
from tandem.messages import BlockCounts
from tandem.v1 import admin_pb2 as pb
from tandem.v1 import admin_pb2_grpc

if TYPE_CHECKING:
    from typing import Any

    # The stubs are generic, the classes are not.
    _Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the router listens, and what it serves."""

    model: str
    http: str
    grpc: str


class Admin(admin_pb2_grpc.AdminServicer):
    """Answers from the membership and the driver's snapshot. `stop` is told why the cluster shall stop."""

    def __init__(
        self,
        *,
        membership: Membership,
        driver: Driver,
        operations: Operations,
        addresses: Callable[[], Addresses],
        stop: Callable[[str], None],
    ) -> None:
        self._membership = membership
        self._driver = driver
        self._operations = operations
        self._addresses = addresses
        self._stop = stop

    async def Status(self, request: pb.StatusRequest, context: _Context) -> pb.StatusResponse:
        """Workers, and requests in flight; with `include_finished` also those that ended lately."""
        snapshot = self._driver.status()
        addresses = self._addresses()
        seen = {(worker.worker_id, worker.incarnation): worker for worker in snapshot.workers}
        return pb.StatusResponse(
            workers=[
                worker_status(member, seen.get((member.info.worker_id, member.incarnation)))
                for member in sorted(self._membership.members.values(), key=lambda each: each.info.worker_id)
            ],
            requests=[
                request_status(each)
                for each in snapshot.requests
                if request.include_finished or each.state not in ENDED
            ],
            model=addresses.model,
            http_address=addresses.http,
            grpc_address=addresses.grpc,
            router_pid=os.getpid(),
            moves=[move_status(each, snapshot.now_ms) for each in snapshot.moves],
        )  # fmt: skip

    async def Migrate(self, request: pb.MigrateRequest, context: _Context) -> pb.MoveStatus:
        """Moves a running request; the answer says how that went. The driver bounds the wait."""
        try:
            record = await self._operations.migrate(request.request_id, request.to)
        except TandemError as error:
            await _abort(context, error)
        return move_status(record, self._driver.status().now_ms)

    async def Drain(self, request: pb.DrainRequest, context: _Context) -> AsyncIterator[pb.DrainProgress]:
        """Drains a worker, and tells of each change until that is over. It goes on when the caller goes away."""
        told: pb.DrainProgress | None = None
        try:
            drain = self._operations.drain(request.worker, deadline_ms=request.deadline_ms, restart=request.restart)
            async with aclosing(self._operations.follow(drain)) as steps:
                async for _ in steps:
                    progress = drain_progress(drain)
                    if progress != told and drain.state is not DrainState.FAILED:
                        told = progress
                        yield drain_progress(drain, elapsed_ms=drain.elapsed_ms(time.monotonic_ns() // 1_000_000))
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
    )
    if load is not None:
        status.running, status.waiting = load.running, load.waiting
        status.last_step_ms = load.last_step_ms
        status.audit.extend(load.audit)
    return status


def request_status(request: RequestSnapshot) -> pb.RequestStatus:
    """One request as the router sees it."""
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


async def _abort(context: _Context, error: TandemError) -> NoReturn:
    """Ends the call with the error's status; its code is in the trailing metadata."""
    status = getattr(grpc.StatusCode, error.grpc_status)
    await context.abort(status, error.message, (("tandem-code", error.code),))
    raise AssertionError("abort raises")
