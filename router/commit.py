"""The judgement of a commit: whether a target that asks for a request may become its owner.

The owner record is compared on (epoch, transfer); then the tokens that the source produced must fit those delivered.
"""

from __future__ import annotations

from router.fleet import Worker
from router.placement import WorkerKey
from router.request import Request
from router.store import OwnerRecord
from tandem.messages import CommitAsk
from tandem.request import Token, TransferId


def is_owner(owner: OwnerRecord | None, worker: Worker, epoch: int) -> bool:
    """Whether this worker incarnation owns the request in this epoch."""
    if owner is None:
        return False
    return (owner.worker_id, owner.incarnation, owner.epoch) == (worker.worker_id, worker.incarnation, epoch)


def is_repeated(owner: OwnerRecord | None, worker: Worker, ask: CommitAsk) -> bool:
    """Whether this very commit was accepted already, and still holds."""
    if owner is None or not owner.committed or owner.transfer_id != ask.transfer_id:
        return False
    return is_owner(owner, worker, ask.from_epoch + 1)


def live_transfer(request: Request) -> tuple[TransferId, WorkerKey] | None:
    """The one transfer of the request that may still be committed, and its target; None when there is none."""
    owner, placement, move = request.owner, request.placement, request.move
    if move is not None:
        return move.transfer_id, move.target.key
    if owner is None or placement is None or owner.committed or not owner.transfer_id:
        return None
    return owner.transfer_id, (placement.decode_worker.worker_id, placement.decode_worker.incarnation)


def is_over(request: Request | None, transfer_id: TransferId) -> bool:
    """Whether no commit of this transfer can be accepted any more; a doubled one of the newest commit can be."""
    if request is None or request.owner is None:
        return True
    if request.owner.committed and request.owner.transfer_id == transfer_id:
        return False
    live = live_transfer(request)
    return live is None or live[0] != transfer_id


def refusal(request: Request, worker: Worker, ask: CommitAsk) -> str:
    """Why the compare-and-swap fails; empty when the owner record is the one that the ask goes on from."""
    owner = request.owner
    if owner is None:
        return "the request is being placed anew"
    if ask.from_epoch != owner.epoch:
        return f"from_epoch is {ask.from_epoch}, the owner record has {owner.epoch}"
    live = live_transfer(request)
    if live is None:
        return f"transfer_id is {ask.transfer_id!r}, and no transfer is under way"
    transfer_id, target = live
    if ask.transfer_id != transfer_id:
        return f"transfer_id is {ask.transfer_id!r}, the transfer under way is {transfer_id!r}"
    if worker.key != target:
        return f"the target is {target[0]} (incarnation {target[1]})"
    return ""


def carried(request: Request, ask: CommitAsk) -> tuple[list[Token], str]:
    """The tokens in the ask that were not delivered yet, and what is wrong with them ("" when all is well).

    Together with what was delivered they must reach exactly to `next_index`, and say the same where they overlap.
    """
    fresh: list[Token] = []
    for token in ask.tokens:
        due = len(request.answer) + len(fresh)
        if token.index > due:
            return [], f"the commit carries token {token.index} where {due} is due"
        if fresh and fresh[-1].finish is not None:
            return [], f"the commit carries token {token.index} after token {fresh[-1].index}, which ends the answer"
        if token.index == due:
            fresh.append(token)
        elif token.index < len(request.answer) and token.token_id != request.answer[token.index].token_id:
            delivered = request.answer[token.index].token_id
            return [], f"token {token.index} is {token.token_id} in the commit, {delivered} was delivered"
    reached = len(request.answer) + len(fresh)
    if reached != ask.next_index:
        return [], f"next_index is {ask.next_index}, and {reached} tokens are known"
    return fresh, ""
