"""Two routers over real gRPC, with the supervisor's relay between them: status, moves, cancellations, drains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import prometheus_client
import pytest
from prometheus_client.registry import Collector
from test_admin import Place, drained, place, refused

from cluster.drain_relay import DrainRelay, DrainWord, Tell
from cluster.membership import MemberState
from cluster.peers import Peers
from cluster.processes import pick_port
from router.events import NewRequest
from router.metrics import EdgeMetrics
from router.stages import FirstToken, Stage
from tandem.errors import Unavailable
from tandem.messages import Role
from tandem.request import RequestId, Sampling, WorkerId
from tandem.v1 import admin_pb2 as pb

ROLES = {WorkerId(name): Role(name.split("-")[0]) for name in ("prefill-0", "decode-0", "decode-1")}
NAMES = ("router-0", "router-1")


def run(case: Callable[[Place, Place], Awaitable[None]]) -> None:
    """Both are up, hold the same workers ready, and hear of one another's drains."""

    async def body() -> None:
        internal = {name: f"127.0.0.1:{pick_port('127.0.0.1', 0, '--host')}" for name in NAMES}
        async with place("router-0", internal) as one, place("router-1", internal) as two:
            relaying = asyncio.create_task(relay({"router-0": one, "router-1": two}))
            try:
                await case(one, two)
            finally:
                relaying.cancel()
                await asyncio.gather(relaying, return_exceptions=True)

    asyncio.run(body())


async def relay(places: dict[str, Place]) -> None:
    """What the supervisor does with what routers say of drains."""
    decider, read = DrainRelay(), dict.fromkeys(places, 0)
    for name in places:
        decider.up(name)
    while True:
        for name, here in places.items():
            while read[name] < len(here.said):
                event, fields = here.said[read[name]]
                read[name] += 1
                for told in passed_on(decider, name, DrainWord(event), fields):
                    places[told.router].operations.told(
                        told.word, told.worker_id, told.incarnation, requests=told.requests, reason=told.reason
                    )
        await asyncio.sleep(0.005)


def passed_on(decider: DrainRelay, name: str, word: DrainWord, fields: dict[str, object]) -> list[Tell]:
    worker_id, incarnation = WorkerId(str(fields["id"])), int(str(fields["incarnation"]))
    if word is DrainWord.DRAINING:
        return decider.begun(name, worker_id, incarnation, restart=bool(fields["restart"]), roles=ROLES)
    if word is DrainWord.PART:
        return decider.part(name, worker_id, incarnation, int(str(fields["requests"])))
    if word is DrainWord.TAKEN_BACK:
        return decider.taken_back(name, worker_id, incarnation, str(fields["reason"]))
    return decider.left(name, worker_id, incarnation)


def submit(here: Place, name: str) -> None:
    """A request that waits for a worker: none has a stream."""
    request = NewRequest(request_id=RequestId(name), tokens=(1, 2, 3), sampling=Sampling(max_tokens=5))
    here.driver.submit(request)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


async def status(here: Place, *, local: bool = False, last_minute: bool = False) -> pb.StatusResponse:
    asked = pb.StatusRequest(local=local, last_minute=last_minute)
    answer: pb.StatusResponse = await here.stub.Status(asked, timeout=10)
    return answer


def test_either_tells_of_both() -> None:
    async def case(one: Place, two: Place) -> None:
        submit(one, "a-1")
        submit(two, "b-1")
        submit(two, "b-2")
        for here in (one, two):
            answer = await status(here)
            assert {each.id: each.router for each in answer.requests} == {
                "a-1": "router-0", "b-1": "router-1", "b-2": "router-1",
            }  # fmt: skip
            assert [(each.id, each.up, each.num_requests) for each in answer.routers] == [
                ("router-0", True, 1), ("router-1", True, 2),
            ]  # fmt: skip
            assert [list(each.workers_ready) for each in answer.routers] == [sorted(ROLES)] * 2
            assert [each.id for each in answer.workers] == sorted(ROLES)
            assert answer.store == "redis://h"
        minutes = (await status(one, last_minute=True)).routers
        assert all(each.HasField("last_minute") for each in minutes), "it is asked of the others too"
        mine = await status(two, local=True)
        assert [each.id for each in mine.requests] == ["b-1", "b-2"]
        assert [each.id for each in mine.routers] == ["router-1"]

    run(case)


def test_a_router_that_does_not_answer_is_named() -> None:
    async def body() -> None:
        async with asyncio.timeout(20), hanging() as port:
            internal = {"router-0": f"127.0.0.1:{pick_port('127.0.0.1', 0, '--host')}", "router-1": f"127.0.0.1:{port}"}
            async with place("router-0", internal) as one:
                began_s = asyncio.get_running_loop().time()
                answer = await status(one)
                assert asyncio.get_running_loop().time() - began_s < 3
                assert [(each.id, each.up, each.address) for each in answer.routers] == [
                    ("router-0", True, internal["router-0"]), ("router-1", False, internal["router-1"]),
                ]  # fmt: skip

                with pytest.raises(Unavailable, match="no other router has the request, and router-1 did not answer"):
                    await one.peers.cancel("a-1", None)
                _, code, sentence = await refused(one.stub.Migrate(pb.MigrateRequest(request_id="a-1"), timeout=10))
                assert (code, "router-1 did not answer" in sentence) == ("unavailable", True)

    asyncio.run(body())


class hanging:
    """A server that takes connections and says nothing."""

    async def __aenter__(self) -> int:
        self._over = asyncio.Event()

        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._over.wait()
            writer.close()

        self._server = await asyncio.start_server(hold, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *error: object) -> None:
        self._over.set()
        self._server.close()
        await self._server.wait_closed()


def test_a_move_is_asked_of_the_router_that_has_the_request() -> None:
    async def case(one: Place, two: Place) -> None:
        submit(two, "b-1")
        _, code, there = await refused(one.stub.Migrate(pb.MigrateRequest(request_id="b-1"), timeout=10))
        assert (code, await refused(two.stub.Migrate(pb.MigrateRequest(request_id="b-1"), timeout=10))) == (
            "move_impossible", (grpc.StatusCode.FAILED_PRECONDITION, "move_impossible", there)
        )  # fmt: skip
        _, code, _ = await refused(one.stub.Migrate(pb.MigrateRequest(request_id="b-1", local=True), timeout=10))
        assert code == "unknown_request", "it is not passed on for ever"
        submit(one, "a-1")
        _, _, sentence = await refused(one.stub.Migrate(pb.MigrateRequest(request_id="-1"), timeout=10))
        assert sentence == "request_id: 2 requests end in '-1'; give the whole id"

    run(case)


def test_a_flight_record_is_told_by_whoever_has_it() -> None:
    async def case(one: Place, two: Place) -> None:
        submit(two, "b-1")
        record = await one.stub.Explain(pb.ExplainRequest(request_id="-1"), timeout=10)
        assert (record.request.id, record.request.router, record.story[0].what) == ("b-1", "router-1", "admitted")
        _, code, _ = await refused(one.stub.Explain(pb.ExplainRequest(request_id="b-1", local=True), timeout=10))
        assert code == "unknown_request", "it is not passed on for ever"
        status, code, sentence = await refused(one.stub.Explain(pb.ExplainRequest(request_id="x"), timeout=10))
        assert (status, code) == (grpc.StatusCode.NOT_FOUND, "unknown_request")
        assert "'x'" in sentence

    run(case)


def test_a_cancellation_finds_its_request() -> None:
    async def case(one: Place, two: Place) -> None:
        submit(two, "b-1")
        assert not await one.peers.cancel("a-1", None)
        assert not await two.peers.cancel("b-1", None), "the others are asked, and they do not ask others"
        assert not await one.peers.cancel("b-1", "somebody else"), "it is not theirs"
        assert await one.peers.cancel("b-1", None)
        await until(lambda: all(each.error for each in two.driver.status().requests))

    run(case)


def test_one_scrape_has_the_metrics_of_both() -> None:
    async def case(one: Place, two: Place) -> None:
        mine = EdgeMetrics("router-0")
        mine.admitted(7)
        mine.first_token(FirstToken(ttft_ms=200.0, stages=((Stage.PREFILL, 200.0),)))
        mine.others = one.peers.metrics
        page = (await mine.whole_page()).decode()
        lines = page.splitlines()
        assert 'tandem_router_prompt_tokens_total{router="router-0"} 7.0' in lines
        assert 'tandem_router_prompt_tokens_total{router="router-1"} 0.0' in lines
        assert 'tandem_router_ttft_seconds_bucket{le="0.25",router="router-0"} 1.0' in lines
        assert 'tandem_router_ttft_seconds_bucket{le="+Inf",router="router-1"} 0.0' in lines
        alone = mine.page().decode().splitlines()
        kinds = [line for line in alone if line.startswith("# TYPE")]
        assert [line for line in lines if line.startswith("# TYPE")] == kinds, "each metric once"
        counted = {line for line in alone if "cpu_seconds" not in line and "resident_bytes" not in line}
        assert counted <= set(lines)

    run(case)


def test_a_scrape_says_how_many_routers_are_not_on_the_page() -> None:
    class Nothing(Collector):
        def collect(self) -> list[prometheus_client.Metric]:
            return []

    async def case(one: Place, two: Place) -> None:
        async def counted(routers: dict[str, str]) -> set[str]:
            mine, peers = EdgeMetrics("router-0"), Peers("router-0", routers)
            mine.others, mine.cluster = peers.metrics, Nothing()
            lines = (await mine.whole_page()).decode().splitlines()
            await peers.close()
            return {line for line in lines if line.startswith("tandem_routers{")}

        both = {"router-0": one.address, "router-1": two.address}
        assert await counted(both) == {'tandem_routers{state="answering"} 2.0', 'tandem_routers{state="silent"} 0.0'}
        gone = both | {"router-2": f"127.0.0.1:{pick_port('127.0.0.1', 0, '--host')}"}
        assert await counted(gone) == {'tandem_routers{state="answering"} 2.0', 'tandem_routers{state="silent"} 1.0'}

    run(case)


def test_a_drain_holds_for_both_and_is_taken_back_for_both() -> None:
    async def case(one: Place, two: Place) -> None:
        draining = asyncio.create_task(refused(drained(one, "decode-0", deadline_ms=1500)))
        await until(lambda: two.state("decode-0") is MemberState.DRAINING)
        _, _, again = await refused(drained(two, "decode-0"))
        assert again == "decode-0 is draining already"
        assert "it takes work again" in (await draining)[2]
        await until(lambda: two.state("decode-0") is MemberState.READY)
        assert one.state("decode-0") is MemberState.READY

    run(case)


def test_a_worker_that_joins_late_drains_here_too() -> None:
    async def case(one: Place, two: Place) -> None:
        two.registry.ended(WorkerId("decode-0"), 1, "exit")
        one.registry.ended(WorkerId("decode-0"), 1, "exit")
        await one.join("decode-0", 2)
        call = one.stub.Drain(pb.DrainRequest(worker="decode-0", deadline_ms=60_000), timeout=30)
        assert (await call.read()).state == "emptying"
        await until(lambda: WorkerId("decode-0") in two.operations._helped)
        await two.join("decode-0", 2)
        assert two.state("decode-0") is MemberState.DRAINING

    run(case)


@pytest.mark.parametrize("workers", [("decode-0", "decode-0"), ("decode-0", "decode-1")])
def test_of_two_drains_at_the_same_time_one_gives_up(workers: tuple[str, str]) -> None:
    async def case(one: Place, two: Place) -> None:
        # Neither awaits between them: both look before either has heard of the other.
        drains = [
            each.operations.drain(worker, deadline_ms=60_000, restart=False)
            for each, worker in zip((one, two), workers, strict=True)
        ]
        await until(lambda: drains[1].reason != "")
        assert drains[0].reason == ""
        assert drains[1].reason == (
            "decode-0 is draining already, watched by router-0" if workers[1] == "decode-0"
            else "decode-1 is the last ready worker that writes tokens; drain it with --restart, or not at all"
        )  # fmt: skip
        await until(lambda: two.state("decode-0") is MemberState.DRAINING)
        assert two.state("decode-1") is MemberState.READY

    run(case)


def test_requests_of_the_other_router_keep_a_worker() -> None:
    """The one that watches hears how many there are; and counts one for a router that has not answered yet."""

    async def case(one: Place, two: Place) -> None:
        drain = one.operations.drain("decode-0", deadline_ms=60_000, restart=False)
        assert one.operations._elsewhere[drain.worker_id] == 1
        await until(lambda: one.operations._elsewhere[drain.worker_id] == 0)
        two.operations._say(DrainWord.PART, id="decode-0", incarnation=1, requests=3)
        await until(lambda: one.operations._elsewhere[drain.worker_id] == 3)
        await until(lambda: drain.left.num_requests >= 3)

    run(case)
