"""The gRPC service for operators: what runs where, and stop."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio

from cluster.membership import Member, Membership
from router.driver import Driver
from router.request import RequestSnapshot, RequestState, WorkerSnapshot
from tandem.messages import BlockCounts
from tandem.v1 import admin_pb2 as pb
from tandem.v1 import admin_pb2_grpc

ENDED = (RequestState.FINISHED, RequestState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the router listens, and what it serves."""

    model: str
    http: str
    grpc: str


class Admin(admin_pb2_grpc.AdminServicer):
    """Answers from the membership and the driver's snapshot. `stop` is told why the cluster shall stop."""

    def __init__(
        self, *, membership: Membership, driver: Driver, addresses: Callable[[], Addresses], stop: Callable[[str], None]
    ) -> None:
        self._membership = membership
        self._driver = driver
        self._addresses = addresses
        self._stop = stop

    async def Status(
        self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusResponse]
    ) -> pb.StatusResponse:
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
        )  # fmt: skip

    async def Stop(
        self, request: pb.StopRequest, context: grpc.aio.ServicerContext[pb.StopRequest, pb.StopResponse]
    ) -> pb.StopResponse:
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
        num_replacements=request.num_replacements,
        error=request.error,
        reason=request.reason,
    )
    if request.ttft_ms is not None:
        status.ttft_ms = request.ttft_ms
    return status
