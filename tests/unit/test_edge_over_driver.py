"""Both APIs over the real driver and a worker on a real stream: what ends at the edge ends at the worker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
from edge import MODEL, http_server, smol
from test_router_driver import INCARNATION, CountingWorker, token_at

from router.config import RouterConfig
from router.driver import Driver
from router.flight import Flight
from router.grpc_api import build_grpc_server
from router.metrics import EdgeMetrics
from router.service import ServedModel, Service
from router.trace_context import TraceContext, trace_of
from tandem.client import AsyncClient
from tandem.errors import Cancelled, DuplicateRequest
from tandem.messages import CancelAssigned

DEADLINE_S = 20
PROMPT = (11, 12, 13)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
Case = Callable[[Driver, CountingWorker, httpx.AsyncClient, AsyncClient], Awaitable[None]]


class Traced:
    """Keeps what a tracer is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Flight, TraceContext | None]] = []

    def ended(self, flight: Flight, trace: TraceContext | None) -> None:
        self.told.append((flight, trace))


def run(case: Case, tracer: Traced | None = None) -> None:
    """A router with both APIs, its driver, and one worker."""

    async def main() -> None:
        worker = CountingWorker()
        await worker.server.start()
        async with Driver(RouterConfig(redial_ms=10, tick_ms=10)) as driver:
            model = ServedModel(id=MODEL, context_tokens=512, created_s=1)
            service = Service(driver=driver, tokenizer=smol(), model=model, metrics=EdgeMetrics())
            service.tracer = tracer
            grpc_server = build_grpc_server(service)
            port = await grpc_server.start("127.0.0.1", 0)
            driver.worker_joined(worker.info(), INCARNATION)
            async with (
                http_server(service) as url,
                httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http,
                AsyncClient(f"127.0.0.1:{port}", timeout_s=DEADLINE_S) as client,
            ):
                await case(driver, worker, http, client)
            await grpc_server.stop(0.2)
        await worker.server.stop(None)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition of this event loop, at most the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


def cancelled(worker: CountingWorker) -> list[str]:
    """Ids that the worker was told to give up."""
    return [each.request_id for each in worker.heard if isinstance(each, CancelAssigned)]


def test_whole_answer_over_both_apis() -> None:
    ids = [token_at(PROMPT, index) for index in range(30)]

    async def case(driver: Driver, worker: CountingWorker, http: httpx.AsyncClient, client: AsyncClient) -> None:
        body = {"prompt": PROMPT, "max_tokens": 30, "ignore_eos": True, "return_token_ids": True, "n": 2}
        reply = (await http.post("/v1/completions", json=body)).json()
        assert [choice["token_ids"] for choice in reply["choices"]] == [ids, ids]
        assert [choice["text"] for choice in reply["choices"]] == [smol().decode(ids)] * 2
        assert reply["usage"]["completion_tokens"] == 60
        done = await client.generate(PROMPT, max_tokens=30, ignore_eos=True)
        assert (list(done.token_ids), done.text) == (ids, smol().decode(ids))
        assert done.usage.completion_tokens == 30
        assert {each.state for each in driver.status().requests} == {"finished"}

    run(case)


def test_a_request_is_traced_once_it_is_over_under_its_clients_span() -> None:
    tracer = Traced()

    async def case(driver: Driver, worker: CountingWorker, http: httpx.AsyncClient, client: AsyncClient) -> None:
        body = {"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
        await http.post("/v1/completions", json=body, headers={"x-request-id": "h", "traceparent": TRACE})
        await client.generate(PROMPT, request_id="g", max_tokens=4, ignore_eos=True)
        worker.num_tokens_max = 2
        stream = client.stream(PROMPT, request_id="c", max_tokens=400, ignore_eos=True)
        await anext(stream)
        assert len(tracer.told) == 2, "one that runs is not told of"
        await client.cancel("c")
        with pytest.raises(Cancelled):
            async for _ in stream:
                pass
        await until(lambda: len(tracer.told) == 3)
        states = {flight.request.request_id: flight.request.state for flight, _ in tracer.told}
        assert states == {"h": "finished", "g": "finished", "c": "cancelled"}
        contexts = {str(flight.request.request_id): trace for flight, trace in tracer.told}
        assert contexts["h"] == trace_of([TRACE])
        assert contexts["g"] is None
        for flight, _ in tracer.told:
            assert flight.first is not None
            assert 0 < flight.first.ttft_ms <= flight.arrived_ms_ago

    run(case, tracer)


def test_stop_string_ends_the_request_at_the_worker() -> None:
    ids = [token_at(PROMPT, index) for index in range(400)]
    stop = smol().decode(ids[8:10])

    async def case(driver: Driver, worker: CountingWorker, http: httpx.AsyncClient, client: AsyncClient) -> None:
        worker.num_tokens_max = 12  # and then it keeps silent: only the edge can end the answer
        body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stop": stop}
        reply = await http.post("/v1/completions", json=body, headers={"x-request-id": "s"})
        choice = reply.json()["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        assert choice["text"] == smol().decode(ids).split(stop)[0]
        await until(lambda: cancelled(worker) == ["s"])
        (known,) = driver.status().requests
        assert (known.request_id, known.state) == ("s", "finished")

    run(case)


def test_disconnect_and_cancel_reach_the_worker() -> None:
    async def case(driver: Driver, worker: CountingWorker, http: httpx.AsyncClient, client: AsyncClient) -> None:
        worker.num_tokens_max = 3
        body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "h"}) as reply:
            await anext(reply.aiter_lines())
            again = await http.post("/v1/completions", json=body, headers={"x-request-id": "h"})
            assert again.status_code == 409
        await until(lambda: "h" in cancelled(worker))

        stream = client.stream(PROMPT, request_id="g", max_tokens=400, ignore_eos=True)
        await anext(stream)
        with pytest.raises(DuplicateRequest):
            await client.generate(PROMPT, request_id="g")
        assert await client.cancel("g")
        with pytest.raises(Cancelled, match="cancelled by a client"):
            _ = [each async for each in stream]
        await until(lambda: "g" in cancelled(worker))

    run(case)
