"""The order of prefills: guarded slack, then shortest remaining work, with aging and hysteresis.

The rule is that of FlowPrefill's slack-based EDF crossed with shortest-remaining-first: who is about to miss its time
goes first, earliest due first; else the shortest remaining uncached work; what is late already comes last, by
remaining work less a share of its wait. Preemption happens between chunks, for the batch runs the order given here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from prefill_worker.config import QueueConfig
from tandem.request import RequestId


class Lane(IntEnum):
    """Lower goes first."""

    RESUMED = 0  # a running request that lost its blocks, or a prompt that stood still for too long or too often
    URGENT = 1  # about to be late: earliest due first
    ON_TIME = 2  # shortest remaining work first
    LATE = 3  # can not be on time any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt that is not yet prefilled."""

    request_id: RequestId
    remaining_tokens: int  # neither computed nor found in the prefix cache
    total_tokens: int
    received_ms: int
    started: bool  # it holds blocks
    recomputed: bool = False  # it had begun to answer and lost its blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a prompt stands and why."""

    request_id: RequestId
    lane: Lane
    key: float
    reason: str


class PrefillCost:
    """Time of a prefill: b * u + c * u * (2 L - u) / 2 for u uncached of L tokens, scaled to what is measured."""

    def __init__(self, *, token_ms: float, pair_ms: float) -> None:
        self._token_ms = token_ms
        self._pair_ms = pair_ms
        self._scale = 1.0

    def predict_ms(self, uncached_tokens: int, total_tokens: int) -> float:
        """Milliseconds for the last `uncached_tokens` of `total_tokens`."""
        return self._scale * self._raw(uncached_tokens, total_tokens)

    def observe(self, tokens: Sequence[tuple[int, int]], took_ms: int) -> None:
        """A step ran rows of (num tokens, position after them) in `took_ms`. Smoothed over about ten steps."""
        raw = sum(self._raw(num, end) for num, end in tokens)
        if raw > 0 and took_ms > 0:
            self._scale += 0.1 * (min(max(took_ms / raw, 0.01), 100.0) - self._scale)

    def _raw(self, uncached: int, total: int) -> float:
        return self._token_ms * uncached + self._pair_ms * uncached * (2 * total - uncached) / 2


@dataclass(slots=True)
class _Memory:
    last_ran_ms: int | None = None
    num_suspensions: int = 0


class PrefillQueue:
    """Ranks prompts. It remembers who ran last, so that it does not flutter, and who stood still, so that none starves.

    Feed it `ran` after each step; prompts that are not named in `rank` any more are forgotten.
    """

    def __init__(self, config: QueueConfig) -> None:
        self._config = config
        self.cost = PrefillCost(token_ms=config.token_ms, pair_ms=config.pair_ms)
        self._memory: dict[RequestId, _Memory] = {}
        self._head: RequestId | None = None

    def rank(self, now_ms: int, prompts: Sequence[Prompt]) -> list[Place]:
        """The prompts in the order in which they are to run."""
        self._memory = {each.request_id: self._memory.get(each.request_id, _Memory()) for each in prompts}
        places = [self._place(now_ms, each) for each in prompts]
        received = {each.request_id: each.received_ms for each in prompts}
        places.sort(key=lambda place: (place.lane, place.key, received[place.request_id]))
        return self._steadied(now_ms, prompts, places)

    def ran(self, now_ms: int, request_ids: Sequence[RequestId]) -> None:
        """A step ran these. Who had run in the step before and not in this one is suspended."""
        running = set(request_ids)
        for request_id, memory in self._memory.items():
            if request_id in running:
                memory.last_ran_ms = now_ms
        if self._head is not None and self._head not in running and self._head in self._memory:
            self._memory[self._head].num_suspensions += 1
        self._head = next((each for each in request_ids if each in self._memory), None)

    def _place(self, now_ms: int, prompt: Prompt) -> Place:
        config = self._config
        memory = self._memory[prompt.request_id]
        left_ms = self.cost.predict_ms(prompt.remaining_tokens, prompt.total_tokens)
        due_ms = prompt.received_ms + config.ttft_slo_ms
        waited_ms = now_ms - prompt.received_ms
        slack_ms = due_ms - now_ms - left_ms * (1 + config.margin_share)

        def place(lane: Lane, key: float, reason: str) -> Place:
            return Place(request_id=prompt.request_id, lane=lane, key=key, reason=reason)

        if prompt.recomputed:
            return place(Lane.RESUMED, prompt.received_ms, "it had begun to answer")
        if prompt.started and memory.last_ran_ms is not None:
            still_ms = now_ms - memory.last_ran_ms
            if still_ms > config.suspend_ms:
                return place(Lane.RESUMED, prompt.received_ms, f"it stood still for {still_ms} ms")
            if memory.num_suspensions >= config.suspensions_max:
                return place(Lane.RESUMED, prompt.received_ms, f"it was suspended {memory.num_suspensions} times")
        if waited_ms > config.starve_ms:
            return place(Lane.URGENT, due_ms, f"it waits for {waited_ms} ms")
        if slack_ms < 0:
            return place(Lane.LATE, left_ms - config.aging_share * waited_ms, f"it is late by {-slack_ms:.0f} ms")
        if slack_ms < max(config.guard_ms, config.guard_share * config.ttft_slo_ms):
            return place(Lane.URGENT, due_ms, f"its slack is {slack_ms:.0f} ms")
        return place(Lane.ON_TIME, left_ms, f"{left_ms:.0f} ms of work are left")

    def _steadied(self, now_ms: int, prompts: Sequence[Prompt], places: list[Place]) -> list[Place]:
        """Keeps the one that ran last in front unless another is better by a margin: switching is not free."""
        at = next((i for i, place in enumerate(places) if place.request_id == self._head), None)
        if not at:  # nobody ran, it has left, or it is first already
            return places
        head, best = places[at], places[0]
        remaining = next(each for each in prompts if each.request_id == head.request_id)
        margin_ms = self._config.switch_share * self.cost.predict_ms(remaining.remaining_tokens, remaining.total_tokens)
        if best.lane < head.lane or head.key - best.key > margin_ms:
            return places
        return [head, *places[:at], *places[at + 1 :]]
