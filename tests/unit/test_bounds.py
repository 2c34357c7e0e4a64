"""Whatever comes from outside and is kept has a bound: clients that come and go, large bodies, sessions, names."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from router_rig import D, Rig, info, request
from scripted_driver import ScriptedDriver
from starlette.requests import Request as HttpRequest
from starlette.types import Message

from cluster import worker_service
from cluster.membership import Admitted, Ended, Membership, Registered, RegistrationRefused
from cluster.worker_reports import joined
from cluster.worker_service import WorkerService
from engine.events import RouterGone
from kv_transfer.actions import RouterJoined
from router import fleet, request_body
from router.api_keys import CALLER, Caller, KeyEntry, digest_of
from router.events import ClientGone, Submitted
from router.fleet import Fleet
from router.line import ENDED_KEPT
from router.metrics import EdgeMetrics
from router.request_body import Bodies
from router.service import ServedModel, Service
from tandem.errors import Overloaded
from tandem.messages import BlockCounts, BlockEvents, Role, WorkerLoad, WorkerReport
from tandem.request import RequestId, Token, WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

KIB = 1 << 10


# ---- the line --------------------------------------------------------------------------------------------------------


def test_clients_that_come_and_go_behind_one_that_waits_leave_nothing_in_the_line() -> None:
    rig = Rig()
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE, total_blocks=8)
    rig.feed(Submitted(request=request("runs", tuple(range(90)), max_tokens=20)))
    rig.feed(Submitted(request=request("waits", tuple(range(91)), max_tokens=20)))
    longest = 0
    for number in range(5_000):
        name = RequestId(f"c{number}")
        rig.feed(Submitted(request=request(name, tuple(range(80)))))
        rig.feed(ClientGone(request_id=name, reason="hung up"))
        longest = max(longest, len(rig.core.line))
        rig.actions.clear()
    assert rig.core.num_requests == 2
    assert longest <= ENDED_KEPT + 2 * 3 + 1
    rig.feed(ClientGone(request_id=RequestId("runs"), reason="hung up"))
    assert [each.request_id for each in rig.assigns()][-1] == RequestId("waits"), "and who waits keeps its place"


def test_a_tidied_line_keeps_its_order() -> None:
    rig = Rig()
    for number in range(4):
        rig.feed(Submitted(request=request(f"w{number}", priority=number % 2)))
    for number in range(300):
        name = RequestId(f"c{number}")
        rig.feed(Submitted(request=request(name)))
        rig.feed(ClientGone(request_id=name, reason="hung up"))
    rig.up("m0", Role.MIXED)
    assert [str(each.request_id) for each in rig.assigns()] == ["w1", "w3", "w0", "w2"]


# ---- bodies ----------------------------------------------------------------------------------------------------------


class Client:
    """A client that sends a body of that length, in two parts, the second when it is let."""

    def __init__(self, length: int) -> None:
        self.go = asyncio.Event()
        self.begun = asyncio.Event()
        self._parts = [b"x" * (length // 2), b"x" * (length - length // 2)]
        headers = [(b"content-length", str(length).encode())]
        self.request = HttpRequest({"type": "http", "method": "POST", "headers": headers}, self._receive)

    async def _receive(self) -> Message:
        self.begun.set()
        if len(self._parts) == 1:
            await self.go.wait()
        part = self._parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self._parts)}


def run(case: Callable[[Bodies], Awaitable[None]]) -> None:
    async def body() -> None:
        async with asyncio.timeout(20):
            await case(Bodies(large_bytes_max=512 * KIB))

    asyncio.run(body())


def test_large_bodies_wait_for_one_another_and_small_ones_for_nobody() -> None:
    async def case(bodies: Bodies) -> None:
        first, second = Client(300 * KIB), Client(300 * KIB)
        reads = [asyncio.create_task(bodies.read(each.request)) for each in (first, second)]
        await first.begun.wait()
        small = Client(10 * KIB)
        small.go.set()
        assert len(await bodies.read(small.request)) == 10 * KIB
        assert not second.begun.is_set(), "it is not read: its client feels that"
        first.go.set()
        second.go.set()
        assert [len(each) for each in await asyncio.gather(*reads)] == [300 * KIB] * 2

    run(case)


def test_who_waits_too_long_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "_ROOM_TIMEOUT_S", 0.05)

    async def case(bodies: Bodies) -> None:
        slow = Client(500 * KIB)
        reading = asyncio.create_task(bodies.read(slow.request))
        await slow.begun.wait()
        late = Client(100 * KIB)
        with pytest.raises(Overloaded, match="large bodies of 512000 bytes are being read, at most 524288"):
            await bodies.read(late.request)
        assert not late.begun.is_set()
        reading.cancel()  # its client leaves: the room is there again
        await asyncio.gather(reading, return_exceptions=True)
        late.go.set()
        assert len(await bodies.read(late.request)) == 100 * KIB

    run(case)


def as_key(name: str) -> Context:
    context = copy_context()
    context.run(CALLER.set, Caller(entry=KeyEntry(name=name, digest=digest_of(name))))
    return context


def test_large_bodies_of_one_key_wait_for_one_another_and_leave_room_for_those_of_others() -> None:
    async def case(bodies: Bodies) -> None:
        loop = asyncio.get_running_loop()
        flood = [Client(100 * KIB) for _ in range(8)]
        reads = [loop.create_task(bodies.read(each.request), context=as_key("alice")) for each in flood]
        await flood[0].begun.wait()
        other = Client(100 * KIB)
        other.go.set()
        assert len(await loop.create_task(bodies.read(other.request), context=as_key("bob"))) == 100 * KIB
        assert [each.begun.is_set() for each in flood] == [True] + [False] * 7
        whole = Client(300 * KIB)  # more than its share: alone it has its turn
        whole.go.set()
        assert len(await loop.create_task(bodies.read(whole.request), context=as_key("bob"))) == 300 * KIB
        for each in flood:
            each.go.set()
        assert [len(each) for each in await asyncio.gather(*reads)] == [100 * KIB] * 8
        assert not bodies._large_bytes_of

    run(case)


def test_long_prompts_of_one_key_leave_room_for_those_of_others() -> None:
    released = threading.Event()

    class Slow:
        """A tokenizer that takes its time."""

        vocab_size, eos_token_ids = 10, ()

        def characters_max(self, num_tokens: int) -> int:
            return 0

        def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
            released.wait(20)
            return (1,)

    async def main() -> None:
        loop, long = asyncio.get_running_loop(), "x" * 20_000
        model = ServedModel(id="m", context_tokens=100, created_s=1)
        tokenizer: Any = Slow()
        service = Service(
            driver=ScriptedDriver(lambda request: []), tokenizer=tokenizer, model=model, metrics=EdgeMetrics()
        )  # fmt: skip
        alices = [loop.create_task(service.encode(long), context=as_key("alice")) for _ in range(100)]
        await asyncio.sleep(0)
        bobs = loop.create_task(service.encode(long), context=as_key("bob"))
        await asyncio.sleep(0)
        released.set()
        found = await asyncio.gather(*alices, bobs, return_exceptions=True)
        assert found[-1] == (1,)
        refused = [each for each in found if isinstance(each, Overloaded)]
        assert len(refused) == 84
        assert "16 long prompts of this key are being tokenized" in str(refused[0])
        assert not service._encoding

    asyncio.run(asyncio.wait_for(main(), 60))


# ---- workers and their names -----------------------------------------------------------------------------------------


def test_a_worker_takes_so_many_router_sessions_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_service, "SESSIONS_MAX", 2)
    posted: list[object] = []

    async def case() -> None:
        service = WorkerService(post=posted.append, on_session=lambda router_id: None)
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with asyncio.timeout(20), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
            calls = []
            for session in (1, 2, 3):
                call = stub.Connect()
                await call.write(pb.RouterMessage(hello=pb.RouterHello(router_id="r", session=session)))
                calls.append(call)
                if session < 3:
                    while RouterJoined(session=session) not in posted:
                        await asyncio.sleep(0.01)
            assert await calls[2].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "2 sessions are connected" in await calls[2].details()
            calls[0].cancel()
            while RouterGone(session=1) not in posted:
                await asyncio.sleep(0.01)
            again = stub.Connect()
            await again.write(pb.RouterMessage(hello=pb.RouterHello(router_id="r", session=4)))
            while RouterJoined(session=4) not in posted:
                await asyncio.sleep(0.01)
        service.close()
        await server.stop(None)

    asyncio.run(case())


def test_names_of_workers_are_bounded_and_the_dead_make_room() -> None:
    membership = Membership(members_max=3)

    def register(name: str, incarnation: int = 1) -> object:
        return membership.handle(0, Registered(info=info(name, Role.DECODE), incarnation=incarnation))[-1]

    for number in range(3):
        assert isinstance(register(f"d{number}"), Admitted)
    refused = register("d3")
    assert isinstance(refused, RegistrationRefused)
    assert refused.reason == "3 workers are in the cluster, no more may"
    assert isinstance(register("d1", 2), Admitted), "one that is known comes again"
    membership.handle(0, Ended(worker_id=D, incarnation=1, reason="killed"))
    assert isinstance(register("d3"), Admitted)
    assert set(membership.members) == {WorkerId(name) for name in ("d1", "d2", "d3")}


def test_classes_of_workers_that_come_no_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "COSTS_MAX", 8)
    known = Fleet(report_lag_ms=20)
    stays = known.join(info("stays", Role.DECODE), 1)
    stays.cost.learn_step(1, 77.0)
    for number in range(50):
        worker = known.join(replace(info(f"d{number}", Role.DECODE), fingerprint=f"f{number}"), 1)
        known.leave(worker, "gone")
    assert len(known._costs) <= 8 + 1
    assert known.join(info("other", Role.DECODE), 1).cost is stays.cost


# ---- a router that lags ----------------------------------------------------------------------------------------------


def test_reports_that_wait_are_joined_and_say_the_same() -> None:
    """Tokens in order, the last load, every BlockEvents by itself."""

    def report(number: int, *, blocks: bool = False) -> WorkerReport:
        events = BlockEvents(sequence=number, stored=(bytes([number]),)) if blocks else None
        counts = BlockCounts(total=9, free=9 - number)
        load = WorkerLoad(
            running=number, waiting=0, blocks=counts, prefill_backlog_tokens=0, steps=number, last_step_ms=1.0
        )
        said = Token(request_id=RequestId("r"), epoch=1, index=number, token_id=number)
        return WorkerReport(
            worker_id=D,
            incarnation=1,
            sequence=number,
            tokens=(said,),
            blocks=events,
            load=load if number < 4 else None,
        )

    reports = [report(0), report(1, blocks=True), report(2), report(3, blocks=True), report(4)]
    first, second = joined(reports)
    assert [token.index for token in first.tokens + second.tokens] == [0, 1, 2, 3, 4]
    assert [each.blocks.sequence for each in (first, second) if each.blocks is not None] == [1, 3]
    assert [each.load.steps for each in (first, second) if each.load is not None] == [2, 3]
    assert (first.sequence, second.sequence) == (2, 4)
    assert joined([]) == []


def test_a_router_that_lags_is_told_of_many_steps_at_once() -> None:
    """Far more reports than may wait: what is written meanwhile is joined, and nobody is cut off."""

    async def case() -> None:
        service = WorkerService(post=lambda event: None, on_session=lambda router_id: None)
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with asyncio.timeout(30), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = worker_pb2_grpc.WorkerStub(channel).Connect()  # type: ignore[no-untyped-call]
            await call.write(pb.RouterMessage(hello=pb.RouterHello(router_id="r", session=1)))
            while 1 not in service._queues:
                await asyncio.sleep(0.01)
            num = 0
            for _ in range(40):
                batch = [
                    WorkerReport(
                        worker_id=D,
                        incarnation=1,
                        sequence=num + each,
                        tokens=(Token(request_id=RequestId("r"), epoch=1, index=num + each, token_id=1),),
                    )
                    for each in range(1_000)
                ]
                service.report([(1, each) for each in batch])
                num += len(batch)
                await asyncio.sleep(0)
                while service._queues[1].qsize() > 3_000:
                    await asyncio.sleep(0.001)
            indices: list[int] = []
            num_messages = 0
            while len(indices) < num:
                message = await call.read()
                num_messages += 1
                indices += [token.index for token in message.tokens]
            assert indices == list(range(num))
            assert num_messages < num / 20
        service.close()
        await server.stop(None)

    asyncio.run(case())
