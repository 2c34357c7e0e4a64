"""What the rebalancer sees of the cluster, and what it foresees from it: freeness, peaks of memory, times of steps.

Memory follows Llumnix (OSDI'24, 3.2): a request counts with its virtual usage, so that a handoff on its way weighs as
if it were here, and a worker that drains is fuller than any other. Growth follows Past-Future (ASPLOS'25): memory
peaks just before a request ends.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.request import RequestId, WorkerId, weight_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequest:
    """A request that a worker decodes."""

    request_id: RequestId
    worker_id: WorkerId
    num_tokens: int  # prompt and answer so far
    left_tokens: float  # predicted
    priority: int = 0
    reserve_blocks: int = 0  # that the router counts it with on a worker that it comes to
    moved_ms: int | None = None  # when its last move began, however that ended; None: it never moved
    moving_to: WorkerId | None = None
    homes: tuple[tuple[WorkerId, int], ...] = ()  # workers that it has moved away from, and when


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRequest:
    """A request that no worker has, and the blocks that it is placed with."""

    request_id: RequestId
    num_blocks: int
    since_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker that decodes something, or may. Blocks held are those that are neither free nor only cached."""

    worker_id: WorkerId
    ready: bool  # it may take requests, and give some away for the sake of others
    draining: bool
    block_size: int
    block_bytes: int
    total_blocks: int
    held_blocks: int
    incoming_blocks: int = 0  # of handoffs on their way that have no blocks granted yet
    num_incoming: int = 0
    room_blocks: int = 0  # that placement would give to a new request
    num_strangers: int = 0  # requests of other routers
    strange_tokens: int = 0  # of KV that those have


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A decode step takes fixed_ms + row_ms a request + token_ms a token of KV (algorithms.md 14, cost models)."""

    fixed_ms: float
    row_ms: float
    token_ms: float

    def of(self, num_rows: int, num_tokens: float) -> float:
        """Milliseconds of one step over so many requests and tokens of KV."""
        return self.fixed_ms + self.row_ms * num_rows + self.token_ms * num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """All that one decision stands on. `waiting` is in the order in which they are served."""

    workers: tuple[WorkerView, ...]
    running: tuple[RunningRequest, ...]
    waiting: tuple[WaitingRequest, ...]
    step: StepTime
    bytes_per_ms: float  # of a migration's copying


@dataclass(slots=True)
class Outlook:
    """One worker with what runs on it, in the rebalancer's hands: requests may be taken away and given in thought."""

    worker: WorkerView
    step: StepTime
    requests: list[RunningRequest] = field(default_factory=list)
    given_blocks: int = 0  # of requests on their way here

    @property
    def num_tokens(self) -> int:
        """Tokens of KV that a step reads."""
        return sum(each.num_tokens for each in self.requests) + self.worker.strange_tokens

    @property
    def num_rows(self) -> int:
        """Requests in a step, those of other routers among them."""
        return len(self.requests) + self.worker.num_strangers

    @property
    def virtual_blocks(self) -> int:
        """What is held, and what surely comes."""
        return self.worker.held_blocks + self.worker.incoming_blocks + self.given_blocks

    @property
    def free_blocks(self) -> int:
        """What is left beside the virtual usage."""
        return self.worker.total_blocks - self.virtual_blocks

    @property
    def freeness(self) -> float:
        """Steps until memory is gone: F = (M - sum V) / B (Llumnix 3.2), in tokens of each request of the batch."""
        if self.worker.draining:
            return -math.inf
        num = self.num_rows + self.worker.num_incoming
        return self.free_blocks * self.worker.block_size / num if num else math.inf

    @property
    def weight(self) -> int:
        """Its requests, each counted by its priority; that of other routers' is not known."""
        return sum(weight_of(each.priority) for each in self.requests) + self.worker.num_strangers

    @property
    def priority(self) -> int:
        """The highest of its requests."""
        return max((each.priority for each in self.requests), default=0)

    @property
    def step_ms(self) -> float:
        """Predicted time of its next step."""
        return self.step.of(self.num_rows, self.num_tokens)

    def blocks_of(self, request: RunningRequest) -> int:
        """Blocks that the request's tokens fill, and the one that it writes."""
        return request.num_tokens // self.worker.block_size + 1

    def peak_blocks(self, steps: float, requests: Sequence[RunningRequest] | None = None, extra_blocks: int = 0) -> int:
        """The most blocks that are held within so many steps. `requests`: instead of those here.

        `extra_blocks`: held beside the virtual usage; less than 0 for what has gone in thought. Requests of other
        routers are taken to go on for longer than that.
        """
        chosen = self.requests if requests is None else requests
        ordered = sorted(chosen, key=lambda each: -each.left_tokens)
        size, held, strangers = self.worker.block_size, self.virtual_blocks + extra_blocks, self.worker.num_strangers
        within = sum(self.blocks_of(each) for each in ordered if each.left_tokens < steps)
        ended = sum(self.blocks_of(each) for each in ordered)
        peak = max(held, math.ceil(held - within + strangers * steps / size)) if strangers else held
        for num, each in enumerate(ordered, start=strangers + 1):
            ended -= self.blocks_of(each)  # of those that end before this one
            grown = num * min(each.left_tokens, steps) / size
            gone = ended if each.left_tokens < steps else within
            peak = max(peak, math.ceil(held - gone + grown))
        return peak


class AnswerLengths:
    """How long answers were, so that one that runs can be judged by those that were longer than it is now."""

    def __init__(self, *, history_max: int = 500, unknown_tokens: int = 256) -> None:
        self._unknown_tokens = unknown_tokens  # expected while nothing has ended yet
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._history_max = history_max

    def ended(self, num_tokens: int) -> None:
        """An answer of that length has ended."""
        self._recent.append(num_tokens)
        insort(self._sorted, num_tokens)
        if len(self._recent) > self._history_max:
            self._sorted.pop(bisect_right(self._sorted, self._recent.popleft()) - 1)

    def left(self, generated: int, left_max: int) -> float:
        """Tokens still expected: the mean of longer answers; beyond all of them, a tenth of what there is."""
        start = bisect_right(self._sorted, generated)
        longer = self._sorted[start:]
        if longer:
            expected = sum(longer) / len(longer) - generated
        elif not self._sorted and generated < self._unknown_tokens:
            expected = float(self._unknown_tokens - generated)
        else:
            expected = max(16.0, generated / 10)
        return min(expected, float(left_max))
