"""What the tests of the edge share: the real tokenizer of SmolLM2, and a service over a scripted driver."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from scripted_driver import ScriptedDriver

from engine.model_files import DEFAULT_MODEL, find_model
from router.http_connection import HttpLimits
from router.http_server import serve_http
from router.listener import listen
from router.metrics import EdgeMetrics
from router.openai_api import build_app
from router.service import ServedModel, Service
from router.tokenizer import Tokenizer, load_tokenizer

MODEL = "smol"
CONTEXT_TOKENS = 512


@functools.cache
def smol() -> Tokenizer:
    """The tokenizer of the packaged model."""
    return load_tokenizer(find_model(DEFAULT_MODEL).path)


def saying(text: str, *, batch: int = 1) -> ScriptedDriver:
    """A driver that answers every request with `text`."""
    ids = list(smol().encode(text))
    return ScriptedDriver(lambda request: ids, batch=batch)


def service_over(driver: ScriptedDriver, *, not_ready: str = "") -> Service:
    """The edge over `driver`."""
    model = ServedModel(id=MODEL, context_tokens=CONTEXT_TOKENS, created_s=1, dtype="float32", exact=True)
    return Service(
        driver=driver, tokenizer=smol(), model=model, metrics=EdgeMetrics(), not_ready=lambda: not_ready
    )  # fmt: skip


@asynccontextmanager
async def http_server(service: Service, limits: HttpLimits | None = None) -> AsyncIterator[str]:
    """A real server on a free port; gives its address."""
    server = await serve_http(build_app(service), listener=listen("127.0.0.1", 0), grace_s=1, limits=limits)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        await server.stop()
