"""Sends the dashboard's frames to who watches: a bounded number of them, each behind by a bounded number of frames."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Protocol

from cluster.dashboard_frames import Frames, Task
from cluster.dashboard_view import View
from router.api_keys import Caller
from router.recent import Recent
from tandem.errors import Overloaded, TandemError

log = logging.getLogger(__name__)

FRAME_S = 0.5
FRAMES_EACH_SECOND = 2
WATCHERS_MAX = 16
BEHIND_MAX = 12  # frames: six seconds
OVERLOADED_RETRY_MS = 5_000


class Viewed(Protocol):
    """Where views come from."""

    def view(self) -> View:
        """How things are now. Quick: it holds up everything else of the router."""
        ...

    async def refresh(self) -> None:
        """Asks others for what they know, within a second."""
        ...

    def tasks(self) -> Sequence[Task]:
        """What operators began lately."""
        ...


class Watcher:
    """One browser. `name` is for people; `caller` is looked at again with every frame."""

    def __init__(self, name: str, caller: Caller) -> None:
        self.name = name
        self.caller = caller
        self.over: str | None = None  # why, once it is
        self._frames: asyncio.Queue[bytes] = asyncio.Queue(BEHIND_MAX)
        self._wake = asyncio.Event()

    def push(self, frame: bytes) -> bool:
        """Another frame for it; False when it is too far behind for that."""
        if self._frames.full():
            return False
        self._frames.put_nowait(frame)
        self._wake.set()
        return True

    def end(self, why: str) -> None:
        """No more frames, and what is waiting is dropped."""
        if self.over is None:
            self.over = why
            self._wake.set()

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """Frames until it is over; the last line says why."""
        while self.over is None:
            while self.over is None and not self._frames.empty():
                yield self._frames.get_nowait()
            self._wake.clear()
            if self.over is None and self._frames.empty():
                await self._wake.wait()  # frames come for ever, or `end`
        yield json.dumps({"kind": "end", "why": self.over}).encode() + b"\n"


class Feed:
    """Looks each FRAME_S while somebody watches, and closes each second of `recent` whether or not anybody does.

    `check` raises the TandemError that a watcher may not go on with.
    """

    def __init__(self, source: Viewed, recent: Recent, check: Callable[[Caller], None]) -> None:
        self._source = source
        self._recent = recent
        self._check = check
        self._frames = Frames()
        self._watchers: set[Watcher] = set()
        self._watched = asyncio.Event()
        self._closed = False

    @property
    def num_watchers(self) -> int:
        """How many there are."""
        return len(self._watchers)

    def admit(self, name: str, caller: Caller) -> Watcher:
        """Another watcher, who must `leave`. Raises Overloaded."""
        if len(self._watchers) >= WATCHERS_MAX or self._closed:
            most = f"{WATCHERS_MAX} dashboards watch this router, no more may"
            raise Overloaded("the router ends" if self._closed else most, retry_after_ms=OVERLOADED_RETRY_MS)
        watcher = Watcher(name, caller)
        if not self._watchers:
            self._look()  # what was seen last is old
        watcher.push(self._frames.full())
        self._watchers.add(watcher)
        self._watched.set()
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """It is gone. Idempotent."""
        self._watchers.discard(watcher)
        if not self._watchers:
            self._watched.clear()

    async def run(self) -> None:
        """For ever."""
        await asyncio.gather(self._run_frames(), self._run_refresh())

    async def _run_frames(self) -> None:
        due_s, number = time.monotonic(), 0
        while True:
            due_s = max(due_s + FRAME_S, time.monotonic() - FRAME_S)  # what was missed is not caught up with
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            number += 1
            if number % FRAMES_EACH_SECOND == 0:
                self._recent.close_second()
            if self._watchers:
                self._publish_next()

    async def _run_refresh(self) -> None:
        while True:
            await self._watched.wait()
            await self._source.refresh()
            await asyncio.sleep(FRAMES_EACH_SECOND * FRAME_S)

    def _look(self) -> bytes:
        at_ms = time.time_ns() // 1_000_000
        return self._frames.look(at_ms, self._source.view(), self._recent.seconds(), self._source.tasks())

    def _publish_next(self) -> None:
        """A mistake here costs operators their view, and no client its stream."""
        try:
            self._publish(self._look())
        except Exception:
            log.exception("the dashboard has failed")
            self.close("the dashboard has failed; the router's log says how")

    def _publish(self, frame: bytes) -> None:
        for watcher in list(self._watchers):
            try:
                self._check(watcher.caller)
            except TandemError as error:
                self._drop(watcher, error.message)
                continue
            if not watcher.push(frame):
                self._drop(watcher, f"it reads too slowly: {BEHIND_MAX} frames wait for it, which is the limit")

    def _drop(self, watcher: Watcher, why: str) -> None:
        log.info("dashboard watcher=%s is dropped: %s", watcher.name, why)
        watcher.end(why)
        self.leave(watcher)

    def close(self, why: str) -> None:
        """Ends all watchers; nobody else gets in."""
        self._closed = True
        for watcher in list(self._watchers):
            watcher.end(why)
            self.leave(watcher)


async def send_lines(watcher: Watcher, send: Callable[[bytes], Awaitable[None]], stuck_s: float = 10.0) -> None:
    """Sends a watcher's lines. Raises TimeoutError when a browser takes nothing for `stuck_s` seconds."""
    async with contextlib.aclosing(watcher.lines()) as lines:
        async for line in lines:
            async with asyncio.timeout(stuck_s):
                await send(line)
