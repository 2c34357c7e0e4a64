"""A router core with its actions collected, and the workers' side spoken by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from router.config import RouterConfig
from router.core import RouterCore
from router.events import (
    Action,
    Deliver,
    Event,
    Fail,
    Finish,
    LinkUp,
    MoveEnded,
    MoveRefused,
    MoveRequested,
    NewRequest,
    ReportArrived,
    SendToWorker,
    Submitted,
    WorkerJoined,
)
from router.move import MoveReason, MoveRecord
from router.request import RequestSnapshot, RequestState
from tandem.errors import TandemError
from tandem.messages import (
    Assign,
    CommitAsk,
    MoveFailed,
    OwnerIs,
    OwnerQuery,
    Role,
    WorkerInfo,
    WorkerReport,
)
from tandem.request import FinishReason, RequestId, Sampling, Token, TransferId, WorkerId

R = RequestId("r")
P, D, D2 = WorkerId("p0"), WorkerId("d0"), WorkerId("d1")
PROMPT = tuple(range(40))


def info(worker_id: str, role: Role, total_blocks: int = 100) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(worker_id),
        role=role,
        control=f"{worker_id}:1",
        endpoint=f"agent-{worker_id}",
        pid=1,
        agent_pid=2,
        model="m",
        namespace="n",
        fingerprint="f",
        exact=True,
        dtype="float32",
        block_size=16,
        total_blocks=total_blocks,
        context_tokens=4096,
        block_bytes=1000,
    )


def request(
    request_id: str = "r",
    tokens: tuple[int, ...] = PROMPT,
    max_tokens: int = 8,
    deadline_ms: int = 0,
    priority: int = 0,
) -> NewRequest:
    return NewRequest(
        request_id=RequestId(request_id),
        tokens=tokens,
        sampling=Sampling(max_tokens=max_tokens),
        deadline_ms=deadline_ms,
        priority=priority,
    )


class Rig:
    """A core with its actions collected, and the workers' side spoken by hand."""

    def __init__(self, config: RouterConfig | None = None) -> None:
        self.core = RouterCore(config or RouterConfig())
        self.now_ms = 1_000
        self.actions: list[Action] = []
        self.sequence = 0

    def feed(self, event: Event, after_ms: int = 0) -> list[Action]:
        self.now_ms += after_ms
        actions = self.core.handle(self.now_ms, event)
        self.actions += actions
        return actions

    def up(self, worker_id: str, role: Role, incarnation: int = 1, total_blocks: int = 100, **differs: Any) -> None:
        told = replace(info(worker_id, role, total_blocks), **differs)
        self.feed(WorkerJoined(info=told, incarnation=incarnation))
        self.feed(LinkUp(worker_id=WorkerId(worker_id), incarnation=incarnation))

    def report(self, worker_id: WorkerId, incarnation: int = 1, **pieces: Any) -> list[Action]:
        self.sequence += 1
        report = WorkerReport(worker_id=worker_id, incarnation=incarnation, sequence=self.sequence, **pieces)
        return self.feed(ReportArrived(report=report))

    def token(self, worker: WorkerId, epoch: int, index: int, finish: FinishReason | None = None) -> list[Action]:
        return self.report(worker, tokens=(token(epoch, index, finish),))

    def commit(self, worker: WorkerId, epoch: int, next_index: int, carried: tuple[Token, ...] = ()) -> list[Action]:
        ask = CommitAsk(
            request_id=R,
            transfer_id=self.assigns()[-1].transfer_id,
            from_epoch=epoch,
            next_index=next_index,
            tokens=carried,
        )
        return self.report(worker, commit_asks=(ask,))

    def assigns(self) -> list[Assign]:
        return [
            each.message for each in self.actions if isinstance(each, SendToWorker) and isinstance(each.message, Assign)
        ]

    def sent(self, kind: type, actions: list[Action] | None = None) -> list[tuple[WorkerId, Any]]:
        actions = self.actions if actions is None else actions
        return [
            (each.worker_id, each.message)
            for each in actions
            if isinstance(each, SendToWorker) and isinstance(each.message, kind)
        ]

    def delivered(self) -> list[int]:
        return [token.index for each in self.actions if isinstance(each, Deliver) for token in each.tokens]

    def ends(self) -> list[Finish | Fail]:
        return [each for each in self.actions if isinstance(each, Finish | Fail)]

    def state(self) -> RequestState:
        return self.core.status(self.now_ms).requests[-1].state

    def error(self) -> Exception:
        (end,) = self.ends()
        assert isinstance(end, Fail)
        return end.error


def token(epoch: int, index: int, finish: FinishReason | None = None, token_id: int | None = None) -> Token:
    return Token(
        request_id=R, epoch=epoch, index=index, token_id=100 + index if token_id is None else token_id, finish=finish
    )


D3 = WorkerId("d2")
MOVE = TransferId("r.2.m1")


class MoveRig(Rig):
    """A rig whose request decodes on d0 at epoch 2, with tokens 0 and 1 delivered; d1 could take it."""

    def __init__(self, config: RouterConfig | None = None, **d1: Any) -> None:
        super().__init__(config)
        self.up("p0", Role.PREFILL)
        self.up("d0", Role.DECODE)
        self.feed(Submitted(request=request(max_tokens=400)))
        self.commit(D, 1, 1, (token(1, 0),))
        self.token(D, 2, 1)
        self.up("d1", Role.DECODE, **d1)
        self.actions.clear()
        self.ticket = 0

    def move(
        self, to: WorkerId | None = D2, reason: MoveReason = MoveReason.OPERATOR, request_id: RequestId = R
    ) -> list[Action]:
        self.ticket += 1
        event = MoveRequested(request_id=request_id, to=to, reason=reason, why="because", ticket=self.ticket)
        return self.feed(event)

    def moved(self, transfer_id: TransferId = MOVE, next_index: int = 2, **other: Any) -> list[Action]:
        """The target asks for the commit."""
        worker, epoch, tokens = other.get("worker", D2), other.get("epoch", 2), other.get("tokens", ())
        ask = CommitAsk(request_id=R, transfer_id=transfer_id, from_epoch=epoch, next_index=next_index, tokens=tokens)
        return self.report(worker, commit_asks=(ask,))

    def asked(self, transfer_id: TransferId = MOVE, worker: WorkerId = D, revoke: bool = False) -> OwnerIs:
        query = OwnerQuery(request_id=R, transfer_id=transfer_id, epoch=2, revoke=revoke)
        ((to, answer),) = self.sent(OwnerIs, self.report(worker, owner_queries=(query,)))
        assert to == worker
        assert isinstance(answer, OwnerIs)
        return answer

    def failed(self, transfer_id: TransferId = MOVE) -> list[Action]:
        """The source gives the move up."""
        failed = MoveFailed(request_id=R, transfer_id=transfer_id, epoch=2, code="slow", message="does not converge")
        return self.report(D, moves_failed=(failed,))

    def records(self) -> list[MoveRecord]:
        """Of the moves that ended; each has ended once."""
        ended = [each for each in self.actions if isinstance(each, MoveEnded)]
        assert len({each.ticket for each in ended}) == len(ended)
        return [each.record for each in ended]

    def shown(self) -> RequestSnapshot:
        return self.core.status(self.now_ms).requests[-1]

    def refusal(self, actions: list[Action]) -> TandemError:
        (refused,) = actions
        assert isinstance(refused, MoveRefused)
        assert (refused.request_id, refused.ticket) == (R, self.ticket)
        return refused.error

    def at_rest(self) -> bool:
        """Whether no worker is charged with anything."""
        return all(
            not (each.reserved or each.arriving or each.dispatches or each.num_reserved_blocks)
            and each.num_arriving_blocks == 0
            for each in self.core.fleet
        )
