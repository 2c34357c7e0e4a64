"""Turns the router's status into the rebalancer's view, and learns from it: answer lengths, step times, bandwidth."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.outlook import AnswerLengths, ClusterView, RunningRequest, StepTime, WaitingRequest, WorkerView
from router.cost import LeastSquares
from router.fleet import WorkerState
from router.move import MoveOutcome, MoveRecord
from router.request import ENDED, RequestSnapshot, RequestState, StatusSnapshot, WorkerSnapshot
from tandem.messages import Role
from tandem.request import RequestId, WorkerId

DECODES = (Role.DECODE, Role.MIXED)
STEP_PRIOR = (10.0, 0.0, 0.0)  # ms: no batch is taken to be slow before one was seen to be
ROWS_SCALE, TOKENS_SCALE = 32.0, 16_384.0  # a step's first samples tell of what is fixed rather than of its batch
SAMPLE_STEPS = 10
SAMPLE_BYTES_LEAST = 1 << 20  # a smaller move says more of round trips than of bandwidth
SAMPLES_MAX = 20
COMING = (RequestState.PREFILLING, RequestState.HANDING_OFF)


@dataclass(frozen=True, slots=True)
class _Mark:
    """A worker at the beginning of a sample: since when it has decoded the same requests, and nothing else."""

    at_ms: int
    steps: int
    requests: frozenset[RequestId]
    strangers: int  # requests of other routers


class Observer:
    """Everything that one view needs to know of the views before it.

    `reserve_tokens`: of each answer, counted by the router in advance. `bytes_per_ms`: until a move was measured.
    `alone`: no other router has requests on these workers.
    """

    def __init__(self, *, reserve_tokens: int, bytes_per_ms: float, alone: bool = True) -> None:
        self._alone = alone
        self.lengths = AnswerLengths()
        self._reserve_tokens = reserve_tokens
        self._bytes_per_ms = bytes_per_ms
        # Nothing is forgotten: batches that stay alike for long would leave no trace of what a larger one costs.
        self._step = LeastSquares(STEP_PRIOR, forgetting=1.0)
        self._marks: dict[tuple[WorkerId, int], _Mark] = {}
        self._ended: set[RequestId] = set()
        self._moving_ms: dict[RequestId, int] = {}  # when a request was last seen moving
        self._known_moves: set[tuple[RequestId, int]] = set()  # that are over, by their beginning
        self._speeds: deque[float] = deque(maxlen=SAMPLES_MAX)

    def look(self, snapshot: StatusSnapshot) -> tuple[ClusterView, list[MoveRecord]]:
        """The view now, and the moves that ended since the last one."""
        decoding = [each for each in snapshot.requests if each.state is RequestState.DECODING]
        # A prefill worker decodes what came while no decode worker was there.
        busy = {each.decode_worker for each in decoding}
        alive = [each for each in snapshot.workers if each.state != WorkerState.DEAD.value]
        workers = [each for each in alive if each.info.role in DECODES or each.worker_id in busy]
        self._learn_lengths(snapshot.requests)
        self._learn_steps(snapshot.now_ms, workers, decoding)
        for request in decoding:
            if request.moving_to:
                self._moving_ms[request.request_id] = snapshot.now_ms
        ended = self._ended_moves(snapshot.moves)
        running = {each.request_id for each in decoding}
        self._moving_ms = {each: at_ms for each, at_ms in self._moving_ms.items() if each in running}
        size = workers[0].info.block_size if workers else 1
        homes: dict[RequestId, list[tuple[WorkerId, int]]] = {}
        for move in snapshot.moves:
            if move.outcome is MoveOutcome.MOVED:
                homes.setdefault(move.request_id, []).append((move.source, move.at_ms))
        view = ClusterView(
            workers=tuple(_worker_view(each, snapshot.requests, alone=self._alone) for each in workers),
            running=tuple(self._running(each, size, homes.get(each.request_id, [])) for each in decoding),
            waiting=tuple(
                WaitingRequest(
                    request_id=each.request_id,
                    num_blocks=self._reserve_blocks(each, size),
                    since_ms=snapshot.now_ms - each.age_ms,
                )
                for each in snapshot.requests
                if each.state is RequestState.ADMITTED
            ),
            step=self.step(),
            bytes_per_ms=self.bytes_per_ms(),
        )
        return view, ended

    def step(self) -> StepTime:
        """What a decode step takes, as far as it was seen. Never less than nothing, whatever the noise."""
        fixed, rows, tokens = (max(0.0, weight) for weight in self._step.weights)
        return StepTime(fixed_ms=fixed, row_ms=rows / ROWS_SCALE, token_ms=tokens / TOKENS_SCALE)

    def bytes_per_ms(self) -> float:
        """The median of the last moves' copying, rounds while the request ran."""
        speeds = sorted(self._speeds)
        return speeds[len(speeds) // 2] if speeds else self._bytes_per_ms

    def _learn_lengths(self, requests: Iterable[RequestSnapshot]) -> None:
        finished = [each for each in requests if each.state is RequestState.FINISHED]
        for request in finished:
            if request.request_id not in self._ended:
                self.lengths.ended(request.tokens)
        self._ended = {each.request_id for each in finished}

    def _learn_steps(self, now_ms: int, workers: Iterable[WorkerSnapshot], decoding: Iterable[RequestSnapshot]) -> None:
        """A sample of each worker that has taken some steps over one batch: their mean, which is steadier than one."""
        here: dict[str, list[RequestSnapshot]] = {}
        for request in decoding:
            here.setdefault(request.decode_worker, []).append(request)
        marks = {}
        for worker in workers:
            key, load, batch = (worker.worker_id, worker.incarnation), worker.load, here.get(worker.worker_id, [])
            disturbed = load is None or load.prefill_backlog_tokens or load.waiting or load.running < len(batch)
            strangers = 0 if load is None else load.running - len(batch)
            if self._alone and strangers:
                continue
            if load is None or disturbed or not batch or any(each.moving_to for each in batch):
                continue
            mark, requests = self._marks.get(key), frozenset(each.request_id for each in batch)
            if mark is not None and (mark.requests, mark.strangers) == (requests, strangers):
                num_steps = load.steps - mark.steps
                if num_steps < SAMPLE_STEPS:
                    marks[key] = mark
                    continue
                tokens = sum(_num_tokens(each) for each in batch)
                if strangers:
                    tokens = max(tokens, _held_blocks(worker) * worker.info.block_size)
                features = (1.0, load.running / ROWS_SCALE, tokens / TOKENS_SCALE)
                self._step.learn(features, (now_ms - mark.at_ms) / num_steps)
            marks[key] = _Mark(now_ms, load.steps, requests, strangers)
        self._marks = marks

    def _ended_moves(self, moves: Iterable[MoveRecord]) -> list[MoveRecord]:
        over = {(each.request_id, each.at_ms): each for each in moves if each.outcome is not MoveOutcome.MOVING}
        fresh = [move for key, move in over.items() if key not in self._known_moves]
        self._known_moves = set(over)
        for move in fresh:
            if move.outcome is MoveOutcome.MOVED and move.bytes_moved >= SAMPLE_BYTES_LEAST and move.precopy_ms:
                self._speeds.append(move.bytes_moved / move.precopy_ms)
            self._moving_ms[move.request_id] = max(move.at_ms, self._moving_ms.get(move.request_id, 0))
        return fresh

    def _running(self, request: RequestSnapshot, size: int, homes: list[tuple[WorkerId, int]]) -> RunningRequest:
        left_max = max(1, request.max_tokens - request.tokens)
        return RunningRequest(
            request_id=request.request_id,
            worker_id=WorkerId(request.decode_worker),
            num_tokens=_num_tokens(request),
            left_tokens=self.lengths.left(request.tokens, left_max),
            priority=request.priority,
            reserve_blocks=self._reserve_blocks(request, size),
            moved_ms=self._moving_ms.get(request.request_id),
            moving_to=WorkerId(request.moving_to) if request.moving_to else None,
            homes=tuple(homes),
        )

    def _reserve_blocks(self, request: RequestSnapshot, size: int) -> int:
        left_max = max(1, request.max_tokens - request.tokens)
        return -(-(_num_tokens(request) + min(left_max, self._reserve_tokens)) // size)


def _num_tokens(request: RequestSnapshot) -> int:
    return request.prompt_tokens + request.tokens


def _held_blocks(worker: WorkerSnapshot) -> int:
    """Blocks that somebody has, as the worker reports, or wants back, as what is swapped out there does."""
    if worker.load is None:
        return 0
    blocks = worker.load.blocks
    return blocks.total - blocks.free - blocks.cached + worker.load.swap.used


def _strangers(worker: WorkerSnapshot, requests: Iterable[RequestSnapshot]) -> tuple[int, int]:
    """How many requests of other routers the worker has, and how many tokens of KV of theirs."""
    if worker.load is None:
        return 0, 0
    here = [
        each
        for each in requests
        if each.state not in ENDED and worker.worker_id in (each.decode_worker, each.prefill_worker, each.moving_to)
    ]
    own = [each for each in here if each.state is RequestState.DECODING and each.decode_worker == worker.worker_id]
    num = max(0, worker.load.running + worker.load.waiting - len(here))
    own_blocks = sum(_num_tokens(each) // worker.info.block_size + 1 for each in own)
    return num, max(0, _held_blocks(worker) - own_blocks) * worker.info.block_size if num else 0


def _worker_view(worker: WorkerSnapshot, requests: Iterable[RequestSnapshot], *, alone: bool) -> WorkerView:
    requests = list(requests)
    info, load = worker.info, worker.load
    coming = [
        each
        for each in requests
        if each.state in COMING and each.decode_worker == worker.worker_id != each.prefill_worker
    ]  # fmt: skip
    expected = sum(_num_tokens(each) // info.block_size + 1 for each in coming)
    blocks = None if load is None else load.blocks
    num_strangers, strange_tokens = (0, 0) if alone else _strangers(worker, requests)
    return WorkerView(
        worker_id=worker.worker_id,
        ready=worker.state == WorkerState.READY.value and info.role in DECODES,
        draining=worker.state == WorkerState.DRAINING.value,
        block_size=info.block_size,
        block_bytes=info.block_bytes,
        total_blocks=info.total_blocks,
        held_blocks=_held_blocks(worker),
        incoming_blocks=max(0, expected - (0 if blocks is None else blocks.granted)),
        num_incoming=len(coming),
        num_strangers=num_strangers,
        strange_tokens=strange_tokens,
        room_blocks=worker.num_free_blocks,
    )
