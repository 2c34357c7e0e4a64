"""What the dashboard costs: first paint, and the CPU of browser and feed together over a large made-up cluster.

The cluster is made up, everything after it is not: the router's snapshots, view, frames, HTTP server, and a real
Chromium whose whole process tree is counted. Both are counted in CPU seconds, so other work on the machine takes longer
and changes little; the time to first paint is the machine's, with whatever else it does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import psutil

from benchmarks import report
from benchmarks.fake_cluster import FakeCluster, serve
from cluster.dashboard_frames import Frames
from router.listener import listen

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

SEED = 7
MOVES_EACH_S = 4.0
PAINTS = 5
WARM_S = 8.0
WANTED_PERCENT = 60.0
WANTED_PAINT_MS = 1000.0
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
READY = "performance.now()"


@dataclass(frozen=True, slots=True)
class Figures:
    """One run."""

    browser_percent: float
    feed_percent: float
    fake_percent: float  # of the feed's process: making the cluster up
    frames: int
    frame_bytes: float
    full_bytes: int
    paint_ms: list[float]
    live_ms: list[float]
    arcs_seen: int


def feed_process(num_workers: int, num_requests: int) -> int:
    """Serves until it is killed; prints the address."""

    async def main() -> None:
        fake = FakeCluster(num_workers=num_workers, num_requests=num_requests, moves_each_s=MOVES_EACH_S, seed=SEED)
        async with serve(fake) as running:
            print(running.url, flush=True)
            await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
    return 0


def cpu_s(process: psutil.Process) -> float:
    """Of a process and all below it, now."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
    return total


@contextlib.contextmanager
def feed(num_workers: int, num_requests: int) -> Iterator[tuple[str, psutil.Process]]:
    """The feed in a process of its own: its address, and the process."""
    command = [sys.executable, "-m", "benchmarks.dashboard", "--feed", str(num_workers), str(num_requests)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.kill()


@contextlib.contextmanager
def chromium(port: int) -> Iterator[psutil.Process]:
    """Chromium as anybody starts it, with a window that nobody sees."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("there is no Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        size = "--window-size=1440,900"
        command = [path, "--headless", *FLAGS, size, f"--remote-debugging-port={port}", f"--user-data-dir={profile}"]
        with subprocess.Popen(
            [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                yield psutil.Process(process.pid)
            finally:
                process.terminate()
                process.wait(20)


def free_port() -> int:
    """One that nobody has now."""
    with listen("127.0.0.1", 0) as listener:
        port: int = listener.getsockname()[1]
    return port


def frame_sizes(num_workers: int, num_requests: int) -> tuple[float, int, float]:
    """Mean bytes of a delta, bytes of a full frame, and CPU milliseconds that making the cluster up takes a frame."""
    fake = FakeCluster(num_workers=num_workers, num_requests=num_requests, moves_each_s=MOVES_EACH_S, seed=SEED)
    frames, sizes, made_s = Frames(), [], 0.0
    for number in range(1, 41):
        began_s = time.process_time()
        fake.advance(number * 0.5)
        snapshot = fake.snapshot()
        made_s += time.process_time() - began_s
        view = fake._viewer.view(snapshot, fake.members.values(), not_ready="", others={})
        sizes.append(len(frames.look(1_700_000_000_000 + number, view, (), ())))
    return sum(sizes[1:]) / len(sizes[1:]), len(frames.full()), 1000 * made_s / 40


def measure(num_workers: int, num_requests: int, seconds: float) -> Figures:
    """One run: a few loads for the paint, then one that stays."""
    from playwright.sync_api import sync_playwright

    frame_bytes, full_bytes, made_ms = frame_sizes(num_workers, num_requests)
    port = free_port()
    with feed(num_workers, num_requests) as (url, feeding), chromium(port) as browsing, sync_playwright() as playwright:
        browser = connect(playwright, port)
        page = browser.contexts[0].pages[0]
        page.set_default_timeout(120_000)
        paint_ms, live_ms = [], []
        for _ in range(PAINTS):
            page.goto(f"{url}/dashboard")
            page.wait_for_selector("#main[data-stale=false] .tile", state="attached")
            live_ms.append(float(page.evaluate(READY)))
            page.wait_for_function(f"({PAINT}) !== null")
            paint_ms.append(float(page.evaluate(PAINT)))
        page.wait_for_timeout(1000 * WARM_S)
        before = number_of(page)
        page.evaluate(COUNT_ARCS)
        began_s, browser_s, feed_s = time.monotonic(), cpu_s(browsing), cpu_s(feeding)
        threading.Event().wait(seconds)
        took_s = time.monotonic() - began_s
        browser_percent = 100 * (cpu_s(browsing) - browser_s) / took_s
        feed_percent = 100 * (cpu_s(feeding) - feed_s) / took_s
        frames = number_of(page) - before
        arcs_seen = int(page.evaluate("window.arcsSeen"))
        browser.close()
    return Figures(
        browser_percent=browser_percent,
        feed_percent=feed_percent,
        fake_percent=made_ms * frames / took_s / 10,
        frames=frames,
        frame_bytes=frame_bytes,
        full_bytes=full_bytes,
        paint_ms=paint_ms,
        live_ms=live_ms,
        arcs_seen=arcs_seen,
    )


COUNT_ARCS = """() => {
    window.arcsSeen = 0;
    new MutationObserver(all => { for (const each of all) window.arcsSeen += each.addedNodes.length; })
        .observe(document.querySelector(".arcs"), { childList: true });
    return 0;
}"""


def number_of(page: Page) -> int:
    """Of the newest frame that the page has shown."""
    return int(page.evaluate("Number(document.getElementById('main').dataset.frame)"))


def connect(playwright: Playwright, port: int) -> Browser:
    """To the Chromium that was started, once it listens."""
    until_s = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port}")
        if time.monotonic() > until_s:
            raise SystemExit("Chromium does not listen after 60 s")
        threading.Event().wait(0.2)


def main() -> int:
    """Measures and writes benchmarks/results/dashboard.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--feed", nargs=2, type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.feed:
        return feed_process(*flags.feed)
    figures = measure(flags.workers, flags.requests, flags.seconds)
    both = figures.browser_percent + figures.feed_percent
    rows = [
        ["browser: all processes of Chromium, % of one core", figures.browser_percent],
        ["feed: the process that makes the cluster up, its views and its frames, % of one core", figures.feed_percent],
        ["of that, making the cluster up", figures.fake_percent],
        [f"together, wanted: at most {WANTED_PERCENT:.0f} %", both],
        [
            f"first contentful paint, median of {PAINTS}, ms, wanted: less than {WANTED_PAINT_MS:.0f}",
            median(figures.paint_ms),
        ],
        ["all workers shown, median, ms", median(figures.live_ms)],
        ["frames shown a second", figures.frames / flags.seconds],
        ["a frame of changes, mean, kB", figures.frame_bytes / 1000],
        ["a frame with everything, kB", figures.full_bytes / 1000],
        ["moves and handoffs drawn as arcs a second", figures.arcs_seen / flags.seconds],
    ]
    body = (
        f"{flags.workers} workers, {flags.requests} requests, {MOVES_EACH_S:g} moves a second, {flags.seconds:g} s.\n\n"
    )
    body += report.table(["what", "figure"], rows) + "\n\nFirst paints: "
    body += ", ".join(f"{each:.0f} ms" for each in figures.paint_ms) + ".\n"
    report.write("dashboard", "The dashboard", body, seed=SEED)
    return int(both > WANTED_PERCENT or median(figures.paint_ms) >= WANTED_PAINT_MS)


if __name__ == "__main__":
    sys.exit(main())
