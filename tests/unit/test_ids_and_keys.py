"""Whose a request is, and what its id and its key mean: ids that come twice, keys of what failed, owners, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from test_resuming import (
    DEADLINE_S,
    PROMPT,
    Router,
    alone,
    ask,
    attached,
    begun,
    ids,
    read_tokens,
    release,
    together,
    tokens_of,
    until,
)
from test_router_driver import CountingWorker

from benchmarks.local_redis import LocalRedis
from router.api_keys import Caller, KeyEntry
from router.journal import Journal
from router.metrics import Api
from router.move import EPOCHS_PER_FENCE
from router.service import Ask, Service
from router.validation import SamplingFields
from tandem.client import Client
from tandem.errors import Overloaded, UnknownRequest
from tandem.messages import Assign
from tandem.request import RequestId
from tandem.v1 import inference_pb2

BODY = {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}


def journal(router: Router) -> Journal:
    found = router.service.journal
    assert found is not None
    return found


def full(router: Router) -> None:
    """The router takes nothing in."""
    error = Overloaded("is full", retry_after_ms=1)
    router.driver._core._admission.refusal = lambda *_, **__: error  # type: ignore[method-assign]


async def code(router: Router, **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return (await router.http.post("/v1/completions", json=BODY, headers=named)).status_code


def test_who_comes_back_gets_no_tokens_of_another_request_of_the_same_id() -> None:
    """It says with its key which of them is meant; the id was free when the other one began."""

    async def case(router: Router, worker: CountingWorker) -> None:
        request = ask("r", 12)
        request.idempotency_key = "k"
        assert tokens_of(await begun(router, request)) == ids(12)[:3]
        await until(lambda: router.driver._core.num_requests == 0)
        other = await router.http.post(
            "/v1/completions",
            json={**BODY, "prompt": [7], "max_tokens": 12},
            headers={"x-request-id": "r", "idempotency-key": "l"},
        )
        assert other.status_code == 200
        asked = inference_pb2.AttachRequest(request_id="r", from_index=3, idempotency_key="k")
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            [each async for each in router.stub.Attach(asked, timeout=DEADLINE_S)]

    alone(case)


def test_the_client_says_with_its_key_which_request_it_comes_back_for() -> None:
    calls: list[Any] = []

    class Call:
        """A stream of one token, the last one or not."""

        def __init__(self, index: int) -> None:
            self.index = index

        def __iter__(self) -> Iterator[object]:
            finish = "length" if self.index else ""
            yield inference_pb2.GenerateResponse(request_id="r", index=self.index, token_ids=[7], finish=finish)
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "", "")

        def cancel(self) -> None:
            """It is over."""

    class Stub:
        """Breaks each stream after its first token."""

        def Generate(self, request: inference_pb2.GenerateRequest, **_: object) -> Call:
            calls.append(request)
            return Call(0)

        def Attach(self, request: inference_pb2.AttachRequest, **_: object) -> Call:
            calls.append(request)
            return Call(1)

    with Client("127.0.0.1:1") as client:
        client._stub = Stub()
        assert [each.token_ids for each in client.stream(PROMPT, request_id="r")] == [(7,), (7,)]
    assert calls[0].idempotency_key == calls[1].idempotency_key != ""


def test_a_key_given_when_coming_back_must_be_that_of_the_request() -> None:
    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        worker.num_tokens_max = 6
        request = ask("r", 12)
        request.idempotency_key = "k"
        call = first.stub.Generate(request, timeout=DEADLINE_S)
        seen = await read_tokens(call, 6)
        await until(lambda: not first.driver.transcripts.pending())
        for router in (first, second):
            asked = inference_pb2.AttachRequest(request_id="r", from_index=6, idempotency_key="another")
            with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
                [each async for each in router.stub.Attach(asked, timeout=DEADLINE_S)]
            headers = {"last-event-id": "r/6", "idempotency-key": "another"}
            assert (await router.http.post("/v1/completions", json=BODY, headers=headers)).status_code == 404
        release(first, worker)
        seen += [each async for each in call]
        assert tokens_of(seen) == ids(12), "nothing was taken from who reads it"
        asked.idempotency_key = "k"
        rest = [each async for each in second.stub.Attach(asked, timeout=DEADLINE_S)]
        assert tokens_of(rest) == ids(12)[6:]

    together(case)


def test_an_owner_gets_nothing_of_an_id_that_became_another_owners_meanwhile() -> None:
    """The id ends and begins anew, at another router, while the store answers."""

    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        alice, bob = (Caller(entry=KeyEntry(name=name, digest=b"")) for name in ("alice", "bob"))
        worker.num_tokens_max = 6
        mine = await opened(first.service, "r", alice)
        await until(lambda: not first.driver.transcripts.pending())
        store = journal(second)._store
        genuine = store.take_over

        async def late(*args: Any) -> Any:
            first.driver.cancel(RequestId("r"), "by the test")
            mine.close("by the test")
            await until(lambda: not first.driver.transcripts.pending())
            theirs.append(await opened(first.service, "r", bob))
            await until(lambda: not first.driver.transcripts.pending())
            return await genuine(*args)

        theirs: list[Any] = []
        store.take_over = late  # type: ignore[method-assign, assignment]
        with pytest.raises(UnknownRequest):
            await second.service.resume("r", 0, alice)
        release(first, worker)
        seen = [token.token_id async for _, piece in theirs[0].pieces() for token in piece.tokens]
        assert seen == ids(12)

    together(case)


async def opened(service: Service, name: str, caller: Caller) -> Any:
    """The answer to this caller's request of 12 tokens, waited for by its client."""
    fields = SamplingFields(max_tokens=12, ignore_eos=True)
    asked = Ask(api=Api.GRPC, request_id=name, prompts=[PROMPT], fields=fields, caller=caller, resume_ms=20_000)
    return await service.open(asked)


def test_what_was_refused_frees_its_id_and_its_key() -> None:
    """Else its client would be told to come again, and then that it is being served; or let in past everybody."""

    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        full(first)
        for number in range(2):
            assert await code(first, x_request_id="r", idempotency_key="k") == 429, f"at try {number}"
            assert await code(first, x_request_id="s") == 429
            await until(lambda: not first.driver.transcripts.pending())
        assert await code(second, x_request_id="s") == 200
        assert await code(second, x_request_id="t", idempotency_key="k") == 200

    together(case)


def test_the_key_of_what_failed_means_the_next_request() -> None:
    """Its client's connection broke, so it was cancelled: the same request again is answered."""

    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        for router in (first, second):
            worker.num_tokens_max = 4
            request = ask("", 12)
            request.resume_ms, request.idempotency_key = 0, "k"
            await begun(first, request)
            await until(lambda: not first.driver.status().waiting and first.driver._core.num_requests == 0)
            await until(lambda: not first.driver.transcripts.pending())
            worker.num_tokens_max = 10**9
            again = [each async for each in router.stub.Generate(request, timeout=DEADLINE_S)]
            assert tokens_of(again) == ids(12)
            once_more = [each async for each in router.stub.Generate(request, timeout=DEADLINE_S)]
            assert once_more[0].request_id == again[0].request_id
            journal(router)._driver.transcripts.lost()
            redis.kill()
            redis.start()

    together(case)


def test_a_client_that_leaves_while_its_request_is_claimed_leaves_nothing_in_the_store() -> None:
    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        store = journal(first)._store
        genuine, claimed = store.claim, asyncio.Event()

        async def unheard(*args: Any) -> None:
            await genuine(*args)
            claimed.set()
            await asyncio.Event().wait()

        store.claim = unheard  # type: ignore[method-assign, assignment]
        call = first.stub.Generate(ask("r", 5), timeout=DEADLINE_S)
        reading = asyncio.create_task(read_tokens(call, 1))
        await claimed.wait()
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: "r" not in first.service._in_flight)
        await until(lambda: not first.driver.transcripts.pending())
        assert await code(second, x_request_id="r") == 200

    together(case)


def test_a_client_that_comes_again_while_its_first_try_is_withdrawn_is_answered() -> None:
    """The store has the key of the claim, and not yet that it was withdrawn: at that router, and at the other one."""

    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        store = journal(first)._store
        genuine = store.claim, store.write
        for name, router in (("r", first), ("s", second)):
            claimed, slow = asyncio.Event(), asyncio.Event()

            async def unheard(*args: Any, claimed: asyncio.Event = claimed) -> None:
                await genuine[0](*args)
                claimed.set()
                await asyncio.Event().wait()

            async def later(writes: Any, slow: asyncio.Event = slow) -> Any:
                await slow.wait()
                return await genuine[1](writes)

            store.claim, store.write = unheard, later  # type: ignore[method-assign, assignment]
            request = ask(name, 5)
            request.idempotency_key = f"key of {name}"
            call = first.stub.Generate(request, timeout=DEADLINE_S)
            reading = asyncio.create_task(read_tokens(call, 1))
            await claimed.wait()
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await until(lambda: not first.service._in_flight)
            store.claim = genuine[0]  # type: ignore[method-assign]
            asyncio.get_running_loop().call_later(0.1, slow.set)
            again = [each async for each in router.stub.Generate(request, timeout=DEADLINE_S)]
            assert tokens_of(again) == ids(5)
            store.write = genuine[1]  # type: ignore[method-assign]

    together(case)


def test_who_comes_back_for_what_ends_while_the_store_answers_gets_that_and_no_second_life() -> None:
    """The store's answer, that this router has the request, is older than the request's end here."""

    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        worker.num_tokens_max = 6
        await begun(first, ask("r", 12))
        store = journal(first)._store
        genuine, taken, ended = store.take_over, asyncio.Event(), asyncio.Event()

        async def late(*args: Any) -> Any:
            kept = await genuine(*args)
            taken.set()
            await ended.wait()
            return kept

        store.take_over = late  # type: ignore[method-assign, assignment]
        reading = asyncio.create_task(attached(first, "r", 3))
        await taken.wait()
        release(first, worker)
        await until(lambda: first.driver.transcripts.find(RequestId("r")) is None)
        heard = len(worker.heard)
        ended.set()
        assert tokens_of(await reading) == ids(12)[3:]
        assert not [each for each in worker.heard[heard:] if isinstance(each, Assign)], "it was begun again"

    together(case)


def test_what_this_router_forgot_unwritten_goes_on_under_a_fence_of_its_own() -> None:
    """The store calls the request this router's, which knows nothing of it any more."""

    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        worker.num_tokens_max = 6
        await begun(first, ask("r", 12))
        await until(lambda: not first.driver.transcripts.pending())
        worker.num_tokens_max = 10**9
        first.driver.let_go(RequestId("r"), began_apart=False)
        assert tokens_of(await attached(first, "r", 3)) == ids(12)[3:]
        await until(lambda: not first.driver.transcripts.pending())
        assert tokens_of(await attached(second, "r", 0)) == ids(12)
        epochs = [each.epoch // EPOCHS_PER_FENCE for each in worker.heard if isinstance(each, Assign)]
        assert len(set(epochs)) == 2
        assert epochs == sorted(epochs)

    together(case)


def test_who_asks_wrongly_for_an_answer_takes_it_from_nobody() -> None:
    async def case(router: Router, worker: CountingWorker) -> None:
        worker.num_tokens_max = 6
        request = ask("r", 12)
        request.resume_ms, request.idempotency_key = 0, "k"
        call = router.stub.Generate(request, timeout=DEADLINE_S)
        seen = await read_tokens(call, 6)
        reply = await router.http.post("/v1/completions", json=BODY, headers={"last-event-id": "r/1"})
        assert reply.status_code == 400
        assert "of a request to grpc" in reply.json()["error"]["message"]
        with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
            await attached(router, "r", 13)
        release(router, worker)
        assert tokens_of(seen + [each async for each in call]) == ids(12)

    alone(case)


def test_who_is_ahead_of_what_failed_is_told_how_it_failed() -> None:
    async def case(router: Router, worker: CountingWorker) -> None:
        worker.num_tokens_max = 4
        await begun(router, ask("r", 12))
        router.driver.cancel(RequestId("r"), "by the test")
        with pytest.raises(grpc.aio.AioRpcError, match="by the test"):
            await attached(router, "r", 9)

    alone(case)


def test_where_tokens_are_not_exact_a_second_try_is_no_guess_either() -> None:
    """What the other router computes again is not what the client has, also when it has caught up."""

    async def case(first: Router, second: Router, worker: CountingWorker, redis: LocalRedis) -> None:
        second.service.model = replace(second.service.model, exact=False)
        worker.num_tokens_max = 6
        await begun(first, ask("r", 40))
        await until(lambda: not first.driver.transcripts.pending())
        worker.num_tokens_max = 10**9
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError, match="the cluster is not exact"):
                await attached(second, "r", 12)
            await asyncio.sleep(0.2)

    together(case)
