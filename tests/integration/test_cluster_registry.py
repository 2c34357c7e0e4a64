"""Registry and registration over real gRPC: joining, refusal, a router that is new, a worker that was dead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc.aio
import pytest

from cluster.membership import Membership, MemberState, StateChanged
from cluster.registry import Registry
from cluster.worker_registration import Pulse, Registration, RegistrationOver
from router.driver import Driver
from tandem.messages import Role, WorkerInfo
from tandem.request import WorkerId
from tandem.v1 import worker_pb2_grpc

D0 = WorkerId("decode-0")
INFO = WorkerInfo(
    worker_id=D0, role=Role.DECODE, control="127.0.0.1:1", endpoint="e", pid=1, agent_pid=2, model="m", namespace="n",
    fingerprint="f", exact=True, dtype="float32", block_size=16, total_blocks=8, context_tokens=128, block_bytes=64,
)  # fmt: skip


class Place:
    """One router's registry: its membership, what it concluded, and its address."""

    def __init__(self, membership: Membership, changes: asyncio.Queue[StateChanged], registry: Registry, port: int):
        self.membership, self.changes, self.registry, self.port = membership, changes, registry, port
        self.address = f"127.0.0.1:{port}"


@asynccontextmanager
async def registry(*, port: int = 0, base_incarnation: int = 0, heartbeat_ms: int = 100) -> AsyncIterator[Place]:
    changes: asyncio.Queue[StateChanged] = asyncio.Queue()
    membership = Membership(heartbeat_ms=heartbeat_ms, base_incarnation=base_incarnation)
    async with Driver() as driver:
        servicer = Registry(membership=membership, driver=driver, on_change=changes.put_nowait)
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_RegistryServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        ticking = asyncio.create_task(servicer.tick())
        try:
            yield Place(membership, changes, servicer, port)
        finally:
            ticking.cancel()
            await server.stop(None)


def pulse() -> Pulse:
    return Pulse(progress=1, runnable=False, agent_pid=7)


async def next_change(place: Place) -> StateChanged:
    return await asyncio.wait_for(place.changes.get(), 20)


def test_joining_living_and_falling_silent() -> None:
    async def body() -> None:
        async with registry() as place:
            registration = Registration(registry=place.address, info=INFO, gone_s=10)
            await registration.register()
            assert (registration.incarnation, registration.heartbeat_ms) == (1, 100)
            assert place.membership.members[D0].state is MemberState.JOINING
            beating = asyncio.create_task(registration.beat(pulse))
            assert (await next_change(place)).state is MemberState.READY
            assert place.membership.members[D0].agent_pid == 7
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            assert [(await next_change(place)).state for _ in range(2)] == [MemberState.SUSPECT, MemberState.DEAD]
            with pytest.raises(RegistrationOver, match="incarnation 1 of decode-0 is over"):
                await registration.beat(pulse)
            await registration.close()

    asyncio.run(body())


def test_a_refused_worker_hears_why() -> None:
    async def body() -> None:
        async with registry() as place:
            first = Registration(registry=place.address, info=INFO, gone_s=10)
            await first.register()
            stranger = replace(INFO, worker_id=WorkerId("decode-1"), namespace="other")
            second = Registration(registry=place.address, info=stranger, gone_s=10)
            with pytest.raises(RegistrationOver, match="one cluster serves one model"):
                await second.register()
            broken = Registration(registry=place.address, info=replace(INFO, block_size=0), gone_s=10)
            with pytest.raises(RegistrationOver, match="block_size"):
                await broken.register()
            for registration in (first, second, broken):
                await registration.close()

    asyncio.run(body())


def test_a_worker_keeps_its_incarnation_over_a_new_router() -> None:
    async def body() -> None:
        async with registry() as place:
            registration = Registration(registry=place.address, info=INFO, gone_s=20)
            await registration.register()
            beating = asyncio.create_task(registration.beat(pulse))
            await next_change(place)
        async with registry(port=place.port, base_incarnation=1000) as again:
            change = await next_change(again)
            assert (change.state, change.incarnation) == (MemberState.READY, 1)
            other = Registration(
                registry=again.address, info=replace(INFO, worker_id=WorkerId("decode-1")), gone_s=10
            )  # fmt: skip
            await other.register()
            assert other.incarnation == 1001
            again.registry.ended("decode-0", 1, "its process is gone")
            assert (await next_change(again)).state is MemberState.DEAD
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            await registration.close()
            await other.close()

    asyncio.run(body())


def test_no_registry_at_all() -> None:
    async def body() -> None:
        registration = Registration(registry="127.0.0.1:1", info=INFO, gone_s=0.5)
        with pytest.raises(RegistrationOver, match="no registry for"):
            await asyncio.wait_for(registration.register(), 20)
        await registration.close()

    asyncio.run(body())


def test_a_drained_worker_is_asked_to_leave() -> None:
    async def body() -> None:
        async with registry() as place:
            registration = Registration(registry=place.address, info=INFO, gone_s=10)
            await registration.register()
            beating = asyncio.create_task(registration.beat(pulse))
            assert (await next_change(place)).state is MemberState.READY
            place.registry.drain(place.membership.members[D0])
            place.registry.drained(D0, 1, left=False, reason="late")
            assert [(await next_change(place)).state for _ in range(2)] == [MemberState.DRAINING, MemberState.READY]
            place.registry.drain(place.membership.members[D0])
            place.registry.drained(D0, 1, left=True, reason="drained")
            with pytest.raises(RegistrationOver, match="the registry asked the worker to leave"):
                await asyncio.wait_for(beating, 20)
            await registration.close()

    asyncio.run(body())
