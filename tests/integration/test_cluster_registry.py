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
from cluster.worker_registration import Pulse, RegistrationOver, Registrations
from router.driver import Driver
from tandem import wire
from tandem.messages import Role, WorkerInfo
from tandem.request import WorkerId
from tandem.v1 import worker_pb2, worker_pb2_grpc

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
async def registry(*, port: int = 0, heartbeat_ms: int = 100) -> AsyncIterator[Place]:
    changes: asyncio.Queue[StateChanged] = asyncio.Queue()
    membership = Membership(heartbeat_ms=heartbeat_ms)
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


def at(*places: Place | str, info: WorkerInfo = INFO, incarnation: int = 1, gone_s: float = 20) -> Registrations:
    """A worker that all the routers there have dialled."""
    addresses = [each if isinstance(each, str) else each.address for each in places]
    names = [f"router-{number}" for number in range(len(addresses))]
    made = Registrations(
        registries=dict(zip(names, addresses, strict=True)), info=info, incarnation=incarnation, gone_s=gone_s
    )
    for name in names:
        made.dialled(name)
    return made


@asynccontextmanager
async def beating(worker: Registrations) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(worker.beat(pulse))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await worker.close()


async def ended(task: asyncio.Task[None]) -> str:
    with pytest.raises(RegistrationOver) as over:
        await asyncio.wait_for(task, 30)
    return str(over.value)


def test_joining_living_and_falling_silent() -> None:
    async def body() -> None:
        async with registry() as place:
            worker = at(place)
            await worker.register()
            assert place.membership.members[D0].state is MemberState.JOINING
            async with beating(worker):
                assert (await next_change(place)).state is MemberState.READY
                assert place.membership.members[D0].agent_pid == 7
            assert [(await next_change(place)).state for _ in range(2)] == [MemberState.SUSPECT, MemberState.DEAD]
            async with beating(at(place)) as task:
                assert await ended(task) == (
                    "router-0 refused: incarnation 1 of decode-0 is over; the latest is 1"
                )  # fmt: skip

    asyncio.run(body())


def test_what_workers_have_refused_is_counted_once() -> None:
    async def body() -> None:
        counted: list[int] = []
        membership = Membership(heartbeat_ms=10_000)
        async with Driver() as driver:
            place = Registry(
                membership=membership, driver=driver, on_change=lambda change: None, on_refused=counted.append
            )
            for incarnation in (1, 2):
                request = wire.encode_worker_info(INFO)
                request.incarnation = incarnation
                await place.Register(request, None)  # type: ignore[arg-type]
                for refused in (0, 2, 2, 7):
                    beat = worker_pb2.HeartbeatRequest(worker_id=D0, incarnation=incarnation, refused=refused)
                    assert (await place.Heartbeat(beat, None)).known  # type: ignore[arg-type]
            assert counted == [2, 5, 2, 5]

    asyncio.run(body())


def test_a_refused_worker_hears_why() -> None:
    async def body() -> None:
        async with registry() as place:
            await at(place).register()
            stranger = replace(INFO, worker_id=WorkerId("decode-1"), namespace="other")
            with pytest.raises(RegistrationOver, match="one cluster serves one model"):
                await at(place, info=stranger).register()
            with pytest.raises(RegistrationOver, match="block_size"):
                await at(place, info=replace(INFO, block_size=0)).register()
            with pytest.raises(RegistrationOver, match="incarnation: is missing"):
                await at(place, incarnation=0).register()

    asyncio.run(body())


def test_a_worker_keeps_its_incarnation_over_a_new_router() -> None:
    async def body() -> None:
        worker = None
        async with registry() as place:
            worker = at(place, incarnation=4)
            await worker.register()
            task = asyncio.create_task(worker.beat(pulse))
            await next_change(place)
        async with registry(port=place.port) as again:
            change = await next_change(again)
            assert (change.state, change.incarnation) == (MemberState.READY, 4)
            again.registry.ended(D0, 4, "its process is gone")
            assert (await next_change(again)).state is MemberState.DEAD
            assert "incarnation 4 of decode-0 is over" in await ended(task)
            await worker.close()

    asyncio.run(body())


def test_no_registry_at_all() -> None:
    async def body() -> None:
        worker = at("127.0.0.1:1", "127.0.0.1:2", gone_s=0.5)
        with pytest.raises(RegistrationOver, match="no registry for"):
            await asyncio.wait_for(worker.register(), 20)
        await worker.close()

    asyncio.run(body())


def test_a_drained_worker_is_asked_to_leave() -> None:
    async def body() -> None:
        async with registry() as place, registry() as other, beating(at(place, other)) as task:
            for each in (place, other):
                assert (await next_change(each)).state is MemberState.READY
            place.registry.drain(place.membership.members[D0])
            place.registry.drained(D0, 1, left=False, reason="late")
            assert [(await next_change(place)).state for _ in range(2)] == [MemberState.DRAINING, MemberState.READY]
            place.registry.drain(place.membership.members[D0])
            place.registry.drained(D0, 1, left=True, reason="drained")
            assert await ended(task) == "router-0 asked the worker to leave"

    asyncio.run(body())


def test_a_worker_lives_while_one_of_its_registries_wants_it() -> None:
    async def body() -> None:
        async with registry() as place, registry() as other, beating(at(place, other)) as task:
            for each in (place, other):
                assert (await next_change(each)).state is MemberState.READY
            other.registry.ended(D0, 1, "it is cut off")
            assert (await next_change(other)).state is MemberState.DEAD
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(task), 2)
            assert place.membership.members[D0].state is MemberState.READY
            place.registry.ended(D0, 1, "so it is here")
            assert "router-1 refused: incarnation 1 of decode-0 is over" in await ended(task)

    asyncio.run(body())


def test_one_router_away_or_new_leaves_the_worker_at_the_other() -> None:
    async def body() -> None:
        async with registry() as place:
            async with registry() as other:
                worker = at(place, other)
                await worker.register()
                task = asyncio.create_task(worker.beat(pulse))
                assert (await next_change(place)).state is MemberState.READY
                assert (await next_change(other)).state is MemberState.READY
            async with registry(port=other.port) as again:
                change = await next_change(again)
                assert (change.state, change.incarnation) == (MemberState.READY, 1)
                assert place.changes.empty(), "nothing happened at the other one"
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await worker.close()

    asyncio.run(body())


def test_a_router_that_does_not_dial_takes_the_worker_for_dead_and_a_new_one_hears_of_it() -> None:
    async def body() -> None:
        async with registry() as place:
            worker = Registrations(registries={"router-0": place.address}, info=INFO, incarnation=1, gone_s=20)
            await worker.register()
            task = asyncio.create_task(worker.beat(pulse))
            place.membership.join_ms = 300
            assert (await next_change(place)).state is MemberState.DEAD
            assert "incarnation 1 of decode-0 is over" in await ended(task)
            await worker.close()

    asyncio.run(body())
