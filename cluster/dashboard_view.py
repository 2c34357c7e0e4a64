"""What the operators' dashboard shows at one moment: rows of workers, requests and moves, as one router sees them.

A row is a tuple in the order of its table's fields, so that two looks compare cheaply and a frame names no field twice.
Nothing in it comes from a prompt or an answer but their lengths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.membership import Member
from router.fleet import WorkerState
from router.move import MoveOutcome
from router.request import ENDED, RequestSnapshot, StatusSnapshot, WorkerSnapshot
from tandem.messages import BlockCounts
from tandem.v1 import admin_pb2 as pb

Cell = str | int | float | bool | None
Row = tuple[Cell, ...]

WORKER_FIELDS = (
    "id", "role", "state", "incarnation", "exact", "running", "waiting", "backlog", "step_ms", "total", "free",
    "cached", "owned", "exported", "granted", "quarantined", "swap_used", "swap_total", "audit", "reason",
)  # fmt: skip
REQUEST_FIELDS = (
    "id", "router", "state", "mode", "prefill", "decode", "moving_to", "prompt_tokens", "max_tokens", "priority",
    "ttft_ms", "moves", "replacements", "began_ms", "took_ms", "error",
)  # fmt: skip
MOVE_FIELDS = (
    "key", "request", "from", "to", "reason", "why", "outcome", "error", "rounds", "blocks", "blocks_reused", "bytes",
    "precopy_ms", "fence_ms", "pause_ms", "at_ms", "router",
)  # fmt: skip
RUNNING_MAX = 4096  # requests shown; of more only the number is told
ENDED_MAX = 200
MOVES_MAX = 100  # that are over
TEXT_MAX = 300  # characters of an error or a reason
SAME_MOVE_MS = 1000  # a router tells of its moves on a clock that it reads anew each time


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything that is shown. Rows by their first field; `tokens` delivered so far, by request."""

    head: Mapping[str, object]
    workers: Mapping[str, Row]
    requests: Mapping[str, Row]
    tokens: Mapping[str, int]
    moves: Mapping[str, Row]


@dataclass(slots=True, kw_only=True)
class Viewer:
    """Makes views. `since_ms`: when this router began. `to_unix_ms`: from its snapshots' clock to Unix time."""

    router: str
    model: str
    since_ms: int
    to_unix_ms: int
    _began: dict[tuple[str, str, str, str], list[int]] = field(default_factory=dict)  # moves of others, as first told

    def view(
        self,
        snapshot: StatusSnapshot,
        members: Iterable[Member],
        *,
        not_ready: str,
        others: Mapping[str, pb.StatusResponse | None],
    ) -> View:
        """The view of this router, with requests and moves of the `others`; None: one that does not answer."""
        running = [each for each in snapshot.requests if each.state not in ENDED]
        ended = [each for each in snapshot.requests if each.state in ENDED][-ENDED_MAX:]
        shown = [*running[:RUNNING_MAX], *ended]
        requests = {str(each.request_id): self._request(each, snapshot.now_ms) for each in shown}
        tokens = {str(each.request_id): each.tokens for each in shown}
        hidden = max(0, len(running) - RUNNING_MAX)
        routers: list[tuple[str, bool, int]] = [(self.router, True, len(running))]
        moves = self._moves(snapshot)
        for name, answer in others.items():
            theirs = () if answer is None else answer.requests
            routers.append((name, answer is not None, len(theirs)))
            room = max(0, RUNNING_MAX + ENDED_MAX - len(requests))
            hidden += max(0, len(theirs) - room)
            for each in theirs[:room]:
                requests[each.id] = _request_elsewhere(each, name)
                tokens[each.id] = each.tokens
            for move in () if answer is None else answer.moves:
                row = self._move_elsewhere(move, name)
                moves[str(row[0])] = row
        self._forget(moves)
        head = {
            "router": self.router,
            "model": self.model,
            "since_ms": self.since_ms,
            "routers": sorted(routers),
            "not_ready": not_ready,
            "hidden_requests": hidden,
        }
        return View(
            head=head,
            workers=_workers(snapshot.workers, members),
            requests=requests,
            tokens=tokens,
            moves=_newest(moves.values()),
        )

    def _request(self, request: RequestSnapshot, now_ms: int) -> Row:
        over = request.state in ENDED
        return (
            request.request_id,
            self.router,
            request.state.value,
            request.mode,
            request.prefill_worker,
            request.decode_worker,
            request.moving_to,
            request.prompt_tokens,
            request.max_tokens,
            request.priority,
            request.ttft_ms,
            request.num_moves,
            request.num_replacements,
            None if over else self.to_unix_ms + now_ms - request.age_ms,
            request.age_ms if over else None,
            request.error[:TEXT_MAX],
        )

    def _moves(self, snapshot: StatusSnapshot) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for move in snapshot.moves:
            key = f"{move.request_id}/{move.at_ms}"
            rows[key] = (
                key,
                move.request_id,
                move.source,
                move.target,
                move.reason.value,
                move.why[:TEXT_MAX],
                move.outcome.value,
                move.error[:TEXT_MAX],
                move.rounds,
                move.blocks_moved,
                move.blocks_reused,
                move.bytes_moved,
                move.precopy_ms,
                move.fence_ms,
                move.pause_ms,
                self.to_unix_ms + move.at_ms,
                self.router,
            )
        return rows

    def _move_elsewhere(self, move: pb.MoveStatus, router: str) -> Row:
        source = str(getattr(move, "from"))
        known = self._began.setdefault((router, move.request, source, move.to), [])
        same = [at_ms for at_ms in known if abs(at_ms - move.at_ms) < SAME_MOVE_MS]
        if not same:
            known.append(move.at_ms)
        at_ms = same[0] if same else move.at_ms
        return (
            f"{move.request}/{router}/{at_ms}",
            move.request,
            source,
            move.to,
            move.reason,
            move.why[:TEXT_MAX],
            move.outcome,
            move.error[:TEXT_MAX],
            move.rounds,
            move.blocks,
            move.blocks_reused,
            move.bytes,
            move.precopy_ms,
            move.fence_ms,
            move.pause_ms,
            at_ms,
            router,
        )

    def _forget(self, moves: Collection[str]) -> None:
        """What no router tells of any more."""
        for (router, request, source, target), known in list(self._began.items()):
            left = [at_ms for at_ms in known if f"{request}/{router}/{at_ms}" in moves]
            if left:
                self._began[router, request, source, target] = left
            else:
                del self._began[router, request, source, target]


def _workers(seen: Iterable[WorkerSnapshot], members: Iterable[Member]) -> dict[str, Row]:
    loads = {(each.worker_id, each.incarnation): each for each in seen if each.state != WorkerState.DEAD.value}
    rows: dict[str, Row] = {}
    for member in sorted(members, key=lambda each: each.info.worker_id):
        info = member.info
        worker = loads.get((info.worker_id, member.incarnation))
        load = None if worker is None else worker.load
        blocks = BlockCounts(total=info.total_blocks, free=info.total_blocks) if load is None else load.blocks
        rows[str(info.worker_id)] = (
            info.worker_id,
            info.role.value,
            member.state.value,
            member.incarnation,
            info.exact,
            0 if load is None else load.running,
            0 if load is None else load.waiting,
            0 if load is None else load.prefill_backlog_tokens,
            None if load is None else round(load.last_step_ms, 1),
            blocks.total,
            blocks.free,
            blocks.cached,
            blocks.owned,
            blocks.exported,
            blocks.granted,
            blocks.quarantined,
            0 if load is None else load.swap.used,
            0 if load is None else load.swap.total,
            0 if load is None else len(load.audit),
            member.reason[:TEXT_MAX],
        )
    return rows


def _request_elsewhere(request: pb.RequestStatus, router: str) -> Row:
    return (
        request.id,
        router,
        request.state,
        request.mode,
        request.prefill_worker,
        request.decode_worker,
        request.moving_to,
        request.prompt_tokens,
        None,
        request.priority,
        request.ttft_ms if request.HasField("ttft_ms") else None,
        request.num_moves,
        request.num_replacements,
        None,
        None,
        request.error[:TEXT_MAX],
    )


def _newest(rows: Iterable[Row]) -> dict[str, Row]:
    """All moves under way, and the newest of those that are over, oldest first."""
    outcome, at_ms = MOVE_FIELDS.index("outcome"), MOVE_FIELDS.index("at_ms")

    def began(row: Row) -> int:
        value = row[at_ms]
        assert isinstance(value, int), row
        return value

    ordered = sorted(rows, key=began)
    over = [row for row in ordered if row[outcome] != MoveOutcome.MOVING.value]
    dropped = {row[0] for row in over[:-MOVES_MAX]}
    return {str(row[0]): row for row in ordered if row[0] not in dropped}
