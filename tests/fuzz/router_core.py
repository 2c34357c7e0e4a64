"""The router's decider under reports of workers that keep no rule: each request ends once, its tokens in order.

Reports come as bytes of a message and through its decoder, as from a worker; beside them clients come, stop and leave,
workers join and die. No exception may leave the core: the router would end with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from draws import Draws
from random_messages import fill

from cluster import admin
from router.config import RouterConfig
from router.core import RouterCore
from router.events import (
    Action,
    ClientGone,
    Deliver,
    Event,
    Fail,
    Finish,
    LinkLost,
    LinkUp,
    MoveRequested,
    NewRequest,
    Refuse,
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
from router.move import MoveReason
from tandem import report_wire
from tandem.messages import Assign, Role, WorkerInfo
from tandem.request import RequestId, Sampling, WorkerId
from tandem.v1 import worker_pb2 as pb

WORKERS = (("p0", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE))
MAX_TOKENS = 4
KNOWN: dict[str, list[Any]] = {
    "request_id": ["r0", "r1", "r2"],
    "index": [0, 1, 2, 3],
    "next_index": [0, 1, 2],
    "token_id": [1, 2],
    "finish": ["", "", "length"],
    "code": ["handoff_failed", "invalid_request", "step_failed", "not_finite", "x"],
    "total": [64],
    "free": [0, 32, 64],
}


@dataclass(slots=True)
class _Asked:
    """One request as its client sees it."""

    num_tokens: int = 0
    assigns: list[tuple[str, Assign]] = field(default_factory=list)  # to whom, in order


class RouterWorld:
    """One router, made anew for each input."""

    def __init__(self, data: bytes) -> None:
        self._draws = Draws(data)
        self._core = RouterCore(RouterConfig(queue_wait_ms=5_000, workers_wait_ms=2_000, requests_max=16))
        self._now_ms = 1000
        self._sequence = 0
        self._asked: dict[str, _Asked] = {}
        self._incarnations: dict[str, int] = {}
        self.num_messages = 0

    def run(self) -> int:
        """Plays the input to its end, then lets everything end. How many events there were."""
        for name, role in WORKERS:
            self._join(name, role)
        while self._draws.left:
            self._turn()
        self._now_ms += 2_000_000  # all deadlines, then what is remembered of who has ended
        for _ in range(3):
            self._feed(Tick())
            self._now_ms += 1_000_000
        assert not self._asked, f"never ended: {sorted(self._asked)}"
        return self.num_messages

    def _join(self, name: str, role: Role) -> None:
        incarnation = self._incarnations[name] = self._incarnations.get(name, 0) + 1
        info = WorkerInfo(
            worker_id=WorkerId(name), role=role, control=f"{name}:1", endpoint=f"{name}-agent", pid=1, agent_pid=2,
            model="m", namespace="n", fingerprint="f", exact=True, dtype="float32", block_size=4, total_blocks=64,
            context_tokens=128, block_bytes=64,
        )  # fmt: skip
        self._feed(WorkerJoined(info=info, incarnation=incarnation))
        self._feed(LinkUp(worker_id=WorkerId(name), incarnation=incarnation))

    def _turn(self) -> None:
        draws = self._draws
        self._now_ms += draws.pick((0, 0, 1, 20, 300, 7000))
        kind = draws.below(12)
        name = draws.pick(("r0", "r1", "r2"))
        if kind < 2:
            self._submit(name)
        elif kind < 8:
            self._report(name)
        elif kind == 8:
            gone, stop = ClientGone(request_id=RequestId(name), reason="x"), StopRequested
            self._feed(gone if draws.below(2) else stop(request_id=RequestId(name), index=draws.below(MAX_TOKENS)))
        elif kind == 9:
            self._worker()
        elif kind == 10:
            to = draws.pick((None, WorkerId("d0"), WorkerId("d1"), WorkerId("nobody")))
            move = MoveRequested(request_id=RequestId(name), to=to, reason=MoveReason.OPERATOR, why="w", ticket=1)
            self._feed(move)
        else:
            self._feed(Tick())

    def _submit(self, name: str) -> None:
        draws = self._draws
        new = NewRequest(
            request_id=RequestId(name), tokens=tuple(draws.byte() % 97 for _ in range(1 + draws.below(40))),
            sampling=Sampling(max_tokens=1 + draws.below(MAX_TOKENS)), priority=draws.below(4),
        )  # fmt: skip
        known = self._asked.get(name)
        self._asked[name] = _Asked()
        refused = [each for each in self._feed(Submitted(request=new)) if isinstance(each, Refuse)]
        if refused and known is not None:
            self._asked[name] = known
        elif refused:
            self._asked.pop(name, None)

    def _worker(self) -> None:
        draws = self._draws
        name, role = draws.pick(WORKERS)
        who = {"worker_id": WorkerId(name), "incarnation": self._incarnations[name]}
        match draws.below(6):
            case 0:
                self._feed(WorkerLost(**who, reason="x"))  # type: ignore[arg-type]
                self._join(name, role)
            case 1:
                self._feed(LinkLost(**who, reason="x"))  # type: ignore[arg-type]
            case 2 | 3:
                self._feed(LinkUp(**who))  # type: ignore[arg-type]
            case 4:
                self._feed(WorkerSuspected(**who, suspected=bool(draws.below(2))))  # type: ignore[arg-type]
            case _:
                self._feed(WorkerDraining(**who, draining=bool(draws.below(2))))  # type: ignore[arg-type]

    # ---- reports -----------------------------------------------------------------------------------------------------

    def _report(self, name: str) -> None:
        draws = self._draws
        message = pb.WorkerReport()
        asked = self._asked.get(name)
        worker = draws.pick(WORKERS)[0]
        if asked is not None and asked.assigns and draws.byte() < 224:
            worker, assign = asked.assigns[-1 - draws.below(min(2, len(asked.assigns)))]
            self._fitting(message, asked, assign)
        if draws.chance(64):
            fill(message, draws, KNOWN)
        message.worker_id, message.incarnation = worker, self._incarnations[worker]
        self._sequence += 1
        message.sequence = self._sequence
        try:
            report = report_wire.decode_report(message)
        except ValueError:
            return
        self._feed(ReportArrived(report=report))

    def _fitting(self, message: pb.WorkerReport, asked: _Asked, assign: Assign) -> None:
        """What this worker could well say of what it was assigned."""
        draws = self._draws
        name, transfer = assign.request_id, assign.transfer_id or "x"
        epoch = assign.epoch + draws.pick((0, 0, 0, 1, 1))
        match draws.below(9):
            case 0 | 1 | 2:
                index = asked.num_tokens + draws.pick((0, 0, 0, 0, 1))
                finish = "length" if draws.chance(64) else ""
                message.tokens.add(request_id=name, epoch=epoch, index=index, token_id=index, finish=finish)
            case 3 | 4:
                ask = message.commit_asks.add(request_id=name, transfer_id=transfer, from_epoch=assign.epoch)
                ask.next_index = asked.num_tokens + draws.pick((0, 0, 0, 1, 2))
                if ask.next_index > asked.num_tokens:
                    ask.tokens.add(request_id=name, epoch=assign.epoch, index=asked.num_tokens, token_id=1)
            case 5:
                message.failed.add(
                    request_id=name, epoch=epoch, code=draws.pick(KNOWN["code"]), message="m",
                    retryable=bool(draws.below(2)), transfer_id=draws.pick(("", transfer)),
                )  # fmt: skip
            case 6:
                query = message.owner_queries.add(request_id=name, transfer_id=transfer, epoch=epoch)
                query.revoke = bool(draws.below(2))
            case 7:
                stats = message.transfers.add(request_id=name, transfer_id=transfer)
                fill(stats, draws, {"request_id": [name], "transfer_id": [transfer]})
            case _:
                message.moves_failed.add(request_id=name, transfer_id=transfer, epoch=epoch, code="c", message="m")

    # ---- what follows ------------------------------------------------------------------------------------------------

    def _feed(self, event: Event) -> list[Action]:
        self.num_messages += 1
        actions = self._core.handle(self._now_ms, event)
        for action in actions:
            match action:
                case Deliver(request_id=request_id, tokens=tokens):
                    asked = self._asked[request_id]
                    for token in tokens:
                        assert token.index == asked.num_tokens, f"{token} after {asked.num_tokens} tokens"
                        asked.num_tokens += 1
                case Finish(request_id=request_id) | Fail(request_id=request_id):
                    del self._asked[request_id]  # KeyError: it ended twice
                case SendToWorker(worker_id=worker_id, message=Assign() as assign):
                    if assign.request_id in self._asked:
                        self._asked[assign.request_id].assigns.append((worker_id, assign))
        snapshot = self._core.status(self._now_ms)
        for request in snapshot.requests:
            admin.request_status(request)  # what an operator is shown has a message to fit in
        for move in snapshot.moves:
            admin.move_status(move, snapshot.now_ms)
        return actions


def run(data: bytes) -> int:
    """One input."""
    return RouterWorld(data).run()
