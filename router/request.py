"""One request as the router keeps it, and what status shows of requests and workers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from engine.prefix_cache import block_hashes
from router.events import NewRequest, Usage
from router.fleet import Worker
from router.move import Move, MoveRecord
from router.placement import Placement, WorkerKey
from router.store import OwnerRecord
from tandem.messages import Assign, AssignMode, TransferStats, WorkerInfo, WorkerLoad
from tandem.request import RequestId, Token, TransferId, WorkerId

STORY_MAX = 32
PLACEMENTS_MAX = 16  # the newest that are remembered of each request


class RequestState(StrEnum):
    """Where a request is in its life."""

    ADMITTED = "admitted"  # taken in; no worker has it (yet, or any more)
    PREFILLING = "prefilling"  # assigned; no token of this attempt yet
    HANDING_OFF = "handing_off"  # the source wrote its first token; the commit is awaited
    DECODING = "decoding"  # the worker that owns it writes token after token
    ORPHANED = "orphaned"  # its owner is lost, and the target of its handoff or move may hold all of it: see to commit
    FINISHED = "finished"
    CANCELLED = "cancelled"  # by its client: on purpose, by leaving, or by not reading
    FAILED = "failed"


ENDED = frozenset({RequestState.FINISHED, RequestState.CANCELLED, RequestState.FAILED})
COUNT_MAX, BYTES_MAX = (1 << 32) - 1, (1 << 64) - 1  # of the status message


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """What handoffs did for one request: counts summed over its attempts, times of the last one.

    Times are milliseconds since a worker's own assignment: the first two since the source's, the third since the
    target's. The last one is how long the target's first step with the request took.
    """

    blocks_granted: int = 0
    blocks_moved: int = 0
    blocks_reused: int = 0
    bytes_moved: int = 0
    tokens_recomputed: int = 0
    tokens_cached: int = 0
    first_frame_ms: int = 0
    last_chunk_start_ms: int = 0
    committed_ms: int = 0
    first_step_ms: float = 0.0

    def plus(self, stats: TransferStats) -> Transferred:
        """With what one end of a transfer tells. Sums stay within what the status message can say."""
        return Transferred(
            blocks_granted=min(self.blocks_granted + stats.blocks_granted, COUNT_MAX),
            blocks_moved=min(self.blocks_moved + stats.blocks_moved, COUNT_MAX),
            blocks_reused=min(self.blocks_reused + stats.blocks_reused, COUNT_MAX),
            bytes_moved=min(self.bytes_moved + stats.bytes, BYTES_MAX),
            tokens_recomputed=min(self.tokens_recomputed + stats.tokens_recomputed, COUNT_MAX),
            tokens_cached=max(self.tokens_cached, stats.tokens_cached),
            first_frame_ms=stats.first_frame_ms or self.first_frame_ms,
            last_chunk_start_ms=stats.last_chunk_start_ms or self.last_chunk_start_ms,
            committed_ms=stats.committed_ms or self.committed_ms,
            first_step_ms=stats.first_step_ms or self.first_step_ms,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRecord:
    """One placement of a request. `at_ms` since it was submitted."""

    at_ms: int
    epoch: int
    placement: Placement


@dataclass(slots=True, eq=False)
class Request:
    """The life of one request. `answer` holds the tokens delivered; `owner` is None while no worker has it.

    `involved`: who has a part in it and is in reach, the source before the target.
    """

    new: NewRequest
    submitted_ms: int
    deadline_ms: int
    stage_since_ms: int  # ADMITTED: when the wait began
    stage_deadline_ms: int = 0  # the other states
    state: RequestState = RequestState.ADMITTED
    hashes: list[bytes] = field(default_factory=list)
    namespace: tuple[str, int] | None = None  # of the hashes: namespace and block size
    answer: list[Token] = field(default_factory=list)
    owner: OwnerRecord | None = None
    placement: Placement | None = None
    placements: deque[PlacementRecord] = field(default_factory=lambda: deque(maxlen=PLACEMENTS_MAX))
    involved: list[Worker] = field(default_factory=list)
    avoid: set[WorkerKey] = field(default_factory=set)
    num_replacements: int = 0
    num_in_vain: int = 0  # of them, since a token was delivered
    not_before_ms: int = 0
    placed_ms: int = 0
    next_epoch: int = 0  # of its next placement
    last_epoch: int = 0  # of those that its placement may use
    move: Move | None = None  # under way, and not committed
    landing: Move | None = None  # committed; the target's first token is awaited
    num_moves: int = 0  # committed
    num_moves_begun: int = 0
    move_ended_ms: int | None = None
    handoff_ms: int | None = None  # from the first token until a decode worker owned it
    first_token_ms: int | None = None
    last_token_ms: int = 0
    attempt_has_token: bool = False
    last_failure: str = ""
    transferred: Transferred = field(default_factory=Transferred)
    story: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=STORY_MAX))

    @property
    def request_id(self) -> RequestId:
        return self.new.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and delivered tokens."""
        return len(self.new.tokens) + len(self.answer)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and delivered tokens: what a worker goes on from."""
        return self.new.tokens + tuple(each.token_id for each in self.answer)

    @property
    def num_more(self) -> int:
        """Tokens that may still be written; at least one."""
        return max(1, self.new.sampling.max_tokens - len(self.answer))

    def assign(
        self, mode: AssignMode, transfer_id: TransferId, peer: Worker | None, deadline_ms: int, *, move: bool = False
    ) -> Assign:
        """What a worker is told: to take part, from what is delivered on, under the owner record's epoch."""
        assert self.owner is not None, f"{self.request_id} has no owner: {list(self.story)}"
        return Assign(
            request_id=self.request_id,
            epoch=self.owner.epoch,
            mode=mode,
            tokens=self.tokens,
            num_prompt_tokens=len(self.new.tokens),
            sampling=self.new.sampling,
            transfer_id=transfer_id,
            peer=None if peer is None else peer.address,
            deadline_ms=deadline_ms,
            move=move,
            cache_salt=self.new.cache_salt,
        )

    def hash_blocks(self, namespace: str, block_size: int) -> None:
        """Hashes the full blocks that have none yet, as the workers do."""
        if self.namespace != (namespace, block_size):
            self.namespace, self.hashes = (namespace, block_size), []
        if len(self.hashes) < self.num_tokens // block_size:
            self.hashes = block_hashes(
                namespace.encode(), self.tokens, block_size, self.hashes, salt=self.new.cache_salt
            )

    def tell(self, now_ms: int, what: str) -> None:
        """Remembers what happened, in milliseconds since it was submitted."""
        self.story.append((now_ms - self.submitted_ms, what))

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.new.tokens),
            completion_tokens=len(self.answer),
            cached_tokens=min(self.transferred.tokens_cached, len(self.new.tokens)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSnapshot:
    """A request as status shows it. Times are milliseconds since it was submitted.

    `decode_worker` is where it is decoded now, or will be; `moving_to` the target of a move under way, or empty.
    """

    request_id: RequestId
    state: RequestState
    mode: str
    prefill_worker: str
    decode_worker: str
    epoch: int
    prompt_tokens: int
    tokens: int
    max_tokens: int
    priority: int = 0
    num_moves: int
    moving_to: str
    transferred: Transferred
    num_replacements: int
    ttft_ms: int | None
    age_ms: int
    error: str
    reason: str
    placements: tuple[PlacementRecord, ...]
    handoff_ms: int | None = None
    story: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """A worker as status shows it. `load` None: it has not reported yet.

    `num_free_blocks`: what a new request may count on, beside what is reported as taken or promised already.
    `num_arriving`: requests on their way by a handoff or a move, promised `num_arriving_blocks`.
    """

    worker_id: WorkerId
    incarnation: int
    state: str
    info: WorkerInfo
    load: WorkerLoad | None
    num_requests: int
    num_free_blocks: int
    num_arriving: int
    num_arriving_blocks: int
    cached_hashes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSnapshot:
    """Workers, requests in flight and those that ended a while ago, moves likewise; newest last.

    `now_ms` is on the clock of the moves' `at_ms`.
    """

    now_ms: int
    workers: tuple[WorkerSnapshot, ...]
    requests: tuple[RequestSnapshot, ...]
    moves: tuple[MoveRecord, ...]
    queued_tokens: int
    waiting: int


def snapshot(request: Request, now_ms: int, *, error: str = "", waits_for: str = "") -> RequestSnapshot:
    """The request as it is now. `waits_for`: why the line does not move, for those that stand in it."""
    placement = request.placement
    ended = request.state in ENDED
    waiting = bool(waits_for) and request.state is RequestState.ADMITTED
    return RequestSnapshot(
        request_id=request.request_id,
        state=request.state,
        mode="" if placement is None else placement.mode.value,
        prefill_worker="" if placement is None else placement.prefill_worker.worker_id,
        decode_worker=_decode_worker(request),
        epoch=0 if request.owner is None else request.owner.epoch,
        prompt_tokens=len(request.new.tokens),
        tokens=len(request.answer),
        max_tokens=request.new.sampling.max_tokens,
        priority=request.new.priority,
        num_moves=request.num_moves,
        moving_to="" if request.move is None or ended else request.move.target.worker_id,
        transferred=request.transferred,
        num_replacements=request.num_replacements,
        ttft_ms=None if request.first_token_ms is None else request.first_token_ms - request.submitted_ms,
        age_ms=now_ms - request.submitted_ms,
        error=error or request.last_failure,
        reason=waits_for if waiting else "" if placement is None else placement.reason,
        placements=tuple(request.placements),
        handoff_ms=request.handoff_ms,
        story=tuple(request.story),
    )


def _decode_worker(request: Request) -> str:
    if request.owner is not None and request.owner.committed:
        return request.owner.worker_id
    return "" if request.placement is None else request.placement.decode_worker.worker_id


def worker_snapshot(worker: Worker, cached_hashes: int) -> WorkerSnapshot:
    """The worker as it is now."""
    return WorkerSnapshot(
        worker_id=worker.worker_id,
        incarnation=worker.incarnation,
        state=worker.state.value,
        info=worker.info,
        load=worker.load,
        num_requests=worker.num_requests,
        num_free_blocks=worker.num_free_blocks,
        num_arriving=len(worker.arriving),
        num_arriving_blocks=worker.num_arriving_blocks,
        cached_hashes=cached_hashes,
        reason=worker.lost_reason,
    )
