"""Streams resumed over both APIs: at the router that serves them, and at another one that shares a real Redis."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
import httpx
import pytest
from edge import MODEL, http_server, smol
from redis_server import redis_server
from test_router_driver import INCARNATION, CountingWorker, token_at

from benchmarks.local_redis import LocalRedis
from cluster.state import RedisStore
from router.clients import WorkerLink
from router.config import RouterConfig
from router.driver import Driver
from router.grpc_api import build_grpc_server
from router.journal import Journal
from router.metrics import EdgeMetrics
from router.move import EPOCHS_PER_FENCE
from router.service import ServedModel, Service
from router.transcripts import Transcripts
from tandem.client import AsyncClient
from tandem.errors import InvalidRequest, RequestLost, Stopping, StoreAway, TakenOver, TandemError, UnknownRequest
from tandem.messages import Assign, CancelAssigned
from tandem.request import RequestId
from tandem.resuming import UNKNOWN_S, Attach, Begin, Resuming
from tandem.v1 import inference_pb2, inference_pb2_grpc

DEADLINE_S = 40
PROMPT = (11, 12, 13)


@dataclass
class Router:
    """One router: its parts, and a client of each API."""

    driver: Driver
    service: Service
    http: httpx.AsyncClient
    client: AsyncClient
    stub: inference_pb2_grpc.InferenceStub


@asynccontextmanager
async def a_router(worker: CountingWorker, redis: LocalRedis | None, name: str) -> AsyncIterator[Router]:
    """A router over the worker, with the store if there is one."""
    async with AsyncExitStack() as stack:
        store, born_us = None, None
        if redis is not None:
            store = RedisStore(redis.url, prefix="t", holder=name, identity="m")
            born_us = await store.open()
        driver = Driver(
            RouterConfig(redial_ms=10, tick_ms=10, router_id=name),
            transcripts=Transcripts(shared=redis is not None),
            born_us=born_us,
        )
        await stack.enter_async_context(driver)
        journal = None
        if store is not None:
            journal = Journal(driver, store)
            writing = asyncio.create_task(journal.run())
            stack.push_async_callback(store.leave)
            stack.callback(writing.cancel)
        model = ServedModel(id=MODEL, context_tokens=512, created_s=1, exact=True)
        service = Service(driver=driver, tokenizer=smol(), model=model, metrics=EdgeMetrics(name), journal=journal)
        server = build_grpc_server(service)
        port = await server.start("127.0.0.1", 0)
        stack.push_async_callback(server.stop, 0.1)
        driver.worker_joined(worker.info(), INCARNATION)
        url = await stack.enter_async_context(http_server(service))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=DEADLINE_S))
        client = await stack.enter_async_context(AsyncClient(f"127.0.0.1:{port}", timeout_s=DEADLINE_S))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        yield Router(driver, service, http, client, inference_pb2_grpc.InferenceStub(channel))  # type: ignore[no-untyped-call]


def alone(case: Callable[[Router, CountingWorker], Awaitable[None]]) -> None:
    """One router without a store."""

    async def main() -> None:
        worker = CountingWorker()
        await worker.server.start()
        async with a_router(worker, None, "only") as router:
            await case(router, worker)
        await worker.server.stop(None)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def together(case: Callable[[Router, Router, CountingWorker, LocalRedis], Awaitable[None]]) -> None:
    """Two routers that share a store and a worker."""

    async def main() -> None:
        worker = CountingWorker()
        await worker.server.start()
        with redis_server() as redis:
            async with a_router(worker, redis, "a") as first, a_router(worker, redis, "b") as second:
                await case(first, second, worker, redis)
        await worker.server.stop(None)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def ids(num: int) -> list[int]:
    return [token_at(PROMPT, index) for index in range(num)]


def ask(request_id: str, num: int, **fields: object) -> inference_pb2.GenerateRequest:
    sampling = inference_pb2.SamplingParams(max_tokens=num, ignore_eos=True, **fields)  # type: ignore[arg-type]
    prompt = inference_pb2.TokenPrompt(ids=PROMPT)
    return inference_pb2.GenerateRequest(
        request_id=request_id, tokens=prompt, sampling=sampling, return_token_ids=True, resume_ms=20_000
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def attached(router: Router, request_id: str, index: int) -> list[inference_pb2.GenerateResponse]:
    call = router.stub.Attach(inference_pb2.AttachRequest(request_id=request_id, from_index=index), timeout=DEADLINE_S)
    return [each async for each in call]


def tokens_of(responses: list[inference_pb2.GenerateResponse]) -> list[int]:
    return [token_id for each in responses for token_id in each.token_ids]


def release(router: Router, worker: CountingWorker) -> None:
    """The worker, which has said no more for a while, is asked again by this router, and says everything."""
    worker.num_tokens_max = 10**9
    link = router.driver._links[(worker.worker_id, INCARNATION)]
    assert isinstance(link, WorkerLink)
    link._break("cut by the test")


async def begun(router: Router, request: inference_pb2.GenerateRequest) -> list[inference_pb2.GenerateResponse]:
    """What a client has that is cut off when it has three tokens."""
    call = router.stub.Generate(request, timeout=DEADLINE_S)
    seen = await read_tokens(call, 3)
    call.cancel()
    return seen


async def read_tokens(call: Any, num: int) -> list[inference_pb2.GenerateResponse]:
    """Messages with so many tokens or more: those that come while the router is busy come in one message."""
    seen: list[inference_pb2.GenerateResponse] = []
    while len(tokens_of(seen)) < num:
        seen.append(await anext(aiter(call)))
    return seen


@pytest.mark.parametrize("num_at_once", [1, 12])
def test_a_broken_stream_is_resumed_where_it_runs(num_at_once: int) -> None:
    async def case(router: Router, worker: CountingWorker) -> None:
        worker.num_tokens_max, worker.num_at_once = 12, num_at_once
        seen = await begun(router, ask("r", 40))
        index = len(tokens_of(seen))
        reading = asyncio.create_task(attached(router, "r", index))
        resumed = b'tandem_router_resumed_requests_total{router="only"} 1.0'
        await until(lambda: resumed in router.service.metrics.page())
        release(router, worker)
        rest = await reading
        assert tokens_of(seen) + tokens_of(rest) == ids(40)
        assert "".join(each.text for each in [*seen, *rest]) == smol().decode(ids(40))
        assert rest[-1].usage.completion_tokens == 40
        assert tokens_of(await attached(router, "r", 38)) == ids(40)[38:], "it ended lately"
        (last,) = await attached(router, "r", 40)
        assert (list(last.token_ids), last.text, last.finish, last.index) == ([], "", "length", 40)

    alone(case)


def test_a_stop_string_is_found_across_the_break() -> None:
    text = smol().decode(ids(40))
    stop = text[20:28]
    assert text.count(stop) == 1

    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        whole = await first.client.generate(PROMPT, max_tokens=40, stop=[stop], ignore_eos=True)
        assert whole.text == text[:20]
        for cut in range(1, len(whole.token_ids)):
            worker.num_tokens_max = cut
            call = first.stub.Generate(ask(f"r{cut}", 40, stop=[stop]), timeout=DEADLINE_S)
            seen = await read_tokens(call, cut)
            call.cancel()
            worker.num_tokens_max = 10**9
            rest = await attached(second, f"r{cut}", cut)
            assert tokens_of(seen) + tokens_of(rest) == list(whole.token_ids)
            assert "".join(each.text for each in [*seen, *rest]) == whole.text
            assert rest[-1].finish == "stop"
            assert rest[-1].stop_reason == stop

    together(case)


def test_who_does_not_come_back_is_cancelled_in_time_and_who_did_not_ask_at_once() -> None:
    async def case(router: Router, worker: CountingWorker) -> None:
        worker.num_tokens_max = 12
        request = ask("soon", 40)
        request.resume_ms = 300
        await begun(router, request)
        assert router.driver.transcripts.find("soon") is not None  # type: ignore[arg-type]
        request.request_id, request.resume_ms = "now", 0
        await begun(router, request)

        def cancelled() -> list[str]:
            return [each.request_id for each in worker.heard if isinstance(each, CancelAssigned)]

        await until(lambda: cancelled() == ["now", "soon"])
        with pytest.raises(grpc.aio.AioRpcError, match="did not come back within 300 ms"):
            await attached(router, "soon", 0)
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await attached(router, "now", 0)

    alone(case)


def test_the_last_one_to_ask_reads() -> None:
    async def case(router: Router, worker: CountingWorker) -> None:
        worker.num_tokens_max = 12
        first = asyncio.create_task(router.client.generate(PROMPT, request_id="r", max_tokens=40, ignore_eos=True))
        await until(lambda: router.driver.transcripts.find("r") is not None)  # type: ignore[arg-type]
        second = asyncio.create_task(attached(router, "r", 0))
        with pytest.raises(TakenOver, match="another client reads"):
            await first
        release(router, worker)
        assert tokens_of(await second) == ids(40)

    alone(case)


def test_taken_over_from_a_router_that_lives() -> None:
    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        worker.num_tokens_max = 12
        call = first.stub.Generate(ask("r", 40), timeout=DEADLINE_S)
        seen = await read_tokens(call, 12)
        worker.num_tokens_max = 10**9
        rest = await attached(second, "r", 5)
        assert tokens_of(seen)[:5] + tokens_of(rest) == ids(40)
        release(first, worker)  # its next word to the store is refused
        with pytest.raises(grpc.aio.AioRpcError, match="another router has this request"):
            [each async for each in call]
        assert [each.state for each in first.driver.status().requests] == ["failed"]

    together(case)


async def taken_and_taken_back(first: Router, second: Router) -> None:
    """Of the request that runs at the first router, whose worker has said 12 tokens; neither hears the answer."""
    kept = first.driver.transcripts

    def is_written() -> bool:
        found = kept.find(RequestId("r"))
        return found is not None and len(found.tokens) == 12 and not kept.pending()

    await until(is_written)
    for each in (second, first):
        assert each.service.journal is not None
        assert await each.service.journal._store.take_over(RequestId("r"), each.driver.next_fence()) is not None


def test_a_take_over_whose_answer_is_lost_does_not_end_what_runs_at_that_very_router() -> None:
    """It was taken back from another router, which may have given it to the workers: they hear of it anew."""

    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        worker.num_tokens_max = 12
        call = first.stub.Generate(ask("r", 40), timeout=DEADLINE_S)
        seen = [await anext(aiter(call)) for _ in range(12)]
        await taken_and_taken_back(first, second)
        release(first, worker)
        worker.num_tokens_max = 13
        await until(
            lambda: len({each.epoch // EPOCHS_PER_FENCE for each in worker.heard if isinstance(each, Assign)}) > 1
        )
        release(first, worker)
        assert tokens_of(seen) + tokens_of([each async for each in call]) == ids(40)
        epochs = [each.epoch for each in worker.heard if isinstance(each, Assign)]
        assert epochs == sorted(epochs)
        await until(lambda: not first.driver.transcripts.pending())
        assert first.service.journal is not None
        stored = await first.service.journal._store.take_over(RequestId("r"), 1)
        assert stored is not None
        assert stored.ended is not None
        assert [each.token_id for each in stored.tokens] == ids(40)

    together(case)


def test_what_ended_is_written_though_a_take_over_of_its_own_router_fenced_it() -> None:
    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        worker.num_tokens_max = 12
        await begun(first, ask("r", 40))
        await taken_and_taken_back(first, second)
        first.driver.cancel(RequestId("r"), "by the test")
        await until(lambda: not first.driver.transcripts.pending())
        assert first.service.journal is not None
        stored = await first.service.journal._store.take_over(RequestId("r"), 1)
        assert stored is not None
        assert stored.ended is not None
        assert stored.ended.message == "by the test"

    together(case)


def test_an_id_that_waits_for_its_client_is_not_claimed_for_another_request() -> None:
    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        worker.num_tokens_max = 12
        seen = tokens_of(await begun(first, ask("r", 40)))
        await until(lambda: "r" not in first.service._in_flight)
        with pytest.raises(grpc.aio.AioRpcError, match="ALREADY_EXISTS"):
            await begun(first, ask("r", 20))
        worker.num_tokens_max = 10**9
        assert seen + tokens_of(await attached(second, "r", len(seen))) == ids(40), "as it was asked first"

    together(case)


def test_a_client_goes_on_at_the_next_router_by_itself() -> None:
    """The first router ends in the middle; the client is told of it and finds the second at the same address."""

    async def main() -> None:
        worker = CountingWorker()
        await worker.server.start()
        worker.num_tokens_max = 12
        seen: list[int] = []
        with redis_server() as redis:
            async with a_router(worker, redis, "b") as second:
                async with a_router(worker, redis, "a") as first:
                    client = first.client
                    stream = client.stream(PROMPT, max_tokens=40, ignore_eos=True)
                    while len(seen) < 12:
                        seen += (await anext(stream)).token_ids
                    await first.driver.stop()
                    assert first.service.journal is not None
                    await first.service.journal.flush()
                    client._stub = second.client._stub
                    worker.num_tokens_max = 10**9
                    async for chunk in stream:
                        assert chunk.index == len(seen)
                        seen += chunk.token_ids
        assert seen == ids(40)
        await worker.server.stop(None)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_a_store_that_is_away_is_named_and_waited_for() -> None:
    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        worker.num_tokens_max = 12
        await begun(first, ask("r", 40))
        assert first.service.journal is not None
        await first.service.journal.flush()
        redis.process.suspend()
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await attached(second, "r", 3)
        assert tokens_of(await begun(second, ask("served", 3))) == ids(3), "what it is not needed for goes on"
        redis.process.resume()
        worker.num_tokens_max = 10**9
        assert tokens_of(await attached(second, "r", 3)) == ids(40)[3:]

    together(case)


def test_an_idempotency_key_at_two_routers_at_once() -> None:
    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        body = {"prompt": PROMPT, "max_tokens": 30, "ignore_eos": True, "return_token_ids": True}
        posts = [
            each.http.post("/v1/completions", json=body, headers={"idempotency-key": "k"})
            for each in (first, second) * 3
        ]
        replies = [reply.json() for reply in await asyncio.gather(*posts)]
        answered = [each for each in replies if "choices" in each]
        assert len({each["id"] for each in answered}) == 1
        assert {tuple(each["choices"][0]["token_ids"]) for each in answered} == {tuple(ids(30))}
        # Of several readers at once the last one is given the answer; the others are told.
        assert {each["error"]["code"] for each in replies if "error" in each} <= {"taken_over"}
        again = await second.http.post("/v1/completions", json=body, headers={"idempotency-key": "k"})
        assert again.json()["choices"][0]["token_ids"] == ids(30)
        other = await first.http.post(
            "/v1/completions", json={**body, "max_tokens": 31}, headers={"idempotency-key": "k"}
        )
        assert other.status_code == 409

    together(case)


def test_a_key_whose_request_ends_while_the_store_is_asked_of_it_is_begun_with_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        journal, asked = first.service.journal, ask("r", 30)
        assert journal is not None
        asked.idempotency_key = "k"
        worker.num_tokens_max = 12
        call = first.stub.Generate(asked, timeout=DEADLINE_S)
        await read_tokens(call, 12)
        look = journal.look

        async def meanwhile(request_id: RequestId) -> object:
            seen = await look(request_id)
            if worker.num_tokens_max == 12:
                worker.num_tokens_max = 10**9
                first.driver.cancel(request_id, "by the test")
                await until(lambda: (kept := first.driver.transcripts.find(request_id)) is None or bool(kept.ended))
            return seen

        monkeypatch.setattr(journal, "look", meanwhile)
        again = ask("other", 30)
        again.idempotency_key = "k"
        assert tokens_of([each async for each in first.stub.Generate(again, timeout=DEADLINE_S)]) == ids(30)
        assert worker.num_tokens_max == 10**9, "it did end meanwhile"

    together(case)


@pytest.mark.parametrize("chat", [True, False])
def test_http_events_can_be_cut_anywhere(chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, object] = {"max_tokens": 30, "ignore_eos": True, "stream": True, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": PROMPT}

    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        whole = await events(first, path, body, {"x-request-id": "whole"})
        assert len({mark for mark, _ in whole}) > 20
        for mark, _ in whole[:-1]:
            if not mark:
                continue
            until_there = whole[: max(at for at, (each, _) in enumerate(whole) if each == mark) + 1]
            rest = await events(second, path, body, {"last-event-id": mark})
            texts = [text for part in (until_there, rest) for _, text in part]
            assert "".join(texts) == "".join(text for _, text in whole)
            assert rest[-1] == ("", "[DONE]")

    together(case)


async def events(router: Router, path: str, body: dict[str, object], headers: dict[str, str]) -> list[tuple[str, str]]:
    """Each event's id and its text."""
    found: list[tuple[str, str]] = []
    mark = ""
    async with router.http.stream("POST", path, json=body, headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith("id: "):
                mark = line.removeprefix("id: ")
            elif line == "data: [DONE]":
                found.append(("", "[DONE]"))
            elif line.startswith("data: "):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
                found.append((mark, text))
    return [each for each in found if each != ("", "[DONE]")] + [("", "[DONE]")]


def test_bad_input_is_named() -> None:
    async def case(router: Router, worker: CountingWorker) -> None:
        body = {"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}

        async def refused(headers: dict[str, str], **fields: object) -> str:
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            reply = await router.http.post("/v1/completions", json={**body, **fields}, headers=raw)
            assert reply.status_code in (400, 404), reply.text
            return str(reply.json()["error"]["message"])

        for wrong in ("x", "x/", "/4", "x/-1", "x/1e3", "x/9999999999", "x/\xb2"):
            assert "last-event-id" in await refused({"last-event-id": wrong})
        assert "no request of id 'nobody'" in await refused({"last-event-id": "nobody/3"})
        assert "x-resume-ms" in await refused({"x-resume-ms": "soon"})
        assert "resume_ms: is 600001" in await refused({"x-resume-ms": "600001"})
        assert "idempotency_key" in await refused({"idempotency-key": "k" * 256})
        assert "asks for 2" in await refused({"idempotency-key": "k"}, n=2)
        done = await router.http.post("/v1/completions", json=body, headers={"idempotency-key": "k"})
        mark = f"{done.json()['id']}/5"
        assert "the answer has 4 tokens at most" in await refused({"last-event-id": mark})
        reply = await router.http.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "x"}]},
            headers={"last-event-id": f"{done.json()['id']}/1"},
        )
        assert "of a request to completions" in reply.json()["error"]["message"]

    alone(case)


def test_where_tokens_are_not_exact_nothing_is_guessed() -> None:
    async def case(router: Router, worker: CountingWorker) -> None:
        router.service.model = replace(router.service.model, exact=False)
        worker.num_tokens_max = 12
        await begun(router, ask("r", 40))
        with pytest.raises(grpc.aio.AioRpcError, match="the cluster is not exact"):
            await attached(router, "r", 30)

    alone(case)


# ---- the client's decider --------------------------------------------------------------------------------------------


def resuming(resume_s: float = 10) -> Resuming:
    return Resuming(resume_s=resume_s)


def test_begins_until_a_token_came_and_attaches_after() -> None:
    stream = resuming()
    assert stream.next_call() == Begin()
    assert stream.failed(0, Stopping("x"), said=True) > 0
    assert stream.next_call() == Begin()
    assert stream.heard(0, 2, finished=False)
    assert stream.next_call() == Attach(2)
    assert not stream.heard(0, 2, finished=False), "it has those"
    assert stream.heard(2, 0, finished=True)
    assert stream.finished


def test_pauses_grow_and_end() -> None:
    stream = resuming()
    stream.heard(0, 1, finished=False)
    pauses = [stream.failed(0, StoreAway("first"), said=True)]
    while sum(pauses) + min(2 * pauses[-1], 1) <= 10:
        pauses.append(stream.failed(sum(pauses), StoreAway("later"), said=True))
    with pytest.raises(StoreAway, match="first"):
        stream.failed(sum(pauses), StoreAway("later"), said=True)
    assert pauses == sorted(pauses)
    assert max(pauses) <= 1


def test_what_waited_long_for_its_first_token_is_not_given_up_at_its_first_break() -> None:
    """It may stand in a queue: the time in which nothing came counts from the break on."""
    stream = resuming(10)
    assert stream.failed(100, Stopping("first"), said=True) > 0
    assert stream.failed(109, Stopping("later"), said=True) > 0
    with pytest.raises(Stopping, match="first"):
        stream.failed(110.5, Stopping("later"), said=True)


@pytest.mark.parametrize(
    ("error", "said"),
    [(InvalidRequest("x", "y"), True), (TakenOver("x"), True), (TandemError("x"), False)],
)
def test_what_does_not_pass_is_raised(error: TandemError, said: bool) -> None:
    with pytest.raises(type(error)):
        resuming().failed(0, error, said=said)


def test_a_request_that_nobody_knows_any_more_is_lost_by_name() -> None:
    stream = resuming()
    stream.heard(0, 3, finished=False)
    stream.failed(0, Stopping("the router is stopping"), said=True)
    now_s = 0.0
    while now_s + stream.pause_s <= UNKNOWN_S:  # it may be known in a moment
        now_s += stream.failed(now_s, UnknownRequest("x"), said=True)
    with pytest.raises(RequestLost, match=r"after 3 tokens.*the router is stopping"):
        stream.failed(now_s, UnknownRequest("x"), said=True)


def test_without_resuming_a_break_is_the_end() -> None:
    with pytest.raises(Stopping):
        resuming(0).failed(0, Stopping("x"), said=True)
