"""Both APIs with API keys, over the real driver: who gets in, who is told what, and what a key may do to others."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from edge import MODEL, http_server, smol
from test_router_driver import INCARNATION, CountingWorker, token_at

from router.api_keys import KeyEntry, KeyRing, digest_of
from router.config import RouterConfig
from router.door import Door
from router.driver import Driver
from router.events import NewRequest
from router.grpc_api import build_grpc_server
from router.metrics import Api, EdgeMetrics
from router.service import Ask, ServedModel, Service
from router.transcripts import Keep, Kept, Seen
from router.validation import SamplingFields
from tandem.client import AsyncClient
from tandem.errors import (
    Cancelled,
    Overloaded,
    PermissionDenied,
    RateLimited,
    TakenOver,
    Unauthenticated,
    UnknownRequest,
)
from tandem.messages import Assign
from tandem.request import RequestId
from tandem.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

DEADLINE_S = 20
PROMPT = (11, 12, 13)
NOW_S = 1_000_000.0
ALICE, BOB, OPS, LATE, GONE = (f"tandem_{name}-secret-of-many-characters" for name in "abolg")


def entry(name: str, key: str, **fields: object) -> KeyEntry:
    return replace(KeyEntry(name=name, digest=digest_of(key)), **fields)  # type: ignore[arg-type]


RING = KeyRing(
    [
        entry("alice", ALICE, requests_per_minute=60, tokens_per_minute=10_000, concurrent=2, tenant="a"),
        entry("bob", BOB, tenant="b"),
        entry("ops", OPS, operator=True),
        entry("late", LATE, expires_s=NOW_S),
        entry("gone", GONE, revoked=True),
    ]
)


def bare(channel: grpc.aio.Channel) -> Any:
    """Calls without stubs: the type hints want serializers, gRPC does not."""
    return channel


class StopsNothing(admin_pb2_grpc.AdminServicer):
    """Stands for the operators' service: what matters is who reaches it."""

    async def Stop(self, request: admin_pb2.StopRequest, context: object) -> admin_pb2.StopResponse:
        return admin_pb2.StopResponse()


class Router:
    """A router with both APIs, its driver, one worker, and its keys."""

    def __init__(self, service: Service, driver: Driver, worker: CountingWorker, url: str, target: str) -> None:
        self.service, self.driver, self.worker, self.url, self.target = service, driver, worker, url, target
        self.door = service.door

    async def post(self, key: str | None, **fields: object) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        headers |= {name: str(fields.pop(name)) for name in list(fields) if name.startswith(("x-", "idem"))}
        async with httpx.AsyncClient(base_url=self.url, timeout=DEADLINE_S) as client:
            body = {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True, **fields}
            return await client.post("/v1/completions", json=body, headers=headers)

    def client(self, key: str, resume_s: float = 0) -> AsyncClient:
        return AsyncClient(self.target, timeout_s=DEADLINE_S, resume_s=resume_s, api_key=key)


Case = Callable[[Router], Awaitable[None]]


def run(case: Case, ring: KeyRing | None = RING) -> None:
    async def main() -> None:
        worker = CountingWorker()
        await worker.server.start()
        door = Door(ring, clock=lambda: NOW_S)
        async with Driver(RouterConfig(redial_ms=10, tick_ms=10), account=door) as driver:
            model = ServedModel(id=MODEL, context_tokens=512, created_s=1)
            service = Service(driver=driver, tokenizer=smol(), model=model, metrics=EdgeMetrics(), door=door)

            def add(server: grpc.aio.Server) -> str:
                admin_pb2_grpc.add_AdminServicer_to_server(StopsNothing(), server)  # type: ignore[no-untyped-call]
                return admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name

            server = build_grpc_server(service, extra=(add,))
            port = await server.start("127.0.0.1", 0)
            driver.worker_joined(worker.info(), INCARNATION)
            async with http_server(service) as url:
                await case(Router(service, driver, worker, url, f"127.0.0.1:{port}"))
            await server.stop(0.2)
        await worker.server.stop(None)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


REFUSED = [
    (None, "is missing; send"),
    ("tandem_nobody-has-this-one", "is not known here"),
    (LATE, "'late' has expired"),
    (GONE, "'gone' is revoked"),
    ("x" * 513, "has 513 characters, at most 512"),
    ("two words", "must be printable ASCII without spaces"),
]


@pytest.mark.parametrize(("key", "words"), REFUSED)
def test_wrong_expired_and_revoked_keys_are_refused_by_name_and_counted(key: str | None, words: str) -> None:
    async def case(router: Router) -> None:
        reply = await router.post(key)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        error = reply.json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert words in error["message"]
        assert key is None or key not in reply.text
        async with router.client(key or "") as client:
            with pytest.raises(Unauthenticated, match=words.split("'")[-1]):
                await client.generate(PROMPT, max_tokens=1)
        page = router.service.metrics.page().decode()
        assert 'refused_requests_total{api="completions",code="invalid_api_key",router="router-0"} 1.0' in page
        assert 'refused_requests_total{api="grpc",code="invalid_api_key",router="router-0"} 1.0' in page
        assert not [each for each in router.worker.heard if isinstance(each, Assign)]

    run(case)


def test_a_good_key_is_served_over_both_apis() -> None:
    ids = [token_at(PROMPT, index) for index in range(3)]

    async def case(router: Router) -> None:
        reply = await router.post(ALICE, return_token_ids=True)
        assert reply.json()["choices"][0]["token_ids"] == ids
        async with router.client(BOB) as client:
            assert list((await client.generate(PROMPT, max_tokens=3, ignore_eos=True)).token_ids) == ids
        salts = [each.cache_salt for each in router.worker.heard if isinstance(each, Assign)]
        assert len(set(salts)) == 2
        assert all(len(salt) == 16 for salt in salts)

    run(case)


def test_every_page_and_method_but_health_and_documentation_is_closed() -> None:
    async def case(router: Router) -> None:
        async with httpx.AsyncClient(base_url=router.url) as client:
            for path in ("/health", "/live", "/ready", "/docs", "/openapi.json"):
                assert (await client.get(path)).status_code in (200, 503), path
            for path in ("/metrics", "/v1/models", "/dashboard", "/nowhere", "/live/", "//live", "/live/../v1/models"):
                assert (await client.get(path)).status_code == 401, path
                assert (await client.get(path, headers={"Authorization": f"Bearer {BOB}"})).status_code != 401, path
        async with grpc.aio.insecure_channel(router.target) as channel:
            for method, code in (
                ("/grpc.health.v1.Health/Check", grpc.StatusCode.OK),
                ("/tandem.v1.Inference/ListModels", grpc.StatusCode.UNAUTHENTICATED),
                ("/tandem.v1.Inference/Nothing", grpc.StatusCode.UNAUTHENTICATED),
                ("/tandem.v1.Admin/Stop", grpc.StatusCode.UNAUTHENTICATED),
            ):
                call = bare(channel).unary_unary(method)(b"", timeout=DEADLINE_S)
                assert await call.code() == code, method

    run(case)


def test_only_an_operator_reaches_the_admin_service() -> None:
    async def case(router: Router) -> None:
        async with grpc.aio.insecure_channel(router.target) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError, match="key 'bob' is no operator's") as caught:
                await stub.Stop(admin_pb2.StopRequest(), metadata=(("authorization", f"Bearer {BOB}"),))
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            await stub.Stop(admin_pb2.StopRequest(), metadata=(("authorization", f"Bearer {OPS}"),))

    run(case)


def test_over_a_limit_both_apis_say_which_and_when_to_come_again() -> None:
    async def case(router: Router) -> None:
        router.door.ring = KeyRing([entry("alice", ALICE, requests_per_minute=2)])
        assert (await router.post(ALICE)).status_code == 200
        assert (await router.post(ALICE)).status_code == 200
        reply = await router.post(ALICE)
        assert reply.status_code == 429
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        assert reply.json()["error"]["message"].startswith(
            "requests_per_minute: key 'alice' has used up its 2 requests"
        )
        assert 25_000 < int(reply.headers["retry-after-ms"]) <= 30_000
        assert int(reply.headers["retry-after"]) <= 30
        async with router.client(ALICE) as client:
            with pytest.raises(RateLimited, match="requests_per_minute") as caught:
                await client.generate(PROMPT, max_tokens=1)
        assert 25_000 < caught.value.retry_after_ms <= 30_000

    run(case)


def test_answer_tokens_count_also_when_nobody_reads_them() -> None:
    async def case(router: Router) -> None:
        router.door.ring = KeyRing([entry("alice", ALICE, tokens_per_minute=100)])
        assert (await router.post(ALICE, max_tokens=200)).status_code == 200  # 3 + 200: far below zero
        reply = await router.post(ALICE)
        assert reply.status_code == 429
        assert reply.json()["error"]["message"].startswith("tokens_per_minute")
        assert int(reply.headers["retry-after-ms"]) > 60_000

    run(case)


def test_requests_at_once_are_bounded_and_given_back_however_they_end() -> None:
    async def case(router: Router) -> None:
        router.door.ring = KeyRing([entry("alice", ALICE, concurrent=2)])
        router.worker.num_tokens_max = 0
        async with router.client(ALICE) as client:
            streams = [client.stream(PROMPT, request_id=f"r{each}", max_tokens=400) for each in range(2)]
            heads = [asyncio.ensure_future(anext(stream)) for stream in streams]
            while router.driver._core.num_requests < 2:
                await asyncio.sleep(0.001)
            assert (await router.post(ALICE)).status_code == 429
            assert (await router.post(ALICE, n=3)).status_code == 429
            for each in heads:
                each.cancel()
            await asyncio.gather(*heads, return_exceptions=True)
        while router.driver._core.num_requests:
            await asyncio.sleep(0.001)
        router.worker.num_tokens_max = 1000
        for _ in range(3):
            assert (await router.post(ALICE, n=2)).status_code == 200
            assert (await router.post(ALICE, max_tokens=0)).status_code == 400  # refused by a check: costs nothing
        assert (await router.post(ALICE, n=3)).status_code == 429

    run(case)


def test_a_key_asks_for_no_higher_priority_than_it_may() -> None:
    async def case(router: Router) -> None:
        router.door.ring = KeyRing([entry("alice", ALICE, priority_max=1), entry("bob", BOB)])
        assert (await router.post(ALICE, priority=1)).status_code == 200
        assert (await router.post(BOB, priority=3)).status_code == 200
        reply = await router.post(ALICE, priority=2)
        assert reply.status_code == 403
        assert reply.json()["error"]["message"] == "priority: is 2, key 'alice' may ask for 1 at most"
        async with router.client(ALICE) as client:
            with pytest.raises(PermissionDenied, match="may ask for 1 at most"):
                await client.generate(PROMPT, max_tokens=1, priority=3)

    run(case)


def test_a_request_of_somebody_else_is_unknown_to_cancel_and_to_attach() -> None:
    async def case(router: Router) -> None:
        router.worker.num_tokens_max = 5
        async with router.client(ALICE, 30) as alice, router.client(BOB) as bob, router.client(OPS) as ops:
            stream = alice.stream(PROMPT, request_id="mine", max_tokens=400, ignore_eos=True)
            await anext(stream)
            assert router.service.owner_of("mine") == "alice"
            assert not await bob.cancel("mine")
            assert not await bob.cancel("mine#0")
            with pytest.raises(UnknownRequest) as caught:
                await router.service.resume("mine", 0, RING.caller(BOB, 0))
            with pytest.raises(UnknownRequest) as missing:
                await router.service.resume("none", 0, RING.caller(BOB, 0))
            assert str(caught.value).replace("mine", "none") == str(missing.value), "the words tell them apart"
            async with grpc.aio.insecure_channel(router.target) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
                asked = inference_pb2.AttachRequest(request_id="mine")
                stolen = stub.Attach(asked, metadata=(("authorization", f"Bearer {BOB}"),), timeout=DEADLINE_S)
                assert await stolen.code() is grpc.StatusCode.NOT_FOUND
                own = stub.Attach(asked, metadata=(("authorization", f"Bearer {ALICE}"),), timeout=DEADLINE_S)
                assert (await own.read()).request_id == "mine"
            assert await ops.cancel("mine")
            with pytest.raises(TakenOver):  # by its own key, above
                async for _ in stream:
                    pass

    run(case)


def test_the_same_idempotency_key_of_two_callers_means_two_requests() -> None:
    async def case(router: Router) -> None:
        replies = [await router.post(key, **{"idempotency-key": "k"}) for key in (ALICE, BOB, ALICE, BOB)]
        assert [reply.status_code for reply in replies] == [200] * 4
        ids = [reply.headers["x-request-id"] for reply in replies]
        assert ids[0] == ids[2] != ids[1] == ids[3]

    run(case)


def test_a_revoked_key_ends_the_streams_that_run() -> None:
    async def case(router: Router) -> None:
        router.worker.num_tokens_max = 5
        async with router.client(ALICE) as alice, router.client(BOB) as bob:
            ended = alice.stream(PROMPT, max_tokens=400, ignore_eos=True)
            goes_on = bob.stream(PROMPT, max_tokens=400, ignore_eos=True)
            await anext(ended)
            await anext(goes_on)
            router.door.ring = KeyRing([entry("alice", ALICE, revoked=True), RING.entries["bob"]])
            router.service.end_unwelcome()
            with pytest.raises(Cancelled, match="the API key 'alice' is revoked"):
                async for _ in ended:
                    pass
            assert router.driver._core.num_requests == 1
            router.service.end_unwelcome()
            assert router.driver._core.num_requests == 1

    run(case)


def test_an_id_that_is_asked_for_again_stays_on_its_own_account() -> None:
    """A request whose client is cut off goes on: who asks for its id meanwhile takes nothing off any account."""

    async def case(router: Router) -> None:
        router.door.ring = KeyRing([entry("alice", ALICE, concurrent=2), entry("bob", BOB, concurrent=1)])
        router.worker.num_tokens_max = 5
        asked = inference_pb2.GenerateRequest(request_id="mine", resume_ms=20_000)
        asked.tokens.ids.extend(PROMPT)
        asked.sampling.max_tokens, asked.sampling.ignore_eos = 400, True
        async with grpc.aio.insecure_channel(router.target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            shown = {key: (("authorization", f"Bearer {key}"),) for key in (ALICE, BOB)}
            call = stub.Generate(asked, metadata=shown[ALICE], timeout=DEADLINE_S)
            await call.read()
            call.cancel()
            while router.service._in_flight:
                await asyncio.sleep(0.001)
            for key in (BOB, ALICE, BOB):
                again = stub.Generate(asked, metadata=shown[key], timeout=DEADLINE_S)
                assert await again.code() is grpc.StatusCode.ALREADY_EXISTS
        assert (await router.post(ALICE, n=2)).status_code == 429, "hers runs"
        router.door.ring = KeyRing([entry("alice", ALICE, revoked=True), entry("bob", BOB, concurrent=1)])
        router.service.end_unwelcome()
        assert not router.driver._core.num_requests, "it is still known whose it is"
        router.door.ring = KeyRing([entry("alice", ALICE, concurrent=2), entry("bob", BOB, concurrent=1)])
        router.worker.num_tokens_max = 1000
        assert (await router.post(ALICE, n=2)).status_code == 200
        assert (await router.post(BOB)).status_code == 200

    run(case)


def test_a_prompt_that_is_not_taken_in_costs_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    async def case(router: Router) -> None:
        router.door.ring = KeyRing([entry("alice", ALICE, tokens_per_minute=100)])

        def full(*arguments: object, **fields: object) -> None:
            raise Overloaded("no room", retry_after_ms=1000)

        monkeypatch.setattr(router.driver, "submit", full)
        codes = {(await router.post(ALICE, n=2)).json()["error"]["code"] for _ in range(100 // len(PROMPT))}
        assert codes == {"overloaded"}
        monkeypatch.undo()
        assert (await router.post(ALICE)).status_code == 200

    run(case)


class BackFromAnother:
    """A journal as of a router whose request another one had meanwhile, which it has not heard of yet."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    async def look(self, request_id: RequestId) -> Seen:
        return Seen(new=self._kept.new, keep=self._kept.keep, mark=b"")

    async def take_over(self, seen: Seen) -> Kept:
        return self._kept


class KnowsTheKey:
    """A journal whose store knows the idempotency key already, of another request."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    async def claim(self, new: NewRequest, keep: Keep) -> Kept:
        return replace(self._kept, keep=replace(keep, digest=b"of another"))


def test_a_key_that_is_refused_gives_its_prompt_back_once() -> None:
    """Else whoever repeats one fills its bucket with it."""

    async def case(router: Router) -> None:
        assert (await router.post(ALICE, **{"x-resume-ms": 1000, "x-request-id": "mine"})).status_code == 200
        kept = router.driver.transcripts.find(RequestId("mine"))
        assert kept is not None
        router.door._now_ms = lambda: 0  # nothing is filled meanwhile
        router.service.journal = KnowsTheKey(kept)  # type: ignore[assignment]
        tokens = router.door._limits._usage["alice"].tokens
        assert tokens is not None
        before = tokens.level
        reply = await router.post(ALICE, prompt=[1] * 300, **{"idempotency-key": "k"})
        assert reply.status_code == 409
        router.service.journal = None
        assert tokens.level == before

    run(case)


def test_a_request_that_comes_back_from_another_router_is_counted_once_and_given_back() -> None:
    async def case(router: Router) -> None:
        router.door.ring = ring = KeyRing([entry("alice", ALICE, concurrent=1)])
        router.worker.num_tokens_max = 5
        async with router.client(ALICE, 30) as alice:
            stream = alice.stream(PROMPT, request_id="mine", max_tokens=400, ignore_eos=True)
            await anext(stream)
            kept = router.driver.transcripts.find(RequestId("mine"))
            assert kept is not None
            router.service.journal = BackFromAnother(replace(kept, fence=kept.fence + 1))  # type: ignore[assignment]
            answers = await router.service.resume("mine", 0, ring.caller(ALICE, NOW_S))
            router.service.journal = None
            assert (await router.post(ALICE)).status_code == 429, "it runs"
            assert router.service.cancel("mine", "enough", "alice")
            answers.close("enough")
            await stream.aclose()  # type: ignore[attr-defined]
        router.worker.num_tokens_max = 1000
        assert (await router.post(ALICE)).status_code == 200

    run(case)


def test_two_authorization_headers_are_refused_even_when_they_agree() -> None:
    async def case(router: Router) -> None:
        host, port = router.url.removeprefix("http://").split(":")

        def ask() -> int:
            connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE_S)
            connection.putrequest("GET", "/v1/models")
            connection.putheader("Authorization", f"Bearer {ALICE}")
            connection.putheader("authorization", f"Bearer {ALICE}")
            connection.endheaders()
            status = connection.getresponse().status
            connection.close()
            return status

        assert await asyncio.to_thread(ask) == 401
        async with grpc.aio.insecure_channel(router.target) as channel:
            call = bare(channel).unary_unary("/tandem.v1.Inference/ListModels")(
                b"", metadata=(("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {BOB}"))
            )
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    run(case)


def odd_heads() -> Iterator[bytes]:
    """Authorization headers that no good client sends."""
    good = ALICE.encode()
    yield b"Authorization: Bearer " + "\u00fc".encode() * 8
    yield b"Authorization: Bearer \xff\xfe\x00"[:-1]
    yield b"Authorization: Basic " + good
    yield b"Authorization: Bearer"
    yield b"Authorization: Bearer " + good + b", Bearer " + good
    yield b"Authorization : Bearer " + good  # a space before the colon: two readers may differ on it
    yield b"X: y\r\n Authorization: Bearer " + good  # folded into the line before
    yield b"Authorization_: Bearer " + good
    yield b"Proxy-Authorization: Bearer " + good


@pytest.mark.parametrize("head", list(odd_heads()))
def test_odd_and_smuggled_headers_let_nobody_in(head: bytes) -> None:
    async def case(router: Router) -> None:
        host, port = router.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n\r\n")
        reply = await reader.read()
        writer.close()
        assert reply.split(b" ")[1] in (b"400", b"401"), reply
        assert router.driver._core.num_requests == 0

    run(case)


def test_a_huge_authorization_header_is_cut_off_and_the_next_client_served() -> None:
    async def case(router: Router) -> None:
        host, port = router.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + b"k" * 100_000)
        reply = await reader.read()
        writer.close()
        assert reply.startswith(b"HTTP/1.1 431"), reply
        assert (await router.post(BOB)).status_code == 200
        async with grpc.aio.insecure_channel(router.target) as channel:
            call = bare(channel).unary_unary("/tandem.v1.Inference/ListModels")(
                b"", metadata=(("authorization", "Bearer " + "k" * 100_000),)
            )
            assert await call.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED)
        async with router.client(BOB) as client:
            assert await client.models()

    run(case)


def test_without_keys_everybody_is_served_and_an_authorization_header_changes_nothing() -> None:
    async def case(router: Router) -> None:
        assert (await router.post(None)).status_code == 200
        assert (await router.post("-")).status_code == 200

    run(case, ring=None)


def test_a_way_around_the_door_is_refused() -> None:
    """Whoever forgets to set the caller must not serve everybody."""

    async def case(router: Router) -> None:
        with pytest.raises(Unauthenticated, match="asks for API keys"):
            await router.service.open(Ask(api=Api.GRPC, request_id="", prompts=[PROMPT], fields=SamplingFields()))

    run(case)
