"""Bad input of every kind to a real cluster: a clear error that names field and limit, and nothing is disturbed."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from cluster_under_test import ClusterUnderTest
from served import tandem

from engine.fake_runner import expected_tokens
from tandem.client import Client
from tandem.errors import DuplicateRequest, InvalidRequest, TandemError, UnknownModel
from tandem.request import Sampling
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(120)]

PROMPT = [1, 2, 3]
GOOD = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
EXPECTED = expected_tokens(PROMPT, Sampling(), 4, 256)
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
NUM_HALF_OPEN = 50


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    """One cluster for all that is sent at it. Its workers must still be the first ones at the end."""
    arguments = ("--decode", "1", "--kv-memory", "1MiB", "--fake-step-ms", "1")
    with ClusterUnderTest(*arguments, run_dir=tmp_path_factory.mktemp("run")) as served:
        yield served
        assert [worker["incarnation"] for worker in served.document()["workers"]] == [1, 1]
        known = ("session=", "DecodeError", "Traceback")  # told of the nonsense that was sent on purpose
        assert [line for line in served.mishaps() if not any(word in line for word in known)] == []


@pytest.fixture(autouse=True)
def healthy(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each attack a good request works over both APIs, and every block is free or cached."""
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        answer = cluster.post(COMPLETIONS, GOOD)
        assert answer.json()["choices"][0]["token_ids"] == EXPECTED
        with Client(cluster.grpc_address) as client:
            assert list(client.generate(PROMPT, temperature=0.0, max_tokens=4).token_ids) == EXPECTED
        cluster.settled()


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


FIELDS: list[tuple[str, object, str]] = [
    ("temperature", 2.1, "0 to 2"),
    ("temperature", "hot", "number"),
    ("temperature", float("nan"), "0 to 2"),
    ("top_p", 0, "above 0"),
    ("top_k", 257, "0 to 256"),
    ("min_p", -0.1, "0 to 1"),
    ("n", 17, "1 to 16"),
    ("n", "2", "integer"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", 8190, "at most 8189"),
    ("max_tokens", 1.5, "integer"),
    ("min_tokens", 5, "0 to 4"),
    ("seed", 1 << 64, "to 18446744073709551615"),
    ("stop", ["a"] * 10_000, "at most 16"),
    ("stop.0", ["a" * 257], "at most 256"),
    ("stop_token_ids.1", [1, 256], "0 to 255"),
    ("logprobs", 21, "0 to 20"),
    ("logit_bias", {"256": 1}, "0 to 255"),
    ("presence_penalty", 2.5, "-2 to 2"),
    ("repetition_penalty", 0, "above 0"),
    ("prompt", [], "at least one token"),
    ("prompt", [256], "0 to 255"),
    ("prompt", [1] * 8192, "8192"),
    ("prompt", "x" * 9000, "8192"),
    ("prompt", ["a"] * 129, "at most 128"),
    ("prompt.1", [1, 1.5], "integer"),
    ("prompt.0", [True], "integer"),
    ("stream", "yes", "boolean"),
    ("no_such_field", 1, "is not a field"),
    ("tools", [{"type": "function"}], "not supported"),
]


@pytest.mark.parametrize(("field", "value", "limit"), FIELDS, ids=[f"{name}: {limit}" for name, _, limit in FIELDS])
def test_a_wrong_field_is_named_with_its_limit(
    cluster: ClusterUnderTest, field: str, value: object, limit: str
) -> None:
    error = refused(cluster.post(COMPLETIONS, {**GOOD, field.split(".")[0]: value}), 400)
    assert error["param"] == field
    assert limit in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b"[]", "must be an object"),
        (random.Random(1).randbytes(4096), "not JSON"),
        (b'{"prompt": ' + b"[" * 200_000, "not JSON"),
        (b"1" * 100_000, "not JSON"),
    ],
)
def test_a_body_that_is_no_request(cluster: ClusterUnderTest, body: bytes, words: str) -> None:
    for path in (COMPLETIONS, CHAT):
        error = refused(cluster.post(path, body), 400)
        assert error["param"] == "body"
        assert words in error["message"]


def test_a_huge_body(cluster: ClusterUnderTest) -> None:
    error = refused(cluster.post(COMPLETIONS, b" " * (9 << 20)), 413)
    assert "at most 8388608" in error["message"]


def test_what_is_not_here(cluster: ClusterUnderTest) -> None:
    error = refused(cluster.post(COMPLETIONS, {**GOOD, "model": "gpt-5"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    refused(httpx.get(f"{cluster.url}/v1/models/gpt-5"), 404)
    refused(httpx.get(f"{cluster.url}/v1/nothing"), 404)
    refused(httpx.get(f"{cluster.url}{COMPLETIONS}"), 405)


def test_request_ids(cluster: ClusterUnderTest) -> None:
    for wrong in ("two words", "x" * 129, "-dash", "a/b"):
        assert refused(cluster.post(COMPLETIONS, GOOD, **{"x-request-id": wrong}), 400)["param"] == "x-request-id"
    with Client(cluster.grpc_address) as client:
        running = client.stream(PROMPT, request_id="twin", max_tokens=5000)
        next(running)
        error = refused(cluster.post(COMPLETIONS, GOOD, **{"x-request-id": "twin"}), 409)
        assert error["code"] == "duplicate_request"
        with pytest.raises(DuplicateRequest, match="twin"):
            client.generate(PROMPT, request_id="twin")
        assert next(running).token_ids  # the first of them is not disturbed
        running.close()  # type: ignore[attr-defined]


def test_over_grpc(cluster: ClusterUnderTest) -> None:
    with Client(cluster.grpc_address) as client:
        for words, prompt, fields in (
            ("temperature.*0 to 2", PROMPT, {"temperature": 3.0}),
            ("stop.*at most 16", PROMPT, {"stop": ["a"] * 10_000}),
            ("max_tokens.*at most 8189", PROMPT, {"max_tokens": 8190}),
            ("prompt.*8192", [1] * 8192, {}),
            ("prompt.*0 to 255", [256], {}),
            ("prompt.*at least one", [], {}),
        ):
            with pytest.raises(InvalidRequest, match=words):
                client.generate(prompt, **fields)
        with pytest.raises(UnknownModel, match="'x' is not served here"):
            client.generate(PROMPT, model="x")
        with pytest.raises(TandemError, match="larger than max"):
            client.generate("x" * (9 << 20))


def test_bytes_that_are_no_message(cluster: ClusterUnderTest) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        call: Any = channel.unary_unary("/tandem.v1.Inference/Tokenize")  # type: ignore[call-arg]
        with pytest.raises(grpc.RpcError, match="4 bytes that are no request of Tokenize") as caught:
            call(b"\xff\xff\xff\xff", timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def ports(cluster: ClusterUnderTest) -> list[int]:
    """Everything that the cluster listens on: the router's, the workers' and the agents'."""
    document = cluster.document()
    pids = [document["router_pid"]] + [worker[part] for worker in document["workers"] for part in ("pid", "agent_pid")]
    found = [each for pid in pids for each in psutil.Process(pid).net_connections("tcp") if each.status == "LISTEN"]
    return sorted({each.laddr.port for each in found})


NOISE = [
    random.Random(2).randbytes(50_000),
    b"GET / HTTP/1.1\r\n" + b"a: " + b"b" * 100_000 + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.Random(3).randbytes(20_000),
    struct.pack(">I", 0xFFFFFFFF) + b"x" * 100,
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
]


def test_noise_on_every_port(cluster: ClusterUnderTest) -> None:
    listening = ports(cluster)
    assert len(listening) >= 6
    for port in listening:
        for noise in NOISE:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                try:
                    connection.sendall(noise)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        continue
                except TimeoutError:
                    raise
                except OSError:
                    continue  # it was cut off, as it may be


def test_connections_that_say_nothing_or_half(cluster: ClusterUnderTest) -> None:
    halves = [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"]
    connections = []
    for port in ports(cluster):
        for number in range(NUM_HALF_OPEN):
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            connection.sendall(halves[number % len(halves)])
            connections.append(connection)
    assert cluster.post(COMPLETIONS, GOOD).status_code == 200  # beside them
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish(cluster: ClusterUnderTest, stream: bool) -> None:
    async def vanish() -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=30) as http:
            body = {"prompt": PROMPT, "max_tokens": 5000, "stream": stream}
            tasks = [asyncio.create_task(http.post(COMPLETIONS, json=body)) for _ in range(8)]
            while len([each for each in cluster.document()["requests"] if each["state"] == "decoding"]) < len(tasks):
                await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(asyncio.wait_for(vanish(), 30))
    document = cluster.settled()
    assert sum("disconnected" in request["error"] for request in document["requests"]) >= 8


def assign(**changes: Any) -> pb.RouterMessage:
    """An assignment that could be served, but for the changes."""
    fields: dict[str, Any] = {
        "request_id": "evil",
        "epoch": 1,
        "mode": pb.ASSIGN_MODE_LOCAL,
        "tokens": PROMPT,
        "num_prompt_tokens": 3,
        "deadline_ms": 1000,
        "sampling": pb.Sampling(top_p=1, repetition_penalty=1, max_tokens=3),
    }
    return pb.RouterMessage(assign=pb.Assign(**{**fields, **changes}))


NOWHERE = pb.WorkerAddress(worker_id="z", incarnation=1, control="127.0.0.1:1", endpoint="junk")
ITSELF = pb.WorkerAddress(worker_id="decode-0", incarnation=1, control="x", endpoint="y")
NONSENSE = [
    pb.RouterMessage(),
    pb.RouterMessage(hello=pb.RouterHello(router_id="again", session=1)),
    assign(mode=0),
    assign(mode=77),
    assign(num_prompt_tokens=0),
    assign(tokens=[], num_prompt_tokens=0),
    assign(tokens=[1] * 100_000, num_prompt_tokens=100_000),
    assign(sampling=pb.Sampling(temperature=float("nan"), max_tokens=3)),
    assign(sampling=None),
    assign(mode=pb.ASSIGN_MODE_PREFILL),
    assign(mode=pb.ASSIGN_MODE_PREFILL, transfer_id="t", peer=NOWHERE),
    assign(mode=pb.ASSIGN_MODE_DECODE, transfer_id="t", peer=ITSELF),
]


def test_a_router_that_speaks_nonsense_to_a_worker(cluster: ClusterUnderTest) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{cluster.control_port('decode-0')}") as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
        for session, message in enumerate(NONSENSE, start=1):
            hello = pb.RouterMessage(hello=pb.RouterHello(router_id="evil", session=session))
            for report in stub.Connect(iter([hello, message]), timeout=10, metadata=cluster.access.metadata):
                assert not [token for token in report.tokens if token.finish]


def test_a_stranger_that_registers(cluster: ClusterUnderTest) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        registry = worker_pb2_grpc.RegistryStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError, match="Method not found"):  # clients have no business with it
            registry.Register(pb.RegisterRequest(worker_id="s"), timeout=10)
    [router] = cluster.document()["routers"]
    shown = cluster.access.metadata
    with grpc.insecure_channel(router["address"]) as channel:
        registry = worker_pb2_grpc.RegistryStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError, match="role: is ''"):
            registry.Register(pb.RegisterRequest(worker_id="s"), timeout=10, metadata=shown)
        stranger = pb.RegisterRequest(
            worker_id="s", role="decode", control="127.0.0.1:1", endpoint="e", pid=1, agent_pid=1, model="m",
            namespace="other", fingerprint="f", dtype="float32", block_size=16, total_blocks=8, context_tokens=9,
            block_bytes=10, incarnation=1,
        )  # fmt: skip
        assert "this cluster serves 'fake'" in registry.Register(stranger, timeout=10, metadata=shown).refused
    assert len(cluster.document()["workers"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-memory", "100PiB", "--model", "smollm2-135m-instruct"], "lower --kv-memory"),
        (["--transport", "pigeon"], "transport"),
        (["--no-such-flag"], "no-such-flag"),
        (["--kv-memory", "1KiB"], "kv_memory"),
    ],
)
def test_a_command_that_cannot_work(arguments: list[str], words: str, tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    done = tandem("serve", "--model", "fake", *arguments, "--run-dir", str(tmp_path))
    assert done.returncode in (1, 2)
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
