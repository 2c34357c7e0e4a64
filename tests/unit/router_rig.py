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
    NewRequest,
    ReportArrived,
    SendToWorker,
    WorkerJoined,
)
from router.request import RequestState
from tandem.messages import Assign, CommitAsk, Role, WorkerInfo, WorkerReport
from tandem.request import FinishReason, RequestId, Sampling, Token, WorkerId

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
    request_id: str = "r", tokens: tuple[int, ...] = PROMPT, max_tokens: int = 8, deadline_ms: int = 0
) -> NewRequest:
    return NewRequest(
        request_id=RequestId(request_id),
        tokens=tokens,
        sampling=Sampling(max_tokens=max_tokens),
        deadline_ms=deadline_ms,
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
