"""The operators' service over real gRPC, on a cluster whose workers only register: what is refused, and how."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import grpc.aio
import pytest
from router_rig import D, Rig, request

from cluster.admin import Addresses, Admin, request_status
from cluster.canary import Canaries
from cluster.config import load
from cluster.drain_relay import DrainWord
from cluster.elastic import Elastic
from cluster.membership import Heartbeat, Membership, MemberState, StateChanged
from cluster.operations import Operations
from cluster.peers import Peers
from cluster.registry import Registry
from router.driver import Driver
from router.events import Submitted
from router.metrics import EdgeMetrics
from router.stages import FirstToken
from tandem.messages import Role, TransferStats, WorkerInfo
from tandem.request import RequestId, TransferId, WorkerId
from tandem.v1 import admin_pb2 as pb
from tandem.v1 import admin_pb2_grpc, worker_pb2_grpc
from tandem.wire import encode_worker_info

WORKERS = ("prefill-0", "decode-0", "decode-1")
ALONE = {"router-0": "127.0.0.1:0"}


@dataclass
class Place:
    """One router process without its edge: the stub of its operators' service, and what lies behind."""

    stub: admin_pb2_grpc.AdminStub
    driver: Driver
    registry: Registry
    operations: Operations
    peers: Peers
    said: list[tuple[str, dict[str, object]]]
    address: str
    metrics: EdgeMetrics

    def left(self) -> list[object]:
        """Workers that were told to end."""
        return [fields["id"] for event, fields in self.said if event == "drained"]

    def state(self, worker: str) -> MemberState:
        return self.registry.membership.members[WorkerId(worker)].state

    async def join(self, worker: str, incarnation: int = 1) -> None:
        """Registers a worker that answers no call and says nothing but that it lives."""
        info = WorkerInfo(
            worker_id=WorkerId(worker), role=Role(worker.split("-")[0]), control="127.0.0.1:1", endpoint="e", pid=1,
            agent_pid=2, model="m", namespace="n", fingerprint="f", exact=True, dtype="float32", block_size=16,
            total_blocks=8, context_tokens=128, block_bytes=64,
        )  # fmt: skip
        async with grpc.aio.insecure_channel(self.address) as channel:
            registry = worker_pb2_grpc.RegistryStub(channel)  # type: ignore[no-untyped-call]
            asked = encode_worker_info(info)
            asked.incarnation = incarnation
            reply = await registry.Register(asked, timeout=10)
            assert reply.refused == ""
        beat = Heartbeat(
            worker_id=info.worker_id, incarnation=incarnation, steps=0, runnable=False, agent_pid=2
        )  # fmt: skip
        self.registry._take(beat)


@asynccontextmanager
async def place(me: str = "router-0", internal: Mapping[str, str] = ALONE) -> AsyncIterator[Place]:
    membership = Membership(heartbeat_ms=60_000)  # nobody is missed
    said: list[tuple[str, dict[str, object]]] = []

    def say(event: str, **fields: object) -> None:
        said.append((event, fields))

    def changed(change: StateChanged) -> None:
        operations.changed(change)

    async with Driver() as driver:
        registry = Registry(membership=membership, driver=driver, on_change=changed)
        config = load({"model": "fake", "stop_timeout_s": 1, "start_timeout_s": 1}, {}).config
        operations = Operations(
            driver=driver,
            registry=registry,
            config=config,
            say=say,
            number=list(internal).index(me),
            num_routers=len(internal),
        )
        peers, metrics = Peers(me, internal), EdgeMetrics(me)
        admin = Admin(
            membership=membership,
            driver=driver,
            operations=operations,
            elastic=Elastic(driver=driver, registry=registry, operations=operations, config=config, say=say),
            canaries=Canaries(driver=driver, vocab_size=256),
            peers=peers,
            addresses=lambda: Addresses(model="m", http="h", grpc="g", store="redis://h"),
            cancel=lambda request_id, reason, only: only is None and driver.cancel(RequestId(request_id), reason),
            metrics=metrics.page,
            lately=metrics.lately,
            stop=lambda reason: None,
        )
        server = grpc.aio.server()
        admin_pb2_grpc.add_AdminServicer_to_server(admin, server)  # type: ignore[no-untyped-call]
        worker_pb2_grpc.add_RegistryServicer_to_server(registry, server)  # type: ignore[no-untyped-call]
        address = f"127.0.0.1:{server.add_insecure_port(internal[me])}"
        await server.start()
        looking = asyncio.create_task(operations.run())
        async with grpc.aio.insecure_channel(address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            here = Place(stub, driver, registry, operations, peers, said, address, metrics)
            for worker in WORKERS:
                await here.join(worker)
            try:
                yield here
            finally:
                looking.cancel()
                await asyncio.gather(looking, return_exceptions=True)
                await server.stop(None)
                await peers.close()


def run(case: Callable[[Place], Awaitable[None]]) -> None:
    async def body() -> None:
        async with place() as here:
            await case(here)

    asyncio.run(body())


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str, str]:
    """Status, code and sentence that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await call
    trailers: Iterable[tuple[str, str | bytes]] = ended.value.trailing_metadata() or ()  # type: ignore[assignment]
    return ended.value.code(), str(dict(trailers)["tandem-code"]), str(ended.value.details())


async def drained(here: Place, worker: str, **asked: object) -> list[str]:
    """The states that a drain tells, doubled ones once."""
    states = []
    async for progress in here.stub.Drain(pb.DrainRequest(worker=worker, **asked), timeout=30):  # type: ignore[arg-type]
        states.append(progress.state)
    return list(dict.fromkeys(states))


def test_counts_that_no_message_holds_are_shown_as_the_largest() -> None:
    most = TransferStats(
        request_id=RequestId("r"), transfer_id=TransferId("t"), blocks_granted=(1 << 32) - 1, bytes=(1 << 64) - 1
    )
    rig = Rig()
    rig.up("d0", Role.MIXED)
    rig.feed(Submitted(request=request()))
    rig.report(D, transfers=(most, most))
    [shown] = [request_status(each) for each in rig.core.status(rig.now_ms).requests]
    assert shown.blocks_granted == (1 << 32) - 1


def test_what_cannot_be_moved_is_named() -> None:
    async def case(here: Place) -> None:
        asked = await refused(here.stub.Migrate(pb.MigrateRequest(request_id="x"), timeout=10))
        assert asked == (grpc.StatusCode.NOT_FOUND, "unknown_request", "no request of id 'x' is known")
        code, name, sentence = await refused(here.stub.Migrate(pb.MigrateRequest(), timeout=10))
        assert (code, name) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
        assert sentence.startswith("request_id: is missing")

    run(case)


@pytest.mark.parametrize(
    ("worker", "deadline_ms", "status", "code", "sentence"),
    [
        ("x", 0, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", "worker: no worker of id 'x' is known"),
        ("", 0, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", "worker: is missing"),
        ("decode-0", 3_600_001, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", "deadline_ms: is 3600001"),
        ("prefill-0", 0, grpc.StatusCode.FAILED_PRECONDITION, "drain_refused", "prefill-0 is the last ready worker"),
    ],
)
def test_what_cannot_be_drained_is_named(
    worker: str, deadline_ms: int, status: grpc.StatusCode, code: str, sentence: str
) -> None:
    async def case(here: Place) -> None:
        ended = await refused(drained(here, worker, deadline_ms=deadline_ms))
        assert ended[:2] == (status, code)
        assert ended[2].startswith(sentence)
        assert {here.state(name) for name in WORKERS} == {MemberState.READY}

    run(case)


@pytest.mark.parametrize(
    ("worker", "role", "code", "sentence"),
    [
        ("x", "prefill", "invalid_request", "worker: no worker of id 'x' is known"),
        ("decode-0", "decoder", "invalid_request", "role: there is no role 'decoder'"),
        ("decode-0", "", "invalid_request", "role: there is no role ''"),
        ("decode-0", "decode", "drain_refused", "decode-0 is a decode worker already"),
        ("prefill-0", "decode", "drain_refused", "prefill-0 is the last ready worker that reads prompts; make it"),
    ],
)
def test_a_role_that_cannot_be_had_is_named(worker: str, role: str, code: str, sentence: str) -> None:
    async def case(here: Place) -> None:
        ended = await refused(here.stub.Flip(pb.FlipRequest(worker=worker, role=role), timeout=10).read())
        assert ended[1] == code
        assert ended[2].startswith(sentence)
        assert {here.state(name) for name in WORKERS} == {MemberState.READY}

    run(case)


def test_a_role_that_does_all_of_the_old_one_is_had_as_soon_as_the_supervisor_says_so() -> None:
    async def case(here: Place) -> None:
        call = here.stub.Flip(pb.FlipRequest(worker="prefill-0", role="mixed"), timeout=10)
        assert (await call.read()).state == "flipping"
        assert here.said[-1][0] == DrainWord.FLIP
        name = WorkerId("prefill-0")
        here.operations.told(DrainWord.FLIPPED, name, 1, requests=0, reason="", role=Role.MIXED)
        assert (await call.read()).state == "done"
        assert here.state("prefill-0") is MemberState.READY
        worker = here.driver.fleet.current(name)
        assert worker is not None
        assert worker.info.role is Role.MIXED

    run(case)


def test_a_worker_that_tells_nothing_is_not_taken_for_empty() -> None:
    async def case(here: Place) -> None:
        draining = asyncio.create_task(refused(drained(here, "decode-0", deadline_ms=700)))
        while here.state("decode-0") is not MemberState.DRAINING:
            await asyncio.sleep(0.01)
        _, _, again = await refused(drained(here, "decode-0"))
        assert again == "decode-0 is draining already"
        _, _, last = await refused(drained(here, "decode-1"))
        assert last.startswith("decode-1 is the last ready worker that writes tokens")
        status, code, sentence = await draining
        assert (status, code) == (grpc.StatusCode.FAILED_PRECONDITION, "drain_refused")
        assert "it has not reported its load; it takes work again" in sentence
        assert here.state("decode-0") is MemberState.READY
        assert here.left() == []

    run(case)


def test_a_drain_goes_on_when_its_caller_goes_away() -> None:
    async def case(here: Place) -> None:
        call = here.stub.Drain(pb.DrainRequest(worker="decode-0", deadline_ms=600), timeout=30)
        assert (await call.read()).state == "emptying"
        call.cancel()
        await asyncio.sleep(0.2)
        assert here.state("decode-0") is MemberState.DRAINING
        while here.state("decode-0") is MemberState.DRAINING:
            await asyncio.sleep(0.05)
        assert here.state("decode-0") is MemberState.READY

    run(case)


def test_a_worker_that_dies_meanwhile_was_not_drained() -> None:
    async def case(here: Place) -> None:
        draining = asyncio.create_task(refused(drained(here, "decode-0", restart=True)))
        while here.state("decode-0") is not MemberState.DRAINING:
            await asyncio.sleep(0.01)
        here.registry.ended(WorkerId("decode-0"), 1, "exit code 1")
        here.operations.ended(WorkerId("decode-0"), 1, "exit code 1")
        assert (await draining)[2] == "decode-0 died while it drained: exit code 1"
        assert here.left() == []
        await here.join("decode-0", 2)
        assert here.state("decode-0") is MemberState.READY

    run(case)


def test_what_clients_saw_is_told_to_who_asks_and_each_request_has_its_age() -> None:
    async def case(here: Place) -> None:
        here.driver.submit(request("r"))
        here.metrics.first_tokens(3)
        here.metrics.first_token(FirstToken(ttft_ms=50.0, stages=()))
        plain = await here.stub.Status(pb.StatusRequest(), timeout=10)
        assert not plain.routers[0].HasField("last_minute")
        assert plain.routers[0].tokens_total == 3
        status = await here.stub.Status(pb.StatusRequest(last_minute=True), timeout=10)
        minute = status.routers[0].last_minute
        assert (minute.tokens, list(minute.ttft_ms), list(minute.tpot_ms)) == (3, [50.0], [])
        assert status.requests[0].age_ms < 10_000

    run(case)
