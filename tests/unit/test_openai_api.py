"""The OpenAI API over a real server: what clients get, streamed and whole, and what they get told."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest
from edge import CONTEXT_TOKENS, MODEL, http_server, saying, service_over, smol
from scripted_driver import ScriptedDriver

from router import openai_api
from router.metrics import Api
from router.openai_document import document_of
from router.openai_schema import ChatRequest, CompletionRequest
from router.service import Ask, Service
from router.validation import SamplingFields
from tandem.errors import Overloaded, RequestLost, Unavailable
from tandem.metrics import ROUTER_METRICS, MetricKind

TEXT = "Hello there, wörld \U0001f469‍\U0001f680! It stops at END and goes on."
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI: Any = [{"role": "user", "content": "hi"}]
DEADLINE_S = 20


def with_server(service: Service, use: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Runs `use` with a client of a real server."""

    async def main() -> None:
        async with http_server(service) as url, httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client:
            await use(client)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S * 2))


def post(service: Service, path: str, body: object, headers: dict[str, str] | None = None) -> httpx.Response:
    """One request over a real server."""
    replies: list[httpx.Response] = []

    async def use(client: httpx.AsyncClient) -> None:
        replies.append(await client.post(path, json=body, headers=headers))

    with_server(service, use)
    return replies[0]


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end in [DONE]."""
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_openai_client_chat_whole_and_streamed() -> None:
    service = service_over(saying(TEXT))

    async def main() -> None:
        async with http_server(service) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(model=MODEL, messages=HI)
            assert whole.choices[0].message.content == TEXT
            assert whole.choices[0].finish_reason == "length"
            num_tokens = len(smol().encode(TEXT))
            assert whole.usage is not None
            assert whole.usage.completion_tokens == num_tokens
            assert whole.usage.total_tokens == num_tokens + whole.usage.prompt_tokens
            stream = await client.chat.completions.create(
                model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
            )
            parts, usage, ends = [], None, []
            async for chunk in stream:
                usage = chunk.usage or usage
                parts += [choice.delta.content or "" for choice in chunk.choices]
                ends += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
            assert "".join(parts) == TEXT
            assert ends == ["length"]
            assert usage == whole.usage
            listed = await client.models.list()
            assert [model.id for model in listed.data] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_openai_client_completions_and_errors() -> None:
    service = service_over(saying(TEXT))

    async def main() -> None:
        async with http_server(service) as url:
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            async with client:
                whole = await client.completions.create(model=MODEL, prompt="Once", max_tokens=4, logprobs=2)
                assert whole.choices[0].text == smol().decode(smol().encode(TEXT)[:4])
                logprobs = whole.choices[0].logprobs
                assert logprobs is not None
                assert len(logprobs.tokens or []) == 4
                with pytest.raises(openai.BadRequestError, match=r"temperature: is 7\.0, must be 0 to 2"):
                    await client.completions.create(model=MODEL, prompt="x", temperature=7.0)
                with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
                    await client.completions.create(model="other", prompt="x")

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_streamed_text_is_the_whole_text(batch: int) -> None:
    """Also with characters of several tokens and stop strings over token borders, however tokens are batched."""
    service = service_over(saying(TEXT, batch=batch))
    body = {"messages": HI, "stop": ["END and", "nowhere"], "stream": True, "n": 3, "logprobs": True}
    reply = post(service, CHAT, body)
    texts = ["", "", ""]
    for event in events(reply):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
            if choice["finish_reason"]:
                assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END and")
    assert texts == [TEXT.split("END")[0]] * 3


def test_stop_string_ends_the_request_at_its_token() -> None:
    driver = saying(TEXT)
    post(service_over(driver), CHAT, {"messages": HI, "stop": "END"}, {"x-request-id": "one"})
    ids = smol().encode(TEXT)
    stopped_at = driver.requests["one"].stopped_at
    assert stopped_at is not None
    assert "END" in smol().decode(ids[: stopped_at + 1])
    assert "END" not in smol().decode(ids[:stopped_at])


def test_end_of_sequence_is_not_text_and_ignore_eos_goes_on() -> None:
    end = smol().eos_token_ids[0]
    ids = [*smol().encode("Yes"), end, *smol().encode(" no")]
    driver = ScriptedDriver(lambda request: ids)
    reply = post(service_over(driver), CHAT, {"messages": HI, "return_token_ids": True}).json()
    choice = reply["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("Yes", "stop", None)
    assert choice["token_ids"] == ids[: ids.index(end) + 1]
    reply = post(service_over(driver), CHAT, {"messages": HI, "ignore_eos": True}).json()
    assert reply["choices"][0]["message"]["content"] == "Yes no"


def test_prompts_of_all_four_kinds() -> None:
    driver = saying("ok")
    service = service_over(driver)

    async def use(client: httpx.AsyncClient) -> None:
        kinds: list[tuple[object, list[tuple[int, ...]]]] = [
            ("a b", [smol().encode("a b")]),
            (["a", "b c"], [smol().encode("a"), smol().encode("b c")]),
            ([5, 6, 7], [(5, 6, 7)]),
            ([[5], [6, 7]], [(5,), (6, 7)]),
        ]
        for prompt, want in kinds:
            driver.requests.clear()
            reply = await client.post(COMPLETIONS, json={"prompt": prompt, "n": 2})
            assert reply.status_code == 200, reply.text
            assert [running.request.tokens for running in driver.requests.values()] == [p for p in want for _ in "12"]
            assert [choice["index"] for choice in reply.json()["choices"]] == list(range(2 * len(want)))
            assert reply.json()["usage"]["prompt_tokens"] == sum(map(len, want))

    with_server(service, use)


def test_logprobs_offsets_are_positions_in_the_text() -> None:
    reply = post(service_over(saying(TEXT, batch=2)), COMPLETIONS, {"prompt": "x", "max_tokens": 99, "logprobs": 1})
    choice = reply.json()["choices"][0]
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert choice["text"] == TEXT
    for offset, token in zip(offsets, tokens, strict=True):
        if "�" not in token:
            assert choice["text"][offset : offset + len(token)] == token


def test_request_id_is_echoed_names_children_and_may_not_be_doubled() -> None:
    driver = saying(TEXT)
    driver.hold_after = 2
    service = service_over(driver)

    async def use(client: httpx.AsyncClient) -> None:
        headers = {"x-request-id": "mine:1"}
        body = {"messages": HI, "n": 2, "stream": True}
        async with client.stream("POST", CHAT, json=body, headers=headers) as reply:
            assert reply.headers["x-request-id"] == "mine:1"
            assert set(driver.requests) == {"mine:1#0", "mine:1#1"}
            again = await client.post(CHAT, json=body, headers=headers)
            assert again.status_code == 409
            assert again.json()["error"]["code"] == "duplicate_request"
            assert again.headers["x-request-id"] == "mine:1"
        driver.hold_after = None
        await until(lambda: all(running.cancelled for running in driver.requests.values()))
        assert (await client.post(CHAT, json={"messages": HI}, headers=headers)).json()["id"] == "mine:1"
        bad = await client.post(CHAT, json={"messages": HI}, headers={"x-request-id": "a b"})
        assert bad.status_code == 400
        assert bad.json()["error"]["param"] == "x-request-id"

    with_server(service, use)


def test_no_client_can_name_its_request_as_an_answer_of_another_is_named() -> None:
    driver = saying(TEXT)
    driver.hold_after = 2
    service = service_over(driver)

    async def use(client: httpx.AsyncClient) -> None:
        body = {"messages": HI, "stream": True}
        async with (
            client.stream("POST", CHAT, json=body, headers={"x-request-id": "mine-0"}) as first,
            client.stream("POST", CHAT, json={**body, "n": 2}, headers={"x-request-id": "mine"}) as second,
        ):
            assert (first.status_code, second.status_code) == (200, 200)
            answers = set(driver.requests) - {"mine-0"}
            assert len(answers) == 2
            for name in answers:
                taken = await client.post(CHAT, json=body, headers={"x-request-id": name})
                assert taken.status_code == 400
                assert taken.json()["error"]["param"] == "x-request-id"
            assert service.cancel("mine", "an operator")  # the client's own id names all of its answers
            assert {name for name, running in driver.requests.items() if running.cancelled} == answers

    with_server(service, use)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition of this event loop, at most the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_disconnects_cancels_everywhere(stream: bool) -> None:
    driver = saying(TEXT)
    driver.hold_after = 2
    service = service_over(driver)

    async def main() -> None:
        async with http_server(service) as url:
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            body = json.dumps({"messages": HI, "n": 2, "stream": stream}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nx-request-id: gone\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await until(lambda: len(driver.requests) == 2 and all(r.delivered == 2 for r in driver.requests.values()))
            if stream:
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.transport.abort()
            await until(lambda: all(running.cancelled for running in driver.requests.values()))
            assert {r.cancelled for r in driver.requests.values()} == {"the client disconnected"}
            await until(lambda: b'tandem_router_running_requests{router="router-0"} 0.0' in service.metrics.page())

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


BAD: list[tuple[str, dict[str, object], str, str]] = [
    (CHAT, {"messages": []}, "messages", "has 0 messages"),
    (CHAT, {}, "messages", "is missing"),
    (CHAT, {"messages": "hi"}, "messages", "must be a valid array"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "is 'king', must be one of system"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0", "'image_url'"),
    (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens", "is 0, must be at least 1"),
    (CHAT, {"messages": HI, "max_completion_tokens": 10**30}, "max_completion_tokens", "at most"),
    (CHAT, {"messages": HI, "max_tokens": 5.5}, "max_tokens", "is 5.5, must be a valid integer"),
    (CHAT, {"messages": HI, "max_tokens": True}, "max_tokens", "must be a valid integer"),
    (CHAT, {"messages": HI, "temperature": "hot"}, "temperature", "is 'hot', must be a valid number"),
    (CHAT, {"messages": HI, "stop": ["x"] * 10_000}, "stop", "has 10000 strings, at most 16"),
    (CHAT, {"messages": HI, "stop": ["x" * 257]}, "stop.0", "has 257 characters, at most 256"),
    (CHAT, {"messages": HI, "stop": 5}, "stop", "is 5, must be a valid string or a valid array"),
    (CHAT, {"messages": HI, "n": 17}, "n", "is 17, must be 1 to 16"),
    (CHAT, {"messages": HI, "n": 0}, "n", "is 0, must be 1 to 16"),
    (CHAT, {"messages": HI, "priority": 4}, "priority", "is 4, must be 0 to 3"),
    (CHAT, {"messages": HI, "priority": -1}, "priority", "is -1, must be 0 to 3"),
    (COMPLETIONS, {"prompt": "x", "priority": "high"}, "priority", "is 'high', must be a valid integer"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "is 21, must be 0 to 20"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools", "not supported"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (CHAT, {"messages": HI, "temprature": 1}, "temprature", "is not a field"),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, "logit_bias", "key 'x' must be a token id"),
    (CHAT, {"messages": HI, "logit_bias": {"99999999": 1}}, "logit_bias", "token 99999999"),
    (CHAT, {"messages": [{"role": "user", "content": "x y " * 600}]}, "messages", "the model's context is 512 tokens"),
    (COMPLETIONS, {"prompt": "x y " * 600}, "prompt", "the model's context is 512 tokens"),
    (COMPLETIONS, {"prompt": "x" * 900_000}, "prompt", "has 900000 characters"),
    (COMPLETIONS, {"prompt": ""}, "prompt", "is empty"),
    (COMPLETIONS, {"prompt": []}, "prompt", "is empty"),
    (COMPLETIONS, {"prompt": ["x"] * 200}, "prompt", "has 200 prompts, at most 128"),
    (COMPLETIONS, {"prompt": ["x"] * 20, "n": 10}, "prompt", "are 200, at most 128"),
    (COMPLETIONS, {"prompt": [1, 49152]}, "prompt", "token 1 is 49152, must be 0 to 49151"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt", "token 0 is -1"),
    (COMPLETIONS, {"prompt": [1, "x"]}, "prompt.1", "is 'x', must be a valid integer"),
    (COMPLETIONS, {"prompt": [1.5] * 1_000_000}, "prompt.0", "is 1.5, must be"),  # one error, not three million
    (CHAT, {"messages": HI, "logit_bias": {"1": "x"}}, "logit_bias.1", "must be a number"),
    (CHAT, {"messages": HI, "logit_bias": {str(each): "x" for each in range(2000)}}, "logit_bias", "at most 1024"),
    (COMPLETIONS, {"prompt": "x", "echo": True}, "echo", "not supported"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
    (COMPLETIONS, {"prompt": "x", "top_p": 0}, "top_p", "must be above 0 and at most 1"),
    (COMPLETIONS, {"prompt": "x", "min_tokens": 17}, "min_tokens", "is 17, must be 0 to 16"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 600}, "max_tokens", "context is 512 tokens and the prompt has 1"),
]


def test_bad_input_names_field_value_and_limit_and_reaches_no_worker() -> None:
    driver = saying(TEXT)

    async def use(client: httpx.AsyncClient) -> None:
        for path, body, param, message in BAD:
            reply = await client.post(path, json=body)
            assert reply.status_code == 400, (body, reply.text)
            error = reply.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["param"] == param, error
            assert message in error["message"], error
            assert len(error["message"]) < 400
        for raw in (b"{", b"", b"\xff\xfe", b"[" * 100_000, b'"x"', b"null", b'{"messages": NaN}'):
            reply = await client.post(CHAT, content=raw)
            assert reply.status_code == 400, raw[:20]
            assert reply.json()["error"]["code"] == "invalid_request"
        for number in (b"NaN", b"Infinity", b"1e999"):
            reply = await client.post(COMPLETIONS, content=b'{"prompt": "x", "temperature": ' + number + b"}")
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "temperature")
        surrogate = await client.post(COMPLETIONS, content=b'{"prompt": "a\\ud800b"}')
        assert surrogate.status_code == 400

    with_server(service_over(driver), use)
    assert not driver.requests


def test_body_over_the_limit_is_413() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        reply = await client.post(CHAT, content=b"x" * (9 * 1024 * 1024))
        assert reply.status_code == 413
        assert "at most 8388608" in reply.json()["error"]["message"]

    with_server(service_over(saying(TEXT)), use)


def test_fields_that_change_nothing_are_taken() -> None:
    body = {
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "be"}]}, *HI],
        "user": "me", "metadata": {"a": "b"}, "store": True, "tools": [], "tool_choice": "auto",
        "response_format": {"type": "text"}, "audio": None, "stream": None, "best_of": 1, "stop": None,
        "service_tier": "auto", "top_k": -1, "seed": -5,
    }  # fmt: skip
    reply = post(service_over(saying(TEXT)), CHAT, body)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(("sent", "priority"), [({}, 0), ({"priority": None}, 0), ({"priority": 3}, 3)])
def test_priority_reaches_the_router(sent: dict[str, object], priority: int) -> None:
    driver = saying(TEXT)
    assert post(service_over(driver), CHAT, {"messages": HI, "n": 2, **sent}).status_code == 200
    assert [each.request.priority for each in driver.requests.values()] == [priority, priority]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("late", [False, True])
def test_refusals_have_their_status(stream: bool, late: bool) -> None:
    """Also when the refusal comes on the stream, as long as nothing was sent."""
    driver = saying(TEXT)
    service = service_over(driver)

    async def use(client: httpx.AsyncClient) -> None:
        for error, status in ((Overloaded("full", retry_after_ms=2500), 429), (Unavailable("no worker"), 503)):
            driver.refuse_with, driver.fail_with = (None, error) if late else (error, None)
            reply = await client.post(CHAT, json={"messages": HI, "stream": stream})
            assert reply.status_code == status
            assert reply.json()["error"]["code"] == error.code
            assert reply.headers.get("retry-after") == ("3" if status == 429 else None)
        if not late:
            page = (await client.get("/metrics")).text
            assert 'tandem_router_refused_requests_total{api="chat",code="overloaded",router="router-0"} 1.0' in page

    with_server(service, use)


def test_failure_after_the_first_token_is_an_event() -> None:
    driver = saying(TEXT)
    driver.fail_with, driver.fail_after = RequestLost("worker d1 died twice"), 3
    reply = post(service_over(driver), CHAT, {"messages": HI, "stream": True})
    assert reply.status_code == 200
    assert events(reply)[-1]["error"]["message"] == "worker d1 died twice"


@pytest.mark.parametrize("n", [1, 2])
def test_failure_that_nobody_foresaw_ends_the_request_however_many_answers_it_has(n: int) -> None:
    driver = saying(TEXT)
    driver.fail_with, driver.fail_after = RuntimeError("planted"), 3

    async def read() -> None:
        answers = await service_over(driver).open(
            Ask(api=Api.CHAT, request_id="", prompts=[[1]], fields=SamplingFields(), n=n)
        )
        async for _ in answers.pieces():
            pass

    with pytest.raises(RuntimeError, match="planted"):
        asyncio.run(asyncio.wait_for(read(), 10))


def test_health_models_metrics_and_unknown_pages() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        assert (await client.get("/live")).status_code == 200
        for page in ("/ready", "/health"):
            reply = await client.get(page)
            assert (reply.status_code, reply.json()["reason"]) == (503, "no decode worker")
        assert (await client.get("/v1/models/a/b")).json()["error"]["code"] == "model_not_found"
        assert (await client.get("/nowhere")).json()["error"]["code"] == "not_found"
        assert (await client.get(CHAT)).status_code == 405
        assert "ChatRequest" in (await client.get("/openapi.json")).text
        await client.post(CHAT, json={"messages": HI})
        page = (await client.get("/metrics")).text
        assert 'tandem_router_requests_total{api="chat",outcome="length",router="router-0"} 1.0' in page
        assert 'tandem_router_ttft_seconds_count{router="router-0"} 1.0' in page
        for metric in ROUTER_METRICS:
            assert f"# HELP {metric.name} {metric.help}" in page
            suffix = "_total" if metric.kind is MetricKind.COUNTER else ""
            assert metric.name.endswith(f"_{metric.unit}{suffix}")
        num_tokens = len(smol().encode(TEXT))
        assert f'tandem_router_generated_tokens_total{{router="router-0"}} {num_tokens}.0' in page
        assert f'tandem_router_itl_seconds_count{{router="router-0"}} {num_tokens - 1}.0' in page

    with_server(service_over(saying(TEXT), not_ready="no decode worker"), use)


def test_docs_can_be_read_offline_and_name_every_endpoint_and_field() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        reply = await client.get("/docs")
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert re.findall(r"<script|<link|<img|src=|@import|url\(|https?:", reply.text) == []
        document = (await client.get("/openapi.json")).json()
        assert {CHAT, COMPLETIONS, "/v1/models", "/metrics"} <= set(document["paths"])
        for path in document["paths"]:
            assert f" {path}</code>" in reply.text
        for kind in (ChatRequest, CompletionRequest):
            for name in kind.model_json_schema()["properties"]:
                assert f"<code>{name}</code>" in reply.text
        assert "<td>string or array of string</td>" in reply.text
        assert (await client.get("/redoc")).status_code == 404

    with_server(service_over(saying(TEXT)), use)


def test_the_documentation_is_made_once_whoever_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def counted(*arguments: Any) -> dict[str, Any]:
        made.append(arguments)
        return document_of(*arguments)

    async def use(client: httpx.AsyncClient) -> None:
        for page in ("/docs", "/openapi.json") * 3:
            assert (await client.get(page)).status_code == 200
        assert len(made) == 1

    monkeypatch.setattr(openai_api, "document_of", counted)
    with_server(service_over(saying(TEXT)), use)


def test_seed_is_the_requests_own_and_choices_differ() -> None:
    driver = saying("ok")
    service = service_over(driver)

    async def use(client: httpx.AsyncClient) -> None:
        seeds = []
        for name in ("a", "a", "b"):
            driver.requests.clear()
            await client.post(CHAT, json={"messages": HI}, headers={"x-request-id": name})
            seeds.append(driver.requests[name].request.sampling.seed)
        assert seeds[0] == seeds[1] != seeds[2]
        driver.requests.clear()
        await client.post(CHAT, json={"messages": HI, "seed": 7, "n": 3}, headers={"x-request-id": "c"})
        assert [running.request.sampling.seed for running in driver.requests.values()] == [7, 8, 9]

    with_server(service, use)


def test_default_and_explicit_max_tokens() -> None:
    driver = saying("ok")
    service = service_over(driver)

    async def use(client: httpx.AsyncClient) -> None:
        for path, body, want in (
            (COMPLETIONS, {"prompt": [5, 6]}, 16),
            (COMPLETIONS, {"prompt": [5, 6], "max_tokens": 40}, 40),
            (COMPLETIONS, {"prompt": [5] * (CONTEXT_TOKENS - 1), "max_tokens": 1}, 1),
        ):
            driver.requests.clear()
            reply = await client.post(path, json=body)
            assert reply.status_code == 200, reply.text
            assert next(iter(driver.requests.values())).request.sampling.max_tokens == want
        driver.requests.clear()
        await client.post(CHAT, json={"messages": HI})
        running = next(iter(driver.requests.values())).request
        assert running.sampling.max_tokens == CONTEXT_TOKENS - len(running.tokens)

    with_server(service, use)
