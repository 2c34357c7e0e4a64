"""Floods: of answers that never end, of huge prompts, of clients that cancel at once, and of ones that do not read."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc.aio
import httpx
import psutil
import pytest
from cluster_under_test import ClusterUnderTest

from engine.fake_runner import expected_tokens
from tandem.client import AsyncClient
from tandem.errors import Overloaded, TandemError
from tandem.request import Sampling
from tandem.v1 import inference_pb2, inference_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(300)]

ENDLESS = 7_000
IN_FLIGHT_MAX = 1_024
CANARIES_MAX = 4  # of the router's own, which count as requests: two pairs, asked twice meanwhile
MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    # Steps so long that workers leave the router its share of two cores: what is tested is the router.
    arguments = ("--prefill", "1", "--decode", "2", "--kv-memory", "512KiB", "--fake-step-ms", "100")
    with ClusterUnderTest(*arguments, run_dir=tmp_path_factory.mktemp("run")) as served:
        yield served


def router(cluster: ClusterUnderTest) -> psutil.Process:
    return psutil.Process(cluster.document()["router_pid"])


def serves(cluster: ClusterUnderTest) -> None:
    """One client is served as ever, and nothing is left of the flood."""
    cluster.settled(60)

    async def ask() -> list[int]:
        async with AsyncClient(cluster.grpc_address, timeout_s=30, resume_s=0) as client:
            return list((await client.generate(list(range(90)), temperature=0.0, max_tokens=20)).token_ids)

    assert asyncio.run(ask()) == expected_tokens(range(90), Sampling(), 20, 256)
    assert httpx.get(f"{cluster.url}/ready", timeout=5).status_code == 200
    assert cluster.mishaps() == []


def test_a_flood_of_answers_that_never_end_is_bounded_and_goes_when_its_clients_go(cluster: ClusterUnderTest) -> None:
    async def flood() -> Counter[str]:
        outcomes: Counter[str] = Counter()

        async def one(client: AsyncClient, number: int) -> None:
            prompt = [number % 256, number // 256, 7, 7]
            try:
                async for _ in client.stream(prompt, max_tokens=ENDLESS, ignore_eos=True):
                    outcomes["tokens"] += 1
            except Overloaded as error:
                outcomes["refused"] += 1
                outcomes["told when to come again"] += error.retry_after_ms >= 500
            except TandemError as error:
                outcomes[repr(error)] += 1

        clients = [AsyncClient(cluster.grpc_address, timeout_s=120, resume_s=0) for _ in range(12)]
        tasks = [asyncio.create_task(one(clients[number % 12], number)) for number in range(1_200)]
        async with asyncio.timeout(90):
            while len(tasks) - sum(task.done() for task in tasks) > IN_FLIGHT_MAX or outcomes["tokens"] < 500:
                await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in clients:
            await client.close()
        return outcomes

    before = router(cluster).memory_info().rss
    outcomes = asyncio.run(flood())
    assert outcomes.keys() == {"tokens", "refused", "told when to come again"}, outcomes
    assert outcomes["refused"] == outcomes["told when to come again"]
    assert 0 <= outcomes["refused"] - (1_200 - IN_FLIGHT_MAX) <= CANARIES_MAX
    serves(cluster)
    grown = router(cluster).memory_info().rss - before
    print(f"{outcomes}, the router has grown by {grown / MIB:.0f} MiB")
    assert grown < 150 * MIB


def test_a_flood_of_huge_prompts_is_served_or_told_and_memory_stays_bounded(cluster: ClusterUnderTest) -> None:
    """Prompts as long as the context, and bodies as large as they may be, which hold far more tokens than that."""
    longest = json.dumps({"prompt": [7] * 8_000, "max_tokens": 1}).encode()
    largest = json.dumps({"prompt": [7] * 2_600_000, "max_tokens": 1}).encode()
    assert 7.0 * MIB < len(largest) < 8 * MIB

    async def flood() -> Counter[int]:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=60)) as client:

            async def one(number: int) -> int:
                body = largest if number % 3 == 0 else longest
                answer = await client.post(f"{cluster.url}/v1/completions", content=body)
                assert answer.status_code != 429 or int(answer.headers["retry-after"]) >= 1
                return answer.status_code

            return Counter(await asyncio.gather(*(one(number) for number in range(60))))

    before = router(cluster).memory_info().rss
    codes = asyncio.run(flood())
    print(codes)
    assert codes[200] > 0
    assert codes[400] + codes[429] >= 20, "the largest are far longer than the context"
    assert set(codes) <= {200, 400, 429}
    serves(cluster)
    grown = router(cluster).memory_info().rss - before
    print(f"the router has grown by {grown / MIB:.0f} MiB")
    assert grown < 400 * MIB


def test_a_storm_of_cancels_leaves_nothing(cluster: ClusterUnderTest) -> None:
    """Clients that leave at once, or before their request is placed: no pool, line or file keeps anything of them."""
    fds = router(cluster).num_fds()

    async def storm() -> Counter[str]:
        outcomes: Counter[str] = Counter()
        async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            for number in range(3_000):
                request = inference_pb2.GenerateRequest()
                request.tokens.ids.extend([number % 256] * (1 + number % 300))
                request.sampling.max_tokens = 2_000
                call = stub.Generate(request)
                if number % 3 == 0:
                    try:
                        async with asyncio.timeout(0.002):
                            await call.read()
                    except (TimeoutError, grpc.aio.AioRpcError):
                        outcomes["late"] += 1
                call.cancel()
                outcomes["cancelled"] += 1
                if number % 50 == 0:
                    await asyncio.sleep(0.01)
        return outcomes

    print(asyncio.run(storm()))
    serves(cluster)
    assert router(cluster).num_fds() <= fds + 8


def test_clients_that_do_not_read_hold_up_nobody_and_cost_little(cluster: ClusterUnderTest) -> None:
    """Others are served meanwhile. The bound at which such a client is cut off is in test_router_driver."""
    before = router(cluster).memory_info().rss
    host, port = "127.0.0.1", cluster.port
    asked = {"prompt": "x", "max_tokens": ENDLESS, "stream": True, "ignore_eos": True, "logprobs": 20}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    sockets = []
    for _ in range(20):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, port))
        client.sendall(head + body)
        sockets.append(client)

    async def ask() -> int:
        async with AsyncClient(cluster.grpc_address, timeout_s=60, resume_s=0) as client:
            return len((await client.generate([1, 2, 3], max_tokens=50, ignore_eos=True)).token_ids)

    assert asyncio.run(ask()) == 50
    grown = router(cluster).memory_info().rss - before
    print(f"20 clients that do not read cost the router {grown / MIB:.0f} MiB")
    assert grown < 300 * MIB
    for client in sockets:
        client.close()
    serves(cluster)


def test_a_target_that_would_be_missed_is_refused_over_both_apis(cluster: ClusterUnderTest) -> None:
    body = {"prompt": "x" * 400, "max_tokens": 2, "ttft_target_ms": 60_000, "tpot_target_ms": 60_000}
    assert cluster.post("/v1/completions", body).status_code == 200
    refused = cluster.post("/v1/completions", {**body, "tpot_target_ms": 1})
    assert refused.status_code == 429
    assert "a token is expected every" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert cluster.post("/v1/completions", {**body, "tpot_target_ms": 1, "slo_class": "batch"}).status_code == 200
    wrong = cluster.post("/v1/completions", {**body, "slo_class": "soon"})
    assert wrong.status_code == 400
    assert "slo_class" in wrong.json()["error"]["message"]

    async def over_grpc() -> tuple[grpc.StatusCode, str]:
        async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            request = inference_pb2.GenerateRequest(text="x", tpot_target_ms=1)
            try:
                async for _ in stub.Generate(request):
                    raise AssertionError("it was taken in")
            except grpc.aio.AioRpcError as error:
                metadata: Any = error.trailing_metadata()
                return error.code(), str(metadata["retry-after-ms"])
        raise AssertionError("it ended well")

    code, after = asyncio.run(over_grpc())
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(after) >= 500
