"""Mixed requests over both APIs, many of them abandoned by their clients, each answer held to what must come out."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from cluster.config import FAKE_VOCAB_SIZE, ClusterConfig
from cluster.served_model import describe
from engine.fake_runner import expected_tokens
from tandem.client import AsyncClient, SamplingOptions
from tandem.errors import TandemError
from tandem.request import Sampling

REQUEST_S = 60.0  # after which a request counts as hung
_TOKENIZER = describe(ClusterConfig(model="fake")).tokenizer
_PRINTABLE = [each for each in range(FAKE_VOCAB_SIZE) if 32 < _TOKENIZER.token_bytes(each)[0] < 127]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What the requests are like. Shares are of 1."""

    prompt_tokens_max: int = 600
    max_tokens_min: int = 1
    max_tokens_max: int = 64
    abandoned: float = 1 / 3
    over_http: float = 0.5
    streamed: float = 0.6
    sampled: float = 0.5
    shared_prefix: float = 0.6
    stopped: float = 0.15
    several: float = 0.15  # of those over HTTP: n > 1
    num_prefixes: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One request, and when its client vanishes: after so many pieces, or so long after sending; None: never."""

    http: bool
    stream: bool
    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    n: int
    stop: str
    leave_after_pieces: int | None
    leave_after_s: float | None

    def answers(self) -> list[tuple[list[int], str]]:
        """What must come out: the token ids of each answer and how it ends."""
        found = []
        for choice in range(self.n):
            sampling = Sampling(temperature=self.temperature, seed=self.seed + choice)
            tokens = expected_tokens(self.prompt, sampling, self.max_tokens, FAKE_VOCAB_SIZE)
            spelled = [_TOKENIZER.token_bytes(token) for token in tokens]
            end = spelled.index(self.stop.encode()) + 1 if self.stop and self.stop.encode() in spelled else 0
            found.append((tokens[:end], "stop") if end else (tokens, "length"))
        return found


@dataclass(slots=True)
class Outcome:
    """What became of all requests."""

    num_completed: int = 0
    num_abandoned: int = 0
    errors: list[TandemError | str] = field(default_factory=list)  # that the cluster answered with
    wrong: list[str] = field(default_factory=list)  # must stay empty
    shapes: Counter[str] = field(default_factory=Counter)  # completed requests by kind

    @property
    def num_ended(self) -> int:
        """Requests that are over in any way."""
        return self.num_completed + self.num_abandoned + len(self.errors) + len(self.wrong)


def requests(mix: Mix, num: int, *, seed: int) -> list[Wanted]:
    """`num` requests of the mix, the same for the same seed."""
    draw = random.Random(seed)
    prefixes = [_tokens(draw, mix.prompt_tokens_max) for _ in range(mix.num_prefixes)]
    return [_request(draw, mix, prefixes) for _ in range(num)]


def _tokens(draw: random.Random, num: int) -> list[int]:
    return [draw.randrange(FAKE_VOCAB_SIZE) for _ in range(num)]


def _request(draw: random.Random, mix: Mix, prefixes: list[list[int]]) -> Wanted:
    length = draw.randint(1, mix.prompt_tokens_max)
    shared = draw.randint(1, length) if draw.random() < mix.shared_prefix else 0
    prompt = draw.choice(prefixes)[:shared] + _tokens(draw, length - shared)
    http = draw.random() < mix.over_http
    stream = draw.random() < mix.streamed
    max_tokens = draw.randint(mix.max_tokens_min, mix.max_tokens_max)
    leaves = draw.random() < mix.abandoned
    counts = leaves and stream and draw.random() < 0.6
    after_s = draw.choice([0.0, draw.uniform(0, 0.02), draw.uniform(0, 0.5)])
    return Wanted(
        http=http,
        stream=stream,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0.8 if draw.random() < mix.sampled else 0.0,
        seed=draw.randrange(1 << 32),
        n=draw.randint(2, 4) if http and draw.random() < mix.several else 1,
        stop=_TOKENIZER.token_bytes(draw.choice(_PRINTABLE)).decode() if draw.random() < mix.stopped else "",
        leave_after_pieces=draw.randint(0, max_tokens - 1) if counts else None,
        leave_after_s=after_s if leaves and not counts else None,
    )


class _Gone(Exception):
    """The client has had enough."""


class Load:
    """Sends requests to one cluster, so many at a time."""

    def __init__(self, *, url: str, grpc_address: str, concurrency: int) -> None:
        self._url = url
        self._grpc_address = grpc_address
        self._concurrency = concurrency
        self.outcome = Outcome()

    async def run(self, wanted: Iterable[Wanted]) -> Outcome:
        """Sends all of them; returns when each has ended or its client has left."""
        waiting = iter(wanted)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
        async with httpx.AsyncClient(base_url=self._url, timeout=REQUEST_S, limits=limits) as http:
            async with AsyncClient(self._grpc_address, timeout_s=REQUEST_S) as client:
                await asyncio.gather(*(self._client(waiting, http, client) for _ in range(self._concurrency)))
        return self.outcome

    async def _client(self, waiting: Iterator[Wanted], http: httpx.AsyncClient, client: AsyncClient) -> None:
        for wanted in waiting:
            answering = _over_http(http, wanted) if wanted.http else _over_grpc(client, wanted)
            task = asyncio.create_task(answering)
            try:
                if wanted.leave_after_s is not None:
                    await asyncio.wait({task}, timeout=wanted.leave_after_s)
                    task.cancel()
                await asyncio.wait_for(task, REQUEST_S)
            except (asyncio.CancelledError, _Gone):
                self.outcome.num_abandoned += 1
            except TimeoutError:
                self.outcome.wrong.append(f"no end after {REQUEST_S} s: {wanted}")
            except TandemError as error:
                self.outcome.errors.append(error)
            except httpx.TransportError as error:
                self.outcome.errors.append(f"{type(error).__name__}: {error}")
            except AssertionError as error:
                self.outcome.wrong.append(f"{error}: {wanted}")
            else:
                self.outcome.num_completed += 1
                api, stop = "http" if wanted.http else "grpc", " with a stop" if wanted.stop else ""
                self.outcome.shapes[f"{api}{' stream' if wanted.stream else ''} n={wanted.n}{stop}"] += 1


async def _over_grpc(client: AsyncClient, wanted: Wanted) -> None:
    sampling: SamplingOptions = {
        "temperature": wanted.temperature,
        "seed": wanted.seed,
        "max_tokens": wanted.max_tokens,
        "stop": [wanted.stop] if wanted.stop else [],
    }
    ids: list[int] = []
    finishes: list[str] = []
    num_pieces = 0
    stream = client.stream(wanted.prompt, **sampling)
    try:
        async for chunk in stream:
            assert not finishes, "something came after the finish"
            assert chunk.index == len(ids), f"token {chunk.index} came where {len(ids)} was due"
            ids += chunk.token_ids
            finishes += [chunk.finish.value] if chunk.finish is not None else []
            num_pieces += 1
            if wanted.leave_after_pieces is not None and num_pieces > wanted.leave_after_pieces:
                raise _Gone
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
    _check(wanted, 0, ids, finishes)


async def _over_http(http: httpx.AsyncClient, wanted: Wanted) -> None:
    body: dict[str, Any] = {
        "prompt": wanted.prompt,
        "max_tokens": wanted.max_tokens,
        "temperature": wanted.temperature,
        "seed": wanted.seed,
        "n": wanted.n,
        "stream": wanted.stream,
        "return_token_ids": True,
    }
    if wanted.stop:
        body["stop"] = wanted.stop
    if wanted.stream:
        await _streamed(http, wanted, body)
        return
    answer = await http.post("/v1/completions", json=body)
    if answer.status_code != 200:
        raise TandemError(f"{answer.status_code}: {answer.json()['error']['message']}")
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(wanted.n))
    for number, choice in enumerate(choices):
        _check(wanted, number, choice["token_ids"], [choice["finish_reason"]])


async def _streamed(http: httpx.AsyncClient, wanted: Wanted, body: dict[str, Any]) -> None:
    ids: list[list[int]] = [[] for _ in range(wanted.n)]
    finishes: list[list[str]] = [[] for _ in range(wanted.n)]
    num_done = num_pieces = 0
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise TandemError(f"{answer.status_code}: {json.loads(await answer.aread())['error']['message']}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            assert not num_done, "something came after the end"
            if line == "data: [DONE]":
                num_done += 1
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise TandemError(event["error"]["message"])
            for choice in event["choices"]:
                assert not finishes[choice["index"]], "something came after the finish"
                ids[choice["index"]] += choice.get("token_ids", [])
                finishes[choice["index"]] += [choice["finish_reason"]] if choice["finish_reason"] else []
            num_pieces += 1
            if wanted.leave_after_pieces is not None and num_pieces > wanted.leave_after_pieces:
                raise _Gone
    assert num_done == 1, "the stream ended without its end"
    for number in range(wanted.n):
        _check(wanted, number, ids[number], finishes[number])


def _check(wanted: Wanted, number: int, ids: Sequence[int], finishes: Sequence[str]) -> None:
    tokens, finish = wanted.answers()[number]
    assert list(ids) == tokens, f"answer {number}: wrong tokens {list(ids)}, must be {tokens}"
    assert list(finishes) == [finish], f"answer {number} ended with {finishes}, must be {finish} once"
