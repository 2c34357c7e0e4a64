"""The synchronous client, against a server on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from edge import MODEL, saying, service_over, smol
from scripted_driver import ScriptedDriver

from router.api_keys import ANYBODY
from router.grpc_api import build_grpc_server
from tandem import Client
from tandem.client import RequestOptions
from tandem.errors import Cancelled, InvalidRequest, UnknownModel
from tandem.request import Slo, SloClass

TEXT = "One, two, three, and a wörld."
DEADLINE_S = 20


class Running:
    """A server on a thread; `driver` may be read from the test once a call has returned."""

    def __init__(self, driver: ScriptedDriver) -> None:
        self.driver = driver
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(DEADLINE_S), "the server did not start"

    def close(self) -> None:
        """Stops the server and its thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = build_grpc_server(service_over(self.driver))
        self.port = await server.start("127.0.0.1", 0)
        self._ready.set()
        await self._stop.wait()
        await server.stop(0.2)


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running(saying(TEXT))
    yield server
    server.close()


def test_generate_stream_tokenize_models(running: Running) -> None:
    with Client(f"127.0.0.1:{running.port}", timeout_s=DEADLINE_S) as client:
        done = client.generate([{"role": "user", "content": "hi"}], model=MODEL, max_tokens=99, logit_bias={5: 1.0})
        assert (done.text, done.token_ids) == (TEXT, smol().encode(TEXT))
        assert running.driver.requests[done.request_id].request.sampling.logit_bias == ((5, 1.0),)
        assert "".join(chunk.text for chunk in client.stream("x")) == TEXT
        assert client.tokenize("a b") == smol().encode("a b")
        assert [model.id for model in client.models()] == [MODEL]
        with pytest.raises(UnknownModel):
            client.generate("x", model="other")
        with pytest.raises(InvalidRequest) as caught:
            client.generate("x", top_p=2.0)
        assert caught.value.field == "top_p"


def test_targets_and_a_cache_salt_can_be_asked_for(running: Running) -> None:
    with Client(f"127.0.0.1:{running.port}", timeout_s=DEADLINE_S) as client:
        asked: RequestOptions = {
            "slo_class": "batch",
            "ttft_target_ms": 500,
            "tpot_target_ms": 50,
            "cache_salt": "mine",
        }
        done = client.generate("x", priority=2, **asked)
        request = running.driver.requests[done.request_id].request
        assert request.slo == Slo(slo_class=SloClass.BATCH, ttft_ms=500, tpot_ms=50)
        assert request.cache_salt == ANYBODY.cache_salt("mine")
        plain = running.driver.requests[client.generate("x").request_id].request
        assert (plain.slo, plain.cache_salt) == (None, b"")
        with pytest.raises(InvalidRequest, match="has 257 characters, at most 256") as caught:
            client.generate("x", cache_salt="s" * 257)
        assert caught.value.field == "cache_salt"


def test_leaving_a_stream_and_cancel(running: Running) -> None:
    running.driver.hold_after = 1
    with Client(f"127.0.0.1:{running.port}", timeout_s=DEADLINE_S) as client:
        stream = client.stream("x", request_id="a")
        assert next(stream).index == 0
        assert client.cancel("a")
        with pytest.raises(Cancelled, match="cancelled by a client"):
            next(stream)
        left = client.stream("x", request_id="b")
        next(left)
        left.close()  # type: ignore[attr-defined]
        assert not client.cancel("nobody")
