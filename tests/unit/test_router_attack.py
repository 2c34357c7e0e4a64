"""The router's core against workers that lie, double, delay and reorder: every promise of it holds all the same."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from router_rig import info

from router.config import RouterConfig
from router.core import RouterCore
from router.events import (
    ClientGone,
    Deliver,
    Event,
    Fail,
    Finish,
    LinkLost,
    LinkUp,
    MoveEnded,
    MoveRefused,
    MoveRequested,
    NewRequest,
    ReportArrived,
    SendToWorker,
    StopRequested,
    Submitted,
    Tick,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerSuspected,
)
from router.move import MoveOutcome, MoveReason
from router.request import RequestState
from tandem.messages import (
    Assign,
    CommitAsk,
    Migrate,
    MoveFailed,
    OwnerIs,
    OwnerQuery,
    RequestFailed,
    Role,
    StopMove,
    TransferStats,
    WorkerReport,
)
from tandem.request import FinishReason, RequestId, Sampling, Token, TransferId, WorkerId

WORKERS = {"p0": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE, "d2": Role.DECODE, "m0": Role.MIXED}
NUM_STEPS = 400
MAX_TOKENS = 12
NUM_SEEDS = 150


class Attack:
    """One run over a core. What the core says is held against what it said before."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        config = RouterConfig(replacements_max=6, request_deadline_ms=60_000, decode_stall_ms=8_000, move_dwell_ms=500)
        self.core = RouterCore(config)
        self.now_ms = 0
        self.incarnations = dict.fromkeys(WORKERS, 0)
        self.answers: dict[RequestId, list[int]] = {}
        self.ends: Counter[RequestId] = Counter()
        self.tickets: Counter[int] = Counter()
        self.num_asked = 0
        self.outcomes: Counter[str] = Counter()
        self.assigned: list[tuple[WorkerId, int, Assign]] = []  # to whom, of which incarnation
        self.migrates: list[tuple[WorkerId, int, Migrate]] = []
        self.owners: dict[tuple[RequestId, int], tuple[WorkerId, int]] = {}
        self.committed: set[TransferId] = set()
        self.over: set[TransferId] = set()
        self.pool: list[WorkerReport] = []  # said, and not heard yet, or to be heard again
        for name in WORKERS:
            self.join(name)

    # ---- what the core does ----------------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        for action in self.core.handle(self.now_ms, event):
            match action:
                case Deliver(request_id=request_id, tokens=tokens):
                    assert not self.ends[request_id], "a token after the end"
                    for token in tokens:
                        assert token.index == len(self.answers[request_id]), f"{token} in {self.answers[request_id]}"
                        assert token.token_id == token.index * 7
                        self.answers[request_id].append(token.token_id)
                case Finish(request_id=request_id) | Fail(request_id=request_id):
                    self.ends[request_id] += 1
                    assert self.ends[request_id] == 1
                case MoveRefused(ticket=ticket):
                    self.tickets[ticket] += 1
                    self.outcomes["refused"] += 1
                case MoveEnded(ticket=ticket, record=record):
                    self.tickets[ticket] += 1
                    self.outcomes[record.outcome] += 1
                    assert record.outcome is not MoveOutcome.MOVING
                    assert bool(record.error) == (record.outcome is not MoveOutcome.MOVED)
                case SendToWorker():
                    self.said(action)
        self.check()

    def said(self, action: SendToWorker) -> None:
        match action.message:
            case Assign() as assign:
                self.assigned.append((action.worker_id, action.incarnation, assign))
            case Migrate() as migrate:
                self.migrates.append((action.worker_id, action.incarnation, migrate))
            case StopMove(transfer_id=transfer_id):
                assert transfer_id not in self.committed
                self.over.add(transfer_id)
            case OwnerIs() as owner:
                self.owner_told(owner)

    def owner_told(self, owner: OwnerIs) -> None:
        """One owner an epoch; and what was said to be over is never committed after that."""
        if owner.worker_id is not None:
            who = owner.worker_id, owner.incarnation
            assert self.owners.setdefault((owner.request_id, owner.epoch), who) == who
        if owner.over:
            self.over.add(owner.transfer_id)
        elif owner.worker_id is not None and not owner.refused and self.is_target(owner):
            assert owner.transfer_id not in self.over, f"{owner} after it was over"
            self.committed.add(owner.transfer_id)

    def is_target(self, owner: OwnerIs) -> bool:
        return any(
            (worker, incarnation, told.transfer_id, told.epoch + 1)
            == (owner.worker_id, owner.incarnation, owner.transfer_id, owner.epoch)
            for worker, incarnation, told in self.assigned
        )

    def check(self) -> None:
        """Requests and accounts agree at all times."""
        held: set[tuple[WorkerId, RequestId]] = set()
        for request in self.core._requests.values():
            held |= {(each.worker_id, request.request_id) for each in request.involved}
            assert request.move is None or request.state in (RequestState.DECODING, RequestState.ORPHANED)
            assert request.move is None or request.landing is None
            assert (request.owner is None) == (request.state is RequestState.ADMITTED)
        for worker in self.core.fleet:
            for request_id in (*worker.reserved, *worker.dispatches):
                assert (worker.worker_id, request_id) in held, f"{request_id} is still charged to {worker.worker_id}"
            assert worker.num_reserved_blocks == sum(worker.reserved.values())
            assert worker.num_arriving_blocks == sum(worker.arriving.values())
            assert set(worker.arriving) <= set(worker.reserved)

    # ---- what the world does ---------------------------------------------------------------------------------------

    def join(self, name: str) -> None:
        self.incarnations[name] += 1
        self.feed(WorkerJoined(info=info(name, WORKERS[name]), incarnation=self.incarnations[name]))
        self.feed(LinkUp(worker_id=WorkerId(name), incarnation=self.incarnations[name]))

    def say(self, worker: WorkerId, incarnation: int, **pieces: Any) -> None:
        report = WorkerReport(worker_id=worker, incarnation=incarnation, sequence=1, **pieces)
        self.pool.append(report)
        if self.random.random() < 0.8:  # in order; the others wait, and may be overtaken
            self.hear(len(self.pool) - 1)

    def hear(self, at: int) -> None:
        report = self.pool[at]
        if self.random.random() < 0.7:
            del self.pool[at]  # else it will be heard again
        self.feed(ReportArrived(report=report))

    def step(self) -> None:
        self.now_ms += self.random.choice((0, 1, 5, 20, 150))
        moves = (
            *(self.submit,) * 2, *(self.token,) * 10, *(self.commit,) * 5, *(self.ask_move,) * 4,
            self.give_up, self.give_move_up, self.query, self.stats, self.fault, self.leave,
            self.late, self.late, self.tick,
        )  # fmt: skip
        self.random.choice(moves)()
        del self.pool[:-200]

    def submit(self) -> None:
        if self.core.num_requests < 6:
            name = RequestId(f"r{len(self.answers)}")
            self.answers[name] = []
            sampling = Sampling(max_tokens=MAX_TOKENS)
            self.feed(Submitted(request=NewRequest(request_id=name, tokens=tuple(range(40)), sampling=sampling)))

    def told(self) -> tuple[WorkerId, int, Assign] | None:
        """One of the newest assignments, as a rule of a request that lives."""
        return self.random.choice(self.assigned[-12:]) if self.assigned else None

    def token(self) -> None:
        """The owner writes on, or anybody writes anything under an epoch that it was told."""
        found = self.told()
        if found is None:
            return
        worker, incarnation, assign = found
        request = self.core._requests.get(assign.request_id)
        epoch, index = assign.epoch + self.random.choice((0, 0, 1)), len(self.answers[assign.request_id])
        if request is not None and request.owner is not None and self.random.random() < 0.8:
            worker, incarnation, epoch = request.owner.worker_id, request.owner.incarnation, request.owner.epoch
        elif self.random.random() < 0.1:
            index = max(0, index + self.random.choice((-1, 1)))
        self.say(worker, incarnation, tokens=(self.made(assign.request_id, epoch, index),))

    def made(self, request_id: RequestId, epoch: int, index: int) -> Token:
        finish = FinishReason.LENGTH if index + 1 >= MAX_TOKENS else None
        return Token(request_id=request_id, epoch=epoch, index=index, token_id=index * 7, finish=finish)

    def commit(self) -> None:
        found = self.told()
        if found is None or not found[2].transfer_id:
            return
        worker, incarnation, assign = found
        first = len(assign.tokens) - assign.num_prompt_tokens
        known = max(first, len(self.answers[assign.request_id]))
        num = self.random.choice((0, 0, 0, 1, 2)) or (1 if known == 0 else 0)
        tokens = tuple(self.made(assign.request_id, assign.epoch, index) for index in range(first, known + num))
        wrong = self.random.random() < 0.05
        ask = CommitAsk(
            request_id=assign.request_id,
            transfer_id=assign.transfer_id,
            from_epoch=assign.epoch,
            next_index=known + num + wrong,
            tokens=tokens,
        )
        self.say(worker, incarnation, commit_asks=(ask,))

    def ask_move(self) -> None:
        self.num_asked += 1
        name = RequestId(f"r{max(0, len(self.answers) - 1 - self.random.randrange(6))}")
        event = MoveRequested(
            request_id=name,
            to=self.random.choice((None, *(WorkerId(each) for each in WORKERS))),
            reason=self.random.choice(list(MoveReason)),
            why="",
            ticket=self.num_asked,
        )
        self.feed(event)

    def give_up(self) -> None:
        found = self.told()
        if found is not None and self.random.random() < 0.3:
            worker, incarnation, assign = found
            epoch = assign.epoch + self.random.choice((0, 1))
            failed = RequestFailed(request_id=assign.request_id, epoch=epoch, code="x", message="y", retryable=True)
            self.say(worker, incarnation, failed=(failed,))

    def give_move_up(self) -> None:
        if self.migrates:
            worker, incarnation, migrate = self.random.choice(self.migrates[-6:])
            failed = MoveFailed(
                request_id=migrate.request_id,
                transfer_id=migrate.transfer_id,
                epoch=migrate.epoch,
                code="x",
                message="y",
            )
            self.say(worker, incarnation, moves_failed=(failed,))

    def query(self) -> None:
        heard: list[tuple[WorkerId, int, Assign | Migrate]] = [*self.migrates[-6:], *self.assigned[-6:]]
        if heard:
            worker, incarnation, told = self.random.choice(heard)
            query = OwnerQuery(
                request_id=told.request_id,
                transfer_id=told.transfer_id,
                epoch=told.epoch,
                revoke=self.random.random() < 0.5,
            )
            self.say(worker, incarnation, owner_queries=(query,))

    def stats(self) -> None:
        found = self.told()
        if found is not None:
            worker, incarnation, assign = found
            stats = TransferStats(
                request_id=assign.request_id, transfer_id=assign.transfer_id, rounds=1, blocks_moved=3
            )
            self.say(worker, incarnation, transfers=(stats,))

    def fault(self) -> None:
        name = self.random.choice(list(WORKERS))
        key: dict[str, Any] = {"worker_id": WorkerId(name), "incarnation": self.incarnations[name]}
        match self.random.randrange(9):
            case 0:
                self.feed(WorkerLost(**key, reason="killed"))
            case 1 | 2:
                self.feed(LinkLost(**key, reason="cut"))
            case 3:
                self.feed(WorkerDraining(**key, draining=self.random.random() < 0.5))
            case 4:
                self.feed(WorkerSuspected(**key, suspected=self.random.random() < 0.3))
            case 5:
                self.join(name)
            case _:
                self.feed(LinkUp(**key))
        for other, incarnation in self.incarnations.items():  # nobody is gone for long
            if self.core.fleet.current(WorkerId(other)) is None and self.random.random() < 0.5:
                self.join(other)
            elif self.random.random() < 0.3:
                self.feed(WorkerDraining(worker_id=WorkerId(other), incarnation=incarnation, draining=False))

    def leave(self) -> None:
        name = RequestId(f"r{self.random.randrange(len(self.answers) + 1)}")
        if self.random.random() < 0.2:
            self.feed(ClientGone(request_id=name, reason="hung up"))
        elif self.random.random() < 0.1 and name in self.answers:
            self.feed(StopRequested(request_id=name, index=self.random.randrange(MAX_TOKENS)))

    def late(self) -> None:
        if self.pool:
            self.hear(self.random.randrange(len(self.pool)))

    def tick(self) -> None:
        self.feed(Tick())

    def reckon(self) -> None:
        """Nothing is heard any more: every request has its deadline, every move its end."""
        for _ in range(200):
            self.now_ms += 500
            self.feed(Tick())
        for name in self.answers:
            assert self.ends[name] == 1, f"{name} ended {self.ends[name]} times"
        assert self.tickets == Counter(range(1, self.num_asked + 1))
        assert not any(each.reserved or each.dispatches or each.arriving for each in self.core.fleet)
        assert all(each.num_reserved_blocks == each.num_arriving_blocks == 0 for each in self.core.fleet)
        status = self.core.status(self.now_ms)
        assert not any(each.outcome is MoveOutcome.MOVING for each in status.moves)
        assert (status.queued_tokens, status.waiting, self.core.num_requests) == (0, 0, 0)


def run(seed: int) -> Attack:
    attack = Attack(seed)
    for _ in range(NUM_STEPS):
        attack.step()
    attack.reckon()
    return attack


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, 10))
def test_no_seed_breaks_a_promise(first: int) -> None:
    for seed in range(first, first + 10):
        try:
            run(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_the_attack_reaches_what_it_is_for() -> None:
    """Moves end in every way, and requests finish beside them."""
    outcomes: Counter[str] = Counter()
    num_tokens = 0
    for seed in range(20):
        attack = run(seed)
        outcomes += attack.outcomes
        num_tokens += sum(len(each) for each in attack.answers.values())
    assert set(outcomes) == {"refused", MoveOutcome.MOVED, MoveOutcome.FAILED, MoveOutcome.ENDED}
    assert min(outcomes.values()) >= 20, outcomes
    assert num_tokens > 1_000
