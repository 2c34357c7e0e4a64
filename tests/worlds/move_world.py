"""The small world with migrations: its owner record moves requests about, revokes moves, and hears of their ends."""

from __future__ import annotations

from dataclasses import dataclass

from pair_world import SESSION, VOCAB, Asked, Faults, Worker, World

from cluster.worker_core import WorkerCoreConfig
from engine.fake_runner import expected_tokens
from kv_transfer.actions import FromRouter
from tandem.messages import (
    Assign,
    AssignMode,
    CancelAssigned,
    CommitAsk,
    Migrate,
    MoveFailed,
    OwnerIs,
    OwnerQuery,
    RequestFailed,
    StopMove,
)
from tandem.request import RequestId, Sampling, Token, TransferId, WorkerId


@dataclass(slots=True)
class Move:
    """A move under way, as the router sees it."""

    transfer: TransferId
    epoch: int
    source: str
    target: str


class MoveWorld(World):
    """A world whose router moves requests. `moved` counts commits of moves, `ended` says how the others ended."""

    def __init__(
        self,
        *,
        seed: int = 0,
        names: tuple[str, ...] = ("p0", "d0", "d1"),
        faults: Faults | None = None,
        num_blocks: int = 64,
        config: WorkerCoreConfig | None = None,
    ) -> None:
        super().__init__(seed=seed, names=names, faults=faults, num_blocks=num_blocks, config=config)
        self.moves: dict[RequestId, Move] = {}
        self.moved = 0
        self.ended: list[str] = []
        self.fenced: dict[tuple[RequestId, int], int] = {}  # (request, epoch): tokens when that epoch was handed over
        self.num_moves = 0
        self.move_deadline_ms = 60_000

    # ---- requests ----------------------------------------------------------------------------------------------------

    def request(
        self, name: str, prompt: tuple[int, ...], sampling: Sampling, *, at: str = "d0", local: bool = True
    ) -> Asked:
        """Places a request with these sampling parameters."""
        expected = expected_tokens(prompt, sampling, sampling.max_tokens, VOCAB)
        stops = [
            at for at, each in enumerate(expected) if each in sampling.stop_token_ids and at >= sampling.min_tokens
        ]
        asked = Asked(
            request_id=RequestId(name),
            prompt=prompt,
            sampling=sampling,
            expected=expected[: stops[0] + 1] if stops else expected,
            local=local,
            source="p0",
            target=at,
        )
        self.requests[asked.request_id] = asked
        self.deadline_ms = 60_000
        self.place(asked)
        return asked

    def place(self, asked: Asked) -> None:
        self._drop(asked, "placed again")
        super().place(asked)

    def decodes(self, asked: Asked) -> bool:
        """Whether the owner is past the prefill, as far as the router can know."""
        decodes = asked.local or (asked.owner is not None and asked.owner[0] != asked.source)
        return bool(not asked.end and decodes and asked.delivered)

    def move(self, asked: Asked, to: str) -> Move | None:
        """Asks for a move; None when the router itself would not begin it."""
        if not self.decodes(asked) or asked.owner is None or asked.request_id in self.moves:
            return None
        source = self.workers[asked.owner[0]]
        if source.incarnation != asked.owner[1] or source.name == to:
            return None
        target = self.workers[to]
        self.num_moves += 1
        transfer = TransferId(f"{asked.request_id}.{asked.epoch}.m{self.num_moves}")
        move = Move(transfer, asked.epoch, source.name, to)
        self.moves[asked.request_id] = move
        tokens = (*asked.prompt, *asked.delivered)
        assign = Assign(
            request_id=asked.request_id,
            epoch=asked.epoch,
            mode=AssignMode.DECODE,
            tokens=tokens,
            num_prompt_tokens=len(asked.prompt),
            sampling=asked.sampling,
            transfer_id=transfer,
            peer=source.address,
            deadline_ms=self.move_deadline_ms,
            move=True,
        )
        migrate = Migrate(
            request_id=asked.request_id,
            epoch=asked.epoch,
            transfer_id=transfer,
            peer=target.address,
            num_tokens=len(tokens),
            deadline_ms=self.move_deadline_ms,
            reason="test",
        )
        self.say(to, assign)
        self.say(source.name, migrate)
        return move

    # ---- how moves end -----------------------------------------------------------------------------------------------

    def _drop(self, asked: Asked, reason: str, *, tell_source: bool = False) -> None:
        """The move is dead at the owner record: nobody can commit it any more."""
        move = self.moves.pop(asked.request_id, None)
        if move is None:
            return
        self.ended.append(reason)
        self.say(
            move.target, CancelAssigned(request_id=asked.request_id, epoch=move.epoch, reason=f"no move: {reason}")
        )
        if tell_source:
            stop = StopMove(
                request_id=asked.request_id, epoch=move.epoch, transfer_id=move.transfer, reason=f"no move: {reason}"
            )
            self.say(move.source, stop)

    def _cancel_epoch(self, asked: Asked, reason: str) -> None:
        self._drop(asked, reason)
        for name in self.workers:
            self.say(name, CancelAssigned(request_id=asked.request_id, epoch=asked.epoch, reason=reason))

    def _lost(self, name: str, incarnation: int) -> None:
        for request_id, move in list(self.moves.items()):
            if move.target == name:
                self._drop(self.requests[request_id], "the target died", tell_source=True)
        for asked in self.requests.values():
            owns = asked.owner == (WorkerId(name), incarnation)
            awaited = not asked.local and name in (asked.source, asked.target) and not self.decodes(asked)
            if not asked.end and (owns or awaited):
                self._again(asked, f"{name} died")

    def _reported(self, worker: Worker, piece: object) -> None:
        me = (WorkerId(worker.name), worker.incarnation)
        match piece:
            case MoveFailed():
                move = self.moves.get(piece.request_id)
                if move is not None and move.transfer == piece.transfer_id:
                    self._drop(self.requests[piece.request_id], piece.message)
            case RequestFailed(request_id=request_id, epoch=epoch) if self._is_target(request_id, me, epoch):
                self._drop(self.requests[request_id], piece.message, tell_source=True)
            case Token(request_id=request_id, epoch=epoch, index=index) if (request_id, epoch) in self.fenced:
                told = self.fenced[request_id, epoch]
                assert index < told, f"{me} wrote token {index} after it was fenced at {told}: {self.tail()}"
            case OwnerQuery(revoke=True):
                asked, move = self.requests[piece.request_id], self.moves.get(piece.request_id)
                if move is not None and move.transfer == piece.transfer_id and asked.owner == me:
                    self._drop(asked, "revoked")
                self._answer(worker, asked, piece.transfer_id)
            case _:
                super()._reported(worker, piece)

    def _is_target(self, request_id: RequestId, me: tuple[WorkerId, int], epoch: int) -> bool:
        move = self.moves.get(request_id)
        return move is not None and (move.target, move.epoch) == (me[0], epoch)

    def _deliver(self, asked: Asked, token: Token) -> None:
        assert (token.logprob is None) == (asked.sampling.logprobs is None), f"{token} lost its logprob"
        assert len(token.top) == (asked.sampling.logprobs or 0), f"{token} lost its alternatives"
        super()._deliver(asked, token)

    def _commit(self, worker: Worker, asked: Asked, ask: CommitAsk) -> None:
        move = self.moves.get(asked.request_id)
        if self.hold_commits or move is None or move.transfer != ask.transfer_id:
            super()._commit(worker, asked, ask)
            return
        target, source = (WorkerId(worker.name), worker.incarnation), asked.owner
        assert (asked.epoch, worker.name, bool(asked.end)) == (move.epoch, move.target, False), "a dead move is alive"
        for token in ask.tokens:
            self._deliver(asked, token)
        assert len(asked.delivered) == ask.next_index, f"{ask} leaves a gap: {self.tail()}"
        self.fenced[asked.request_id, asked.epoch] = ask.next_index
        del self.moves[asked.request_id]
        self.moved += 1
        asked.epoch += 1
        asked.owner, asked.transfer = target, ask.transfer_id
        self._answer(worker, asked, ask.transfer_id)
        if source is not None and self.workers[source[0]].incarnation == source[1]:
            self._answer(self.workers[source[0]], asked, ask.transfer_id)

    def _answer(self, worker: Worker, asked: Asked, transfer: TransferId, refused: str = "") -> None:
        move = self.moves.get(asked.request_id)
        ended = asked.end or asked.owner is None
        owner = OwnerIs(
            request_id=asked.request_id,
            transfer_id=transfer,
            epoch=asked.epoch,
            worker_id=None if ended or asked.owner is None else asked.owner[0],
            incarnation=0 if ended or asked.owner is None else asked.owner[1],
            refused=refused,
            over=transfer != (move.transfer if move is not None else asked.transfer),
        )
        if self.workers[worker.name] is worker and not self.hold_commits:
            self.post(worker.name, FromRouter(session=SESSION, message=owner), channel=f"router {worker.name}")

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _run(self, worker: Worker) -> None:
        if worker.plan is not None:
            for row in worker.plan.rows:
                asked = self.requests[row.request_id]
                known = [*asked.prompt, *asked.expected]
                assert row.sampling == asked.sampling
                assert row.num_prompt_tokens == len(asked.prompt), "min_tokens and max_tokens would shift"
                if asked.sampling.repetition_penalty != 1.0 and row.sample:
                    assert list(row.context) == known[: row.position], "the penalties' context is another one"
        super()._run(worker)
