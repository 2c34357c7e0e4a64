"""Whether a handoff may come in: room for its prompt now, and for what all answers will grow to.

Growth is foreseen as in Past-Future scheduling (LightLLM, ASPLOS'25): answer lengths are drawn from those of the past,
given what is written already, and the peak of memory over time is computed for each draw. The draws are stratified
quantiles in an order given by a hash, so that the same situation always gets the same answer.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from decode_worker.config import AdmissionConfig
from engine.noise import GOLDEN, mix64


class Verdict(StrEnum):
    """What becomes of an offer."""

    ADMIT = "admit"
    WAIT = "wait"
    REFUSE = "refuse"  # it can never fit here


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One request that occupies memory, or is about to: `salt` tells it from the others in the draws."""

    salt: int
    num_tokens: int  # with its answer so far
    num_generated: int
    num_left_max: int  # tokens that it may still write


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The verdict, why, and the numbers behind it."""

    verdict: Verdict
    reason: str
    scores: tuple[tuple[str, float], ...] = ()


class Admission:
    """Decides on handoffs for a pool of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, config: AdmissionConfig, *, num_blocks: int, block_size: int) -> None:
        self._config = config
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def finished(self, num_generated: int) -> None:
        """An answer of that length has ended."""
        self._recent.append(num_generated)
        insort(self._sorted, num_generated)
        if len(self._recent) > self._config.history_max:
            self._sorted.pop(bisect_right(self._sorted, self._recent.popleft()) - 1)

    def decide(self, *, wanted: Load, num_new_blocks: int, num_available: int, others: Sequence[Load]) -> Decision:
        """`num_new_blocks`: what the prompt needs beyond what the prefix cache has, pinned already or not."""
        size = self._block_size
        if -(-(wanted.num_tokens + 1) // size) > self._num_blocks:
            needed = -(-(wanted.num_tokens + 1) // size)
            return Decision(verdict=Verdict.REFUSE, reason=f"needs {needed} blocks, the pool has {self._num_blocks}")
        if len(others) >= self._config.max_requests:
            return _wait(f"{len(others)} requests are here, at most {self._config.max_requests} may")
        watermark = math.ceil(self._num_blocks * self._config.watermark_share) if others else 0
        left = num_available - num_new_blocks - watermark
        if left < (1 if others else 0):
            return _wait(f"{num_new_blocks} blocks and a watermark of {watermark} do not fit {num_available} available")
        loads = [*others, wanted]
        growth = sum(_growth(load, size) for load in loads)
        if growth <= left or not others:
            reason = f"{growth} blocks of growth fit {left}" if others else "nothing else is here"
            return Decision(verdict=Verdict.ADMIT, reason=reason, scores=(("growth", growth), ("left", left)))
        bad = sum(self._overflows(loads, draw, left * size) for draw in range(self._config.num_draws))
        scores = (("growth", float(growth)), ("left", float(left)), ("bad_draws", float(bad)))
        if bad <= self._config.alpha * self._config.num_draws:
            reason = f"{bad} of {self._config.num_draws} draws overflow"
            return Decision(verdict=Verdict.ADMIT, reason=reason, scores=scores)
        return _wait(f"{bad} of {self._config.num_draws} draws of answer lengths overflow", scores)

    def _overflows(self, loads: Sequence[Load], draw: int, free_tokens: int) -> bool:
        """Whether in this draw the memory is too small at some time.

        With the requests ordered by what is left of them, longest first, memory peaks just before one of them ends:
        then the first i hold what they hold now and i * left[i] more.
        """
        drawn = sorted(((self._left(load, draw), load.num_tokens) for load in loads), reverse=True)
        capacity = free_tokens + sum(load.num_tokens for load in loads)
        held = 0
        for num, (left, tokens) in enumerate(drawn, start=1):
            held += tokens
            if held + left * num > capacity:
                return True
        return False

    def _left(self, load: Load, draw: int) -> int:
        """Tokens still to come in this draw, given those that came."""
        num_draws = self._config.num_draws
        stratum = (draw + mix64(load.salt * GOLDEN)) % num_draws
        quantile = (stratum + 0.5) / num_draws
        start = bisect_right(self._sorted, load.num_generated)
        num_longer = len(self._sorted) - start
        if num_longer:
            left = self._sorted[start + int(quantile * num_longer)] - load.num_generated
        elif not self._sorted and load.num_generated < self._config.unknown_output_tokens:
            left = self._config.unknown_output_tokens - load.num_generated
        else:  # longer than all of the past: geometric, with a tenth of what came as its mean
            left = math.ceil(-math.log1p(-quantile) * max(16.0, load.num_generated / 10))
        return min(left, load.num_left_max)


def _growth(load: Load, block_size: int) -> int:
    """Blocks that the request needs at most beyond those of its tokens so far."""
    return -(-(load.num_tokens + load.num_left_max) // block_size) - -(-load.num_tokens // block_size)


def _wait(reason: str, scores: tuple[tuple[str, float], ...] = ()) -> Decision:
    return Decision(verdict=Verdict.WAIT, reason=reason, scores=scores)
