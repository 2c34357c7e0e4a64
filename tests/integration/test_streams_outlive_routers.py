"""Streams outlive their router where Redis keeps them: killed, ended in order, with Redis away or restarted empty."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from redis_server import redis_server
from served import Served, wait_until

from benchmarks.local_redis import LocalRedis
from engine.fake_runner import expected_tokens
from tandem.client import AsyncClient, Client
from tandem.errors import DuplicateRequest, RequestLost
from tandem.request import Sampling

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

ROUTERS = ("1", "2")
ARGUMENTS = ["--model", "fake", "--prefill", "1", "--decode", "2", "--fake-step-ms", "10"]
NUM_TOKENS = 300
PROMPTS = [[7, 8, 9, number] for number in range(8)]
ANSWERS = [expected_tokens(prompt, Sampling(temperature=0.0), NUM_TOKENS, 256) for prompt in PROMPTS]  # undisturbed


@pytest.fixture(scope="module")
def redis() -> Iterator[LocalRedis]:
    with redis_server() as server:
        yield server


@pytest.fixture(scope="module", params=ROUTERS)
def cluster(
    request: pytest.FixtureRequest, redis: LocalRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    arguments = [*ARGUMENTS, "--redis", redis.url, "--routers", str(request.param), "--max-restarts", "100"]
    with Served(arguments, run_dir=tmp_path_factory.mktemp("run")) as served:
        yield served


def router_of(cluster: Served) -> psutil.Process:
    return psutil.Process(cluster.status()["router_pid"])


def streams_through(cluster: Served, disturb: Callable[[], Awaitable[None]]) -> list[list[int]]:
    """All prompts at once, disturbed when each has some tokens; every index is seen once and in order."""

    async def main() -> list[list[int]]:
        seen: list[list[int]] = [[] for _ in PROMPTS]

        async def read(number: int) -> None:
            async for chunk in client.stream(PROMPTS[number], temperature=0.0, max_tokens=NUM_TOKENS):
                assert chunk.index == len(seen[number])
                seen[number] += chunk.token_ids

        async with AsyncClient(str(cluster.status()["grpc_address"]), timeout_s=90) as client:
            reading = asyncio.gather(*(read(number) for number in range(len(PROMPTS))))
            while not all(len(each) > 20 for each in seen):
                await asyncio.sleep(0.01)
            assert all(len(each) < NUM_TOKENS for each in seen), "too late to disturb them"
            await disturb()
            await reading
        return seen

    return asyncio.run(asyncio.wait_for(main(), 120))


def ready(cluster: Served) -> bool:
    try:
        return httpx.get(f"{cluster.url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def nothing_is_held(status: dict[str, object]) -> bool:
    workers = status["workers"]
    assert isinstance(workers, list)
    counts = [each["kv_blocks"] for each in workers if each["state"] == "ready"]
    return len(counts) == 3 and all(each["free"] + each["cached"] == each["total"] for each in counts)


def test_streams_go_on_behind_a_killed_router(cluster: Served) -> None:
    async def kill() -> None:
        router_of(cluster).kill()

    assert streams_through(cluster, kill) == ANSWERS
    cluster.status_when(nothing_is_held)


def test_streams_go_on_behind_a_router_that_ends_in_order(cluster: Served) -> None:
    async def terminate() -> None:
        router_of(cluster).terminate()

    assert streams_through(cluster, terminate) == ANSWERS
    cluster.status_when(nothing_is_held)


def test_redis_away_harms_nothing_that_runs(cluster: Served, redis: LocalRedis) -> None:
    async def stop() -> None:
        redis.process.suspend()
        asyncio.get_running_loop().call_later(3, redis.process.resume)

    assert streams_through(cluster, stop) == ANSWERS


def test_redis_restarted_empty_is_repaired(cluster: Served, redis: LocalRedis) -> None:
    """And what it was told anew is enough to go on from."""

    async def empty_then_kill() -> None:
        redis.kill()
        await asyncio.to_thread(redis.start)
        await asyncio.sleep(1.2)  # less than the streams last; the store is looked at once a second
        router_of(cluster).kill()

    assert streams_through(cluster, empty_then_kill) == ANSWERS


def test_http_stream_goes_on_after_its_last_event(cluster: Served) -> None:
    wait_until(lambda: ready(cluster), 30)
    body = {"prompt": "A sea", "max_tokens": 200, "temperature": 0, "stream": True, "ignore_eos": True}
    whole, _, _ = read_events(cluster, body, {})
    headers = {"x-request-id": "by-http"}
    begun, last, done = read_events(cluster, body, headers, cut_after=40)
    assert not done
    assert last.startswith("by-http/")
    router_of(cluster).kill()
    wait_until(lambda: ready(cluster), 30)
    rest, _, done = read_events(cluster, body, {"last-event-id": last})
    assert done
    assert begun + rest == whole


def read_events(
    cluster: Served, body: dict[str, object], headers: dict[str, str], *, cut_after: int | None = None
) -> tuple[str, str, bool]:
    """The text, the last event's id, and whether the stream was done; hanging up in the middle where asked."""
    text, last, num, done = "", "", 0, False
    if cut_after is not None:
        headers = {**headers, "x-resume-ms": "60000"}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=60) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line.startswith("id: "):
                last = line.removeprefix("id: ")
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                text += "".join(choice["text"] for choice in choices)
                num += 1
                if num == cut_after:
                    break
    return text, last, done


def test_an_idempotency_key_means_one_request(cluster: Served) -> None:
    wait_until(lambda: ready(cluster), 30)
    body = {"prompt": "A mountain", "max_tokens": 20, "temperature": 1}
    first, second, other = (
        httpx.post(f"{cluster.url}/v1/completions", json=each, headers={"idempotency-key": "m"}, timeout=60)
        for each in (body, body, {**body, "max_tokens": 21})
    )
    assert first.json() == second.json(), "the same answer, of the same id"
    assert other.status_code == 409
    assert "came with another request" in other.json()["error"]["message"]
    router_of(cluster).kill()
    wait_until(lambda: ready(cluster), 30)
    third = httpx.post(f"{cluster.url}/v1/completions", json=body, headers={"idempotency-key": "m"}, timeout=60)
    assert third.json()["choices"] == first.json()["choices"], "Redis remembers it"
    assert third.json()["id"] == first.json()["id"]


def test_without_redis_such_a_stream_ends_by_name(tmp_path: Path) -> None:
    with Served(ARGUMENTS, run_dir=tmp_path) as cluster:
        router = router_of(cluster)
        with Client(str(cluster.status()["grpc_address"]), timeout_s=60) as client:
            stream = client.stream([1, 2, 3], max_tokens=NUM_TOKENS, request_id="lost")
            next(stream)
            router.kill()
            with pytest.raises(RequestLost, match="no router can resume it"):
                list(stream)
            with pytest.raises(DuplicateRequest), _held(client):
                client.generate([1], request_id="held", max_tokens=2)


class _held:
    """A stream of the id `held` for a while: a client that lives has its id to itself."""

    def __init__(self, client: Client) -> None:
        self._stream = client.stream([1, 2, 3], max_tokens=NUM_TOKENS, request_id="held")

    def __enter__(self) -> None:
        next(self._stream)

    def __exit__(self, *error: object) -> None:
        self._stream.close()  # type: ignore[attr-defined]
