"""What the tests of the dashboard share: one over a made-up cluster, keys, and a browser."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from benchmarks.fake_cluster import FakeCluster, Running, serve
from router.api_keys import KeyEntry, KeyRing, digest_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

START_S = 60
OPERATOR, CLIENT = "tandem_ops-secret-of-many-characters", "tandem_alice-secret-of-many-characters"
MARK = {"x-tandem-dashboard": "1"}
# Without these Chromium wants a sandbox that root has not, a GPU, and hosts of its own.
CHROMIUM_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
BROWSER_MS = 60_000


def ring(*, revoked: bool = False, operator: bool = True) -> KeyRing:
    """An operator's key and a client's."""
    return KeyRing(
        [
            KeyEntry(name="ops", digest=digest_of(OPERATOR), operator=operator, revoked=revoked),
            KeyEntry(name="alice", digest=digest_of(CLIENT)),
        ]
    )


@dataclass
class Served:
    """A dashboard in a thread of its own; `call` runs something on its event loop."""

    fake: FakeCluster
    running: Running
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return self.running.url

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


@dataclass
class _Thread:
    fake: FakeCluster
    keys: KeyRing | None
    port: int
    ready: threading.Event = field(default_factory=threading.Event)
    served: Served | None = None
    stop: asyncio.Event | None = None

    def run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        async with serve(self.fake, self.keys, self.port) as running:
            self.stop = asyncio.Event()
            self.served = Served(self.fake, running, asyncio.get_running_loop())
            self.ready.set()
            await self.stop.wait()


@contextmanager
def dashboard(fake: FakeCluster, keys: KeyRing | None = None, port: int = 0) -> Iterator[Served]:
    """The dashboard over `fake`, for the length of the block."""
    thread = _Thread(fake, keys, port)
    runner = threading.Thread(target=thread.run, daemon=True)
    runner.start()
    assert thread.ready.wait(START_S), "the dashboard did not start"
    served, stop = thread.served, thread.stop
    assert served is not None
    assert stop is not None
    try:
        yield served
    finally:
        served.loop.call_soon_threadsafe(stop.set)
        runner.join(START_S)
        assert not runner.is_alive(), "the dashboard did not end"


def small(**differs: object) -> FakeCluster:
    """Two prefill and six decode workers, 12 requests, and no move that nobody asked for."""
    return FakeCluster(num_workers=8, num_requests=12, **{"moves_each_s": 0.0, **differs})  # type: ignore[arg-type]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A real one, without a window. Skips where there is none: `TANDEM_REQUIRE=browser` makes that a failure."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright; it needs no browser of its own")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_at(browser: Browser, url: str, **options: object) -> Iterator[Page]:
    """The dashboard in a profile of its own. Fails on any error of the page, breaches of its own policy included."""
    context = browser.new_context(**options)  # type: ignore[arg-type]
    context.set_default_timeout(BROWSER_MS)
    page = context.new_page()
    wrong: list[str] = []

    def said(message: ConsoleMessage) -> None:
        if message.type == "error":
            wrong.append(message.text)

    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", said)
    page.goto(f"{url}/dashboard")
    try:
        yield page
    finally:
        context.close()
    expected = ("Failed to load resource", "net::ERR")  # what the tests bring about themselves
    assert [each for each in wrong if not any(part in each for part in expected)] == []


def live(page: Page) -> None:
    """Waits until frames come."""
    page.wait_for_selector("#link[data-state=live]")
    page.wait_for_selector("#main[data-stale=false]")
