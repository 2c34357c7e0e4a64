"""The faults that may be armed in a running process: links that let nothing pass for a while, and damaged frames.

Shells ask here before they write and after they have read. Nothing is ever armed but through tandem.v1.Faults, which a
worker serves only when its cluster was started with `--allow-faults`. What is armed ends by itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

OPEN_SHARE = 0.1  # of a period that a delayed link is open


@dataclass(slots=True)
class Gate:
    """Whether a message may pass now on one kind of link, either way. Times are seconds of the monotonic clock.

    Shut without a period it is a partition: nothing passes until it is over, then all of it, as over a TCP connection
    that nobody has given up meanwhile. With a period it is a slow link: what comes passes together at its end.
    """

    began_s: float = 0.0
    until_s: float = 0.0
    period_s: float = 0.0

    def shut(self, now_s: float, *, for_s: float, period_s: float = 0.0) -> None:
        """Arms the fault, in place of one that still lasts."""
        self.began_s, self.until_s, self.period_s = now_s, now_s + for_s, period_s

    def wait_s(self, now_s: float) -> float:
        """How long a message has to wait; 0: it may pass."""
        if now_s >= self.until_s:
            return 0.0
        left_s = self.until_s - now_s
        if not self.period_s:
            return left_s
        rest_s = self.period_s * (1 - OPEN_SHARE) - (now_s - self.began_s) % self.period_s
        return min(left_s, max(0.0, rest_s))

    async def passing(self) -> None:
        """Returns when a message may pass."""
        while self.until_s and (wait_s := self.wait_s(time.monotonic())) > 0:
            await asyncio.sleep(wait_s)


@dataclass(slots=True)
class Damage:
    """Whether a frame that has arrived is to be damaged before it is checked: each `every`-th one is, with 0 none."""

    every: int = 0
    until_s: float | None = None  # None: for ever
    num_frames: int = 0

    def arm(self, now_s: float, *, every: int, for_s: float) -> None:
        """Damages frames for a while."""
        self.every, self.until_s, self.num_frames = every, now_s + for_s, 0

    def due(self) -> bool:
        """Asked once for each frame."""
        if not self.every or (self.until_s is not None and time.monotonic() >= self.until_s):
            return False
        self.num_frames += 1
        return self.num_frames % self.every == 0
