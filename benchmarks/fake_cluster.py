"""A made-up cluster of any size behind the real dashboard: its requests come, move and end by a seeded plan.

What it makes are the router's own snapshots, so that everything from there on is what production runs.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from cluster.admin import move_status, request_status
from cluster.config import load
from cluster.dashboard import OPEN_PAGES, Dashboard
from cluster.dashboard_feed import Feed
from cluster.dashboard_frames import Task
from cluster.dashboard_tasks import Tasks
from cluster.dashboard_view import View, Viewer
from cluster.documents import plain, record_document
from cluster.flight_record import flight_record
from cluster.membership import Member, MemberState
from cluster.served_model import describe
from router.api_keys import KeyRing
from router.door import Door
from router.driver import Driver
from router.flight import Flight
from router.http_server import serve_http
from router.listener import listen
from router.metrics import EdgeMetrics
from router.move import MoveOutcome, MoveReason, MoveRecord
from router.openai_api import build_app
from router.placement import Candidate, Part, Placement
from router.recent import Recent
from router.request import PlacementRecord, RequestSnapshot, RequestState, StatusSnapshot, Transferred, WorkerSnapshot
from router.service import ServedModel, Service
from router.stages import FirstToken, Stage
from tandem.errors import DrainRefused, MoveImpossible, UnknownRequest
from tandem.messages import AssignMode, BlockCounts, Role, WorkerAddress, WorkerInfo, WorkerLoad
from tandem.request import RequestId, WorkerId

BLOCKS = 2048
BLOCK_TOKENS = 16
TOKENS_EACH_S = 24.0  # of each request that decodes
PREFILL_S = 0.4
ENDED_KEPT = 300
MOVE_S = 0.3
REASONS = tuple(MoveReason)


@dataclass(slots=True)
class _Live:
    """A request under way. `ready_s`: when its first token comes; `move` the record of one under way."""

    snapshot: RequestSnapshot
    began_s: float
    ready_s: float
    tokens: float = 0.0
    move: MoveRecord | None = None
    move_until_s: float = 0.0


@dataclass
class FakeCluster:
    """`num_workers`, a quarter of which prefill, with `num_requests` at any time; `moves_each_s` of them move."""

    num_workers: int
    num_requests: int
    moves_each_s: float = 4.0
    seed: int = 1
    router: str = "router-0"
    not_ready: str = ""
    recent: Recent = field(default_factory=Recent)
    began: Tasks = field(default_factory=Tasks)
    acted: list[tuple[object, ...]] = field(default_factory=list)
    members: dict[str, Member] = field(default_factory=dict)
    _live: dict[str, _Live] = field(default_factory=dict)
    _ended: list[RequestSnapshot] = field(default_factory=list)
    _moves: list[MoveRecord] = field(default_factory=list)
    _now_s: float = 0.0
    _next: int = 0
    _moves_due: float = 0.0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        num_prefill = max(1, self.num_workers // 4)
        for number in range(self.num_workers):
            role = Role.PREFILL if number < num_prefill else Role.DECODE
            name = f"{role.value}-{number if number < num_prefill else number - num_prefill}"
            self.members[name] = _member(name, role)
        self._by_role = {role: [n for n, m in self.members.items() if m.info.role is role] for role in Role}
        now_ms = time.time_ns() // 1_000_000
        self._viewer = Viewer(router=self.router, model="fake", since_ms=now_ms, to_unix_ms=now_ms)
        self._began_s = time.monotonic()
        while len(self._live) < self.num_requests:
            live = self._arrive()
            live.ready_s = 0.0
            live.tokens = self._random.uniform(1, live.snapshot.max_tokens)

    # ---- what happens ----------------------------------------------------------------------------------------------

    def _arrive(self) -> _Live:
        rng, number = self._random, self._next
        self._next += 1
        source, target = rng.choice(self._by_role[Role.PREFILL]), rng.choice(self._by_role[Role.DECODE])
        prompt = rng.randrange(20, 2000)
        snapshot = RequestSnapshot(
            request_id=RequestId(f"chatcmpl-{rng.getrandbits(96):024x}{number:06x}"),
            state=RequestState.PREFILLING,
            mode=AssignMode.PREFILL.value,
            prefill_worker=source,
            decode_worker=target,
            epoch=number,
            prompt_tokens=prompt,
            tokens=0,
            max_tokens=rng.randrange(200, 1200),
            priority=rng.choice((0, 0, 0, 0, 1)),
            num_moves=0,
            moving_to="",
            transferred=Transferred(),
            num_replacements=0,
            ttft_ms=None,
            age_ms=0,
            error="",
            reason="prefill: wait 0 ms",
            placements=(),
            story=((0, "admitted"),),
        )
        live = _Live(snapshot, self._now_s, self._now_s + PREFILL_S * rng.uniform(0.5, 2.0))
        self._live[snapshot.request_id] = live
        return live

    def advance(self, now_s: float) -> None:
        """Lets it go on until then."""
        passed_s, self._now_s = now_s - self._now_s, now_s
        tokens = 0
        for live in list(self._live.values()):
            tokens += self._go_on(live, passed_s)
        self.recent.tokens(tokens)
        while len(self._live) < self.num_requests:
            self._arrive()
        self._moves_due += passed_s * self.moves_each_s
        while self._moves_due >= 1:
            self._moves_due -= 1
            live = self._random.choice(list(self._live.values()))
            if live.move is None and live.snapshot.state is RequestState.DECODING:
                self._begin_move(live, self._random.choice(REASONS))
        del self._moves[:-200]
        del self._ended[:-ENDED_KEPT]

    def _go_on(self, live: _Live, passed_s: float) -> int:
        now = live.snapshot
        if now.state is RequestState.PREFILLING:
            if self._now_s >= live.ready_s:
                ttft_ms = round(1000 * (self._now_s - live.began_s))
                live.snapshot = replace(now, state=RequestState.HANDING_OFF, ttft_ms=ttft_ms, tokens=1)
                self.recent.first_token(ttft_ms)
            return 0
        if now.state is RequestState.HANDING_OFF:
            live.snapshot = replace(now, state=RequestState.DECODING)
            return 1
        if live.move is not None and self._now_s >= live.move_until_s:
            self._end_move(live)
            now = live.snapshot
        before, live.tokens = int(live.tokens), live.tokens + passed_s * TOKENS_EACH_S
        if live.tokens >= now.max_tokens and live.move is None:
            took_ms = round(1000 * (self._now_s - live.began_s))
            del self._live[now.request_id]
            self._ended.append(
                replace(now, state=RequestState.FINISHED, tokens=now.max_tokens, moving_to="", age_ms=took_ms)
            )
            self.recent.answered(1000 / TOKENS_EACH_S * self._random.uniform(0.8, 1.5))
            self.recent.ended()
        else:
            tokens = min(int(live.tokens), now.max_tokens)
            age_ms = round(1000 * (self._now_s - live.began_s))
            live.snapshot = replace(now, tokens=tokens, age_ms=age_ms)
        return int(live.tokens) - before

    def _begin_move(self, live: _Live, reason: MoveReason, to: str = "") -> MoveRecord:
        now = live.snapshot
        others = [each for each in self._by_role[Role.DECODE] if each != now.decode_worker]
        target = to or self._random.choice(others)
        record = MoveRecord(
            request_id=now.request_id,
            source=WorkerId(now.decode_worker),
            target=WorkerId(target),
            reason=reason,
            why="steps of 41 and 28 ms: 6.4 s less waiting for 0.3 s of copying",
            outcome=MoveOutcome.MOVING,
            at_ms=round(1000 * self._now_s),
        )
        live.move, live.move_until_s = record, self._now_s + MOVE_S * self._random.uniform(0.5, 4)
        live.snapshot = replace(now, moving_to=target)
        self._moves.append(record)
        return record

    def _end_move(self, live: _Live) -> MoveRecord:
        assert live.move is not None
        fails = self._random.random() < 0.05
        record = replace(
            live.move,
            outcome=MoveOutcome.FAILED if fails else MoveOutcome.MOVED,
            error="the target refused: no room" if fails else "",
            rounds=2,
            blocks_moved=40,
            bytes_moved=29_500_000,
            precopy_ms=210,
            fence_ms=18,
            pause_ms=0 if fails else 46,
        )
        self._moves[self._moves.index(live.move)] = record
        self.recent.moved(record.reason.value, carried_out=not fails)
        now = live.snapshot
        home = now.decode_worker if fails else record.target
        live.snapshot = replace(now, moving_to="", decode_worker=home, num_moves=now.num_moves + (not fails))
        live.move = None
        return record

    # ---- what a dashboard asks ---------------------------------------------------------------------------------------

    def snapshot(self) -> StatusSnapshot:
        """As a router's core gives it."""
        workers = {name: [0, 0] for name in self.members}  # requests, blocks
        for live in self._live.values():
            now = live.snapshot
            home = now.decode_worker if now.state is RequestState.DECODING else now.prefill_worker
            workers[home][0] += 1
            workers[home][1] += (now.prompt_tokens + now.tokens) // BLOCK_TOKENS + 1
        return StatusSnapshot(
            now_ms=round(1000 * self._now_s),
            workers=tuple(self._worker(name, *has) for name, has in workers.items()),
            requests=(*self._ended, *(each.snapshot for each in self._live.values())),
            moves=tuple(self._moves),
            queued_tokens=0,
            waiting=0,
        )

    def _worker(self, name: str, num: int, owned: int) -> WorkerSnapshot:
        member = self.members[name]
        owned = min(owned, BLOCKS - 200)
        cached = min(BLOCKS - owned - 60, 300 + member.info.pid % 400)
        exported = min(40, owned // 10) if member.info.role is Role.PREFILL else 0
        granted = 24 if member.info.role is Role.DECODE and num % 3 == 0 else 0
        blocks = BlockCounts(
            total=BLOCKS,
            free=BLOCKS - owned - cached - exported - granted,
            cached=cached,
            owned=owned,
            exported=exported,
            granted=granted,
        )
        step_ms = 20.0 + num * 1.5 + self._random.random()
        load_ = WorkerLoad(
            running=num, waiting=0, blocks=blocks, prefill_backlog_tokens=0, steps=1, last_step_ms=step_ms
        )  # fmt: skip
        return WorkerSnapshot(
            worker_id=member.info.worker_id,
            incarnation=member.incarnation,
            state="ready",
            info=member.info,
            load=load_,
            num_requests=num,
            num_free_blocks=blocks.free,
            num_arriving=0,
            num_arriving_blocks=0,
            cached_hashes=cached,
            reason="",
        )

    def view(self) -> View:
        """The real view of all that."""
        self.advance(time.monotonic() - self._began_s)
        return self._viewer.view(self.snapshot(), self.members.values(), not_ready=self.not_ready, others={})

    async def refresh(self) -> None:
        """There are no other routers."""

    def tasks(self) -> Sequence[Task]:
        """What operators began."""
        return self.began.all()

    async def explain(self, request: str) -> dict[str, object]:
        """A record with everything in it."""
        live = self._live.get(request)
        over = [each for each in self._ended if each.request_id == request]
        if live is None and not over:
            raise UnknownRequest(f"no request of id {request!r} is remembered")
        snapshot = over[-1] if live is None else live.snapshot
        moves = tuple(each for each in self._moves if each.request_id == request)
        story = [*snapshot.story, (2, f"placed on {snapshot.prefill_worker}, {snapshot.decode_worker} at epoch 1")]
        story += [
            (310, "first token"),
            (322, f"{moves[0].source if moves else snapshot.decode_worker} owns it at epoch 2"),
        ]
        began_ms = round(1000 * self._now_s) - snapshot.age_ms
        for move in moves:
            at_ms = max(330, move.at_ms - began_ms)
            story.append((at_ms, f"moves from {move.source} to {move.target} ({move.reason}: {move.why})"))
            if move.outcome is MoveOutcome.MOVED:
                story.append((at_ms + 230, f"{move.target} owns it at epoch 3"))
        if over:
            story.append((max(story[-1][0], snapshot.age_ms), "finished: length"))
        full = replace(snapshot, placements=(self._placement(snapshot),), story=tuple(story))
        flight = Flight(request=full, moves=moves, first=_first(), now_ms=round(1000 * self._now_s), arrived_ms_ago=0.0)
        told = [move_status(each, flight.now_ms) for each in moves]
        return record_document(flight_record(flight, request_status(full, self.router), told))

    def _placement(self, snapshot: RequestSnapshot) -> PlacementRecord:
        candidates = [
            Candidate(
                WorkerId(name), Part.DECODE, 30.0 + 4 * number, (("batch_ms", 28.0), ("copy_ms", 2.0 + 4 * number))
            )
            for number, name in enumerate(dict.fromkeys([snapshot.decode_worker, *self._by_role[Role.DECODE][:3]]))
        ]
        prefill = Candidate(
            WorkerId(snapshot.prefill_worker), Part.PREFILL, 290.0, (("queue_ms", 40.0), ("prefill_ms", 250.0))
        )
        placement = Placement(
            mode=AssignMode.PREFILL,
            prefill_worker=_address(snapshot.prefill_worker),
            decode_worker=_address(snapshot.decode_worker),
            num_cached_tokens=64,
            predicted_ms=300.0,
            prefill_ms=250.0,
            reason="prefill: wait 40 ms, 250 ms for 512 of 576 tokens; decode: a batch of 7, 61 % of its blocks in use",
            candidates=(prefill, *candidates),
        )
        return PlacementRecord(at_ms=2, epoch=1, placement=placement)

    # ---- what its buttons do -----------------------------------------------------------------------------------------

    async def migrate(self, request: str, to: str, by: str) -> dict[str, object]:
        """Moves it at once."""
        self.acted.append(("migrate", request, to, by))
        live = self._live.get(request)
        if live is None or live.snapshot.state is not RequestState.DECODING or live.move is not None:
            raise MoveImpossible(f"{request} is not decoding")
        record = self._begin_move(live, MoveReason.OPERATOR, to)
        live.move_until_s = self._now_s
        return plain(move_status(replace(record, outcome=MoveOutcome.MOVED, pause_ms=46), record.at_ms))

    async def drain(self, worker: str, *, restart: bool, by: str) -> Task:
        """Begins it, and it lasts."""
        self.acted.append(("drain", worker, restart, by))
        return await self.began.begin("drain", worker, by, self._draining(worker))

    async def _draining(self, worker: str) -> AsyncGenerator[str, None]:
        member = self.members.get(worker)
        if member is None:
            raise DrainRefused(f"there is no worker {worker!r}")
        member.state, member.reason = MemberState.DRAINING, "asked by an operator"
        yield "emptying: 3 requests and 120 blocks left"

    async def flip(self, worker: str, role: str, by: str) -> Task:
        """Gives it that role at once."""
        self.acted.append(("flip", worker, role, by))
        member = self.members[worker]
        member.info = replace(member.info, role=Role(role))
        return await self.began.begin("flip", f"{worker} to {role}", by, _said("done"))

    async def scale(self, sizes: Mapping[str, int], by: str) -> Task:
        """Says so."""
        self.acted.append(("scale", dict(sizes), by))
        return await self.began.begin("scale", str(dict(sizes)), by, _said("decode-9 is joining"))

    async def close(self) -> None:
        """Nothing goes on."""
        await self.began.close()


async def _said(what: str) -> AsyncGenerator[str, None]:
    yield what


def _member(name: str, role: Role) -> Member:
    info = WorkerInfo(
        worker_id=WorkerId(name), role=role, control="127.0.0.1:1", endpoint="e", pid=sum(map(ord, name)) * 37,
        agent_pid=2, model="fake", namespace="n", fingerprint="f", exact=True, dtype="float32", block_size=BLOCK_TOKENS,
        total_blocks=BLOCKS, context_tokens=32768, block_bytes=737_280,
    )  # fmt: skip
    return Member(info=info, incarnation=1, state=MemberState.READY, heard_ms=0)


def _address(worker: str) -> WorkerAddress:
    return WorkerAddress(worker_id=WorkerId(worker), incarnation=1, control="c", endpoint="e")


def _first() -> FirstToken:
    took = {
        Stage.EDGE: 3.0,
        Stage.LINE: 1.0,
        Stage.WIRE: 4.0,
        Stage.QUEUE: 40.0,
        Stage.PREFILL: 255.0,
        Stage.DELIVER: 2.0,
    }
    stages = tuple((stage, took.get(stage, 0.0)) for stage in Stage)
    return FirstToken(ttft_ms=sum(ms for _, ms in stages), stages=stages)


@dataclass(slots=True)
class Running:
    """A dashboard that is served."""

    url: str
    board: Dashboard
    door: Door


@asynccontextmanager
async def serve(fake: FakeCluster, ring: KeyRing | None = None, port: int = 0) -> AsyncIterator[Running]:
    """The router's own application with the dashboard, and no workers behind its API."""
    edge = describe(load({"model": "fake"}, {}).config)
    door, metrics = Door(ring), EdgeMetrics(fake.router)
    metrics.recent = fake.recent
    model = ServedModel(id=edge.name, context_tokens=edge.context_tokens, created_s=1)
    async with Driver(account=door) as driver:
        service = Service(driver=driver, tokenizer=edge.tokenizer, model=model, metrics=metrics, door=door)
        board = Dashboard(fake, feed=Feed(fake, fake.recent, door.check_operator), door=door, metrics=metrics)
        app = build_app(service, open_pages=OPEN_PAGES)
        board.add_to(app)
        server = await serve_http(app, listener=listen("127.0.0.1", port), grace_s=1)
        async with _running(board):
            yield Running(f"http://127.0.0.1:{server.port}", board, door)
        await server.stop()
    await fake.close()


@asynccontextmanager
async def _running(board: Dashboard) -> AsyncIterator[None]:
    task = asyncio.create_task(board.feed.run())
    try:
        yield
    finally:
        board.feed.close("the router ends")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
