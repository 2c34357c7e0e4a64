"""The gRPC API and the public clients over a real server: answers, errors, cancellation, health, noise."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from edge import MODEL, saying, service_over, smol
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from scripted_driver import ScriptedDriver

from router.grpc_api import INFERENCE, build_grpc_server
from router.service import Service
from tandem.client import AsyncClient, Client, Prompt
from tandem.errors import (
    Cancelled,
    DeadlinePassed,
    DuplicateRequest,
    InvalidRequest,
    Overloaded,
    RequestLost,
    TandemError,
    Unavailable,
    UnknownModel,
)
from tandem.request import FinishReason
from tandem.v1 import inference_pb2, inference_pb2_grpc

TEXT = "Hello there, wörld \U0001f469‍\U0001f680! It stops at END and goes on."
HI = [{"role": "user", "content": "hi"}]
DEADLINE_S = 20


@asynccontextmanager
async def grpc_server(service: Service, **times_s: float) -> AsyncIterator[str]:
    """A real server on a free port; gives its address."""
    server = build_grpc_server(service, **times_s)  # type: ignore[arg-type]
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0.2)


def with_client(service: Service, use: Callable[[AsyncClient], Awaitable[None]], *, resume_s: float = 30.0) -> None:
    """Runs `use` with a client of a real server."""

    async def main() -> None:
        async with (
            grpc_server(service) as target,
            AsyncClient(target, timeout_s=DEADLINE_S, resume_s=resume_s) as client,
        ):
            await use(client)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition of this event loop, at most the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("batch", [1, 4])
def test_generate_from_text_chat_and_ids(batch: int) -> None:
    driver = saying(TEXT, batch=batch)
    prompts: list[tuple[Prompt, tuple[int, ...]]] = [
        ("Once upon", smol().encode("Once upon")),
        (HI, smol().encode(smol().render_chat(HI), add_special_tokens=False)),
        ([5, 6, 7], (5, 6, 7)),
    ]

    async def use(client: AsyncClient) -> None:
        for prompt, ids in prompts:
            done = await client.generate(prompt, model=MODEL, request_id="r", logprobs=1, stop=["END"])
            assert done.text == TEXT.split("END")[0]
            assert (done.finish, done.stop_reason) == (FinishReason.STOP, "END")
            assert done.token_ids == smol().encode(TEXT)[: len(done.token_ids)]
            assert len(done.logprobs) == len(done.token_ids) == done.usage.completion_tokens
            assert done.logprobs[0].chosen.token_id == done.token_ids[0]
            assert done.usage.prompt_tokens == len(ids)
            assert driver.requests["r"].request.tokens == ids
        whole = await client.generate("x")
        assert (whole.text, whole.finish) == (TEXT, FinishReason.LENGTH)
        indices, text = [], ""
        async for chunk in client.stream("x"):
            indices.append(chunk.index)
            text += chunk.text
        assert text == TEXT
        assert indices == list(range(0, len(smol().encode(TEXT)), batch))

    with_client(service_over(driver), use)


def test_named_stop_token_is_the_reason() -> None:
    ids = smol().encode(TEXT)

    async def use(client: AsyncClient) -> None:
        done = await client.generate("x", stop_token_ids=[ids[3]])
        assert (done.finish, done.stop_reason) == (FinishReason.STOP, str(ids[3]))
        assert done.text == smol().decode(ids[:3])

    with_client(service_over(saying(TEXT)), use)


def test_tokenize_and_models() -> None:
    async def use(client: AsyncClient) -> None:
        assert await client.tokenize("a b") == smol().encode("a b")
        assert await client.tokenize(HI) == smol().encode(smol().render_chat(HI), add_special_tokens=False)
        (model,) = await client.models()
        assert (model.id, model.dtype, model.exact) == (MODEL, "float32", True)
        with pytest.raises(UnknownModel, match="'b' is not served here"):
            await client.tokenize("a", model="b")

    with_client(service_over(saying(TEXT)), use)


def test_bad_input_names_the_field() -> None:
    driver = saying(TEXT)

    async def use(client: AsyncClient) -> None:
        async def refusal(prompt: Prompt, **sampling: object) -> InvalidRequest:
            with pytest.raises(InvalidRequest) as caught:
                await client.generate(prompt, **sampling)  # type: ignore[arg-type]
            return caught.value

        error = await refusal("x", temperature=3.0)
        assert (error.field, error.message) == ("temperature", "temperature: is 3.0, must be 0 to 2")
        assert (await refusal([])).field == "prompt"
        assert (await refusal([49152])).message == "prompt: token 0 is 49152, must be 0 to 49151"
        assert (await refusal("x y " * 600)).message.startswith("prompt: has 1")
        assert (await refusal("x", max_tokens=512)).field == "max_tokens"
        assert (await refusal("x", stop=["a"] * 10_000)).message == "stop: has 10000 strings, at most 16"
        assert (await refusal("x", temperature=float("nan"))).field == "temperature"
        assert (await refusal([{"role": "king", "content": "x"}])).field == "chat.messages.0.role"
        assert (await refusal("x", max_tokens="many")).field == "request"
        assert (await refusal("x", priority=4)).message == "priority: is 4, must be 0 to 3"
        assert (await refusal("x", priority=-1)).field == "request"
        assert (await refusal([{"role": "user"}])).field == "messages"
        with pytest.raises(InvalidRequest, match="request_id: is 'a b'"):
            await client.generate("x", request_id="a b")

    with_client(service_over(driver), use)
    assert not driver.requests


ERRORS_OF_THE_DRIVER: list[TandemError] = [
    Overloaded("full", retry_after_ms=1234),
    Unavailable("no worker"),
    DuplicateRequest("known"),
    DeadlinePassed("too late"),
    RequestLost("d1 died"),
    Cancelled("an operator"),
    TandemError("a bug"),
]


@pytest.mark.parametrize("error", ERRORS_OF_THE_DRIVER, ids=lambda error: str(error.code))
def test_errors_come_back_as_they_were(error: TandemError) -> None:
    driver = saying(TEXT)

    async def use(client: AsyncClient) -> None:
        for refuse, fail in ((error, None), (None, error)):
            driver.refuse_with, driver.fail_with, driver.fail_after = refuse, fail, 2
            with pytest.raises(type(error), match=error.message) as caught:
                await client.generate("x")
            assert type(caught.value) is type(error)
            if isinstance(caught.value, Overloaded):
                assert caught.value.retry_after_ms == 1234

    with_client(service_over(driver), use)


def test_server_that_is_not_there_is_unavailable() -> None:
    with Client("127.0.0.1:1", timeout_s=DEADLINE_S, resume_s=2) as client, pytest.raises(Unavailable):
        client.generate("x")


def test_client_that_leaves_cancels_and_cancel_by_id() -> None:
    driver = saying(TEXT)
    driver.hold_after = 2
    service = service_over(driver)

    async def use(client: AsyncClient) -> None:
        stream = client.stream("x", request_id="left")
        assert (await anext(stream)).index == 0
        await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: driver.requests["left"].cancelled == "the client disconnected")

        stream = client.stream("x", request_id="ended")
        await anext(stream)
        with pytest.raises(DuplicateRequest):
            await client.generate("x", request_id="ended")
        assert await client.cancel("ended")
        with pytest.raises(Cancelled, match="cancelled by a client"):
            [each async for each in stream]
        assert not await client.cancel("ended")
        assert not await client.cancel("nobody")
        await until(lambda: b'tandem_router_running_requests{router="router-0"} 0.0' in service.metrics.page())

    with_client(service, use, resume_s=0)


def test_client_that_vanishes_cancels() -> None:
    """A client that is stopped says no more than one whose cable was cut; its connection stands."""
    driver = saying(TEXT)
    driver.hold_after = 2
    service = service_over(driver)
    streams = "import sys, tandem; c = tandem.Client(sys.argv[1]); list(c.stream('x', request_id='gone'))"

    async def main() -> None:
        async with grpc_server(service, keepalive_s=0.3) as target:
            client = await asyncio.create_subprocess_exec(sys.executable, "-c", streams, target)
            try:
                await until(lambda: "gone" in driver.requests and driver.requests["gone"].delivered == 2)
                await asyncio.sleep(1.5)  # held beyond any ping's time: a client that answers is kept
                assert not driver.requests["gone"].cancelled
                client.send_signal(signal.SIGSTOP)
                await until(lambda: driver.requests["gone"].cancelled == "the client disconnected")
            finally:
                client.kill()
                await client.wait()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n"])
def test_connection_that_says_nothing_is_closed(said: bytes) -> None:
    async def main() -> None:
        async with grpc_server(service_over(saying(TEXT)), handshake_timeout_s=0.3) as target:
            host, port = target.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(said)
            async with asyncio.timeout(5):
                await reader.read()
            writer.close()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_attach_to_what_nobody_knows_is_refused_by_name() -> None:
    async def main() -> None:
        async with grpc_server(service_over(saying(TEXT))) as target, grpc.aio.insecure_channel(target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Attach(inference_pb2.AttachRequest(request_id="a"), timeout=DEADLINE_S)
            assert await call.code() is grpc.StatusCode.NOT_FOUND
            assert "no request of id 'a'" in await call.details()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_health_follows_readiness_and_reflection_lists_services() -> None:
    reasons = ["no decode worker"]
    service = service_over(saying(TEXT))
    service.not_ready = lambda: reasons[0]

    async def main() -> None:
        async with grpc_server(service) as target, grpc.aio.insecure_channel(target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service=INFERENCE), timeout=DEADLINE_S)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            reasons[0] = ""
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=DEADLINE_S)
            await reflected.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = (await reflected.read()).list_services_response.service
            assert {INFERENCE, "grpc.health.v1.Health"} <= {each.name for each in listed}

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_binary_noise_and_large_messages_do_no_harm() -> None:
    async def main() -> None:
        async with grpc_server(service_over(saying(TEXT))) as target:
            host, port = target.split(":")
            for noise in (b"\x00" * 4096, bytes(range(256)) * 64, b"GET / HTTP/1.1\r\n\r\n"):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(noise)
                writer.close()
            async with grpc.aio.insecure_channel(target) as channel:
                method = channel.unary_stream(f"/{INFERENCE}/Generate")  # type: ignore[call-arg]
                for payload in (b"\xff" * 100, b"x" * (9 * 1024 * 1024)):
                    call = method(payload, timeout=DEADLINE_S)
                    assert await call.code() is not grpc.StatusCode.OK
            async with AsyncClient(target, timeout_s=DEADLINE_S) as client:
                assert (await client.generate("x")).text == TEXT

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_bytes_that_are_no_message_are_the_callers_mistake() -> None:
    """Of every kind of method, on streams also in the middle; the call after it is served."""

    async def main() -> None:
        async with grpc_server(service_over(saying(TEXT))) as target, grpc.aio.insecure_channel(target) as channel:
            calls = [
                channel.unary_unary(f"/{INFERENCE}/Tokenize")(b"\xff\xff", timeout=DEADLINE_S),  # type: ignore[call-arg]
                channel.unary_stream(f"/{INFERENCE}/Generate")(b"\xff\xff", timeout=DEADLINE_S),  # type: ignore[call-arg]
            ]
            stream = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(  # type: ignore[call-arg]
                timeout=DEADLINE_S
            )
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            await stream.write(asked.SerializeToString())
            listed: Any = await stream.read()
            assert INFERENCE.encode() in listed
            await stream.write(b"\xff\xff")
            for call in (*calls, stream):
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert (await call.details()).startswith("message: 2 bytes that are no request of ")
            async with AsyncClient(target, timeout_s=DEADLINE_S) as client:
                assert (await client.generate("x")).text == TEXT

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_no_more_connections_than_the_limit() -> None:
    async def main() -> None:
        server = build_grpc_server(service_over(saying(TEXT)), connections_max=3)
        port = await server.start("127.0.0.1", 0)
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        for reader, _ in idle:
            await asyncio.wait_for(reader.readexactly(9), DEADLINE_S)  # the server's settings
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=DEADLINE_S)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        for _, writer in idle:
            writer.transport.abort()
        async with AsyncClient(f"127.0.0.1:{port}", timeout_s=DEADLINE_S) as client:
            assert (await client.generate("x")).text == TEXT
        await server.stop(0.2)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_calls_that_come_faster_than_the_loop_takes_them_are_all_answered() -> None:
    """gRPC's own server would end dozens of so many with a bare CANCELLED, before anybody saw them."""
    num_calls, num_channels, deadline_s = 1_500, 4, 90

    async def main() -> None:
        async with grpc_server(service_over(saying(TEXT))) as target:
            options = [("grpc.use_local_subchannel_pool", 1)]
            channels = [grpc.insecure_channel(target, options=options) for _ in range(num_channels)]
            stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]  # type: ignore[no-untyped-call]
            for stub in stubs:  # all are connected when the flood comes
                await asyncio.to_thread(stub.ListModels, inference_pb2.ListModelsRequest(), timeout=deadline_s)
            # From here to the first await the server's loop stands still, as it does for a while under load.
            calls = [
                stubs[number % num_channels].ListModels.future(inference_pb2.ListModelsRequest(), timeout=deadline_s)
                for number in range(num_calls)
            ]
            time.sleep(0.3)
            codes = await asyncio.to_thread(lambda: Counter(call.code() for call in calls))
            for channel in channels:
                channel.close()
            assert codes == {grpc.StatusCode.OK: num_calls}

    asyncio.run(asyncio.wait_for(main(), deadline_s))


def test_one_service_behind_both_apis_knows_its_ids() -> None:
    """An answer of several choices is cancelled by the name that the client gave."""
    driver = ScriptedDriver(lambda request: [5] * 9)
    driver.hold_after = 1
    service = service_over(driver)

    async def use(client: AsyncClient) -> None:
        stream = client.stream("x", request_id="one")
        await anext(stream)
        assert service.cancel("one", "an operator")
        with pytest.raises(Cancelled, match="an operator"):
            await anext(stream)

    with_client(service, use)


def test_import_of_tandem_is_light_and_the_router_has_no_torch() -> None:
    light = "import sys, tandem; assert 'grpc' not in sys.modules; tandem.Client; assert 'grpc' in sys.modules"
    edge = (
        "import sys, router.grpc_api, router.openai_api, router.http_server, router.driver;"
        "found = {'torch', 'ray', 'transformers'} & set(sys.modules); assert not found, found"
    )
    for code in (light, edge):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
