"""Sends the canaries that the readiness decider asks for: requests of the cluster's own, on the router's event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time

from cluster.readiness import PairStatus, Readiness, named
from router.driver import Driver, NewRequest
from tandem.errors import Overloaded, TandemError
from tandem.request import CANARY_PREFIX, Pair, RequestId, Sampling

log = logging.getLogger(__name__)

LOOK_S = 0.1
PROMPT_TOKENS = 3  # less than a block: one block moves, and no prefix cache keeps it
ANSWER_TOKENS = 2  # the second one is written where the block was moved to


class Canaries:
    """`run` looks for ever; `not_ready` and `status` may be asked at any time."""

    def __init__(self, *, driver: Driver, vocab_size: int) -> None:
        self._driver = driver
        self._vocab_size = vocab_size
        self._own = secrets.token_hex(4)  # several routers may ask one worker
        self._numbers = itertools.count(1)
        self._readiness = Readiness(served_ms=driver.fleet.served_ms)

    async def run(self) -> None:
        """One canary at a time, whenever one is due."""
        while True:
            pair = self._readiness.look(now_ms(), self._driver.fleet)
            if pair is not None:
                await self._send(pair)
            await asyncio.sleep(LOOK_S)

    def not_ready(self) -> str:
        """Why the cluster does not serve; empty when it does."""
        return self._readiness.not_ready(now_ms())

    def status(self) -> list[PairStatus]:
        """What is known of each pair of workers."""
        return self._readiness.status()

    async def _send(self, pair: Pair) -> None:
        """The wait is bounded by the request's deadline, which the router keeps."""
        number = next(self._numbers)
        request = NewRequest(
            request_id=RequestId(f"{CANARY_PREFIX}{self._own}.{number}"),
            tokens=tuple((number + each) % self._vocab_size for each in range(PROMPT_TOKENS)),
            sampling=Sampling(max_tokens=ANSWER_TOKENS, ignore_eos=True),
            deadline_ms=self._readiness.config.timeout_ms,
            canary=pair,
        )
        error, full = "", False
        try:
            async for _ in self._driver.submit(request):
                pass
        except TandemError as failed:
            error, full = failed.message, isinstance(failed, Overloaded)
            log.info("canary %s: %s", named(pair), error)
        self._readiness.ended(now_ms(), error=error, full=full)


def now_ms() -> int:
    """The clock of the driver."""
    return time.monotonic_ns() // 1_000_000
